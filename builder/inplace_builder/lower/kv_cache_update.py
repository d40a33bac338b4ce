"""The mechanism ``kv_cache_update``: TensorRT's own cache layer writes the bound cache.

TensorRT 10.15 and later and TensorRT for RTX have the layer, and know that its output is its input.
It drops an update that starts at the capacity; null rows write nothing by starting there.
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from inplace.schema.specs import StateSpec
from inplace.trt import TensorRT

from inplace_builder.graph.nodes import source_line
from inplace_builder.lower.layers import ITensor
from inplace_builder.lower.mechanisms import Eligibility, StateUse, mechanism
from inplace_builder.lower.network import Network, NetworkState
from inplace_builder.lower.registry import state_converter
from inplace_builder.lower.static_slots import INT, Rows, append_and_attend, by_row, rows_of

inplace = torch.ops.inplace


KIND: Final = "kv_cache_update"


MIN_VERSION = (10, 15)
"""The first TensorRT with IKVCacheUpdateLayer."""


@mechanism(KIND)
def supports_kv_cache_update(uses: Sequence[StateUse], tensorrt: TensorRT) -> Eligibility:
    """Caches ``[slots, heads, capacity, dim]`` in a float type, appended to once in each step.

    A state whose extents are all known may have any other axes before and behind the one that
    grows: they are merged to ``heads`` and ``dim``. A batch that is written at one position is one
    row.
    """
    if not tensorrt.is_rtx and tensorrt.version[:2] < MIN_VERSION:
        return Eligibility(
            False,
            f"IKVCacheUpdateLayer is in TensorRT 10.15 and later and in TensorRT for RTX, "
            f"this is {tensorrt}",
        )
    order = {node: place for place, node in enumerate(uses[0].node.graph.nodes)}
    for use in uses:
        writers = (other for other in uses if other.writes and other.state.name == use.state.name)
        is_last = all(order[writer.node] < order[use.node] for writer in writers)
        reason = _unsupported_state(use) or _unsupported_operator(use, after_writers=is_last)
        if reason is not None:
            return Eligibility(False, f"{reason}{source_line(use.node)}")
    for name in {use.state.name for use in uses}:
        num_writers = sum(use.writes for use in uses if use.state.name == name)
        if num_writers > 1:
            return Eligibility(
                False,
                f"{name} is updated {num_writers} times a step; the layer's cache must be an "
                f"input of the network",
            )
    return Eligibility(True, "TensorRT's cache layer updates the bound memory itself")


def _unsupported_state(use: StateUse) -> str | None:
    """Why the state cannot be a cache of the layer, or None."""
    state = use.state
    if not use.fixed and len(state.shape) != 3:
        return (
            f"{state.name} has rank {len(state.shape) + 1} with its slots; "
            f"the layer takes [slots, heads, capacity, dim]"
        )
    if state.axis is None:
        return f"{state.name} does not grow; the layer appends along axis 2"
    if not use.fixed and state.axis != 1:
        return f"{state.name} grows along axis {state.axis + 1}; the layer appends along axis 2"
    if state.dtype.as_torch not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{state.name} is {state.dtype}; the layer takes float32, float16 and bfloat16"
    if use.has_dynamic_capacity:
        return f"the capacity of {state.name} is chosen at load; the layer has a static one"
    return None


def _unsupported_operator(use: StateUse, *, after_writers: bool) -> str | None:
    """Why the layer cannot do what the operator does, or None.

    Args:
        use: the call of the operator.
        after_writers: every update of the state comes before it.
    """
    name, arguments = use.state.name, use.arguments
    if arguments.get("ring"):
        return f"{name} is a ring; the layer only appends and drops what is beyond the capacity"
    if use.operator == "read" and not after_writers:
        return f"{name} is read before its update; TensorRT could update it first"
    if use.operator == "update" and arguments["write_indices"] is None:
        return f"{name} is rewritten; the layer only appends"
    axis = use.state.axis
    if use.operator == "update" and axis is not None and arguments["axis"] != axis + 1:
        return (
            f"{name} is appended to along axis {arguments['axis']}, and grows along axis {axis + 1}"
        )
    if use.operator not in ("read", "update", "attention"):
        return f"it has no converter for {use.node.target}"
    return None


def cache_shape(spec: StateSpec) -> tuple[int, int, int]:
    """The extents of a slot as the layer takes them: heads, capacity, dim."""
    assert spec.axis is not None
    before, behind = spec.shape[: spec.axis], spec.shape[spec.axis + 1 :]
    return torch.Size(before).numel(), spec.shape[spec.axis], torch.Size(behind).numel()


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
    heads, _, dim = cache_shape(state.spec)
    merged = state.spec.shape != cache_shape(state.spec)
    if row_offsets is None:
        new = ctx.reshape(value, (rows.count, heads, -1, dim)) if merged else value
    else:
        new = by_row(ctx, ctx.reshape(value, (-1, heads, dim)) if merged else value, rows)
    _append_to_cache(ctx, state, rows, new)


@state_converter(inplace.attention.default, KIND)
def attention(ctx: Network, *arguments: Any, **options: Any) -> ITensor:
    """Append, then attend to the updated caches."""
    return append_and_attend(ctx, _append_packed, *arguments, **options)


def _append_packed(ctx: Network, state: NetworkState, rows: Rows, new: ITensor) -> None:
    _append_to_cache(ctx, state, rows, by_row(ctx, new, rows))


def _append_to_cache(ctx: Network, state: NetworkState, rows: Rows, new: ITensor) -> None:
    """Append ``new``, ``[rows, heads, tokens, dim]``."""
    assert state.spec.axis is not None
    capacity = ctx.scalar(state.spec.shape[state.spec.axis], INT, 1)
    layer = ctx.network.add_kv_cache_update(
        state.current, new, ctx.select(rows.null, capacity, rows.starts), ctx.api.KVCacheMode.LINEAR
    )
    ctx.update_state(state, ctx.output(layer))
