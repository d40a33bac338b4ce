"""Write the files of a served engine."""

from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from inplace.schema.files import record_files
from inplace.schema.programs import CompiledProgram
from inplace.schema.schedule import DEFAULT_SCHEDULE, PROMPT_LOGPROBS, Schedule
from inplace.schema.served import FILE_NAME, Manifest
from inplace.schema.specs import INITIAL_FILE
from inplace.schema.tensor_file import flat_bytes, write_tensors
from inplace.snapshots.contract import WEIGHTS_NOTE
from pydantic import ValidationError
from torch import Tensor

from inplace_builder.capture.capture import Capture
from inplace_builder.capture.union import union_of_states
from inplace_builder.engine_files import (
    PLAN_FILE,
    TORCH_FILE,
    WEIGHTS_FILE,
    built_with,
    write_plan,
    write_program,
)
from inplace_builder.errors import BuildError, validation_reasons
from inplace_builder.served.options import BuildOptions

if TYPE_CHECKING:
    from inplace_builder.served.plan import ServedPlan


def write_files(
    folder: Path,
    name: str,
    captures: Sequence[Capture],
    options: BuildOptions,
    plans: "Sequence[ServedPlan | None]",
    extras: Callable[[Path], None],
    schedules: tuple[Schedule, ...] = (DEFAULT_SCHEDULE,),
) -> Manifest:
    """Write captured programs, each as a graph for PyTorch or as the plan it was compiled to.

    Args:
        folder: the version folder.
        name: the model's name.
        captures: the captured programs.
        options: what they are built for.
        plans: the plan of each; None for PyTorch.
        extras: writes further files into the folder.
        schedules: in which order requests call them.

    Returns:
        The engine's manifest, which is not written yet.

    Raises:
        BuildError: programs do not fit together.
        OSError: a file cannot be written.
    """
    notes: dict[str, str] = {}
    written: dict[str, Mapping[str, Tensor]] = {}
    programs: list[CompiledProgram] = []
    for capture, plan in zip(captures, plans, strict=True):
        if plan is None and capture.program.name == PROMPT_LOGPROBS:
            # its graph is in the file of the step, whose constants it shares
            engine = programs[0].engine.model_copy(update={"graph": PROMPT_LOGPROBS})
            names = [state.name for state in capture.states]
            program = CompiledProgram.of(capture.program, engine, capture.lowering, names)
        else:
            alone = len(captures) == 1 or capture.prompt_logprobs is not None
            program = _write_program(folder, capture, options, plan, notes, written, alone=alone)
        programs.append(program)
    notes[WEIGHTS_NOTE] = _digest_weights(captures)
    states = union_of_states(captures)
    initial = {name: tensor for capture in captures for name, tensor in capture.initial.items()}
    if initial:
        write_tensors(folder / INITIAL_FILE, initial)
    extras(folder)
    limits = [capture.capacity for capture in captures if capture.capacity is not None]
    try:
        return Manifest(
            name=name,
            slots=options.slots,
            capacity=min(limits, default=None),
            min_capacity=captures[0].min_capacity,
            states=states,
            programs=tuple(programs),
            schedules=schedules,
            files=record_files(folder, leave_out=FILE_NAME),
            verified="compiled_only",
            built_with=notes,
        )
    except ValidationError as error:
        if len(captures) == 1:
            raise
        raise BuildError(
            f"the programs do not fit together: {validation_reasons(error)}"
        ) from error


def _write_program(
    folder: Path,
    capture: Capture,
    options: BuildOptions,
    compiled: "ServedPlan | None",
    notes: dict[str, str],
    written: dict[str, Mapping[str, Tensor]],
    *,
    alone: bool,
) -> CompiledProgram:
    """Write the file of one program.

    What built it is added to ``notes``, and the weights beside its plan to ``written``, by file.
    """

    def file(name: str) -> str:
        stem, _, ending = name.partition(".")
        return name if alone else f"{stem}-{capture.program.name}.{ending}"

    states = [state.name for state in capture.states]
    if compiled is None:
        notes |= built_with()
        prompt = capture.prompt_logprobs
        others = {} if prompt is None else {PROMPT_LOGPROBS: prompt.exported}
        engine = write_program(
            capture.exported, folder, options.device, capture.dtype, file(TORCH_FILE), others
        )
        return CompiledProgram.of(capture.program, engine, capture.lowering, states)
    plan = compiled.plan
    notes |= built_with(plan.record)
    constants = int(notes.get("weights_in_plan_bytes", 0)) + plan.constant_bytes
    notes["weights_in_plan_bytes"] = str(constants)
    files = file(PLAN_FILE), file(WEIGHTS_FILE)
    engine = write_plan(
        plan.content, plan.record, plan.weights, folder, capture.dtype, files, written, plan.scales
    )
    if engine.plan is not None and engine.plan.weights is not None:
        written[engine.plan.weights] = plan.weights
    return CompiledProgram.of(compiled.program, engine, plan.lowering, states)


def _digest_weights(captures: Sequence[Capture]) -> str:
    """The SHA-256 digest of what programs were captured with, before anything is lowered.

    Tensors that several names share are read once.
    """
    digest, seen = sha256(), dict[tuple[object, ...], bytes]()
    for capture in captures:
        tensors = {**capture.exported.state_dict, **capture.exported.constants}
        for name, tensor in sorted(tensors.items()):
            if not isinstance(tensor, Tensor):
                continue
            place = (
                tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape,
                tensor.stride(), tensor.dtype,
            )  # fmt: skip
            if place not in seen:
                data = flat_bytes(tensor.detach().cpu())
                seen[place] = sha256(data.numpy().data).digest()
            text = f"{capture.program.name} {name} {tensor.dtype} {list(tensor.shape)} "
            digest.update(text.encode() + seen[place])
    return digest.hexdigest()
