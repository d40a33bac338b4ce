"""From a captured module to a TensorRT plan that is bound to the caller's memory."""

from collections.abc import Mapping
from typing import Any

from inplace.schema.artifacts import Profile
from inplace.schema.specs import AliasKind, Lowering, StateSpec, evaluate_extent
from inplace.schema.standalone import SLOTS, CallSignature, result_name
from inplace.trt import TensorRT

from inplace_builder.capture.exported import ExportedCapture
from inplace_builder.errors import BuildError
from inplace_builder.lower import LoweredNetwork, choose_mechanisms, lower, lowerable
from inplace_builder.lower.compile import CompiledPlan, Range, Target, compile_plan
from inplace_builder.lower.kv_cache_update import cache_shape
from inplace_builder.lower.mechanisms import candidates
from inplace_builder.states.rewrite import CapturedState


def build_plan(
    capture: ExportedCapture,
    call: CallSignature,
    target: Target,
    *,
    alias: AliasKind | None = None,
    strict: bool = False,
    optimization_level: int | None = None,
) -> CompiledPlan:
    """Lower and compile a captured module.

    Args:
        capture: the module; states are bound alone, so row r is slot r.
        call: how it is called, which names results and ranges.
        target: the TensorRT and the GPU to compile for.
        alias: the only mechanism allowed for every state that no operator of the user's own
            updates.
        strict: refuse the mechanism ``copy``.
        optimization_level: see `CompileOptions`.

    Raises:
        BuildError: TensorRT does not support a mechanism, an operator or a type, an extent has no
            largest value, or TensorRT cannot compile the network.
    """
    ranges = _ranges(call)
    lowered, lowering = lower_module(capture, call, target.tensorrt, alias=alias, strict=strict)
    profile = Profile(rows=(capture.rows,) * 2, tokens=(capture.rows,) * 2)
    return compile_plan(
        lowered, target, [ranges] if ranges else [], [profile], lowering, optimization_level
    )


def lower_module(
    capture: ExportedCapture,
    call: CallSignature,
    tensorrt: TensorRT,
    *,
    alias: AliasKind | None = None,
    strict: bool = False,
) -> tuple[LoweredNetwork, tuple[Lowering, ...]]:
    """The network of a captured module, and how each state is updated.

    Each state is an input with exactly its own extents.

    Raises:
        BuildError: as `build_plan`.
    """
    _check_leaves(call)
    declared = {state.name for state in capture.states if state.kind == "user"}
    chosen = choose_mechanisms(
        capture.exported.graph,
        [spec for spec in capture.state_specs if spec.name not in declared],
        tensorrt,
        order=candidates(alias, strict=strict),
        fixed=True,
    )
    records = {record.state: record for record in (*capture.lowering, *chosen)}
    lowering = tuple(records[state.name] for state in capture.states)
    kinds = {record.state: record.kind for record in lowering}
    states = tuple(zip(capture.states, capture.state_specs, strict=True))
    lowered = lower(
        lowerable(capture.exported, kinds),
        outputs=[
            result_name(place)
            for place, result in enumerate(call.results)
            if result.kind == "tensor"
        ],
        states=capture.state_specs,
        kinds=kinds,
        tensorrt=tensorrt,
        shapes={
            state.name: _bound_shape(state, spec, capture.rows, records[state.name].kind)
            for state, spec in states
        },
        constants={SLOTS: capture.slots()},
    )
    if missing := sorted({state.name for state in capture.states} - set(lowered.state_outputs)):
        raise BuildError(f"internal: the network does not write {missing}")
    return lowered, lowering


def _bound_shape(
    state: CapturedState, spec: StateSpec, rows: int, kind: AliasKind
) -> tuple[int, ...]:
    """The shape of a state's network input.

    It has the slot axis in front, except where an operator of the user's own writes the state.
    TensorRT's cache layer has three more axes.
    """
    if state.kind == "user":
        return tuple(state.tensor.initial.shape)
    extents = cache_shape(spec) if kind == "kv_cache_update" else spec.shape
    return (rows if state.has_slot_axis else 1, *extents)


def _check_leaves(call: CallSignature) -> None:
    """Raise BuildError if an argument or a result is one that TensorRT cannot have."""
    for argument in call.arguments:
        if argument.kind == "state" and any(isinstance(extent, str) for extent in argument.shape):
            raise BuildError(
                f"argument {argument.where} is a state of {list(argument.shape)}, and a call "
                f"chooses an extent of it: a plan is bound to states of fixed extents; build one "
                f"for each, or engine='torch'"
            )
        if argument.kind == "number":
            raise BuildError(
                f"argument {argument.where} is a Python number that changes from call to call, "
                f"which TensorRT cannot take: pass a tensor"
            )
    for place, result in enumerate(call.results):
        if result.kind == "number":
            raise BuildError(
                f"output {place} is a Python number that the graph computes, which TensorRT "
                f"cannot return: return a tensor"
            )


def _ranges(call: CallSignature) -> dict[str, Range]:
    """Smallest, optimal and largest shape of every input with a dynamic extent.

    The optimal shape is the one that is tuned for: the largest.
    """
    lowest = {symbol: max(low or 0, 1) for symbol, (low, _) in call.ranges.items()}
    highest: Mapping[str, Any] = {
        symbol: high for symbol, (_, high) in call.ranges.items() if high is not None
    }
    ranges: dict[str, Range] = {}
    for argument in call.arguments:
        if argument.kind != "tensor" or all(isinstance(extent, int) for extent in argument.shape):
            continue
        try:
            largest = tuple(evaluate_extent(extent, highest) for extent in argument.shape)
        except ValueError as error:
            raise BuildError(
                f"argument {argument.where} is {list(argument.shape)}, and an extent has no "
                f"largest value ({error}): a plan needs one; give it in dynamic_shapes, as "
                f"torch.export.Dim(name, max=…)"
            ) from error
        smallest = tuple(evaluate_extent(extent, lowest) for extent in argument.shape)
        ranges[argument.name] = (smallest, largest, largest)
    return ranges
