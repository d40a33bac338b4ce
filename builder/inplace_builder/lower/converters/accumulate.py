"""Sums and other reductions of the elements that belong to one place.

TensorRT's scatter layer replaces elements, and does not say which of several wins. So each place
selects the elements that belong to it and reduces them: as many comparisons as there are pairs of a
place and an element.
"""

from typing import Any

import torch
from torch.fx import Node

from inplace_builder.graph.nodes import argument, only_first_used
from inplace_builder.lower.converters.padding import padded
from inplace_builder.lower.converters.shape import cut
from inplace_builder.lower.layers import HALF, ITensor, Number, Size, expression
from inplace_builder.lower.network import Network
from inplace_builder.lower.registry import converter

aten = torch.ops.aten


INT = torch.int32

REDUCTIONS = {
    "sum": "SUM",
    "add": "SUM",
    "mean": "SUM",
    "prod": "PROD",
    "multiply": "PROD",
    "amax": "MAX",
    "amin": "MIN",
}
"""PyTorch's names of reductions, and TensorRT's operations."""


def _neutral(operation: str, dtype: torch.dtype) -> Number:
    """The value that changes nothing in a reduction."""
    if operation in ("SUM", "PROD"):
        return 0 if operation == "SUM" else 1
    if dtype.is_floating_point:
        return float("-inf") if operation == "MAX" else float("inf")
    limits = torch.iinfo(dtype)
    return limits.min if operation == "MAX" else limits.max


def _hits_of(ctx: Network, dim: int, extent: Size, index: ITensor) -> ITensor:
    """Whether an element belongs to a place.

    Args:
        ctx: the network.
        dim: the axis of ``index`` that counts elements.
        extent: number of places.
        index: the place of each element, int32.

    Returns:
        As ``index``, with an axis of places before the axis of elements.
    """
    shape = [1] * (len(index.shape) + 1)
    shape[dim] = -1
    return ctx.equal(ctx.unsqueeze(index, [dim]), ctx.reshape(ctx.iota(extent, INT), shape))


def _gathered(ctx: Network, operation: str, hits: ITensor, dim: int, values: ITensor) -> ITensor:
    """For each place the reduction of its elements.

    Args:
        ctx: the network.
        operation: a member of TensorRT's ReduceOperation.
        hits: from `_hits_of`.
        dim: the axis of ``values`` that counts elements; it counts places in the result.
        values: the elements, in a type of at least 32 bits.
    """
    dtype = ctx.dtype_of(values)
    nothing = ctx.scalar(_neutral(operation, dtype), dtype, len(values.shape) + 1)
    chosen = ctx.select(hits, ctx.unsqueeze(values, [dim]), nothing)
    return ctx.reduce(operation, chosen, [dim + 1], keep=False)


def accumulated(
    ctx: Network,
    operation: str,
    base: ITensor,
    dim: int,
    extent: Size,
    index: ITensor,
    values: ITensor,
) -> ITensor:
    """``base`` combined with the elements of each place.

    Args:
        ctx: the network.
        operation: ``SUM``, ``PROD``, ``MAX`` or ``MIN``.
        base: the tensor.
        dim: its axis of places.
        extent: number of places.
        index: the place of each element; broadcasts with ``values``. Not negative.
        values: the elements.
    """
    dtype = ctx.dtype_of(base)
    compute = torch.float32 if dtype in HALF else dtype
    hits = _hits_of(ctx, dim, extent, ctx.cast(index, INT))
    sums = _gathered(ctx, operation, hits, dim, ctx.cast(values, compute))
    return ctx.cast(ctx.elementwise(operation, ctx.cast(base, compute), sums), dtype)


def _elements(
    ctx: Network, base: ITensor, dim: int, operation: str, source: ITensor | Number
) -> tuple[ITensor, ITensor, torch.dtype]:
    """The hits and values of a scatter that reduces, and the type that it is computed in."""
    shape, places = ctx.meta(ctx.node.args[0]).shape, ctx.meta(ctx.node.args[2]).shape
    dtype = ctx.dtype_of(base)
    compute = torch.float32 if dtype in HALF else dtype
    if isinstance(source, int | float):
        values = ctx.expand(ctx.scalar(source, compute, len(places)), places)
    else:
        values = ctx.cast(source, compute)
        given = ctx.meta(ctx.node.args[3]).shape
        for axis, extent in enumerate(places):
            values = cut(ctx, values, [*places[:axis], *given[axis:]], axis, 0, extent)
    index = ctx.cast(ctx.value(ctx.node.args[2]), INT)  # type: ignore[arg-type]
    return _hits_of(ctx, dim, shape[dim], index), values, compute


