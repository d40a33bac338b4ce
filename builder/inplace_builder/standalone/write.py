"""Write the files of a directly called engine."""

from pathlib import Path

import torch
from inplace.schema.artifacts import EngineFile, File
from inplace.schema.dtypes import Dtype
from inplace.schema.served import Lowering
from inplace.schema.standalone import CallSignature, StandaloneManifest, StandaloneState
from inplace.standalone.engine import write_owned_states

from inplace_builder import archive
from inplace_builder.capture.exported import ExportedCapture
from inplace_builder.served.write import PLAN_FILE, TORCH_FILE
from inplace_builder.standalone.call import dtype_of
from inplace_builder.standalone.plan import StandalonePlan
from inplace_builder.states.state import Owner
from inplace_builder.versions import built_with


def write_standalone(
    folder: Path, capture: ExportedCapture, call: CallSignature, plan: StandalonePlan | None
) -> StandaloneManifest:
    """Write a captured module as a graph of PyTorch, or as the plan that was compiled of it.

    Raises:
        BuildError: a weight has a type that no engine has.
        OSError: it cannot be written.
    """
    weights = next(
        (tensor for tensor in capture.exported.state_dict.values() if tensor.is_floating_point()),
        None,
    )
    dtype = dtype_of(weights, "a weight") if weights is not None else Dtype.FLOAT32
    if plan is None:
        archive.save(capture.exported, folder / TORCH_FILE)
        engine = EngineFile(
            kind="torch", **File.of(folder / TORCH_FILE).model_dump(), device="cpu", dtype=dtype
        )
    else:
        (folder / PLAN_FILE).write_bytes(plan.content)
        engine = EngineFile(
            kind="tensorrt",
            **File.of(folder / PLAN_FILE).model_dump(),
            device="cuda",
            dtype=dtype,
            plan=plan.record,
        )
    manifest = StandaloneManifest(
        states=standalone_states(capture, call),
        aliases=tuple(str(alias) for alias in (capture.aliases if plan is None else plan.aliases)),
        lowering=lowering(capture, plan),
        call=call,
        rows=capture.rows,
        engine=engine,
        owned=write_owned_states(folder, held_states(capture)),
        built_with=built_with() | ({} if plan is None else plan.notes),
    )
    manifest.save(folder)
    return manifest


def lowering(capture: ExportedCapture, plan: StandalonePlan | None) -> tuple[Lowering, ...]:
    """How each state is updated: the verdict on the module's writes, and for a plan the mechanism."""
    if plan is None:
        return capture.lowering
    found = {record.state: record.reason for record in capture.lowering}
    return tuple(
        record
        if record.kind == "user"
        else record.model_copy(update={"reason": f"{found[record.state]}; {record.reason}"})
        for record in plan.lowering
    )


def held_states(capture: ExportedCapture) -> dict[str, torch.Tensor]:
    """The initial values of the states that the module owns."""
    owned = (
        state.tensor.module_tensor for state in capture.states if state.tensor.owner is Owner.MODULE
    )
    return {tensor.source: tensor.initial for tensor in owned}


def standalone_states(capture: ExportedCapture, call: CallSignature) -> tuple[StandaloneState, ...]:
    """The states as the manifest has them."""
    passed = {argument.name: argument for argument in call.arguments}
    return tuple(
        StandaloneState(
            name=state.name,
            owner="caller" if state.tensor.owner is Owner.CALLER else "module",
            source=passed[name].where
            if (name := state.tensor.module_tensor.name) in passed
            else state.tensor.module_tensor.source,
            dtype=dtype_of(state.tensor.initial, state.tensor.source),
            shape=passed[name].shape
            if name in passed
            else tuple(state.tensor.module_tensor.initial.shape),
            selection=state.tensor.selects,
            written_at=state.tensor.first_write.strip(),
            has_slot_axis=state.has_slot_axis,
        )
        for state in capture.states
    )
