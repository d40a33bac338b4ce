"""Attention over caches in plain layers: matrix product, float32 softmax, matrix product.

Its cost follows the capacity, not the cached length. What lies beyond the cached length never reaches the result, whatever it is: such
scores are replaced, and such values are replaced by zeros, because a weight of zero times NaN is NaN.

The rows of a step where row r is slot r (*identity placement*), and every row has as many tokens as the others.

The mechanisms ``copy`` and ``kv_cache_update`` work like this: TensorRT updates a whole batch of caches, not chosen slots of an arena.
The runtime binds the slots it steps, one a row; a decode step has one token a row, a prefill step one row with a chunk. A slot of -1 is
still a null row: it writes nothing and gives zeros.
"""

from dataclasses import dataclass
from functools import partial

import torch

from inplace_builder.lower.layers import ITensor, Size, expression
from inplace_builder.lower.network import Network, NetworkState

INT = torch.int32


def argument(node: torch.fx.Node, name: str) -> object:
    """An argument of an operator's call by the name its schema gives it."""
    assert isinstance(node.target, torch._ops.OpOverload)
    position = [each.name for each in node.target._schema.arguments].index(name)
    return node.args[position] if position < len(node.args) else node.kwargs[name]


@dataclass(frozen=True)
class Rows:
    """What a step does to each row.

    Attributes:
        count: number of rows, which is the number of slots.
        null: ``[rows]`` bool: the row is none.
        starts: ``[rows]`` int32: cached length before the step.
    """

    count: Size
    null: ITensor
    starts: ITensor

    def null_as(self, ctx: Network, rank: int) -> ITensor:
        """``null`` with axes of 1 behind it."""
        return ctx.reshape(self.null, (-1, *(1,) * (rank - 1)))

    def column(self, ctx: Network, x: ITensor) -> ITensor:
        """``[rows]`` as ``[rows, 1]``."""
        return ctx.reshape(x, (-1, 1))


def rows_of(
    ctx: Network, states: tuple[NetworkState, ...], slots: ITensor, write_indices: ITensor | None
) -> Rows:
    """The rows that the arguments of an operator describe; TensorRT is told that these states have a slot a row."""
    count = ctx.meta(argument(ctx.node, "slots")).shape[0]
    if not isinstance(count, int):
        for state in states:
            state.input.set_dimension_name(0, str(expression(count)))

    def make() -> Rows:
        null = ctx.less(slots, ctx.scalar(0, ctx.dtype_of(slots), 1))
        starts = ctx.scalar(0, INT, 1) if write_indices is None else ctx.cast(write_indices, INT)
        return Rows(count, null, starts)

    return ctx.once((Rows, slots, write_indices), make)


LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Visibility:
    """Which cached positions queries see.

    Attributes:
        written: ``[rows, capacity]`` bool: the entry holds something.
        seen: ``[rows, 1, queries, capacity]`` bool: the query attends to the entry. Queries are a row's tokens, repeated for each head of
            a group.
    """

    written: ITensor
    seen: ITensor


def by_row(ctx: Network, query: ITensor, rows: Rows) -> ITensor:
    """Packed queries ``[tokens, heads, dim]`` as ``[rows, heads, tokens of a row, dim]``."""
    heads, dim = query.shape[1], query.shape[2]
    return ctx.permute(ctx.reshape(query, (rows.count, -1, heads, dim)), (0, 2, 1, 3))


def visibility(
    ctx: Network,
    rows: Rows,
    query: ITensor,
    capacity: int,
    *,
    append: bool,
    ring: bool,
    causal: bool = True,
    window: int = 0,
    group: int = 1,
) -> Visibility:
    """The masks of `by_row` queries over caches that already hold the appended tokens; made once for all layers alike.

    Args:
        ctx: the network.
        rows: its rows.
        query: from `by_row`.
        capacity: entries of a cache.
        append, causal, window, ring: as the operator has them.
        group: heads whose queries lie behind one another, see `attend`.
    """
    key = (Visibility, rows.null, rows.starts, capacity, append, causal, window, ring, group)
    make = partial(
        _visibility,
        ctx,
        rows,
        query,
        capacity,
        append=append,
        causal=causal,
        window=window,
        ring=ring,
        group=group,
    )
    return ctx.once(key, make)


