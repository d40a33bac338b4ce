"""From a captured program to a TensorRT plan: choose mechanisms, fuse, lower, compile."""

from dataclasses import dataclass

from inplace.engines.tensorrt.steps import decode_sizes, mixed_sizes
from inplace.schema.artifacts import Profile
from inplace.schema.programs import Program
from inplace.schema.specs import (
    PACKED_ROLES,
    AliasKind,
    Dtype,
    Role,
    StateSpec,
    Update,
    in_words,
)

from inplace_builder.capture.capture import Capture
from inplace_builder.fusion.fuse import bindable_weights, fuse, without_sampling
from inplace_builder.lower import LoweredNetwork, choose_mechanisms, lower, lowerable
from inplace_builder.lower.compile import CompiledPlan, Range, Target, compile_plan
from inplace_builder.lower.mechanisms import candidates

VERIFICATION_SLOTS = 5
"""Slots of the arena that verification uses; every plan takes at least so many."""


BUCKETS = ((1, 1), (2, 8), (9, 32), (33, 64), (65, 256))
"""Decode rows that get a profile of their own.

A profile tuned for many rows costs a single row a third (TensorRT 10.6, H100).
"""


LARGE_CONSTANT = 1 << 20
"""Bytes. A plan that holds a larger weight has layers that TensorRT tunes by the number of rows."""


@dataclass(frozen=True)
class ServedPlan:
    """The plan of a program.

    Attributes:
        plan: the plan.
        program: the program as the plan runs it: with its aliases, and without sampling where the
            plan has no kernel for it.
    """

    plan: CompiledPlan
    program: Program


def build_plan(
    capture: Capture,
    target: Target,
    *,
    slots: int,
    alias: AliasKind | None = None,
    strict: bool = False,
) -> ServedPlan:
    """Lower and compile a captured program.

    Args:
        capture: the captured program.
        target: the TensorRT and the GPU to compile for.
        slots: the arena's slots.
        alias: the only mechanism allowed for every state.
        strict: refuse the mechanism ``copy``.

    Raises:
        LoweringError: no mechanism can update a state, an operator cannot be lowered, or TensorRT
            cannot compile the network.
    """
    tensorrt, states = target.tensorrt, capture.states
    order = candidates(alias, strict=strict)
    lowering = choose_mechanisms(capture.exported.graph, states, tensorrt, order=order)
    kinds = {record.state: record.kind for record in lowering}
    functional = lowerable(capture.exported, kinds)
    if set(kinds.values()) == {"plugin"}:
        graph, program = fuse(functional), capture.program
        bind = bindable_weights(graph)
    else:
        graph, program = without_sampling(functional, capture.program)
        bind = frozenset()
    names = [spec.name for spec in program.outputs]
    lowered = lower(graph, outputs=names, states=states, kinds=kinds, tensorrt=tensorrt, bind=bind)
    program = program.model_copy(update={"aliases": lowered.aliases(lowering)})
    profiles = _profiles(program, max(slots, VERIFICATION_SLOTS), tuned=_is_tuned(lowered))
    ranges = [_ranges(program, capture, profile, slots) for profile in profiles]
    return ServedPlan(compile_plan(lowered, target, ranges, profiles, lowering), program)


def _is_tuned(lowered: LoweredNetwork) -> bool:
    """Whether TensorRT tunes layers of the network by the number of rows."""
    return any(tensor.nbytes >= LARGE_CONSTANT for tensor in lowered.context.constants)


def _profiles(program: Program, slots: int, *, tuned: bool) -> tuple[Profile, ...]:
    """The ranges of the steps that the runtime makes of a program.

    Args:
        program: its aliases decide how rows are placed.
        slots: most slots of an arena.
        tuned: whether TensorRT tunes layers by the number of rows.
    """
    if program.rows_are_slots:
        decode = Profile(rows=(1, slots), tokens=(1, slots))
        prefill = Profile(rows=(1, 1), tokens=(2, program.chunk))
        return (decode, prefill) if program.chunk > 1 else (decode,)
    mixed = mixed_sizes(program)
    if not tuned:
        largest = (mixed or decode_sizes(program))[-1]
        return (Profile(rows=(1, largest.rows), tokens=(1, largest.tokens)),)
    max_rows = program.max_rows
    decode_profiles = tuple(
        Profile(rows=(low, min(high, max_rows)), tokens=(low, min(high, max_rows)))
        for low, high in BUCKETS
        if low <= max_rows
    )
    if not mixed:
        return decode_profiles
    tokens = (mixed[0].tokens, mixed[-1].tokens)
    return (*decode_profiles, Profile(rows=(mixed[0].rows,) * 2, tokens=tokens))


def _min_slot_shape(state: StateSpec, min_capacity: int | None) -> tuple[int, ...]:
    """The smallest shape of a slot, where the capacity is chosen at load."""
    if min_capacity is None or state.update is not Update.APPEND:
        return state.shape
    return tuple(
        min_capacity if axis == state.axis else extent for axis, extent in enumerate(state.shape)
    )


def _ranges(program: Program, capture: Capture, profile: Profile, slots: int) -> dict[str, Range]:
    """Smallest, optimal and largest shape of every input in a profile.

    The optimal shape is the one that is tuned for: the largest that a step of the runtime has.
    """
    decodes = profile.rows == profile.tokens
    opt_rows, opt_tokens = profile.rows[1], profile.tokens[1]
    if program.rows_are_slots:
        opt_rows = min(opt_rows, slots)
        opt_tokens = min(opt_tokens, slots) if decodes else opt_tokens
    ranges: dict[str, Range] = {}
    for spec in program.inputs:
        is_packed = spec.role in PACKED_ROLES
        low, high = profile.tokens if is_packed else profile.rows
        opt = opt_tokens if is_packed else opt_rows
        rest = spec.shape[1:] if spec.role is Role.TOKENS else spec.shape
        extra = spec.role is Role.ROW_OFFSETS  # one more than rows
        ranges[spec.name] = ((low + extra, *rest), (opt + extra, *rest), (high + extra, *rest))
    for state in capture.states:
        low, high = profile.rows if program.rows_are_slots else (1, max(slots, VERIFICATION_SLOTS))
        opt = opt_rows if program.rows_are_slots else slots
        shapes = [_min_slot_shape(state, capture.min_capacity), state.shape, state.shape]
        if state.dtype is Dtype.FLOAT8_E4M3FN:
            shapes = [in_words(shape) for shape in shapes]
        smallest, usual, largest = shapes
        ranges[state.name] = ((low, *smallest), (opt, *usual), (high, *largest))
    return ranges
