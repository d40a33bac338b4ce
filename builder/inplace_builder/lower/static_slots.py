"""Reads and attention in plain layers, where row r of a step is slot r.

The mechanisms ``copy`` and ``kv_cache_update`` work like this: TensorRT updates a whole batch of
caches, not selected slots of an arena. The runtime binds the slots of a step, one for each row, and
every row has as many tokens as the others: a decode step has one token in each row, a prefill step
has one row with a chunk. A slot of -1 is a null row: it writes nothing and gives zeros.

Attention is a matrix product, a float32 softmax and a matrix product. Its cost follows the
capacity, not the cached length. Entries beyond the cached length never reach the result, whatever
they hold: their scores are replaced, and their values are replaced by zeros, because a weight of
zero times NaN is NaN.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from inplace_builder.lower.layers import MASKED_SCORE, ITensor, Size, expression
from inplace_builder.lower.network import Network, NetworkState
from inplace_builder.lower.registry import state_converter

inplace = torch.ops.inplace


INT = torch.int32


@dataclass(frozen=True)
class Rows:
    """The rows of a step.

    Attributes:
        count: number of rows, which is the number of slots.
        null: ``[rows]`` bool: the row is a null row.
        starts: ``[rows]`` int32: cached length before the step.
    """

    count: Size
    null: ITensor
    starts: ITensor

    def null_as(self, ctx: Network, rank: int) -> ITensor:
        """``null`` with axes of extent 1 added at the end, up to this rank."""
        return ctx.reshape(self.null, (-1, *(1,) * (rank - 1)))

    def column(self, ctx: Network, x: ITensor) -> ITensor:
        """``[rows]`` as ``[rows, 1]``."""
        return ctx.reshape(x, (-1, 1))


def rows_of(
    ctx: Network, states: Sequence[NetworkState], slots: ITensor, write_indices: ITensor | None
) -> Rows:
    """The rows that the arguments of the current operator describe.

    TensorRT is told that the first axis of these states counts rows.
    """
    count = ctx.meta(_argument(ctx.node, "slots")).shape[0]
    if not isinstance(count, int):
        for state in states:
            state.input.set_dimension_name(0, str(expression(count)))

    def make() -> Rows:
        null = ctx.less(slots, ctx.scalar(0, ctx.dtype_of(slots), 1))
        starts = ctx.scalar(0, INT, 1) if write_indices is None else ctx.cast(write_indices, INT)
        return Rows(count, null, starts)

    return ctx.cached((Rows, slots, write_indices), make)


def _argument(node: torch.fx.Node, name: str) -> object:
    """An argument of an operator's call by the name that its schema gives it."""
    assert isinstance(node.target, torch._ops.OpOverload)
    position = [each.name for each in node.target._schema.arguments].index(name)
    return node.args[position] if position < len(node.args) else node.kwargs[name]


@state_converter(inplace.read.default, "copy", "kv_cache_update")
def read(ctx: Network, state: NetworkState, slots: ITensor) -> ITensor:
    """The rows of the state, with the updates so far; null rows are zeros."""
    rows = rows_of(ctx, (state,), slots, None)
    current, rank = state.current, len(state.spec.shape) + 1
    if len(current.shape) != rank:  # bound with axes merged
        current = ctx.reshape(current, (rows.count, *state.spec.shape))
    zero = ctx.tensor(0, state.spec.dtype.as_torch, rank)
    return ctx.select(rows.null_as(ctx, rank), zero, current)


@dataclass(frozen=True)
class Visibility:
    """Which cached positions queries attend to.

    Attributes:
        written: ``[rows, capacity]`` bool: the entry holds a token.
        visible: ``[rows, 1, queries, capacity]`` bool: the query attends to the entry. Queries are
            a row's tokens, repeated for each head of a group.
    """

    written: ITensor
    visible: ITensor


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
    attention_chunk: int = 0,
    group: int = 1,
) -> Visibility:
    """The masks of queries over caches that already hold the appended tokens.

    Layers with the same options share them.

    Args:
        ctx: the network.
        rows: its rows.
        query: from `by_row`.
        capacity: entries of a cache.
        append, causal, window, attention_chunk, ring: as the operator has them.
        group: query heads that are packed into one cache head, see `_attend`.
    """
    options: dict[str, Any] = {
        "append": append,
        "causal": causal,
        "window": window,
        "attention_chunk": attention_chunk,
        "ring": ring,
        "group": group,
    }
    key = (Visibility, rows.null, rows.starts, capacity, *options.values())
    return ctx.cached(key, partial(_visibility, ctx, rows, query, capacity, **options))


