"""Order of the entries of an axis: sort, argsort, and sums along an axis in order."""

import torch
from torch.fx import Node

from inplace_builder.graph.nodes import argument
from inplace_builder.lower.converters.reduction import MAX_K, top_k
from inplace_builder.lower.layers import HALF, ITensor, Size
from inplace_builder.lower.network import Network
from inplace_builder.lower.registry import converter

aten = torch.ops.aten


INT = torch.int32

MAX_RANKED = 1 << 14
"""Largest extent that is sorted by comparing all pairs of entries."""


def _sorted_axis(
    ctx: Network, x: ITensor, dim: int, extent: Size, *, descending: bool, stable: bool
) -> tuple[ITensor, ITensor]:
    """The values of an axis in order, and where they were, int64.

    Floating-point numbers are sorted by TensorRT's TopK layer, which takes 3840 entries. What it
    cannot take, and what must be stable, is sorted by rank: the number of entries that come before
    an entry.
    """
    dtype = ctx.dtype_of(x)
    if dtype.is_floating_point and isinstance(extent, int) and extent <= MAX_K and not stable:
        return top_k(ctx, "MAX" if descending else "MIN", x, extent, dim)
    key = ctx.cast(x, INT) if dtype == torch.bool else x
    positions = _ranked_positions(ctx, key, dim, extent, descending=descending)
    layer = ctx.network.add_gather_v2(key, positions, ctx.api.GatherMode.ELEMENT)
    layer.axis = dim
    return ctx.cast(ctx.output(layer), dtype), ctx.cast(positions, torch.int64)


def _ranked_positions(
    ctx: Network, x: ITensor, dim: int, extent: Size, *, descending: bool
) -> ITensor:
    """Where the entries of an axis are, in order; equal ones in the order that they have."""
    rank = len(x.shape) + 1
    own, other = ctx.unsqueeze(x, [dim + 1]), ctx.unsqueeze(x, [dim])
    shape = [1] * rank
    shape[dim], shape[dim + 1] = -1, 1
    place = ctx.reshape(ctx.iota(extent, INT), shape)
    shape[dim], shape[dim + 1] = 1, -1
    of_other = ctx.reshape(ctx.iota(extent, INT), shape)
    first = ctx.elementwise("GREATER", other, own) if descending else ctx.less(other, own)
    tied = ctx.logical_and(ctx.equal(other, own), ctx.less(of_other, place))
    before = ctx.cast(ctx.elementwise("OR", first, tied), INT)
    ranks = ctx.reduce("SUM", before, [dim + 1], keep=False)
    hits = ctx.equal(ctx.unsqueeze(ranks, [dim]), place)  # [.., order, entry, ..]
    chosen = ctx.select(hits, of_other, ctx.scalar(0, INT, rank))
    return ctx.reduce("SUM", chosen, [dim + 1], keep=False)


def _small_enough(node: Node, ctx: Network) -> str | None:
    """Axes of at most 16384 entries, where the extent is known."""
    shape = ctx.meta(node.args[0]).shape
    if not shape:
        return "it has no axis"
    dim = argument(node, 1, "dim", -1)
    extent = shape[dim] if isinstance(dim, int) else None
    if isinstance(extent, int) and extent > MAX_RANKED:
        return f"it sorts {extent} entries; up to {MAX_RANKED} are lowered"
    return None


@converter(aten.sort.default, aten.argsort.default, validator=_small_enough)
def sort(
    ctx: Network, x: ITensor, dim: int = -1, descending: bool = False
) -> tuple[ITensor, ITensor] | ITensor:
    """The values of an axis in order, and where they were."""
    return _sorted(ctx, x, dim, descending=descending, stable=False)


@converter(aten.sort.stable, aten.argsort.stable, validator=_small_enough)
def sort_stable(
    ctx: Network,
    x: ITensor,
    *,
    stable: bool | None = True,
    dim: int = -1,
    descending: bool = False,
) -> tuple[ITensor, ITensor] | ITensor:
    """The values of an axis in order, equal ones in the order that they have."""
    return _sorted(ctx, x, dim, descending=descending, stable=bool(stable))


def _sorted(
    ctx: Network, x: ITensor, dim: int, *, descending: bool, stable: bool
) -> tuple[ITensor, ITensor] | ITensor:
    shape = ctx.meta(ctx.node.args[0]).shape
    axis = dim % len(shape)
    values, positions = _sorted_axis(
        ctx, x, axis, shape[axis], descending=descending, stable=stable
    )
    name = ctx.node.target._schema.name  # type: ignore[union-attr]
    return positions if name == "aten::argsort" else (values, positions)


