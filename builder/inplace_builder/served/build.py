"""The build: load, capture, write, verify, publish. What fails leaves nothing behind and what stood there before untouched."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from inplace.drivers.text import TOKENIZER_FILE, TOKENIZER_FOLDER
from inplace.schema.publish import RestoreError, publish, replace_conflict
from inplace.schema.served import FILE_NAME, Manifest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from inplace_builder.capture.capture import Capture
from inplace_builder.capture.decoder import DecoderOptions
from inplace_builder.capture.huggingface import capture_decoder, load_decoder
from inplace_builder.compare import beside_engine
from inplace_builder.errors import BuildError
from inplace_builder.lower.compile import Target
from inplace_builder.served.model_config import TextSettings, model_config
from inplace_builder.served.options import BuildOptions
from inplace_builder.served.proxy import (
    MODEL_VERSION,
    proxy_occupied,
    proxy_of,
    remove_proxy,
    write_proxy,
)
from inplace_builder.served.verify import verify
from inplace_builder.served.write import WrittenEngine, write_tensorrt, write_torch
from inplace_builder.versions import built_with

VERSION, TOKENIZER = MODEL_VERSION, TOKENIZER_FOLDER


Stage = Callable[[str], None]
"""Called with what begins now; a progress display."""


def build_decoder(
    source: Path, output: Path, options: BuildOptions, stage: Stage = lambda _: None
) -> Manifest:
    """Build a Hugging Face decoder into ``output``, a model of a Triton repository.

    Args:
        source: a local model folder (safetensors, or one GGUF file), or a GGUF file.
        output: the folder to write; its name is the model's. An engine directory there is replaced, anything else refused.
        options: what to build for.
        stage: told what begins.

    Raises:
        BuildError: with nothing written.
        LoadError: TensorRT is not installed.
    """
    check_output(output, options)
    if options.engine != "torch":
        Target.of(options.engine, options.compute_capability)
    stage("load the model")
    model, tokenizer = load_decoder(source, options.dtype)
    stage("capture the graph")
    capture = capture_decoder(model, decoder_options(options))

    def extras(folder: Path) -> None:
        if tokenizer is None:
            return
        try:
            tokenizer.save_pretrained(folder / TOKENIZER)
        except (
            Exception
        ) as error:  # the tokenizers library has no type of its own for a failed write
            raise (
                error if isinstance(error, OSError) else OSError(f"{TOKENIZER}: {error}")
            ) from error

    notes = {"source": source.name, "architecture": type(model).__name__}
    eos = end_tokens(model, tokenizer)
    return write_engine(
        capture,
        output,
        options,
        stage,
        notes,
        extras,
        lambda: beside_engine(model, options.device),
        eos,
    )


def end_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[int, ...]:
    """The tokens that end what a model says: those of its generation configuration, or else its tokenizer's."""
    config = model.generation_config
    found = config.eos_token_id if config is not None else None
    if found is None and tokenizer is not None:
        found = tokenizer.eos_token_id
    return tuple(found) if isinstance(found, list) else () if found is None else (found,)


def decoder_options(options: BuildOptions) -> DecoderOptions:
    """What a decoder is captured for."""
    chunk = min(options.chunk, options.min_capacity or options.capacity)
    most = min(options.most_tokens, options.max_rows * chunk)
    return DecoderOptions(options.capacity, options.max_rows, chunk, most, options.min_capacity)


