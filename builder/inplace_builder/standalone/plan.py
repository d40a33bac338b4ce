"""From a captured module to a TensorRT plan that is bound to the caller's memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from inplace.schema.artifacts import Plan, Profile
from inplace.schema.extents import evaluate
from inplace.schema.served import Alias, AliasKind, Lowering
from inplace.schema.specs import StateSpec
from inplace.schema.standalone import SLOTS, CallSignature, result_name
from inplace.trt import Flavor, TensorRT

from inplace_builder.capture.exported import ExportedCapture
from inplace_builder.errors import BuildError
from inplace_builder.lower import CompileOptions, LoweredNetwork, choose, compile_network, lower
from inplace_builder.lower.compile import Range, Target
from inplace_builder.lower.mechanisms import ORDER
from inplace_builder.states.state import CapturedState


@dataclass(frozen=True)
class StandalonePlan:
    """A compiled module.

    Attributes:
        content: the plan.
        record: what the manifest says of it.
        aliases: one a state, as the network has them.
        lowering: how each state is updated, and why.
        notes: what to record of the build.
    """

    content: bytes
    record: Plan
    aliases: tuple[Alias, ...]
    lowering: tuple[Lowering, ...]
    notes: dict[str, str]


def build_standalone_plan(
    capture: ExportedCapture,
    call: CallSignature,
    flavor: Flavor,
    *,
    alias: AliasKind | None = None,
    strict: bool = False,
    compute_capability: str | None = None,
    optimization_level: int | None = None,
) -> StandalonePlan:
    """Lower and compile a captured module.

    Args:
        capture: the module; states are bound alone, so row r is slot r.
        call: how it is called, which names results and ranges.
        flavor: which TensorRT.
        alias: insist on this mechanism for every state that no operator of the user's own updates.
        strict: refuse ``copy`` where it was not asked for by name.
        compute_capability: compile for this GPU, for example ``8.9``, without having it (TensorRT for RTX only).
        optimization_level: see `CompileOptions`.

    Raises:
        BuildError: there is no such GPU, a mechanism, an operator or a type has no place in TensorRT, an extent has no largest value, or
            TensorRT cannot compile it.
        LoadError: TensorRT is not installed.
    """
    target = Target.of(flavor, compute_capability)
    ranges = _ranges(call)
    lowered, lowering = lower_standalone(capture, call, target.tensorrt, alias=alias, strict=strict)
    kinds = {record.state: record.kind for record in lowering}
    aliases = tuple(
        Alias(output=output, input=state, kind=kinds[state])
        for state, output in lowered.state_outputs.items()
    )
    options = CompileOptions(
        compute_capabilities=target.capabilities,
        plugins=bool({"plugin", "user"} & set(kinds.values())),
        optimization_level=optimization_level,
    )
    kept = {lowered.network.get_input(index).name for index in range(lowered.network.num_inputs)}
    used = {name: found for name, found in ranges.items() if name in kept}
    content = bytes(compile_network(lowered, [used] if used else [], options))
    record = target.plan([Profile(rows=(capture.rows,) * 2, tokens=(capture.rows,) * 2)])
    return StandalonePlan(content, record, aliases, lowering, {flavor: record.version})


def lower_standalone(
    capture: ExportedCapture,
    call: CallSignature,
    tensorrt: TensorRT,
    *,
    alias: AliasKind | None = None,
    strict: bool = False,
) -> tuple[LoweredNetwork, tuple[Lowering, ...]]:
    """The network of a captured module, each state an input of just its own extents, and how each state is updated.

    Raises:
        BuildError: as `build_standalone_plan`.
    """
    _check_leaves(call)
    if strict and alias == "copy":
        raise BuildError(
            "strict refuses the mechanism copy, which was asked for; leave one of them out"
        )
    order = (alias,) if alias else tuple(kind for kind in ORDER if not (strict and kind == "copy"))
    declared = {state.name for state in capture.states if state.kind == "user"}
    chosen = choose(
        capture.exported.graph,
        [spec for spec in capture.state_specs if spec.name not in declared],
        tensorrt,
        order=order,
    )
    found = {
        record.state: record
        for record in (
            *chosen,
            *(record for record in capture.lowering if record.state in declared),
        )
    }
    lowering = tuple(found[state.name] for state in capture.states)
    lowered = lower(
        capture.exported,
        outputs=[
            result_name(place)
            for place, result in enumerate(call.results)
            if result.kind == "tensor"
        ],
        states=capture.state_specs,
        kinds={record.state: record.kind for record in lowering},
        tensorrt=tensorrt,
        shapes={
            state.name: _bound_shape(state, spec, capture.rows)
            for state, spec in zip(capture.states, capture.state_specs, strict=True)
        },
        constants={SLOTS: capture.slots()},
    )
    if missing := sorted({state.name for state in capture.states} - set(lowered.state_outputs)):
        raise BuildError(f"internal: the network does not write {missing}")
    return lowered, lowering


def _bound_shape(state: CapturedState, spec: StateSpec, rows: int) -> tuple[int, ...]:
    """What the network has a state as: with its slots; the module's own extents where an operator of the user's own writes it."""
    return (
        tuple(state.tensor.initial.shape)
        if state.kind == "user"
        else (rows if state.has_slot_axis else 1, *spec.shape)
    )


def _check_leaves(call: CallSignature) -> None:
    for argument in call.arguments:
        if argument.kind == "state" and any(isinstance(extent, str) for extent in argument.shape):
            raise BuildError(
                f"argument {argument.where} is a state of {list(argument.shape)}, of which a call chooses an extent: a plan is bound to "
                f"states of fixed extents; build one for each, or engine='torch'"
            )
        if argument.kind == "number":
            raise BuildError(
                f"argument {argument.where} is a Python number that changes from call to call, which TensorRT cannot take: pass a tensor"
            )
    for place, result in enumerate(call.results):
        if result.kind == "number":
            raise BuildError(
                f"output {place} is a Python number that the graph computes, which TensorRT cannot return: return a tensor"
            )


def _ranges(call: CallSignature) -> dict[str, Range]:
    """Smallest, usual and largest shape of every input with a dynamic extent; usual is the largest, which is what is tuned for."""
    least = {symbol: max(low or 0, 1) for symbol, (low, _) in call.ranges.items()}
    most: Mapping[str, Any] = {
        symbol: high for symbol, (_, high) in call.ranges.items() if high is not None
    }
    found: dict[str, Range] = {}
    for argument in call.arguments:
        if argument.kind != "tensor" or all(isinstance(extent, int) for extent in argument.shape):
            continue
        try:
            high = tuple(evaluate(extent, most) for extent in argument.shape)
        except ValueError as error:
            raise BuildError(
                f"argument {argument.where} is {list(argument.shape)}, and an extent has no largest value ({error}): a plan needs one; "
                f"give it in dynamic_shapes, as torch.export.Dim(name, max=…)"
            ) from error
        found[argument.name] = (
            tuple(evaluate(extent, least) for extent in argument.shape),
            high,
            high,
        )
    return found
