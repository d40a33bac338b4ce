"""Build an engine for a server: plan, write, verify, publish.

A build that fails leaves nothing behind, and what was at its place before is not touched.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from inplace.drivers.detokenizer import TOKENIZER_NAME
from inplace.engines.gpus import full_float32
from inplace.schema.schedule import DEFAULT_SCHEDULE
from inplace.schema.served import FILE_NAME, Manifest
from inplace.schema.specs import Dtype

from inplace_builder.capture.capture import Capture
from inplace_builder.capture.drafted import SpeculativeCapture
from inplace_builder.engine_files import check_target, disk_errors, publish_engine
from inplace_builder.errors import BuildError
from inplace_builder.served.model_config import MODEL_VERSION, TextSettings, model_config
from inplace_builder.served.options import BuildOptions
from inplace_builder.served.proxy import (
    check_proxy_target,
    proxy_folder,
    remove_proxy,
    write_proxy,
)
from inplace_builder.served.verify import verify
from inplace_builder.served.write import write_files

if TYPE_CHECKING:
    from inplace_builder.capture.programs import ProgramsCapture
    from inplace_builder.lower.compile import Target
    from inplace_builder.served.plan import ServedPlan

Stage = Callable[[str], None]
"""Called with the name of each stage as it begins, for a progress display."""


def write_engine(
    capture: "Capture | ProgramsCapture | SpeculativeCapture",
    output: Path | str,
    options: BuildOptions,
    stage: Stage = lambda _: None,
    notes: dict[str, str] | None = None,
    extras: Callable[[Path], None] = lambda _: None,
    prepare: Callable[[], object] = lambda: None,
    eos_token_ids: tuple[int, ...] = (),
) -> Manifest:
    """Write a captured model as an engine directory, verify it, and publish it.

    Args:
        capture: the captured model, the captured programs of one, or a model with its draft.
        output: the folder to write, a model of a Triton repository; its name is the model's. An
            engine directory there is replaced, anything else refused.
        options: what to build for.
        stage: called with the name of each stage as it begins.
        notes: what else to record in ``built_with``.
        extras: writes further files into the version folder.
        prepare: called before verification, when nothing needs the captured weights any more: the
            place to move the model, whose memory they are, to the engine's device, so that the
            reference runs there too.
        eos_token_ids: tokens that end a generation.

    Raises:
        BuildError: it cannot be written, or it does not do what the captured model does.
        LoadError: TensorRT is not installed.
    """
    output = Path(output)
    check_output(output, options)
    captures = _captures(capture)
    if options.cache == "fp8" and not any(
        state.dtype is Dtype.FLOAT8_E4M3FN for each in captures for state in each.states
    ):
        raise BuildError(
            "cache is fp8, and the captured model has no states of 8-bit floats: build_decoder "
            "makes such of the keys and values of a checkpoint; leave cache out"
        )
    max_rows = max(each.program.max_rows for each in captures) // options.tokens_per_round
    if max_rows > options.slots:
        raise BuildError(
            f"a batch of {max_rows} rows needs as many slots; there are "
            f"{options.slots}: raise slots or lower the batch"
        )
    generates = options.serve == "stream" and captures[0].program.decoder_io is not None
    with _drafts(output, with_proxy=generates) as (draft, proxy_draft):
        folder = draft / MODEL_VERSION
        plans = [_plan(each, options, stage) for each in captures]
        stage("write the engine")
        with disk_errors(output):
            folder.mkdir()
            schedules = (DEFAULT_SCHEDULE,) if isinstance(capture, Capture) else capture.schedules
            manifest = write_files(folder, output.name, captures, options, plans, extras, schedules)
        captured = {name: note for each in captures for name, note in each.notes.items()}
        manifest = _with_notes(manifest, captured | (notes or {}))
        if _runs_here(manifest):
            stage("verify it against the model")
            prepare()
            with full_float32():
                manifest = _verified(folder, manifest, capture)
        text = None
        if generates:
            text = TextSettings(eos_token_ids, manifest.has_file(TOKENIZER_NAME))
        config = model_config(manifest, options, text)
        with disk_errors(output):
            manifest.save(folder)
            (draft / "config.pbtxt").write_text(config.text())
            if proxy_draft is not None and text is not None:
                write_proxy(proxy_draft, manifest, text)
    if not generates:
        remove_proxy(output)
    return manifest


def _captures(capture: "Capture | ProgramsCapture | SpeculativeCapture") -> tuple[Capture, ...]:
    """The programs of an engine."""
    if not isinstance(capture, Capture):
        return capture.captures
    prompt = capture.prompt_logprobs
    return (capture,) if prompt is None else (capture, prompt)


def _verified(
    folder: Path, manifest: Manifest, capture: "Capture | ProgramsCapture | SpeculativeCapture"
) -> Manifest:
    """Verify an engine; its manifest, with what verification found."""
    if isinstance(capture, Capture):
        manifest = _with_notes(manifest, verify(folder, manifest, capture))
    elif isinstance(capture, SpeculativeCapture):
        from inplace_builder.served.verify_speculative import verify_speculative

        manifest = _with_notes(manifest, verify_speculative(folder, manifest, capture))
    else:
        # only here: most builds have one program
        from inplace_builder.served.verify_schedule import verify_schedule, with_appended

        manifest = _with_notes(manifest, verify_schedule(folder, manifest, capture))
        manifest = with_appended(folder, manifest, capture)
    return manifest.model_copy(update={"verified": "executed"})


@contextlib.contextmanager
def _drafts(output: Path, *, with_proxy: bool) -> Iterator[tuple[Path, Path | None]]:
    """Drafts of the model and of its proxy, published together."""
    with publish_engine(output) as draft:
        if not with_proxy:
            yield draft, None
            return
        with publish_engine(proxy_folder(output)) as proxy_draft:
            yield draft, proxy_draft


def load_target(options: BuildOptions) -> "Target | None":
    """Load TensorRT, and say what it compiles for; None for the PyTorch engine.

    Raises:
        BuildError: it cannot compile for that GPU.
        LoadError: it is not installed.
    """
    if options.engine == "torch":
        return None
    from inplace_builder.lower.compile import Target

    return Target.of(options.engine, options.compute_capability)


def _plan(capture: Capture, options: BuildOptions, stage: Stage) -> "ServedPlan | None":
    target = load_target(options)
    if target is None:
        return None
    stage(f"compile program {capture.program.name}")
    # only here, because importing the converters takes as long as importing PyTorch
    from inplace_builder.served.plan import build_plan

    return build_plan(
        capture, target, slots=options.slots, alias=options.alias, strict=options.strict
    )


def _runs_here(manifest: Manifest) -> bool:
    """Whether the engine was built for a device that this machine has."""
    plan = manifest.programs[0].engine.plan
    return plan is None or plan.gpu != ""


def _with_notes(manifest: Manifest, notes: dict[str, str]) -> Manifest:
    return manifest.model_copy(update={"built_with": manifest.built_with | notes})


def check_output(output: Path, options: BuildOptions) -> None:
    """Raise BuildError if the places of the model or its proxy are taken by something else."""
    check_target(output, Path(MODEL_VERSION, FILE_NAME))
    if options.serve == "stream":
        check_proxy_target(output)