def _fitted(ctx: Network, x: ITensor, dim: int, value: Number) -> ITensor:
    """With ``value`` where the base has more entries than the index, on the other axes."""
    shape, places = ctx.meta(ctx.node.args[0]).shape, ctx.meta(ctx.node.args[2]).shape
    for axis, (whole, part) in enumerate(zip(shape, places, strict=True)):
        if axis != dim and expression(whole) != expression(part):
            x = padded(ctx, x, axis, part, 0, whole - part, value=value)
    return x


def _scattered(
    ctx: Network,
    base: ITensor,
    dim: int,
    source: ITensor | Number,
    name: str,
    *,
    include_self: bool = True,
) -> ITensor:
    """A scatter that reduces.

    Args:
        ctx: the network.
        base, dim, source: as the operator has them.
        name: of the reduction, as PyTorch has it.
        include_self: whether the base's own elements are part of the reduction.
    """
    rank = len(base.shape)
    dim, operation, dtype = dim % rank, REDUCTIONS[name], ctx.dtype_of(base)
    hits, values, compute = _elements(ctx, base, dim, operation, source)
    reduced = _gathered(ctx, operation, hits, dim, values)
    reduced = _fitted(ctx, reduced, dim, _neutral(operation, compute))
    own = ctx.cast(base, compute)
    if include_self and name != "mean":
        return ctx.cast(ctx.elementwise(operation, own, reduced), dtype)
    ones = ctx.expand(ctx.scalar(1, compute, rank), ctx.meta(ctx.node.args[2]).shape)
    count = _fitted(ctx, _gathered(ctx, "SUM", hits, dim, ones), dim, 0)
    if include_self:
        reduced = ctx.add(own, reduced)
        count = ctx.add(count, ctx.scalar(1, compute, rank))
    result = reduced
    if name == "mean":
        one = ctx.scalar(1, compute, rank)
        divide = "DIV" if compute.is_floating_point else "FLOOR_DIV"
        result = ctx.elementwise(divide, reduced, ctx.elementwise("MAX", count, one))
    touched = ctx.elementwise("GREATER", count, ctx.scalar(0, compute, rank))
    return ctx.cast(ctx.select(touched, result, own), dtype)


def _summable(node: Node, ctx: Network) -> str | None:
    """Numbers with at least one axis."""
    x = ctx.meta(node.args[0])
    if x.dtype == torch.bool:
        return "TensorRT adds no booleans"
    return "it has no axis" if not x.dim() else None


@converter(aten.scatter_add.default, validator=_summable)
def scatter_add(ctx: Network, base: ITensor, dim: int, index: ITensor, source: ITensor) -> ITensor:
    """Each element of ``source`` added at its place of an axis."""
    return _scattered(ctx, base, dim, source, "sum")


@converter(aten.scatter_reduce.two, validator=_summable)
def scatter_reduce(
    ctx: Network,
    base: ITensor,
    dim: int,
    index: ITensor,
    source: ITensor,
    reduce: str,
    *,
    include_self: bool = True,
) -> ITensor:
    """Sum, product, mean, largest or smallest of the elements at each place of an axis."""
    return _scattered(ctx, base, dim, source, reduce, include_self=include_self)


@converter(aten.scatter.reduce, aten.scatter.value_reduce, validator=_summable)
def scatter_with(
    ctx: Network,
    base: ITensor,
    dim: int,
    index: ITensor,
    source: ITensor | Number,
    *,
    reduce: str,
) -> ITensor:
    """Each element added to, or multiplied with, its place of an axis."""
    return _scattered(ctx, base, dim, source, reduce)


