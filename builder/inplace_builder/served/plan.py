"""From a capture to a TensorRT plan: choose mechanisms, fuse, lower, compile."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from inplace.engines.tensorrt.steps import decode_sizes, mixed_sizes
from inplace.schema.artifacts import Profile
from inplace.schema.served import Alias, AliasKind, Lowering, Program
from inplace.schema.specs import Role, StateSpec, Update
from inplace.trt import TensorRT

from inplace_builder.capture.capture import Capture
from inplace_builder.errors import BuildError
from inplace_builder.fusion.fuse import fuse, without_sampling
from inplace_builder.lower import LoweredNetwork, lower
from inplace_builder.lower.compile import CompileOptions, Range, compile_network
from inplace_builder.lower.mechanisms import ORDER, choose

SPARE_SLOTS = 5
"""Slots of the arena that verification uses; plans take at least so many."""


BUCKETS = ((1, 1), (2, 8), (9, 32), (33, 64), (65, 256))
"""Decode rows that get a profile of their own: one tuned for many rows costs a single row a third (TensorRT 10.6, H100)."""


BAKED = 1 << 20
"""Bytes; a plan that holds a larger weight has layers that TensorRT tunes, so it gets a profile for each bucket."""


@dataclass(frozen=True)
class BuiltPlan:
    """A plan and what belongs to it.

    Attributes:
        plan: the serialized engine.
        weights: weights that the plan takes as inputs.
        program: the program with its aliases.
        lowering: how each state's update was lowered.
        profiles: in the plan's order.
        baked: bytes of the weights that the plan holds.
    """

    plan: Any
    weights: Mapping[str, torch.Tensor]
    program: Program
    lowering: tuple[Lowering, ...]
    profiles: tuple[Profile, ...]
    baked: int


def build_plan(
    capture: Capture,
    tensorrt: TensorRT,
    *,
    slots: int,
    alias: AliasKind | None = None,
    strict: bool = False,
    compute_capabilities: tuple[str, ...] = (),
) -> BuiltPlan:
    """Lower and compile a captured program.

    Args:
        capture: what a frontend captured.
        tensorrt: what to compile with.
        slots: the arena's slots.
        alias: insist on this mechanism for every state.
        strict: refuse ``copy`` where it was not asked for by name.
        compute_capabilities: GPUs to compile for (TensorRT for RTX only).

    Raises:
        BuildError: no mechanism can update a state, an operator cannot be lowered, or TensorRT cannot compile the network.
    """
    order: Sequence[AliasKind] = (
        (alias,) if alias else tuple(kind for kind in ORDER if not (strict and kind == "copy"))
    )
    if strict and alias == "copy":
        raise BuildError(
            "strict refuses the mechanism copy, which was asked for; leave one of them out"
        )
    lowering = choose(capture.exported.graph, capture.states, tensorrt, order=order)
    kinds = {record.state: record.kind for record in lowering}
    names = [spec.name for spec in capture.program.outputs]
    states, program = capture.states, capture.program
    if set(kinds.values()) == {"plugin"}:
        fused = fuse(capture.exported)
        lowered = lower(
            fused,
            outputs=names,
            states=states,
            kinds=kinds,
            tensorrt=tensorrt,
            bind=fused.bindable(),
        )
    else:
        greedy, program = without_sampling(capture.exported, program)
        lowered = lower(greedy, outputs=names, states=states, kinds=kinds, tensorrt=tensorrt)
    aliases = tuple(
        Alias(output=output, input=state, kind=kinds[state])
        for state, output in lowered.state_outputs.items()
    )
    program = program.model_copy(update={"aliases": aliases})
    baked = [tensor.nbytes for tensor in lowered.context.constants]
    profiles = _profiles(program, max(slots, SPARE_SLOTS), tuned=max(baked, default=0) >= BAKED)
    least = tuple(_least(state, capture.min_capacity) for state in states)
    ranges = [_ranges(program, states, least, profile, slots) for profile in profiles]
    options = CompileOptions(
        compute_capabilities=compute_capabilities, plugins="plugin" in kinds.values()
    )
    plan = compile_network(lowered, [_relevant(lowered, found) for found in ranges], options)
    return BuiltPlan(plan, lowered.bound_weights, program, lowering, profiles, sum(baked))


def _profiles(program: Program, slots: int, *, tuned: bool) -> tuple[Profile, ...]:
    """The ranges of steps that the runtime makes of this program.

    Args:
        program: its aliases decide how rows are placed.
        slots: most slots of an arena.
        tuned: whether TensorRT tunes layers by the number of rows.
    """
    if program.rows_are_slots:
        decode = Profile(rows=(1, slots), tokens=(1, slots))
        return (
            (decode, Profile(rows=(1, 1), tokens=(2, program.chunk)))
            if program.chunk > 1
            else (decode,)
        )
    mixed = mixed_sizes(program)
    if not tuned:
        most = (mixed or decode_sizes(program))[-1]
        return (Profile(rows=(1, most.rows), tokens=(1, most.tokens)),)
    last = program.max_rows
    found = [
        Profile(rows=(low, min(high, last)), tokens=(low, min(high, last)))
        for low, high in BUCKETS
        if low <= last
    ]
    return (
        (*found, Profile(rows=(mixed[0].rows,) * 2, tokens=(mixed[0].tokens, mixed[-1].tokens)))
        if mixed
        else tuple(found)
    )


def _least(state: StateSpec, capacity: int | None) -> tuple[int, ...]:
    """The smallest extents of a slot, where the capacity is chosen at load."""
    if capacity is None or state.update is not Update.APPEND:
        return state.shape
    return tuple(
        capacity if axis == state.axis else extent for axis, extent in enumerate(state.shape)
    )


def _ranges(
    program: Program,
    states: Sequence[StateSpec],
    least: Sequence[tuple[int, ...]],
    profile: Profile,
    slots: int,
) -> dict[str, Range]:
    """Smallest, usual and largest shape of every input in a profile. Usual is the largest that will be: that is what is tuned."""
    usual = Profile(
        rows=(1, min(profile.rows[1], slots) if program.rows_are_slots else profile.rows[1]),
        tokens=(
            1,
            min(profile.tokens[1], slots)
            if program.rows_are_slots and profile.rows == profile.tokens
            else profile.tokens[1],
        ),
    )
    found: dict[str, Range] = {}
    for spec in program.inputs:
        packed = spec.role in (Role.TOKENS, Role.POSITIONS)
        low, high = profile.tokens if packed else profile.rows
        most = usual.tokens[1] if packed else usual.rows[1]
        rest = spec.shape[1:] if spec.role is Role.TOKENS else spec.shape
        more = spec.role is Role.ROW_OFFSETS
        found[spec.name] = ((low + more, *rest), (most + more, *rest), (high + more, *rest))
    for state, smallest in zip(states, least, strict=True):
        low, high = profile.rows if program.rows_are_slots else (1, max(slots, SPARE_SLOTS))
        most = usual.rows[1] if program.rows_are_slots else slots
        found[state.name] = ((low, *smallest), (most, *state.shape), (high, *state.shape))
    return found


def _relevant(lowered: LoweredNetwork, ranges: Mapping[str, Range]) -> dict[str, Range]:
    """Only inputs whose shape varies, and that the network kept."""
    network = lowered.network
    inputs = {
        tensor.name: tensor
        for tensor in (network.get_input(index) for index in range(network.num_inputs))
    }
    return {
        name: found
        for name, found in ranges.items()
        if name in inputs and -1 in tuple(inputs[name].shape)
    }