def _visibility(
    ctx: Network,
    rows: Rows,
    query: ITensor,
    capacity: int,
    *,
    append: bool,
    causal: bool,
    window: int,
    attention_chunk: int,
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
    if ring:
        # entry c holds the newest position that is c modulo the capacity; a negative position
        # means that the entry was not written yet
        newest = ctx.subtract(length, ctx.scalar(1, INT, 2))
        positions = ctx.subtract(
            newest, modulo(ctx, ctx.subtract(newest, entries), ctx.scalar(capacity, INT, 2))
        )
        written = ctx.logical_not(ctx.less(positions, ctx.scalar(0, INT, 2)))
    else:
        written = ctx.less(entries, length)
    token = ctx.unsqueeze(ctx.iota(tokens, INT), [0])
    if group > 1:
        token = ctx.concatenate([token] * group, 1)
    query_positions = ctx.reshape(ctx.add(starts, token), (0, 1, -1, 1))
    positions = ctx.reshape(positions, (-1, 1, 1, capacity))
    visible = ctx.reshape(written, (-1, 1, 1, capacity))
    if causal:
        later = ctx.elementwise("GREATER", positions, query_positions)
        visible = ctx.logical_and(visible, ctx.logical_not(later))
    if window:
        oldest = ctx.subtract(query_positions, ctx.scalar(window, INT, 4))
        visible = ctx.logical_and(visible, ctx.elementwise("GREATER", positions, oldest))
    if attention_chunk:
        inside = modulo(ctx, query_positions, ctx.scalar(attention_chunk, INT, 4))
        before = ctx.less(positions, ctx.subtract(query_positions, inside))
        visible = ctx.logical_and(visible, ctx.logical_not(before))
    return Visibility(written, visible)


AppendToState = Callable[[Network, NetworkState, Rows, ITensor], None]
"""Appends packed tokens ``[tokens, …]`` to a state."""


def append_and_attend(
    ctx: Network,
    append_to_state: AppendToState,
    query: ITensor,
    key: ITensor | None,
    value: ITensor | None,
    key_state: NetworkState,
    value_state: NetworkState | None,
    slots: ITensor,
    row_offsets: ITensor,
    write_indices: ITensor,
    sinks: ITensor | None = None,
    bias: ITensor | None = None,
    *,
    scale: float,
    append: bool = True,
    softcap: float = 0.0,
    ring: bool = False,
    latent_dim: int = 0,
    **mask: Any,
) -> ITensor:
    """Lower ``inplace::attention``: append keys and values, then attend to the updated caches.

    Args:
        ctx: the network.
        append_to_state: how the mechanism appends.
        query, key, value, key_state, value_state, slots, row_offsets, write_indices, sinks, bias,
            scale, append, softcap, ring, latent_dim: as the operator has them.
        mask: the operator's options ``causal``, ``window`` and ``attention_chunk``.

    Returns:
        Packed, ``[tokens, heads, value_dim]``.
    """
    states = [state for state in (key_state, value_state) if state is not None]
    rows = rows_of(ctx, states, slots, write_indices)
    if append:
        for state, new in zip(states, (key, value), strict=False):
            append_to_state(ctx, state, rows, new)
    queries = by_row(ctx, query, rows)
    kv_heads, capacity = key_state.spec.shape[:2]
    group = queries.shape[1] // kv_heads
    masks = visibility(ctx, rows, queries, capacity, append=append, ring=ring, group=group, **mask)
    keys = key_state.current
    if value_state is None:
        values = ctx.slice(keys, [0] * 4, [*ctx.extents.of(keys)[:3], latent_dim])
    else:
        values = value_state.current
    if bias is not None:
        bias = by_row(ctx, bias, rows)
    return _attend(ctx, queries, keys, values, masks, sinks, bias, scale=scale, softcap=softcap)


def modulo(ctx: Network, x: ITensor, by: ITensor) -> ITensor:
    """``x % by`` as Python has it, never negative; int32."""
    return ctx.subtract(x, ctx.multiply(ctx.elementwise("FLOOR_DIV", x, by), by))


def _attend(
    ctx: Network,
    query: ITensor,
    keys: ITensor,
    values: ITensor,
    masks: Visibility,
    sinks: ITensor | None,
    bias: ITensor | None,
    *,
    scale: float,
    softcap: float,
) -> ITensor:
    """Softmax attention.

    The query heads of a group are packed into one cache head, so that its keys are read once, and
    nothing here has more than four axes. These are the forms that TensorRT 10.6 was seen to build
    for real models.

    Args:
        ctx: the network.
        query: `by_row` queries.
        keys: ``[rows, kv_heads, capacity, dim]``.
        values: ``[rows, kv_heads, capacity, value_dim]``.
        masks: which entries are attended to; their ``group`` is the query heads of a cache head.
        sinks: ``[heads]``: a score of each query head that has no value; None without them.
        bias: ``[rows, heads or 1, tokens of a row, capacity]``: added to the scores; None without.
        scale: factor of the scores.
        softcap: if not 0, scores become ``softcap * tanh(scores / softcap)``.

    Returns:
        Packed, ``[tokens, heads, value_dim]``.
    """
    heads, dim = query.shape[1], query.shape[3]
    kv_heads, capacity, value_dim = keys.shape[1], keys.shape[2], values.shape[3]
    values = ctx.select(
        ctx.reshape(masks.written, (-1, 1, capacity, 1)),
        values,
        ctx.scalar(0.0, ctx.dtype_of(values), 4),
    )
    scores = ctx.matmul(ctx.reshape(query, (0, kv_heads, -1, dim)), keys, transpose_b=True)
    scores = ctx.multiply(ctx.cast(scores, torch.float32), ctx.scalar(scale, torch.float32, 4))
    if softcap:
        cap = ctx.scalar(softcap, torch.float32, 4)
        scores = ctx.multiply(ctx.activation("TANH", ctx.elementwise("DIV", scores, cap)), cap)
    if bias is not None:
        scores = ctx.add(scores, _bias_of_heads(ctx, bias, heads, kv_heads))
    scores = ctx.select(masks.visible, scores, ctx.scalar(MASKED_SCORE, torch.float32, 4))
    if sinks is None:
        weights = ctx.softmax(scores, 3)
    else:
        by_head = ctx.reshape(scores, (0, heads, -1, capacity))
        weights = _softmax_with_sinks(ctx, by_head, ctx.reshape(sinks, (1, heads, 1, 1)))
        weights = ctx.reshape(weights, (0, kv_heads, -1, capacity))
    out = ctx.matmul(ctx.cast(weights, ctx.dtype_of(values)), values)
    out = ctx.permute(ctx.reshape(out, (0, heads, -1, value_dim)), (0, 2, 1, 3))
    return ctx.reshape(out, (-1, heads, value_dim))


def _bias_of_heads(ctx: Network, bias: ITensor, heads: int, kv_heads: int) -> ITensor:
    """A bias as scores are: ``[rows, kv_heads or 1, tokens of all heads of a group, capacity]``."""
    bias, capacity = ctx.cast(bias, torch.float32), bias.shape[3]
    if bias.shape[1] == heads:
        return ctx.reshape(bias, (0, kv_heads, -1, capacity))
    return ctx.concatenate([bias] * (heads // kv_heads), 2)


def _softmax_with_sinks(ctx: Network, scores: ITensor, sinks: ITensor) -> ITensor:
    """The weights of ``scores [rows, heads, tokens, capacity]`` beside ``sinks [1, heads, 1, 1]``.

    The sinks count in the sum only; both are computed in float32.
    """
    sinks = ctx.cast(sinks, torch.float32)
    largest = ctx.elementwise("MAX", ctx.reduce("MAX", scores, [3], keep=True), sinks)
    weights = ctx.unary("EXP", ctx.subtract(scores, largest))
    total = ctx.reduce("SUM", weights, [3], keep=True)
    total = ctx.add(total, ctx.unary("EXP", ctx.subtract(sinks, largest)))
    return ctx.elementwise("DIV", weights, total)