@converter(aten.index_add.default, validator=_summable)
def index_add(
    ctx: Network, base: ITensor, dim: int, index: ITensor, source: ITensor, *, alpha: Number = 1
) -> ITensor:
    """Each entry of ``source`` added at its place of an axis."""
    dtype, rank = ctx.dtype_of(base), len(base.shape)
    dim %= rank
    shape = [1] * rank
    shape[dim] = -1
    places = ctx.reshape(ctx.expand_rank(ctx.cast(index, INT), 1), shape)
    if alpha != 1:
        compute = torch.float32 if dtype in HALF else dtype
        source = ctx.multiply(ctx.cast(source, compute), ctx.scalar(alpha, compute, rank))
    extent = ctx.meta(ctx.node.args[0]).shape[dim]
    return accumulated(ctx, "SUM", base, dim, extent, places, source)


def _with_bins(node: Node, ctx: Network) -> str | None:
    """A constant number of bins."""
    bins = argument(node, 1, "bins", 100)
    return None if isinstance(bins, int) else "the number of bins varies"


@converter(aten.histc.default, validator=_with_bins)
def histc(ctx: Network, x: ITensor, bins: int = 100, min: Number = 0, max: Number = 0) -> ITensor:
    """How many values are in each of ``bins`` ranges of one width."""
    number = torch.float32
    flat = ctx.cast(ctx.reshape(x, [-1]), number)
    if min == max == 0:
        low, high = (ctx.reduce(way, flat, [0], keep=True) for way in ("MIN", "MAX"))
        same, one = ctx.equal(low, high), ctx.scalar(1.0, number, 1)
        low = ctx.select(same, ctx.subtract(low, one), low)
        high = ctx.select(same, ctx.add(high, one), high)
    else:
        low, high = (ctx.scalar(float(value), number, 1) for value in (min, max))
    width = ctx.subtract(high, low)
    scaled = ctx.multiply(ctx.subtract(flat, low), ctx.scalar(float(bins), number, 1))
    place = ctx.unary("FLOOR", ctx.elementwise("DIV", scaled, width))
    last = ctx.scalar(float(bins - 1), number, 1)
    place = ctx.select(ctx.equal(flat, high), last, place)  # the last bin has both its ends
    hits = ctx.equal(
        ctx.unsqueeze(place, [0]), ctx.constant(torch.arange(bins, dtype=number)[:, None])
    )
    counts = ctx.reduce("SUM", ctx.cast(hits, torch.int32), [1], keep=False)
    return ctx.cast(counts, ctx.result().dtype)


def _only_bags(node: Node, ctx: Network) -> str | None:
    """Only the bags themselves are lowered."""
    return only_first_used(node)


@converter(
    aten.embedding_bag.default,
    aten.embedding_bag.padding_idx,
    aten._embedding_bag.default,
    aten._embedding_bag_forward_only.default,
    validator=_only_bags,
)
def embedding_bag(
    ctx: Network,
    weight: ITensor,
    indices: ITensor,
    offsets: ITensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: ITensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = -1,
) -> list[ITensor | None]:
    """Sum, mean or largest of the table's rows in each bag."""
    dtype = ctx.dtype_of(weight)
    compute = torch.float32 if dtype in HALF else dtype
    rows = ctx.cast(ctx.gather(weight, indices, 0), compute)
    if per_sample_weights is not None:
        rows = ctx.multiply(rows, ctx.unsqueeze(ctx.cast(per_sample_weights, compute), [1]))
    member = _members(ctx, indices, ctx.cast(offsets, INT), last=include_last_offset)
    if padding_idx is not None and padding_idx >= 0:
        counted = ctx.logical_not(
            ctx.equal(indices, ctx.scalar(padding_idx, ctx.dtype_of(indices), 1))
        )
        member = ctx.logical_and(member, counted)
    operation = "MAX" if mode == 2 else "SUM"
    bags = _gathered(ctx, operation, ctx.unsqueeze(member, [2]), 0, rows)
    count = ctx.reduce("SUM", ctx.cast(member, INT), [1], keep=True)
    one = ctx.scalar(1, INT, 2)
    if mode == 1:
        bags = ctx.elementwise("DIV", bags, ctx.cast(ctx.elementwise("MAX", count, one), compute))
    if mode == 2:
        bags = ctx.select(ctx.less(count, one), ctx.scalar(0, compute, 2), bags)
    return [ctx.cast(bags, dtype), None, None, None]


