"""Write the files of a standalone engine."""

from pathlib import Path
from typing import TYPE_CHECKING

from inplace.schema.dtypes import Dtype
from inplace.schema.files import record_files
from inplace.schema.served import Lowering
from inplace.schema.standalone import FILE_NAME, CallSignature, StandaloneManifest, StandaloneState
from inplace.standalone.engine import write_owned_states
from torch import Tensor

from inplace_builder.capture.exported import ExportedCapture
from inplace_builder.engine_files import built_with, write_plan, write_program
from inplace_builder.standalone.call import dtype_of
from inplace_builder.states.state import Owner

if TYPE_CHECKING:
    from inplace_builder.lower.compile import CompiledPlan


def write_files(
    folder: Path, capture: ExportedCapture, call: CallSignature, plan: "CompiledPlan | None"
) -> StandaloneManifest:
    """Write a captured module as a graph for PyTorch, or as the plan that it was compiled to.

    The manifest is written too.

    Raises:
        BuildError: a weight has a type that no engine has.
        OSError: a file cannot be written.
    """
    weights = capture.exported.state_dict.values()
    weight = next((tensor for tensor in weights if tensor.is_floating_point()), None)
    dtype = dtype_of(weight, "a weight") if weight is not None else Dtype.FLOAT32
    if plan is None:
        engine, notes = write_program(capture.exported, folder, "cpu", dtype), built_with()
    else:
        engine = write_plan(plan.content, plan.record, plan.weights, folder, dtype)
        notes = built_with(plan.record)
    owned = write_owned_states(folder, _owned_states(capture))
    manifest = StandaloneManifest(
        states=state_records(capture, call),
        aliases=tuple(str(alias) for alias in (plan or capture).aliases),
        lowering=lowering_records(capture, plan),
        call=call,
        rows=capture.rows,
        engine=engine,
        owned=owned,
        files=record_files(folder, leave_out=FILE_NAME),
        built_with=notes,
    )
    manifest.save(folder)
    return manifest


def lowering_records(capture: ExportedCapture, plan: "CompiledPlan | None") -> tuple[Lowering, ...]:
    """How each state is updated, and why.

    The reason is how the module's writes were recognised, and for a plan also the mechanism's.
    """
    if plan is None:
        return capture.lowering
    recognised = {record.state: record.reason for record in capture.lowering}
    return tuple(
        record
        if record.kind == "user"
        else record.model_copy(update={"reason": f"{recognised[record.state]}; {record.reason}"})
        for record in plan.lowering
    )


def _owned_states(capture: ExportedCapture) -> dict[str, Tensor]:
    """The initial values of the tensors that hold the engine's own states."""
    owned = (
        state.tensor.module_tensor for state in capture.states if state.tensor.owner is Owner.MODULE
    )
    return {tensor.source: tensor.initial for tensor in owned}


def state_records(capture: ExportedCapture, call: CallSignature) -> tuple[StandaloneState, ...]:
    """The states as the manifest records them."""
    arguments = {argument.name: argument for argument in call.arguments}
    records = []
    for state in capture.states:
        tensor = state.tensor.module_tensor
        argument = arguments.get(tensor.name)
        records.append(
            StandaloneState(
                name=state.name,
                owner="caller" if state.tensor.owner is Owner.CALLER else "module",
                source=tensor.source if argument is None else argument.where,
                dtype=dtype_of(state.tensor.initial, state.tensor.source),
                shape=tuple(tensor.initial.shape) if argument is None else argument.shape,
                selection=state.tensor.selects,
                written_at=state.tensor.first_write.strip(),
                has_slot_axis=state.has_slot_axis,
            )
        )
    return tuple(records)
