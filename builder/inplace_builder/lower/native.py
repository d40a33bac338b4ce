"""The mechanism ``kv_cache_update``: TensorRT's own cache layer, which writes the bound cache and knows that its output is its input.

TensorRT 10.15 and later, TensorRT for RTX. An update that would start at the capacity is dropped: this is how a null row writes nothing.
"""

from typing import Any

import torch

from inplace_builder.lower.attention import INT, Rows, attend, by_row, rows_of, visibility
from inplace_builder.lower.layers import ITensor
from inplace_builder.lower.network import Network, NetworkState
from inplace_builder.lower.registry import state_converter

KIND = "kv_cache_update"


inplace = torch.ops.inplace


@state_converter(inplace.read.default, KIND)
def read(ctx: Network, state: NetworkState, slots: ITensor) -> ITensor:
    """The rows of the updated cache; null rows are zeros. A read ahead of the update is refused by the mechanism."""
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
    """Append to each row's cache."""
    rows = rows_of(ctx, (state,), slots, write_indices)
    append(ctx, state, rows, value if row_offsets is None else by_row(ctx, value, rows))


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
    """Append, then attend to the updated caches."""
    rows = rows_of(ctx, (key_state, value_state), slots, write_indices)
    if append:
        for state, new in ((key_state, key), (value_state, value)):
            _append(ctx, state, rows, by_row(ctx, new, rows))
    queries = by_row(ctx, query, rows)
    kv_heads, capacity = key_state.spec.shape[:2]
    group = queries.shape[1] // kv_heads
    visible = visibility(
        ctx, rows, queries, capacity, append=append, ring=ring, group=group, **view
    )
    keys, values = key_state.current, value_state.current
    return attend(ctx, queries, keys, values, visible, scale=scale, softcap=softcap)


def append(ctx: Network, state: NetworkState, rows: Rows, new: ITensor) -> None:
    """Append ``new``, ``[rows, heads, tokens, dim]``."""
    capacity = ctx.scalar(state.spec.shape[1], INT, 1)
    layer = ctx.network.add_kv_cache_update(
        state.current, new, ctx.select(rows.null, capacity, rows.starts), ctx.api.KVCacheMode.LINEAR
    )
    ctx.written(state, ctx.output(layer))


_append = append  # where an argument named by the operator hides the function
