"""The console command ``inplace``: build, inspect, serve, chat.

Every install has this command. Each subcommand imports what it needs when it runs: ``--help`` is
quick, and a subcommand whose packages are not installed names the extra that brings them.
"""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from inplace import __version__
from inplace.errors import InplaceError
from rich.console import Console
from rich.text import Text

from inplace_builder.choices import (
    Cache,
    Device,
    EngineChoice,
    Mechanism,
    Precision,
    Protocol,
    Weights,
)
from inplace_builder.errors import BuildError

if TYPE_CHECKING:
    from inplace.schema.snapshots import SnapshotOptions

    from inplace_builder.served.options import BuildOptions
    from inplace_builder.tools.front_process import FrontProcess
    from inplace_builder.tools.tritonserver import TritonServer

app = typer.Typer(no_args_is_help=True, add_completion=False)


console = Console()


FOR_MODEL = (
    "build_cache",
    "dtype",
    "weights",
    "cache",
    "capacity",
    "slots",
    "prompt_logprobs",
    "snapshot_store",
    "snapshot_secret_file",
    "snapshot_every",
)
"""Options of `serve` that are for a model which it builds."""

FOR_FRONT_END = ("openai_host", "openai_port", "openai_workers", "keys", "tool_call_parser")
"""Options of `serve` that are for the OpenAI front end."""


SnapshotSecretFile = Annotated[
    Path | None,
    typer.Option(help="File with 32 random bytes or more, the same for all servers of the store."),
]
SnapshotEvery = Annotated[
    int | None,
    typer.Option(
        help="Positions after which a living sequence is stored again; default: only when the "
        "server stops."
    ),
]
WeightsOption = Annotated[
    Weights,
    typer.Option(
        help="fp8: those of linear layers and experts are 8-bit floats with scales, the head's "
        "are not; dequantized: none are; auto: as dequantized."
    ),
]
CacheOption = Annotated[
    Cache,
    typer.Option(
        help="fp8: cached keys and values are 8-bit floats with a scale for each layer and "
        "head, half the bytes of bfloat16; auto: they have the type of --dtype."
    ),
]