def write_engine(
    capture: Capture,
    output: Path,
    options: BuildOptions,
    stage: Stage = lambda _: None,
    notes: dict[str, str] | None = None,
    extras: Callable[[Path], None] = lambda _: None,
    prepare: Callable[[], object] = lambda: None,
    eos: tuple[int, ...] = (),
) -> Manifest:
    """Write a captured model as an engine directory, verify it as it was written, and only then put it in its place.

    Args:
        capture: what a frontend captured.
        output: as in `build_decoder`.
        options: as in `build_decoder`.
        stage: as in `build_decoder`.
        notes: what else to record in ``built_with``.
        extras: writes further files into the version folder.
        prepare: called before verification, when nothing needs the captured weights any more: the place to move the model that they
            share their memory with to the device of the engine, so that the reference runs there too.
        eos: tokens that end a generation.

    Raises:
        BuildError: it cannot be written, or it does not do what the captured model does.
    """
    check_output(output, options)
    if capture.program.max_rows > options.slots:
        raise BuildError(
            f"a batch of {capture.program.max_rows} rows needs as many slots; there are {options.slots}: raise slots or lower the batch"
        )
    generates = options.serve == "stream" and capture.program.decoder_io is not None
    with (
        _published(output) as draft,
        _published(proxy_of(output)) if generates else contextlib.nullcontext() as front_draft,
    ):
        folder = draft / VERSION
        stage("write the engine")
        with _disk_errors(output):
            folder.mkdir()
            written = _write(capture, folder, options)
            extras(folder)
        manifest = Manifest(
            name=output.name,
            slots=options.slots,
            capacity=capture.capacity,
            min_capacity=capture.min_capacity,
            states=capture.states,
            programs=(written.program,),
            lowering=written.lowering,
            engine=written.engine,
            verified="executed" if written.verifiable else "compiled_only",
            built_with=built_with() | written.notes | (notes or {}),
        )
        if written.verifiable:
            stage("verify it against the model")
            prepare()
            least = (
                manifest
                if manifest.min_capacity is None
                else manifest.at_capacity(manifest.min_capacity)
            )
            error = max(
                verify(folder, chosen, capture)
                for chosen in ((manifest,) if least is manifest else (least, manifest))
            )
            manifest = manifest.model_copy(
                update={"built_with": manifest.built_with | {"verified_error": f"{error:.1e}"}}
            )
        language = (
            TextSettings(eos, text=(folder / TOKENIZER / TOKENIZER_FILE).is_file())
            if generates
            else None
        )
        config = model_config(
            manifest,
            serve=options.serve,
            idle_timeout=options.idle_timeout,
            queue_delay_microseconds=options.queue_delay_microseconds,
            instances=options.instances,
            language=language,
        )
        with _disk_errors(output):
            manifest.save(folder)
            (draft / "config.pbtxt").write_text(config.text())
            if front_draft is not None and language is not None:
                write_proxy(front_draft, manifest, language)
    if not generates:
        remove_proxy(output)
    return manifest


def _write(capture: Capture, folder: Path, options: BuildOptions) -> WrittenEngine:
    if options.engine == "torch":
        return write_torch(capture, folder, options.device)
    return write_tensorrt(
        capture,
        folder,
        options.engine,
        slots=options.slots,
        alias=options.alias,
        strict=options.strict,
        compute_capability=options.compute_capability,
    )


def check_output(output: Path, options: BuildOptions) -> None:
    """BuildError if ``output`` holds something that is not an engine directory, or its front's place something that is no front."""
    if (reason := replace_conflict(output, Path(VERSION, FILE_NAME))) is not None:
        raise BuildError(reason)
    if options.serve == "stream" and (reason := proxy_occupied(output)) is not None:
        raise BuildError(reason)


@contextlib.contextmanager
def _published(output: Path) -> Iterator[Path]:
    """`publish`, with its errors as BuildErrors and those of the block as they are."""
    with contextlib.ExitStack() as stack:
        with _disk_errors(output):
            draft = stack.enter_context(publish(output))
        yield draft
        with _disk_errors(output):
            stack.close()


@contextlib.contextmanager
def _disk_errors(output: Path) -> Iterator[None]:
    """A failed write as a BuildError."""
    try:
        yield
    except RestoreError as error:
        raise BuildError(str(error)) from error
    except OSError as error:
        raise BuildError(
            f"{output} cannot be written: {error}; free space there or choose another place (nothing was left behind)"
        ) from error
