"""Tensors with a part replaced: scatter operators, index_put and roll."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from inplace_builder.lower.converters.shape import cut, offset
from inplace_builder.lower.layers import ITensor, Number, Size
from inplace_builder.lower.network import Network
from inplace_builder.lower.registry import converter

aten = torch.ops.aten


INT = torch.int32


def _placed(ctx: Network, base: ITensor, new: ITensor, axis: int, source: ITensor) -> ITensor:
    """``base`` with entries of an axis replaced by entries of ``new``.

    Args:
        ctx: the network.
        base: the tensor.
        new: the new entries.
        axis: the axis.
        source: ``[extent]`` int32: for each entry of ``base`` the entry of ``new`` that replaces
            it, or -1.
    """
    replaced = ctx.logical_not(ctx.less(source, ctx.scalar(0, INT, 1)))
    entries = ctx.gather(new, ctx.elementwise("MAX", source, ctx.scalar(0, INT, 1)), axis)
    shape = [1] * len(base.shape)
    shape[axis] = -1
    return ctx.select(ctx.reshape(replaced, shape), entries, base)


def _slice_source(ctx: Network, extent: Size, start: Size, step: int, count: Size) -> ITensor:
    """The ``source`` of `_placed` for ``count`` entries from ``start``, every ``step``-th."""
    if isinstance(extent, int) and isinstance(start, int) and isinstance(count, int):
        source = torch.full((extent,), -1, dtype=INT)
        source[start : start + count * step : step] = torch.arange(count, dtype=INT)
        return ctx.constant(source)
    distance = ctx.subtract(ctx.iota(extent, INT), ctx.tensor(start, INT, 1))
    entry = (
        distance if step == 1 else ctx.elementwise("FLOOR_DIV", distance, ctx.scalar(step, INT, 1))
    )
    inside = ctx.logical_and(
        ctx.logical_not(ctx.less(distance, ctx.scalar(0, INT, 1))),
        ctx.less(entry, ctx.tensor(count, INT, 1)),
    )
    if step != 1:
        inside = ctx.logical_and(
            inside, ctx.equal(ctx.multiply(entry, ctx.scalar(step, INT, 1)), distance)
        )
    return ctx.select(inside, entry, ctx.scalar(-1, INT, 1))


def _index_source(
    ctx: Network, extent: Size, index: ITensor, count: Size, *, wraps: bool
) -> ITensor:
    """The ``source`` of `_placed` for entries at the indices in ``index``, ``[count]``.

    Of equal indices the last one counts. Negative ones count from the end if ``wraps``.
    """
    index = ctx.cast(index, INT)
    if wraps:
        index = ctx.select(
            ctx.less(index, ctx.scalar(0, INT, 1)),
            ctx.add(index, ctx.tensor(extent, INT, 1)),
            index,
        )
    hit = ctx.equal(
        ctx.unsqueeze(ctx.iota(extent, INT), [1]), ctx.unsqueeze(index, [0])
    )  # [extent, count]
    entry = ctx.unsqueeze(ctx.iota(count, INT), [0])
    return ctx.reduce("MAX", ctx.select(hit, entry, ctx.scalar(-1, INT, 2)), [1], keep=False)


@converter(aten.slice_scatter.default)
def slice_scatter(
    ctx: Network,
    base: ITensor,
    new: ITensor,
    dim: int = 0,
    start: Size | None = None,
    end: Size | None = None,
    step: int = 1,
) -> ITensor:
    """``base[start:end:step] = new`` along an axis.

    The number of entries is read from the captured graph.
    """
    shape = ctx.meta(ctx.node.args[0]).shape
    dim %= len(shape)
    count = ctx.meta(ctx.node.args[1]).shape[dim]
    return _placed(
        ctx,
        base,
        new,
        dim,
        _slice_source(ctx, shape[dim], offset(shape[dim], start or 0), step, count),
    )


@converter(aten.select_scatter.default)
def select_scatter(ctx: Network, base: ITensor, new: ITensor, dim: int, index: Size) -> ITensor:
    """``base[index] = new`` along an axis."""
    shape = ctx.meta(ctx.node.args[0]).shape
    dim %= len(shape)
    return _placed(
        ctx,
        base,
        ctx.unsqueeze(new, [dim]),
        dim,
        _slice_source(ctx, shape[dim], offset(shape[dim], index), 1, 1),
    )


@converter(aten.index_copy.default)
def index_copy(ctx: Network, base: ITensor, dim: int, index: ITensor, new: ITensor) -> ITensor:
    """Replace the entries of an axis at these indices."""
    shape = ctx.meta(ctx.node.args[0]).shape
    dim %= len(shape)
    places = ctx.meta(ctx.node.args[2]).shape
    count = places[0] if len(places) else 1
    return _placed(
        ctx,
        base,
        new,
        dim,
        _index_source(ctx, shape[dim], ctx.expand_rank(index, 1), count, wraps=False),
    )


def _one_place(node: Node, ctx: Network) -> str | None:
    if len(node.args) > 3 and node.args[3]:
        return "it accumulates, which is not lowered"
    indices = [index for index in node.args[1] if index is not None]  # type: ignore[union-attr]
    if len(indices) != 1:
        return f"it has {len(indices)} index tensors; only one is lowered"
    meta = ctx.meta(indices[0])
    if meta.dtype not in (torch.int32, torch.int64) or meta.dim() > 1:
        return (
            f"its index is {meta.dtype} of rank {meta.dim()}; integers of rank 0 or 1 are lowered"
        )
    return None


@converter(aten.index_put.default, validator=_one_place)
def index_put(
    ctx: Network,
    base: ITensor,
    indices: Sequence[ITensor | None],
    new: ITensor,
    accumulate: bool = False,
) -> ITensor:
    """``base[:, …, index] = new``.

    Negative indices count from the end; of equal indices the last one counts.
    """
    shape = list(ctx.meta(ctx.node.args[0]).shape)
    dim = next(axis for axis, index in enumerate(indices) if index is not None)
    places = ctx.meta(ctx.node.args[1][dim]).shape  # type: ignore[index]
    count = places[0] if len(places) else 1
    if not len(places):  # the axis is missing from what is written
        new = ctx.unsqueeze(ctx.expand_rank(new, len(shape) - 1), [dim])
    new = ctx.expand(ctx.expand_rank(new, len(shape)), [*shape[:dim], count, *shape[dim + 1 :]])
    source = _index_source(ctx, shape[dim], ctx.expand_rank(indices[dim], 1), count, wraps=True)
    return _placed(ctx, base, new, dim, source)


def _elements(node: Node, ctx: Network) -> str | None:
    return "TensorRT scatters no booleans" if ctx.meta(node.args[0]).dtype == torch.bool else None


@converter(aten.scatter.src, aten.scatter.value, validator=_elements)
def scatter(
    ctx: Network, base: ITensor, dim: int, index: ITensor, new: ITensor | Number
) -> ITensor:
    """One element of ``new`` for each element of ``index``, at that place of an axis."""
    shape = ctx.meta(ctx.node.args[2]).shape
    if isinstance(new, int | float):
        new = ctx.expand(ctx.scalar(new, ctx.dtype_of(base), len(shape)), shape)
    else:
        for axis, extent in enumerate(shape):
            new = cut(
                ctx, new, [*shape[:axis], *ctx.meta(ctx.node.args[3]).shape[axis:]], axis, 0, extent
            )
    layer = ctx.network.add_scatter(base, ctx.cast(index, INT), new, ctx.api.ScatterMode.ELEMENT)
    layer.axis = dim % len(base.shape)
    return ctx.output(layer)


def _known_shifts(node: Node, ctx: Network) -> str | None:
    shifts: Any = node.args[1]
    dims: Any = node.args[2] if len(node.args) > 2 else []
    if not dims:
        return "it rolls a flattened tensor; give dims"
    extents = ctx.meta(node.args[0]).shape
    if not all(isinstance(shift, int) for shift in shifts) or not all(
        isinstance(extents[dim], int) for dim in dims
    ):
        return "it rolls by, or along, an extent that varies"
    return None


@converter(aten.roll.default, validator=_known_shifts)
def roll(ctx: Network, x: ITensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> ITensor:
    """Move entries along an axis; those that pass the end continue at the start."""
    shape = ctx.meta(ctx.node.args[0]).shape
    for shift, dim in zip(shifts, dims, strict=True):
        dim %= len(shape)
        first = -shift % shape[dim]
        if first:
            parts = [
                cut(ctx, x, shape, dim, first, shape[dim] - first),
                cut(ctx, x, shape, dim, 0, first),
            ]
            x = ctx.concatenate(parts, dim)
    return x
