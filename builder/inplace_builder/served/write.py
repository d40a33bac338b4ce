"""Write the files of a served engine."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from inplace.schema.files import record_files
from inplace.schema.served import FILE_NAME, CompiledProgram, Manifest
from inplace.schema.specs import INITIAL_FILE
from inplace.schema.tensor_file import write_tensors

from inplace_builder.capture.capture import Capture
from inplace_builder.engine_files import built_with, write_plan, write_program
from inplace_builder.served.options import BuildOptions

if TYPE_CHECKING:
    from inplace_builder.served.plan import ServedPlan


def write_files(
    folder: Path,
    name: str,
    capture: Capture,
    options: BuildOptions,
    compiled: "ServedPlan | None",
    extras: Callable[[Path], None],
) -> Manifest:
    """Write a captured model as a graph for PyTorch, or as the plan that it was compiled to.

    Args:
        folder: the version folder.
        name: the model's name.
        capture: the captured model.
        options: what it is built for.
        compiled: the plan; None for PyTorch.
        extras: writes further files into the folder.

    Returns:
        The engine's manifest, which is not written yet.

    Raises:
        OSError: a file cannot be written.
    """
    if compiled is None:
        program, lowering, notes = capture.program, capture.lowering, built_with()
        engine = write_program(capture.exported, folder, options.device, capture.dtype)
    else:
        plan = compiled.plan
        program, lowering, notes = compiled.program, plan.lowering, built_with(plan.record)
        notes["weights_in_plan_bytes"] = str(plan.constant_bytes)
        engine = write_plan(plan.content, plan.record, plan.weights, folder, capture.dtype)
    if capture.initial:
        write_tensors(folder / INITIAL_FILE, capture.initial)
    extras(folder)
    states = [state.name for state in capture.states]
    return Manifest(
        name=name,
        slots=options.slots,
        capacity=capture.capacity,
        min_capacity=capture.min_capacity,
        states=capture.states,
        programs=(CompiledProgram.of(program, engine, lowering, states),),
        files=record_files(folder, leave_out=FILE_NAME),
        verified="compiled_only",
        built_with=notes,
    )
