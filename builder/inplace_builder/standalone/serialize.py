"""Build a module into a serialized engine whose states are bindings that the caller manages."""

import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from inplace.schema.artifacts import Plan
from inplace.schema.specs import Alias, AliasKind, Dtype, Lowering
from inplace.schema.standalone import SLOTS, CallSignature, StandaloneState, result_name
from torch import Tensor
from torch.export import ExportedProgram

from inplace_builder.capture.exported import ExportedCapture, capture_exported
from inplace_builder.choices import EngineKind
from inplace_builder.errors import BuildError
from inplace_builder.standalone.build import (
    alignment,
    describe_call,
    export_for,
    lowering_records,
    state_records,
)
from inplace_builder.states.adapt import adapted_states

if TYPE_CHECKING:
    from inplace_builder.lower.compile import CompiledPlan


@dataclass(frozen=True)
class Binding:
    """A tensor of an engine.

    Attributes:
        name: the engine's name for it.
        dtype: element type.
        shape: extents; a string is a dynamic extent, an expression in the symbols of
            `Serialized.ranges`.
    """

    name: str
    dtype: Dtype
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Serialized:
    """A serialized engine and everything that is needed to run it. It was not run, nor verified.

    Attributes:
        content: ``torch``: an archive for ``torch.export.load`` whose program takes ``inputs`` and
            then ``states``, in this order, and returns ``outputs``. Otherwise a TensorRT plan.
        engine: which of the two.
        plan: what the plan was compiled for; None for ``torch``.
        inputs: what is passed; a Python number as int64. For ``torch`` the last one is ``slots``,
            int32 ``[rows]``, which is ``arange(rows)``.
        states: the states, the caller's and lifted ones. An alias names the output that is the same
            memory: for a plan bind both to one address; of the kind ``copy`` give the output memory
            of its own, which holds the new value.
        outputs: what is returned.
        aliases: one for each state.
        lowering: how each state is updated, and why.
        ranges: smallest and largest value of each symbol; None is no limit.
        records: the states as the manifest of an engine has them: who owns their memory and where
            they come from. Several may be parts of one tensor, under the same source
            (`StandaloneState.part`): bind those as views of it, or as tensors of their own.
        initial: the value of each state at the build, as it is bound; a copy.
    """

    content: bytes
    engine: EngineKind
    plan: Plan | None
    inputs: tuple[Binding, ...]
    states: tuple[Binding, ...]
    outputs: tuple[Binding, ...]
    aliases: tuple[Alias, ...]
    lowering: tuple[Lowering, ...]
    ranges: Mapping[str, tuple[int | None, int | None]]
    records: tuple[StandaloneState, ...]
    initial: Mapping[str, Tensor]


def serialize(
    module: torch.nn.Module | ExportedProgram,
    example_inputs: Sequence[Any] = (),
    *,
    lift_mutable_buffers: bool = False,
    kwargs: Mapping[str, Any] | None = None,
    engine: EngineKind = "torch",
    dynamic_shapes: Any = None,
    assume_consecutive: Collection[str] = (),
    alias: AliasKind | None = None,
    strict: bool = False,
    compute_capability: str | None = None,
) -> Serialized:
    """Compile a module that mutates its inputs or buffers into a serialized engine.

    Args:
        module: as in `inplace_builder.build`.
        example_inputs: as in `inplace_builder.build`.
        lift_mutable_buffers: make states of the buffers that the module mutates, for the caller to
            bind. Without it such a module is refused, because their values would be lost.
        kwargs: as in `inplace_builder.build`.
        engine: as in `inplace_builder.build`.
        dynamic_shapes: as in `inplace_builder.build`.
        assume_consecutive: as in `inplace_builder.build`.
        alias: as in `inplace_builder.build`.
        strict: as in `inplace_builder.build`.
        compute_capability: compile for this GPU, for example ``8.9``, without having it (TensorRT
            for RTX only).

    Raises:
        BuildError: as in `inplace_builder.build`; or buffers are mutated and not lifted.
        LoadError: the TensorRT that was asked for is not installed.
    """
    with adapted_states(module, example_inputs, kwargs) as adapted:
        exported = export_for(
            module,
            adapted.args,
            engine,
            dynamic_shapes=adapted.shapes(dynamic_shapes),
            kwargs=adapted.kwargs,
        )
    capture = capture_exported(
        exported, assume_consecutive=assume_consecutive, strict=strict, alignment=alignment(engine)
    )
    call = describe_call(exported, capture)
    records = state_records(capture, call)
    owned = list(dict.fromkeys(state.source for state in records if state.owner == "module"))
    if owned and not lift_mutable_buffers:
        raise BuildError(
            f"the module mutates its buffers {owned}: pass lift_mutable_buffers=True and bind them "
            f"as states, or let inplace_builder.build make an engine that holds them"
        )
    plan = None
    if engine != "torch":
        from inplace_builder.lower.compile import Target
        from inplace_builder.standalone.plan import build_plan

        target = Target.of(engine, compute_capability)
        plan = build_plan(capture, call, target, alias=alias, strict=strict)
    initial = _initial_values(capture, plan)
    return Serialized(
        content=_archive(capture.exported) if plan is None else bytes(plan.content),
        engine=engine,
        plan=None if plan is None else plan.record,
        inputs=_input_bindings(capture, call, plan),
        states=tuple(
            Binding(state.name, state.dtype, _bound_shape(state, initial[state.name]))
            for state in records
        ),
        outputs=tuple(
            Binding(result_name(place), result.dtype, result.shape)
            for place, result in enumerate(call.results)
            if result.dtype is not None
        ),
        aliases=(plan or capture).aliases,
        lowering=lowering_records(capture, plan),
        ranges=call.ranges,
        records=records,
        initial=initial,
    )


def _input_bindings(
    capture: ExportedCapture, call: CallSignature, plan: "CompiledPlan | None"
) -> tuple[Binding, ...]:
    inputs = [
        Binding(argument.name, argument.dtype or Dtype.INT64, argument.shape)
        for argument in call.arguments
        if argument.kind in ("tensor", "number")
    ]
    if plan is None:
        inputs.append(Binding(SLOTS, Dtype.INT32, (capture.rows,)))
    return tuple(inputs)


def _initial_values(capture: ExportedCapture, plan: "CompiledPlan | None") -> dict[str, Tensor]:
    """A copy of each state's value, as it is bound."""
    values = {}
    for state in capture.states:
        own_shape = plan is not None and state.kind == "user"
        values[state.name] = state.tensor.initial if own_shape else state.bound_initial()
    return {name: value.clone() for name, value in values.items()}


def _bound_shape(state: StandaloneState, initial: Tensor) -> tuple[int | str, ...]:
    """Extents as they are bound: with the slot axis in front where the tensor has none."""
    return (*initial.shape[: initial.dim() - len(state.view_shape)], *state.view_shape)


def _archive(exported: ExportedProgram) -> bytes:
    content = io.BytesIO()
    torch.export.save(exported, content)
    return content.getvalue()
