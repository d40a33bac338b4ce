"""Tensors with a part replaced: the operators slice_scatter to scatter."""

import torch
from torch.fx import Node

from inplace_builder.lower.converters.shape import cut, offset
from inplace_builder.lower.layers import ITensor, Number, Size
from inplace_builder.lower.network import Network
from inplace_builder.lower.registry import converter

aten = torch.ops.aten


INT = torch.int32


def placed(ctx: Network, base: ITensor, new: ITensor, axis: int, source: ITensor) -> ITensor:
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
    """The ``source`` of `placed` for ``count`` entries from ``start``, every ``step``-th."""
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


def index_source(ctx: Network, extent: Size, index: ITensor, count: Size) -> ITensor:
    """The ``source`` of `placed` for entries at the indices in ``index``, ``[count]``.

    Of equal indices the last one counts.
    """
    index = ctx.cast(index, INT)
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
    if isinstance(count, int) and not count:
        return base
    return placed(
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
    return placed(
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
    return placed(
        ctx,
        base,
        new,
        dim,
        index_source(ctx, shape[dim], ctx.expand_rank(index, 1), count),
    )


def _elements(node: Node, ctx: Network) -> str | None:
    """Elements that are not booleans."""
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