@converter(aten.bucketize.Tensor, aten.searchsorted.Tensor)
def searchsorted(
    ctx: Network,
    one: ITensor,
    other: ITensor,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: ITensor | None = None,
) -> ITensor:
    """Where each value would be inserted into sorted boundaries."""
    bucketize = ctx.node.target is aten.bucketize.Tensor
    values, boundaries = (one, other) if bucketize else (other, one)
    rank, axes = len(values.shape), len(boundaries.shape)
    common = torch.promote_types(ctx.dtype_of(values), ctx.dtype_of(boundaries))
    if sorter is not None:
        layer = ctx.network.add_gather_v2(boundaries, sorter, ctx.api.GatherMode.ELEMENT)
        layer.axis = axes - 1
        boundaries = ctx.output(layer)
    edges = ctx.cast(boundaries, common)
    if axes == 1:  # the same for all values
        edges = ctx.reshape(edges, (*(1,) * rank, -1))
    else:
        edges = ctx.unsqueeze(edges, [axes - 1])
    each = ctx.unsqueeze(ctx.cast(values, common), [rank])
    passed = ctx.less(edges, each)
    if right or side == "right":
        passed = ctx.elementwise("OR", passed, ctx.equal(edges, each))
    count = ctx.reduce("SUM", ctx.cast(passed, INT), [rank], keep=False)
    return ctx.cast(count, ctx.result().dtype)


def _with_an_axis(node: Node, ctx: Network) -> str | None:
    """Tensors with at least one axis."""
    return None if ctx.meta(node.args[0]).dim() else "it has no axis"


@converter(aten.cumsum.default, validator=_with_an_axis)
def cumsum(ctx: Network, x: ITensor, dim: int, **_: object) -> ITensor:
    """Sums of an axis up to each entry."""
    return _cumulative(ctx, "SUM", x, dim)


@converter(aten.cumprod.default, validator=_with_an_axis)
def cumprod(ctx: Network, x: ITensor, dim: int, **_: object) -> ITensor:
    """Products of an axis up to each entry."""
    return _cumulative(ctx, "PROD", x, dim)


def _cumulative(ctx: Network, operation: str, x: ITensor, dim: int) -> ITensor:
    """A running reduction.

    Where the extent is known, each round combines entries with those 1, 2, 4, … before them. Else
    every entry reduces all those before it.
    """
    result = ctx.result().dtype
    compute = torch.float32 if result in HALF else result
    shape = ctx.meta(ctx.node.args[0]).shape
    axis, value = dim % len(shape), ctx.cast(x, compute)
    nothing = 0 if operation == "SUM" else 1
    if isinstance(shape[axis], int):
        value = _doubling(ctx, operation, value, axis, shape[axis], nothing)
    else:
        value = _all_before(ctx, operation, value, axis, shape[axis], nothing)
    return ctx.cast(value, result)


def _doubling(
    ctx: Network, operation: str, x: ITensor, axis: int, extent: int, nothing: int
) -> ITensor:
    dtype, rank, distance = ctx.dtype_of(x), len(x.shape), 1
    shape = [1] * rank
    shape[axis] = -1
    places = torch.arange(extent, dtype=INT)
    while distance < extent:
        earlier = ctx.gather(x, ctx.constant((places - distance).clamp_min(0)), axis)
        inside = ctx.constant((places >= distance).reshape(shape))
        earlier = ctx.select(inside, earlier, ctx.scalar(nothing, dtype, rank))
        x = ctx.elementwise(operation, x, earlier)
        distance *= 2
    return x


def _all_before(
    ctx: Network, operation: str, x: ITensor, axis: int, extent: Size, nothing: int
) -> ITensor:
    dtype, rank = ctx.dtype_of(x), len(x.shape) + 1
    shape = [1] * rank
    shape[axis] = -1
    place = ctx.reshape(ctx.iota(extent, INT), shape)
    shape[axis], shape[axis + 1] = 1, -1
    other = ctx.reshape(ctx.iota(extent, INT), shape)
    later = ctx.elementwise("GREATER", other, place)
    chosen = ctx.select(later, ctx.scalar(nothing, dtype, rank), ctx.unsqueeze(x, [axis]))
    return ctx.reduce(operation, chosen, [axis + 1], keep=False)
