"""Attention over caches in plain layers: matrix product, float32 softmax, matrix product.

Its cost follows the capacity, not the cached length. What lies beyond the cached length never reaches the result, whatever it is: such
scores are replaced, and such values are replaced by zeros, because a weight of zero times NaN is NaN.
"""

from dataclasses import dataclass
from functools import partial

import torch

from inplace_builder.lower.layers import ITensor
from inplace_builder.lower.network import Network
from inplace_builder.lower.rows import INT, Rows

LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Visibility:
    """Which cached positions tokens see.

    Attributes:
        written: ``[rows, capacity]`` bool: the entry holds something.
        seen: ``[rows, 1, tokens, capacity]`` bool: the token attends to the entry.
    """

    written: ITensor
    seen: ITensor


def grouped(ctx: Network, query: ITensor, rows: Rows, kv_heads: int) -> ITensor:
    """Packed queries ``[tokens, heads, dim]`` as ``[rows, kv_heads, group, tokens of a row, dim]``."""
    heads, dim = query.shape[1], query.shape[2]
    apart = ctx.reshape(query, (rows.count, -1, kv_heads, heads // kv_heads, dim))
    return ctx.permute(apart, (0, 2, 3, 1, 4))


def visibility(
    ctx: Network, rows: Rows, query: ITensor, capacity: int, *, append: bool, causal: bool, window: int, ring: bool
) -> Visibility:
    """The masks of `grouped` queries over caches that already hold the appended tokens; made once for all layers alike."""
    key = (Visibility, rows.null, rows.starts, capacity, append, causal, window, ring)
    make = partial(_visibility, ctx, rows, query, capacity, append=append, causal=causal, window=window, ring=ring)
    return ctx.once(key, make)


def _visibility(
    ctx: Network, rows: Rows, query: ITensor, capacity: int, *, append: bool, causal: bool, window: int, ring: bool
) -> Visibility:
    tokens = ctx.extents.of(query)[3]
    starts = rows.column(ctx, rows.starts)
    entries = ctx.constant(torch.arange(capacity, dtype=INT)[None])
    length = starts
    if append:
        length = ctx.add(length, ctx.tensor(tokens, INT, 2))
    length = ctx.select(rows.column(ctx, rows.null), ctx.scalar(0, INT, 2), length)
    positions = entries
    if ring:  # entry c holds the newest position that is c modulo the capacity; a negative one is not written yet
        newest = ctx.subtract(length, ctx.scalar(1, INT, 2))
        positions = ctx.subtract(newest, modulo(ctx, ctx.subtract(newest, entries), capacity))
        written = ctx.invert(ctx.less(positions, ctx.scalar(0, INT, 2)))
    else:
        written = ctx.less(entries, length)
    queries = ctx.add(starts, ctx.unsqueezed(ctx.iota(tokens, INT), [0]))
    at = ctx.unsqueezed(queries, [1, 3])
    positions = ctx.unsqueezed(positions, [1, 2])
    seen = ctx.unsqueezed(written, [1, 2])
    if causal:
        seen = ctx.both(seen, ctx.invert(ctx.elementwise("GREATER", positions, at)))
    if window:
        seen = ctx.both(seen, ctx.elementwise("GREATER", positions, ctx.subtract(at, ctx.scalar(window, INT, 4))))
    return Visibility(written, seen)


def modulo(ctx: Network, x: ITensor, by: int) -> ITensor:
    """``x % by`` as Python has it, never negative; int32."""
    divisor = ctx.scalar(by, INT, len(x.shape))
    quotient = ctx.elementwise("FLOOR_DIV", x, divisor)
    return ctx.subtract(x, ctx.multiply(quotient, divisor))


def attend(ctx: Network, query: ITensor, keys: ITensor, values: ITensor, visible: Visibility, *, scale: float, softcap: float) -> ITensor:
    """Softmax attention.

    Args:
        ctx: the network.
        query: `grouped` queries.
        keys: ``[rows, kv_heads, capacity, dim]``.
        values: the same of the values.
        visible: what is attended.
        scale: factor of the scores.
        softcap: if not 0, scores become ``softcap * tanh(scores / softcap)``.

    Returns:
        Packed, ``[tokens, heads, dim]``.
    """
    _, kv_heads, group, _, dim = query.shape
    capacity, value_dim = keys.shape[2], values.shape[3]
    values = ctx.select(ctx.unsqueezed(visible.written, [1, 3]), values, ctx.scalar(0.0, ctx.dtype_of(values), 4))
    # the queries of a group lie behind one another: one product a cache head reads its keys once
    scores = ctx.matmul(ctx.reshape(query, (0, kv_heads, -1, dim)), keys, transpose_b=True)
    scores = ctx.multiply(ctx.cast(scores, torch.float32), ctx.scalar(scale, torch.float32))
    if softcap:
        cap = ctx.scalar(softcap, torch.float32)
        scores = ctx.multiply(ctx.activation("TANH", ctx.elementwise("DIV", scores, cap)), cap)
    scores = ctx.reshape(scores, (0, kv_heads, group, -1, capacity))
    scores = ctx.select(ctx.unsqueezed(visible.seen, [1]), scores, ctx.scalar(LOWEST, torch.float32))
    weights = ctx.cast(ctx.softmax(scores, 4), ctx.dtype_of(values))
    out = ctx.matmul(ctx.reshape(weights, (0, kv_heads, -1, capacity)), values)
    out = ctx.permute(ctx.reshape(out, (0, kv_heads, group, -1, value_dim)), (0, 3, 1, 2, 4))
    return ctx.reshape(out, (-1, kv_heads * group, value_dim))
