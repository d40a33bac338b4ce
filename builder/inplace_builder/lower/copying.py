"""The mechanism ``copy``: a state's new value is a second output, and the runtime swaps the two buffers after each step.

It needs nothing of TensorRT, and reads and writes the whole state in each step.
"""

from typing import Any

import torch

from inplace_builder.lower.attention import INT, Rows, attend, by_row, modulo, rows_of, visibility
from inplace_builder.lower.layers import ITensor
from inplace_builder.lower.network import Network, NetworkState
from inplace_builder.lower.registry import state_converter

KIND = "copy"


inplace = torch.ops.inplace


@state_converter(inplace.read.default, KIND)
def read(ctx: Network, state: NetworkState, slots: ITensor) -> ITensor:
    """The rows of the state; null rows are zeros."""
    rows = rows_of(ctx, (state,), slots, None)
    rank = len(state.current.shape)
    return ctx.select(
        rows.null_as(ctx, rank), ctx.tensor(0, state.spec.dtype.as_torch, rank), state.current
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
        ctx.written(state, ctx.select(rows.null_as(ctx, len(value.shape)), state.current, value))
    else:
        if row_offsets is None:
            value = packed(ctx, value, axis)
        append(ctx, state, rows, value, axis, ring=ring)


@state_converter(inplace.attention.default, KIND)
def attention(
    ctx: Network,
    query: ITensor,
    key: ITensor | None,
    value: ITensor | None,
    key_state: NetworkState,
    value_state: NetworkState,
    slots: ITensor,
    row_offsets: ITensor,
    write_indices: ITensor,
    *,
    scale: float,
    append: bool = True,
    softcap: float = 0.0,
    ring: bool = False,
    **view: Any,
) -> ITensor:
    """Append, then attend to the state as it is afterwards."""
    rows = rows_of(ctx, (key_state, value_state), slots, write_indices)
    if append:
        for state, new in ((key_state, key), (value_state, value)):
            _append(ctx, state, rows, new, 2, ring=ring)
    capacity = key_state.spec.shape[1]
    queries = by_row(ctx, query, rows)
    group = queries.shape[1] // key_state.spec.shape[0]
    visible = visibility(
        ctx, rows, queries, capacity, append=append, ring=ring, group=group, **view
    )
    return attend(
        ctx, queries, key_state.current, value_state.current, visible, scale=scale, softcap=softcap
    )


def packed(ctx: Network, value: ITensor, axis: int) -> ITensor:
    """``[rows, …, new entries on axis, …]`` as ``[rows * entries, …]``."""
    order = [0, axis, *(other for other in range(1, len(value.shape)) if other != axis)]
    moved = ctx.permute(value, order)
    rest = ctx.extents.of(moved)[2:]
    return ctx.reshape(moved, (-1, *rest))


def append(
    ctx: Network, state: NetworkState, rows: Rows, new: ITensor, axis: int, *, ring: bool
) -> None:
    """Give each entry of the growing axis the new token that belongs there, or leave it.

    Args:
        ctx: the network.
        state: what grows; ``[rows, …]``.
        rows: where.
        new: packed, ``[tokens, …]`` without the growing axis.
        axis: the state's axis that grows.
        ring: whether it wraps at its end.
    """
    rank, capacity = len(state.current.shape), state.spec.shape[axis - 1]
    apart = ctx.reshape(new, (rows.count, -1, *ctx.extents.of(new)[1:]))
    tokens = ctx.tensor(ctx.extents.of(apart)[1], INT, 2)
    entries = ctx.constant(torch.arange(capacity, dtype=INT)[None])
    distance = ctx.subtract(entries, rows.column(ctx, rows.starts))
    if ring:
        distance = modulo(ctx, distance, ctx.scalar(capacity, INT, 2))
    inside = ctx.both(
        ctx.less(distance, tokens), ctx.invert(ctx.less(distance, ctx.scalar(0, INT, 2)))
    )
    inside = ctx.both(inside, ctx.invert(rows.column(ctx, rows.null)))
    # every entry takes some token, also those that keep what they hold: an index outside would be undefined
    nearest = ctx.elementwise(
        "MAX",
        ctx.scalar(0, INT, 2),
        ctx.elementwise("MIN", distance, ctx.subtract(tokens, ctx.scalar(1, INT, 2))),
    )
    first = ctx.multiply(ctx.unsqueezed(ctx.iota(rows.count, INT), [1]), tokens)
    picked = ctx.gather(new, ctx.add(first, nearest), 0)  # [rows, capacity, …]
    order = [0, *range(2, rank)]
    order.insert(axis, 1)
    shape = [1] * rank
    shape[0], shape[axis] = -1, capacity
    ctx.written(
        state, ctx.select(ctx.reshape(inside, shape), ctx.permute(picked, order), state.current)
    )


_append = append  # where an argument named by the operator hides the function
