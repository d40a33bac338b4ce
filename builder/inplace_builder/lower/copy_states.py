"""The mechanism ``copy``: a state's new value is a second output, and the runtime swaps the two.

It needs no particular feature of TensorRT, and reads and writes the whole state in each step.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import torch
from inplace.trt import TensorRT

from inplace_builder.graph.nodes import source_line
from inplace_builder.lower.layers import ITensor
from inplace_builder.lower.mechanisms import Eligibility, StateUse, mechanism
from inplace_builder.lower.network import Network, NetworkState
from inplace_builder.lower.recurrences import NAMES as RECURRENCES
from inplace_builder.lower.registry import state_converter
from inplace_builder.lower.static_slots import (
    INT,
    Rows,
    append_and_attend,
    modulo,
    rows_of,
)

inplace = torch.ops.inplace


KIND: Final = "copy"


@mechanism(KIND)
def supports_copy(uses: Sequence[StateUse], tensorrt: TensorRT) -> Eligibility:
    """States of an element type that TensorRT's select layer takes."""
    for use in uses:
        dtype = use.state.dtype.as_torch
        if dtype in (torch.int8, torch.uint8) or not tensorrt.has_dtype(dtype):
            return Eligibility(
                False,
                f"TensorRT does not select between elements of {use.state.name}, "
                f"which is {use.state.dtype}",
            )
        if use.has_dynamic_capacity:
            return Eligibility(
                False,
                f"the capacity of {use.state.name} is chosen at load; "
                f"the scatter needs an extent that is known",
            )
        if use.operator not in ("read", "update", "attention", *RECURRENCES):
            return Eligibility(
                False, f"it has no converter for {use.node.target}{source_line(use.node)}"
            )
    return Eligibility(
        True, "the state is copied into a second buffer in each step, and the runtime swaps the two"
    )


@state_converter(inplace.update.default, KIND)
def update(
    ctx: Network,
    state: NetworkState,
    slots: ITensor,
    value: ITensor,
    row_offsets: ITensor | None = None,
    write_indices: ITensor | None = None,
    axis: int = 0,
    ring: bool = False,
) -> None:
    """Rewrite slots, or append to them."""
    rows = rows_of(ctx, (state,), slots, write_indices)
    if write_indices is None:
        ctx.update_state(
            state, ctx.select(rows.null_as(ctx, len(value.shape)), state.current, value)
        )
    else:
        if row_offsets is None:
            value = _packed(ctx, value, axis)
        _scatter(ctx, state, rows, value, axis, ring=ring)


@state_converter(inplace.attention.default, KIND)
def attention(ctx: Network, *arguments: Any, ring: bool = False, **options: Any) -> ITensor:
    """Append, then attend to the updated state."""
    append = partial(_scatter, axis=2, ring=ring)
    return append_and_attend(ctx, append, *arguments, ring=ring, **options)


def _packed(ctx: Network, value: ITensor, axis: int) -> ITensor:
    """``[rows, …, new entries on axis, …]`` as ``[rows * entries, …]``."""
    order = [0, axis, *(other for other in range(1, len(value.shape)) if other != axis)]
    moved = ctx.permute(value, order)
    rest = ctx.extents.of(moved)[2:]
    return ctx.reshape(moved, (-1, *rest))


def _scatter(
    ctx: Network, state: NetworkState, rows: Rows, new: ITensor, axis: int, *, ring: bool
) -> None:
    """Write new tokens to the entries of the growing axis that they belong to.

    Args:
        ctx: the network.
        state: the state that grows, ``[rows, …]``.
        rows: the rows of the step.
        new: packed, ``[tokens, …]`` without the growing axis.
        axis: the state's axis that grows.
        ring: whether positions wrap at the end of the axis.
    """
    rank, capacity = len(state.current.shape), state.spec.shape[axis - 1]
    apart = ctx.reshape(new, (rows.count, -1, *ctx.extents.of(new)[1:]))
    tokens = ctx.tensor(ctx.extents.of(apart)[1], INT, 2)
    entries = ctx.constant(torch.arange(capacity, dtype=INT)[None])
    distance = ctx.subtract(entries, rows.column(ctx, rows.starts))
    if ring:
        distance = modulo(ctx, distance, ctx.scalar(capacity, INT, 2))
    inside = ctx.logical_and(
        ctx.less(distance, tokens), ctx.logical_not(ctx.less(distance, ctx.scalar(0, INT, 2)))
    )
    inside = ctx.logical_and(inside, ctx.logical_not(rows.column(ctx, rows.null)))
    # every entry gathers some token, even if it is not written: an index outside is undefined
    nearest = ctx.elementwise(
        "MAX",
        ctx.scalar(0, INT, 2),
        ctx.elementwise("MIN", distance, ctx.subtract(tokens, ctx.scalar(1, INT, 2))),
    )
    first = ctx.multiply(ctx.unsqueeze(ctx.iota(rows.count, INT), [1]), tokens)
    picked = ctx.gather(new, ctx.add(first, nearest), 0)  # [rows, capacity, …]
    order = [0, *range(2, rank)]
    order.insert(axis, 1)
    shape = [1] * rank
    shape[0], shape[axis] = -1, capacity
    ctx.update_state(
        state, ctx.select(ctx.reshape(inside, shape), ctx.permute(picked, order), state.current)
    )