def _print_version(requested: bool) -> None:
    if requested:
        console.print(f"inplace {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Models that keep state between requests, updated in place, on Triton Inference Server."""


@app.command()
def build(
    model: Annotated[
        Path,
        typer.Argument(
            help="Folder of a Hugging Face decoder (safetensors, .bin or one GGUF file), of a "
            "speech model (Whisper, Nemotron streaming) or of a LoRA adapter, a GGUF file, or the "
            "id of a model that `hf download` has fetched."
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="Folder to write, in a model repository: model_repository/<name>.")
    ],
    dtype: Annotated[
        Precision, typer.Option(help="Element type of weights and states.")
    ] = "float32",
    weights: WeightsOption = "auto",
    cache: CacheOption = "auto",
    device: Annotated[
        Device | None,
        typer.Option(help="Where it runs; default: cpu for torch, cuda for TensorRT."),
    ] = None,
    engine: Annotated[
        EngineChoice,
        typer.Option(help="What runs it; auto: TensorRT on a GPU where it can, else PyTorch."),
    ] = "auto",
    alias: Annotated[
        Mechanism | None,
        typer.Option(
            help="Require this way of updating states (TensorRT); default: the first possible one."
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse to copy states (TensorRT).")
    ] = False,
    compute_capability: Annotated[
        str | None,
        typer.Option(
            help="Compile for this GPU, for example 8.9, without having it (tensorrt_rtx)."
        ),
    ] = None,
    slots: Annotated[int, typer.Option(help="Sequences that can live at the same time.")] = 8,
    max_batch: Annotated[
        int | None,
        typer.Option(
            help="Maximum number of sequences in one step; default: the slots, at most 8."
        ),
    ] = None,
    capacity: Annotated[int, typer.Option(help="Positions a sequence may hold.")] = 1024,
    min_capacity: Annotated[
        int | None,
        typer.Option(
            help="Smallest capacity that config.pbtxt may set instead; default: it is fixed."
        ),
    ] = None,
    chunk: Annotated[
        int,
        typer.Option(
            help="Maximum number of tokens of one sequence in one step; "
            "a longer prompt takes several."
        ),
    ] = 128,
    step_tokens: Annotated[
        int | None,
        typer.Option(
            help="Maximum number of tokens of all sequences in one step; default: four chunks."
        ),
    ] = None,
    prompt_logprobs: Annotated[
        bool,
        typer.Option(
            "--prompt-logprobs",
            help="Build a second program for requests that ask for log-probabilities of the tokens "
            "that they feed.",
        ),
    ] = False,
    lookahead: Annotated[
        int | None,
        typer.Option(
            help="Frames that a streaming speech model sees ahead; a chunk has one more. Default: "
            "the model's own."
        ),
    ] = None,
    draft: Annotated[
        Path | None,
        typer.Option(
            help="A smaller decoder with the same tokens that drafts them (speculative decoding): "
            "files as of the model. Only with --serve stream."
        ),
    ] = None,
    draft_layers: Annotated[
        int | None,
        typer.Option(help="Draft with the model's own first layers, so many, instead of --draft."),
    ] = None,
    draft_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens that are drafted before the model verifies them; default: 4."),
    ] = None,
    serve: Annotated[
        Protocol,
        typer.Option(
            help="step: unary requests of one step each; "
            "stream: gRPC streams and HTTP generate_stream, whole generations."
        ),
    ] = "step",
    name: Annotated[
        str | None,
        typer.Option(help="The model's name; then --output is the repository it is written into."),
    ] = None,
    idle_timeout: Annotated[
        float,
        typer.Option(help="Seconds after its last response at which a sequence loses its slot."),
    ] = 600.0,
    queue_delay_us: Annotated[
        int,
        typer.Option(help="Microseconds the server may hold back a batch that is not full (step)."),
    ] = 500,
    instances: Annotated[
        int,
        typer.Option(
            help="Processes that serve it, each with an engine and slots of its own; on a GPU: on "
            "each GPU."
        ),
    ] = 1,
    share_engine: Annotated[
        bool,
        typer.Option(help="The instances of a GPU have one engine and its slots in common."),
    ] = False,
    gpus: Annotated[
        str,
        typer.Option(help="GPUs of the server that serve it, for example 0,1: an engine on each."),
    ] = "all",
    snapshot_store: Annotated[
        str | None,
        typer.Option(
            help="URL of a folder, file:///… or s3://…, where servers store sequences, so that "
            "others go on with them; needs --snapshot-secret-file."
        ),
    ] = None,
    snapshot_secret_file: SnapshotSecretFile = None,
    snapshot_every: SnapshotEvery = None,
) -> None:
    """Build a model into a model repository, after verifying it against transformers."""
    with _errors("build", "builder"):
        from inplace.schema.specs import Dtype

        from inplace_builder.served.choose import build_with_best_engine, first_engine
        from inplace_builder.served.model import build_model
        from inplace_builder.served.options import BuildOptions
        from inplace_builder.tools.report import summary_table

        kind = first_engine(device) if engine == "auto" else engine
        build_options = BuildOptions(
            dtype=Dtype(dtype),
            weights=weights,
            cache=cache,
            device=device or ("cpu" if kind == "torch" else "cuda"),
            engine=kind,
            alias=alias,
            strict=strict,
            compute_capability=compute_capability,
            step_tokens=step_tokens,
            prompt_logprobs=prompt_logprobs,
            lookahead=lookahead,
            draft=draft,
            draft_layers=draft_layers,
            draft_tokens=draft_tokens,
            slots=slots,
            max_rows=max_batch if max_batch is not None else min(slots, 8),
            capacity=capacity,
            min_capacity=min_capacity,
            chunk=chunk,
            idle_timeout=idle_timeout,
            queue_delay_microseconds=queue_delay_us,
            instances=instances,
            share_engine=share_engine,
            gpus=_gpu_numbers(gpus),
            serve=serve,
            snapshots=_snapshots(snapshot_store, snapshot_secret_file, snapshot_every),
        )
        target = _model_folder(output, name)
        with _stages() as stage:
            if engine == "auto":
                manifest = build_with_best_engine(
                    model, target, build_options, stage, partial(console.print, soft_wrap=True)
                )
            else:
                manifest = build_model(model, target, build_options, stage)
            stage("done")
        console.print(summary_table(manifest, target))
        console.print(f"written to {target}", soft_wrap=True, highlight=False)


def _model_folder(output: Path, name: str | None) -> Path:
    """The folder of the model: the output, or one of that name in it."""
    if name is None:
        return output
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise BuildError(f"the name is {name!r}; it must be a folder name without a slash")
    return output if output.name == name else output / name


@contextlib.contextmanager
def _stages() -> Iterator[Callable[[str], None]]:
    """Yield a callback that begins a stage and marks the one before it as done."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:

        def finish() -> None:
            for task in progress.task_ids[-1:]:
                progress.update(task, total=1, completed=1)

        def begin(stage: str) -> None:
            finish()
            progress.add_task(stage, total=None)

        yield begin
        finish()


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(help="An engine directory, or a model of a repository.")],
    memory: Annotated[
        float | None, typer.Option(help="Also print how many slots fit into this many GiB.")
    ] = None,
) -> None:
    """Describe an engine directory: programs, states, aliases, memory, limits, what built it."""
    with _errors("inspect", "runtime"):
        from inplace.schema.served import FILE_NAME, Manifest

        from inplace_builder.tools.report import detail_tables

        folder = model if (model / FILE_NAME).is_file() else model / "1"
        for table in detail_tables(Manifest.load(folder), folder, memory):
            console.print(table)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="What `inplace build` takes: built into the cache, if it is not there yet, and "
            "served with the OpenAI front end. Default: serve a model repository."
        ),
    ] = None,
    model_repository: Annotated[
        Path, typer.Option(help="The model repository, without MODEL.")
    ] = Path("model_repository"),
    openai: Annotated[
        bool | None,
        typer.Option(
            help="Start the OpenAI front end beside the server; default: with MODEL.",
            show_default=False,
        ),
    ] = None,
    openai_host: Annotated[
        str, typer.Option(help="Address of the front end; without --keys a loopback address.")
    ] = "127.0.0.1",
    openai_port: Annotated[int, typer.Option(help="Port of the front end.")] = 9000,
    openai_workers: Annotated[
        int, typer.Option(min=1, max=256, help="Processes of the front end.")
    ] = 1,
    keys: Annotated[
        Path | None, typer.Option(help="File of API keys, see `inplace openai-key`.")
    ] = None,
    tool_call_parser: Annotated[
        list[str] | None,
        typer.Option(
            help="How a model calls tools: hermes, llama3_json, mistral or json, of all models, or "
            "MODEL=hermes of one; repeatable; default: as its chat template says."
        ),
    ] = None,
    build_cache: Annotated[
        Path | None,
        typer.Option(help="Folder of built models; default: ~/.cache/inplace/models."),
    ] = None,
    dtype: Annotated[
        Precision | None,
        typer.Option(help="Element type of MODEL; default: float32 on a CPU, bfloat16 on a GPU."),
    ] = None,
    weights: WeightsOption = "auto",
    cache: CacheOption = "auto",
    capacity: Annotated[int, typer.Option(help="Positions that a sequence of MODEL holds.")] = 1024,
    slots: Annotated[int, typer.Option(help="Sequences of MODEL that live at the same time.")] = 8,
    prompt_logprobs: Annotated[
        bool,
        typer.Option(
            "--prompt-logprobs", help="Build MODEL for log-probabilities of prompts (echo)."
        ),
    ] = False,
    snapshot_store: Annotated[
        str | None,
        typer.Option(
            help="URL of a folder, file:///… or s3://…, where sequences of MODEL are stored, "
            "so that they go on in another server; needs --snapshot-secret-file."
        ),
    ] = None,
    snapshot_secret_file: SnapshotSecretFile = None,
    snapshot_every: SnapshotEvery = None,
    gpus: Annotated[
        str | None,
        typer.Option(
            help="GPUs that models run on, an engine on each: all, or numbers such as 0,1; "
            "default: those in config.pbtxt, which are all if it names none."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address that tritonserver listens on.")] = "127.0.0.1",
    grpc_port: Annotated[
        int, typer.Option(help="Port of the gRPC endpoint; 0 chooses a free one.")
    ] = 8001,
    http_port: Annotated[
        int, typer.Option(help="Port of the HTTP endpoint; 0 chooses a free one.")
    ] = 8000,
    metrics_port: Annotated[
        int, typer.Option(help="Port of /metrics; 0 chooses a free one.")
    ] = 8002,
    log_file: Annotated[
        Path | None, typer.Option(help="File for the server's own output; default: the terminal.")
    ] = None,
    trust_models: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder whose TensorRT plans may be loaded, because a plan is code; may be "
            "repeated; default: the model repository."
        ),
    ] = None,
    start_timeout: Annotated[
        float, typer.Option(help="Seconds within which the server must be ready.")
    ] = 300.0,
) -> None:
    """Serve a model, or a model repository, with tritonserver until interrupted.

    Further arguments are passed to tritonserver.
    """
    arguments = list(context.args)
    if model is not None and model.startswith("-"):  # an option of tritonserver
        arguments, model = [model, *arguments], None
    with_front = openai if openai is not None else model is not None
    with _errors("serve", "server"):
        numbers = None
        if gpus is not None:
            from inplace_builder.tools.gpus import checked_gpus

            numbers = checked_gpus(_gpu_numbers(gpus))
    if with_front:
        with _errors("serve", "server"):
            from inplace_builder.tools.front_process import check_plain

            check_plain(arguments)
    with _errors("serve", "builder"):
        snapshots = _snapshots(snapshot_store, snapshot_secret_file, snapshot_every)
        _check_given(context, with_model=model is not None, with_front=with_front)
    if model is not None:
        with _errors("serve", "builder"):
            options = _build_options(dtype, capacity, slots, prompt_logprobs=prompt_logprobs)
            options = replace(options, weights=weights, cache=cache, snapshots=snapshots)
            model_repository = _built(Path(model), build_cache, options)
    with _errors("serve", "server"):
        from inplace.server.trust import TRUST_MODELS

        from inplace_builder.tools.front_process import FrontOptions, FrontProcess
        from inplace_builder.tools.gpus import on_gpus
        from inplace_builder.tools.tritonserver import Ports, TritonServer

        interrupted = _interrupts()
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.suppress(KeyboardInterrupt))
            repository = model_repository
            if numbers is not None:
                repository = stack.enter_context(on_gpus(model_repository, numbers))
                if trust_models is None and TRUST_MODELS not in os.environ:
                    trust_models = [model_repository]
            server = TritonServer(
                repository,
                Ports(grpc=grpc_port, http=http_port, metrics=metrics_port),
                host,
                log=log_file,
                arguments=arguments,
                trust_models=trust_models,
                start_timeout=start_timeout,
            )
            stack.enter_context(server)
            http, metrics = server.ports.http, server.ports.metrics
            console.print(
                f"serving {model_repository}: gRPC {server.grpc_url}, HTTP {host}:{http}, "
                f"metrics {host}:{metrics}",
                soft_wrap=True,
            )
            for name, reason in server.failed_models().items():
                console.print(f"model {name} could not be loaded: {reason}", soft_wrap=True)
            front = None
            if with_front:
                front = FrontProcess(
                    FrontOptions(openai_host, openai_port, keys),
                    server.grpc_url,
                    model_repository,
                    [
                        f"--workers={openai_workers}",
                        *(f"--tool-call-parser={each}" for each in tool_call_parser or ()),
                    ],
                )
                stack.enter_context(front)
                console.print(f"OpenAI's protocol: {front.options.url}/v1", soft_wrap=True)
            _wait(server, front, interrupted)


def _check_given(context: typer.Context, *, with_model: bool, with_front: bool) -> None:
    """Refuse options of `serve` that would be ignored.

    Raises:
        BuildError: one is for MODEL, for a repository or for the front end, and there is none.
    """
    if with_model:
        _refuse(context, ["model_repository"], "MODEL is built into a repository of its own")
    else:
        _refuse(
            context,
            FOR_MODEL,
            "for MODEL, and none was given; models of a repository are served as `inplace build` "
            "built them, with these options",
        )
    if not with_front:
        _refuse(context, FOR_FRONT_END, "for the OpenAI front end, which starts with --openai")


def _refuse(context: typer.Context, names: Iterable[str], reason: str) -> None:
    """BuildError if one of these options was given."""
    sources = {name: context.get_parameter_source(name) for name in names}
    given = [
        "--" + name.replace("_", "-")
        for name, source in sources.items()
        if source is not None and source.name != "DEFAULT"
    ]
    if given:
        raise BuildError(f"{', '.join(given)}: {reason}")


def _build_options(
    dtype: Precision | None, capacity: int, slots: int, *, prompt_logprobs: bool
) -> "BuildOptions":
    """The options of a build for this machine."""
    from inplace.schema.specs import Dtype

    from inplace_builder.served.choose import first_engine
    from inplace_builder.served.options import BuildOptions

    engine = first_engine(None)
    on_gpu = engine != "torch"
    return BuildOptions(
        dtype=Dtype(dtype or ("bfloat16" if on_gpu else "float32")),
        device="cuda" if on_gpu else "cpu",
        engine=engine,
        capacity=capacity,
        slots=slots,
        max_rows=min(slots, 8),
        serve="stream",
        prompt_logprobs=prompt_logprobs,
    )


def _built(model: Path, cache: Path | None, options: "BuildOptions") -> Path:
    """The model repository with a model, built if it is not in the cache yet."""
    from inplace_builder.tools.one_command import build_cached, default_cache

    with _stages() as stage:
        folder = build_cached(
            model,
            cache or default_cache(),
            options,
            stage,
            partial(console.print, soft_wrap=True, highlight=False),
        )
    return folder.parent


def _interrupts() -> threading.Event:
    """Interrupt this process at SIGINT and SIGTERM; set from the first signal on.

    Python drops the exception of a signal that arrives in a callback or a destructor.
    """
    interrupted = threading.Event()

    def interrupt(*_: object) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    return interrupted


def _wait(
    server: "TritonServer", front: "FrontProcess | None", interrupted: threading.Event
) -> None:
    """Wait until a server ends, or until this process is interrupted; then stop it.

    The front end is stopped first: its requests may still finish.
    """
    assert server.process is not None
    try:
        while not interrupted.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                raise SystemExit(server.process.wait(0.5))
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        console.print(
            f"stopping: running requests may finish for {server.exit_timeout:g} s; "
            "interrupt again to end them",
            soft_wrap=True,
        )
        try:
            if front is not None:
                front.stop()
            server.stop()
        except KeyboardInterrupt:
            server.stop(timeout=0)


@app.command()
def openai(
    server: Annotated[
        str,
        typer.Option(
            help="host:port of a tritonserver's gRPC endpoint; several with commas between them."
        ),
    ] = "127.0.0.1:8001",
    model_repository: Annotated[
        Path,
        typer.Option(help="The model repository: tokenizers and chat templates come from it."),
    ] = Path("model_repository"),
    host: Annotated[
        str, typer.Option(help="Address to listen on; without --keys a loopback address.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 chooses a free one.")] = 9000,
    keys: Annotated[
        Path | None, typer.Option(help="File of API keys, see `inplace openai-key`.")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="A further name of this server, where there are no keys; repeatable."),
    ] = None,
    tls_certificate: Annotated[Path | None, typer.Option(help="File for HTTPS.")] = None,
    tls_private_key: Annotated[Path | None, typer.Option(help="File for HTTPS.")] = None,
    server_ca: Annotated[
        Path | None,
        typer.Option(help="Certificate authority of the servers' gRPC endpoints, for TLS to them."),
    ] = None,
    tool_call_parser: Annotated[
        list[str] | None,
        typer.Option(
            help="How a model calls tools: hermes, llama3_json, mistral or json, of all models, or "
            "MODEL=hermes of one; repeatable; default: as its chat template says."
        ),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(min=1, max=256, help="Processes, for more tokens a second than one can send."),
    ] = 1,
    drain_timeout: Annotated[
        float, typer.Option(help="Seconds for which running requests may finish after SIGTERM.")
    ] = 30.0,
) -> None:
    """Speak OpenAI's HTTP protocol in front of one or more tritonservers."""
    with _errors("openai", "openai"):
        import logging

        from inplace.openai import Frontend, run

        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
        run(
            Frontend(
                servers=[each.strip() for each in server.split(",")],
                model_repository=model_repository,
                host=host,
                port=port,
                keys=keys,
                hosts=allow_host or (),
                certificate=tls_certificate,
                private_key=tls_private_key,
                server_ca=server_ca,
                drain_seconds=drain_timeout,
                call_formats=tool_call_parser or (),
                workers=workers,
            )
        )


@app.command()
def openai_key(
    name: Annotated[str, typer.Argument(help="Who the key is for.")],
) -> None:
    """Make an API key for `inplace openai`, and print it with its record for the file of keys."""
    with _errors("openai-key", "openai"):
        from inplace.openai.keys import KeyFile, new_key

        key, record = new_key(name)
        console.print(f"key (shown once): {key}", soft_wrap=True, highlight=False)
        text = KeyFile(keys=(record,)).model_dump_json(indent=1, exclude_none=True)
        console.print(f"file of keys:\n{text}", soft_wrap=True, highlight=False, markup=False)


def _snapshots(
    store: str | None, secret_file: Path | None, every: int | None
) -> "SnapshotOptions | None":
    """Where sequences are stored; None if they are not.

    Raises:
        BuildError: there are options of a store, and none is named.
    """
    from inplace.schema.snapshots import SnapshotOptions

    if store is None:
        if secret_file is not None or every is not None:
            raise BuildError(
                "there are options of a store of snapshots, and no store: name one"
                " (--snapshot-store), or leave them out"
            )
        return None
    secret = "" if secret_file is None else str(secret_file)
    return SnapshotOptions(store, secret, every)


def _gpu_numbers(text: str) -> tuple[int, ...]:
    """The numbers of GPUs, separated by commas; none for ``all``.

    Raises:
        BuildError: they are not numbers.
    """
    from inplace_builder.errors import BuildError

    if text == "all":
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 5 for part in parts):
        raise BuildError(f"gpus is {text[:100]!r}; expected all, or numbers such as 0,1")
    return tuple(map(int, parts))