def _members(ctx: Network, indices: ITensor, offsets: ITensor, *, last: bool) -> ITensor:
    """``[bags, indices]``: whether an index belongs to a bag."""
    total = ctx.meta(ctx.node.args[1]).shape[0]
    bags = ctx.meta(ctx.node.args[2]).shape[0]
    position = ctx.unsqueeze(ctx.iota(total, INT), [0])
    if last:
        starts = cut(ctx, offsets, [bags], 0, 0, bags - 1)
        ends = cut(ctx, offsets, [bags], 0, 1, bags - 1)
    else:
        starts = offsets
        rest = cut(ctx, offsets, [bags], 0, 1, bags - 1)
        ends = ctx.concatenate([rest, ctx.tensor(total, INT, 1)], 0)
    before = ctx.less(position, ctx.unsqueeze(starts, [1]))
    return ctx.logical_and(ctx.logical_not(before), ctx.less(position, ctx.unsqueeze(ends, [1])))


def _one_of(node: Node, ctx: Network) -> str | None:
    """A constant number of classes."""
    classes: Any = argument(node, 1, "num_classes", -1)
    return None if isinstance(classes, int) and classes > 0 else "it has no number of classes"


@converter(aten.one_hot.default, validator=_one_of)
def one_hot(ctx: Network, x: ITensor, num_classes: int) -> ITensor:
    """1 at the class of each element, else 0."""
    dtype, rank = ctx.dtype_of(x), len(x.shape)
    classes = ctx.reshape(ctx.iota(num_classes, dtype), (*(1,) * rank, num_classes))
    return ctx.cast(ctx.equal(ctx.unsqueeze(x, [rank]), classes), torch.int64)


def _known_length(node: Node, ctx: Network) -> str | None:
    """With ``output_size``, without which the result has no known shape."""
    size = node.kwargs.get("output_size")
    return "it has no output_size, so its result has no known shape" if size is None else None


@converter(aten.repeat_interleave.Tensor, validator=_known_length)
def repeat_interleave(
    ctx: Network, repeats: ITensor, *, output_size: Size | None = None
) -> ITensor:
    """The positions of entries, each as often as ``repeats`` says."""
    count = ctx.meta(ctx.node.args[0]).shape[0]
    order = ctx.iota(count, INT)
    earlier = ctx.less(ctx.unsqueeze(order, [1]), ctx.unsqueeze(order, [0]))  # [entry, later]
    sizes = ctx.unsqueeze(ctx.cast(repeats, INT), [0])
    upto = ctx.logical_not(earlier)
    ends = ctx.reduce("SUM", ctx.select(upto, sizes, ctx.scalar(0, INT, 2)), [1], keep=True)
    assert output_size is not None
    places = ctx.unsqueeze(ctx.iota(output_size, INT), [0])
    passed = ctx.logical_not(ctx.less(places, ends))
    positions = ctx.reduce("SUM", ctx.cast(passed, INT), [0], keep=False)
    return ctx.cast(positions, ctx.result().dtype)


@converter(aten.masked_scatter.default)
def masked_scatter(ctx: Network, x: ITensor, mask: ITensor, source: ITensor) -> ITensor:
    """The elements of ``source``, in order, where the mask holds."""
    shape = ctx.result().shape
    count: Size = 1
    for extent in shape:
        count = count * extent
    is_set = ctx.reshape(ctx.cast(ctx.expand(mask, shape), INT), [count])
    places = ctx.iota(count, INT)
    upto = ctx.logical_not(ctx.less(ctx.unsqueeze(places, [1]), ctx.unsqueeze(places, [0])))
    chosen = ctx.select(upto, ctx.unsqueeze(is_set, [0]), ctx.scalar(0, INT, 2))
    order = ctx.subtract(ctx.reduce("SUM", chosen, [1], keep=False), ctx.scalar(1, INT, 1))
    order = ctx.elementwise("MAX", order, ctx.scalar(0, INT, 1))
    available: Size = 1
    for extent in ctx.meta(ctx.node.args[2]).shape:
        available = available * extent
    order = ctx.elementwise("MIN", order, ctx.tensor(available - 1, INT, 1))
    entries = ctx.reshape(ctx.gather(ctx.reshape(source, [-1]), order, 0), shape)
    return ctx.select(ctx.expand(mask, shape), entries, ctx.expand(x, shape))