def _visibility(
    ctx: Network,
    rows: Rows,
    query: ITensor,
    capacity: int,
    *,
    append: bool,
    causal: bool,
    window: int,
    ring: bool,
    group: int,
) -> Visibility:
    tokens = ctx.extents.of(query)[2]
    starts = rows.column(ctx, rows.starts)
    entries = ctx.constant(torch.arange(capacity, dtype=INT)[None])
    length = starts
    if append:
        length = ctx.add(length, ctx.tensor(tokens, INT, 2))
    length = ctx.select(rows.column(ctx, rows.null), ctx.scalar(0, INT, 2), length)
    positions = entries
    if ring:  # entry c holds the newest position that is c modulo the capacity; a negative one is not written yet
        newest = ctx.subtract(length, ctx.scalar(1, INT, 2))
        positions = ctx.subtract(
            newest, modulo(ctx, ctx.subtract(newest, entries), ctx.scalar(capacity, INT, 2))
        )
        written = ctx.invert(ctx.less(positions, ctx.scalar(0, INT, 2)))
    else:
        written = ctx.less(entries, length)
    token = ctx.unsqueezed(ctx.iota(tokens, INT), [0])
    if group > 1:
        token = ctx.concatenate([token] * group, 1)
    at = ctx.reshape(ctx.add(starts, token), (0, 1, -1, 1))
    positions = ctx.reshape(positions, (-1, 1, 1, capacity))
    seen = ctx.reshape(written, (-1, 1, 1, capacity))
    if causal:
        seen = ctx.both(seen, ctx.invert(ctx.elementwise("GREATER", positions, at)))
    if window:
        seen = ctx.both(
            seen,
            ctx.elementwise("GREATER", positions, ctx.subtract(at, ctx.scalar(window, INT, 4))),
        )
    return Visibility(written, seen)


def modulo(ctx: Network, x: ITensor, by: ITensor) -> ITensor:
    """``x % by`` as Python has it, never negative; int32."""
    return ctx.subtract(x, ctx.multiply(ctx.elementwise("FLOOR_DIV", x, by), by))


def attend(
    ctx: Network,
    query: ITensor,
    keys: ITensor,
    values: ITensor,
    visible: Visibility,
    *,
    scale: float,
    softcap: float,
) -> ITensor:
    """Softmax attention.

    Nothing here has more than four axes, and one product a cache head reads its keys once: the queries of a group lie behind one another.
    These are the forms that TensorRT 10.6 was seen to build for real models.

    Args:
        ctx: the network.
        query: `by_row` queries.
        keys: ``[rows, kv_heads, capacity, dim]``.
        values: the same of the values.
        visible: what is attended, with ``group`` the query heads of a cache head.
        scale: factor of the scores.
        softcap: if not 0, scores become ``softcap * tanh(scores / softcap)``.

    Returns:
        Packed, ``[tokens, heads, dim]``.
    """
    heads, dim = query.shape[1], query.shape[3]
    kv_heads, capacity, value_dim = keys.shape[1], keys.shape[2], values.shape[3]
    values = ctx.select(
        ctx.reshape(visible.written, (-1, 1, capacity, 1)),
        values,
        ctx.scalar(0.0, ctx.dtype_of(values), 4),
    )
    scores = ctx.matmul(ctx.reshape(query, (0, kv_heads, -1, dim)), keys, transpose_b=True)
    scores = ctx.multiply(ctx.cast(scores, torch.float32), ctx.scalar(scale, torch.float32, 4))
    if softcap:
        cap = ctx.scalar(softcap, torch.float32, 4)
        scores = ctx.multiply(ctx.activation("TANH", ctx.elementwise("DIV", scores, cap)), cap)
    scores = ctx.select(visible.seen, scores, ctx.scalar(LOWEST, torch.float32, 4))
    out = ctx.matmul(ctx.cast(ctx.softmax(scores, 3), ctx.dtype_of(values)), values)
    out = ctx.permute(ctx.reshape(out, (0, heads, -1, value_dim)), (0, 2, 1, 3))
    return ctx.reshape(out, (-1, heads, value_dim))