@app.command()
def install_backend(
    directory: Annotated[
        Path, typer.Argument(help="The folder to make, for tritonserver --backend-directory.")
    ],
) -> None:
    """Write a backend directory for your own tritonserver command line."""
    with _errors("install-backend", "server"):
        from inplace_builder.tools.tritonserver import environment, install_backend

        install_backend(directory)
        console.print(
            f"tritonserver --backend-directory={directory} --model-repository=…\n"
            f"with LD_LIBRARY_PATH={environment()['LD_LIBRARY_PATH']}",
            soft_wrap=True,
        )


@app.command()
def chat(
    model: Annotated[
        Path,
        typer.Argument(
            help="The model in its repository; gives the model's name and its tokenizer."
        ),
    ],
    url: Annotated[
        str, typer.Option(help="host:port of the server's gRPC endpoint.")
    ] = "127.0.0.1:8001",
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Maximum number of tokens of a reply.")] = 256,
    say: Annotated[
        list[str] | None,
        typer.Option(
            help="A user's turn to send instead of asking at the prompt; may be repeated."
        ),
    ] = None,
) -> None:
    """Talk to a served decoder.

    The whole conversation is one sequence: each turn sends only what is new.
    """
    with _errors("chat", "builder"):
        from inplace.client import Client, Sequence
        from tritonclient.utils import InferenceServerException

        from inplace_builder.tools.chat import Conversation, load_chat_tokenizer

        name = model.resolve().name
        with Client(url) as client, Sequence(client, name) as sequence:
            try:
                client.model(url, name, timeout=10.0)
            except InferenceServerException as error:
                raise InplaceError(
                    f"{url} does not serve {name}: {error}; start a server with `inplace serve`, "
                    "or name another --url"
                ) from None
            tokenizer = load_chat_tokenizer(model)
            conversation = Conversation(sequence, tokenizer, system)
            for turn in say if say else _typed_turns():
                if say:
                    console.print(f"[bold]>[/] {turn}")
                for piece in conversation.send(turn, max_tokens):
                    console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
                console.print()


