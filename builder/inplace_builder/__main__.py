"""The console command ``inplace``: build, inspect, serve, chat."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from inplace.errors import InplaceError
from inplace.schema.dtypes import Dtype
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

app = typer.Typer(
    help="Models that keep state between requests, updated in place, on Triton Inference Server.",
    no_args_is_help=True,
    add_completion=False,
)


console = Console()


class Device(StrEnum):
    """Where an engine runs."""

    CPU = "cpu"
    CUDA = "cuda"


class Precision(StrEnum):
    """Element types of decoders; float16 on a GPU only."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class EngineKind(StrEnum):
    """What runs a program."""

    TORCH = "torch"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt_rtx"


class Protocol(StrEnum):
    """How a model is served."""

    STEP = "step"
    STREAM = "stream"


class Mechanism(StrEnum):
    """How TensorRT updates a state."""

    PLUGIN = "plugin"
    KV_CACHE_UPDATE = "kv_cache_update"
    COPY = "copy"


@app.command()
def build(
    model: Annotated[
        Path,
        typer.Argument(
            help="Folder of a Hugging Face decoder (safetensors or one GGUF file), or a GGUF file."
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="Folder to write, in a model repository: model_repository/<name>.")
    ],
    dtype: Annotated[
        Precision, typer.Option(help="Element type of weights and states.")
    ] = Precision.FLOAT32,
    device: Annotated[
        Device | None,
        typer.Option(help="Where it runs; default: cpu for torch, cuda for TensorRT."),
    ] = None,
    engine: Annotated[EngineKind, typer.Option(help="What runs it.")] = EngineKind.TORCH,
    alias: Annotated[
        Mechanism | None,
        typer.Option(
            help="Insist on how states are updated (TensorRT); default: the first that can."
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
        int | None, typer.Option(help="Most sequences in one step; default: the slots, at most 8.")
    ] = None,
    capacity: Annotated[int, typer.Option(help="Positions a sequence may hold.")] = 1024,
    min_capacity: Annotated[
        int | None,
        typer.Option(
            help="The least capacity that config.pbtxt may choose instead; default: it is fixed."
        ),
    ] = None,
    chunk: Annotated[
        int,
        typer.Option(help="Most tokens of one sequence in one step; longer prompts take several."),
    ] = 128,
    step_tokens: Annotated[
        int | None,
        typer.Option(help="Most tokens of all sequences in one step; default: four chunks."),
    ] = None,
    serve: Annotated[
        Protocol,
        typer.Option(
            help="step: unary requests of one step each; stream: gRPC streams and HTTP generate_stream, whole generations."
        ),
    ] = Protocol.STEP,
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
        int, typer.Option(help="Processes that serve it, each with an engine and slots of its own.")
    ] = 1,
) -> None:
    """Build a decoder into a model repository, verified against transformers before it is written."""
    from inplace_builder.served.build import build_decoder
    from inplace_builder.served.options import BuildOptions
    from inplace_builder.tools.report import summary

    with _errors():
        options = BuildOptions(
            dtype=Dtype(dtype.value),
            device=device.value
            if device is not None
            else "cpu"
            if engine is EngineKind.TORCH
            else "cuda",
            engine=engine.value,
            alias=alias.value if alias is not None else None,
            strict=strict,
            compute_capability=compute_capability,
            step_tokens=step_tokens,
            slots=slots,
            max_rows=max_batch if max_batch is not None else min(slots, 8),
            capacity=capacity,
            min_capacity=min_capacity,
            chunk=chunk,
            idle_timeout=idle_timeout,
            queue_delay_microseconds=queue_delay_us,
            instances=instances,
            serve=serve.value,
        )
        target = output if name is None or output.name == name else output / name
        columns = (
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console) as progress:
            last: list[int] = []

            def stage(what: str) -> None:
                for task in last:
                    progress.update(progress.tasks[task].id, total=1, completed=1)
                last[:] = [progress.add_task(what, total=None)]

            manifest = build_decoder(model, target, options, stage)
            stage("done")
            progress.update(progress.tasks[last[0]].id, total=1, completed=1)
        console.print(summary(manifest, target))
        console.print(f"written to {target}", soft_wrap=True, highlight=False)


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(help="An engine directory, or a model of a repository.")],
    memory: Annotated[
        float | None, typer.Option(help="GiB of memory of which to say how many slots they hold.")
    ] = None,
) -> None:
    """Say what an engine directory is: programs, states, aliases, memory, limits, and what built it."""
    from inplace.schema.served import FILE_NAME, Manifest

    from inplace_builder.tools.report import details

    with _errors():
        folder = model if (model / FILE_NAME).is_file() else model / "1"
        for part in details(Manifest.load(folder), folder, memory):
            console.print(part)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model_repository: Annotated[Path, typer.Option(help="The model repository.")] = Path(
        "model_repository"
    ),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
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
        Path | None, typer.Option(help="Where the server's own output goes; default: here.")
    ] = None,
) -> None:
    """Serve a model repository with tritonserver until interrupted. Further arguments go to tritonserver as they are."""
    from inplace_builder.tools.tritonserver import Ports, TritonServer

    with _errors():
        server = TritonServer(
            model_repository,
            Ports(grpc=grpc_port, http=http_port, metrics=metrics_port),
            host,
            log=log_file,
            arguments=context.args,
        )
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        with contextlib.suppress(KeyboardInterrupt), server:
            web, metrics = server.ports.http, server.ports.metrics
            console.print(
                f"serving {model_repository}: gRPC {server.grpc_url}, HTTP {host}:{web}, metrics {host}:{metrics}",
                soft_wrap=True,
            )
            assert server.process is not None
            raise SystemExit(server.process.wait())