@app.command()
def transcribe(
    server: Annotated[str, typer.Argument(help="host:port of the server's gRPC endpoint.")],
    model: Annotated[str, typer.Argument(help="The name of a served speech model.")],
    recording: Annotated[
        Path, typer.Argument(help="A WAV, FLAC, Ogg or MP3 file with the model's sample rate.")
    ],
    realtime: Annotated[
        bool, typer.Option("--realtime", help="Send the audio at the pace of its recording.")
    ] = False,
    part_seconds: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            help="Most seconds of audio in a request; default: a whole window, or 5 with "
            "--realtime; of a stream 5, or a chunk with --realtime.",
        ),
    ] = None,
    language: Annotated[
        str | None, typer.Option(help="The code of the language; default: the model detects it.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="transcribe or translate, where the model has a choice.")
    ] = None,
) -> None:
    """Send a recording to a served speech model and print its words as they come."""
    with _errors("transcribe", "speech"):
        from inplace.client import Client, Sequence
        from inplace.client.recordings import AudioFormat, cut, read_recording, words
        from tritonclient.grpc import InferenceServerClient
        from tritonclient.utils import InferenceServerException

        try:
            with InferenceServerClient(server) as connection:
                takes = AudioFormat.of(connection, model)
        except InferenceServerException as error:
            raise InplaceError(
                f"{server} does not serve {model}: {error}; start a server with `inplace serve`"
            ) from None
        samples = read_recording(recording, takes.rate)
        parts = cut(samples, takes, takes.part_samples(part_seconds, realtime=realtime))
        given = {"language": language, "task": task}
        options = {name: value for name, value in given.items() if value is not None}
        with Client(server) as client, Sequence(client, model) as sequence:
            for piece in words(sequence, parts, takes.rate, options, realtime=realtime):
                console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        console.print()


def _typed_turns() -> Iterator[str]:
    """Read turns at the prompt until an empty line or the end of input."""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while text := console.input("[bold]>[/] ").strip():
            yield text


@contextlib.contextmanager
def _errors(command: str, extra: str) -> Iterator[None]:
    """Print this project's errors as one line instead of a traceback, and exit with status 1.

    Args:
        command: the subcommand, for the message about a package that is not installed.
        extra: the extra of this distribution that brings what the subcommand imports.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "inplace", "inplace_builder"):
            raise
        _fail(
            f"`inplace {command}` needs the package {package}, which is not installed: "
            f"install inplace-triton[{extra}]"
        )
    except InplaceError as error:
        _fail(str(error))


def _fail(message: str) -> None:
    Console(stderr=True).print(Text.assemble(("error: ", "red"), message), soft_wrap=True)
    raise typer.Exit(1) from None


def main() -> None:
    """Entry point of the console command."""
    app()


if __name__ == "__main__":
    main()