@app.command()
def install_backend(
    directory: Annotated[
        Path, typer.Argument(help="The folder to make, for tritonserver --backend-directory.")
    ],
) -> None:
    """Write a backend directory for your own tritonserver command line."""
    from inplace_builder.tools.tritonserver import environment, install_backend

    with _errors():
        install_backend(directory)
        console.print(
            f"tritonserver --backend-directory={directory} --model-repository=…\nwith LD_LIBRARY_PATH={environment()['LD_LIBRARY_PATH']}",
            soft_wrap=True,
        )


@app.command()
def chat(
    model: Annotated[
        Path,
        typer.Argument(
            help="The model in its repository: its name, and its tokenizer, are taken from there."
        ),
    ],
    url: Annotated[
        str, typer.Option(help="host:port of the server's gRPC endpoint.")
    ] = "127.0.0.1:8001",
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of a reply.")] = 256,
    say: Annotated[
        list[str] | None,
        typer.Option(
            help="Say this instead of asking at the prompt; may be repeated, a turn each."
        ),
    ] = None,
) -> None:
    """Talk to a served decoder. The whole conversation is one sequence: no turn sends what was said before."""
    from inplace.client import Client, Sequence
    from tritonclient.utils import InferenceServerException

    from inplace_builder.served.build import TOKENIZER, VERSION
    from inplace_builder.tools.chat import Conversation, load_tokenizer

    name = model.resolve().name
    with _errors(), Client(url) as client, Sequence(client, name) as sequence:
        try:
            client.model(url, name, timeout=10.0)
        except InferenceServerException as error:
            raise InplaceError(
                f"{url} does not serve {name}: {error}; start a server with `inplace serve`, or name another --url"
            ) from None
        conversation = Conversation(sequence, load_tokenizer(model / VERSION / TOKENIZER), system)
        for turn in say if say else _typed():
            if say:
                console.print(f"[bold]>[/] {turn}")
            for piece in conversation.say(turn, max_tokens):
                console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
            console.print()


def _typed() -> Iterator[str]:
    """What the user types, until an empty line or the end of input."""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while text := console.input("[bold]>[/] ").strip():
            yield text


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Our own errors are messages, not tracebacks."""
    try:
        yield
    except InplaceError as error:
        Console(stderr=True).print(Text.assemble(("error: ", "red"), str(error)), soft_wrap=True)
        raise typer.Exit(1) from None


def main() -> None:
    """Entry point of the console command."""
    app()


if __name__ == "__main__":
    main()
