"""Shapes: views, slices, concatenation, and tensors made of a shape and a value."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from inplace_builder.graph.in_place import SAME_ORDER, SELF_INVERSE
from inplace_builder.lower.layers import ITensor, Number, Size, expression
from inplace_builder.lower.network import Network
from inplace_builder.lower.registry import converter

aten = torch.ops.aten


@converter(*SAME_ORDER)
def reshape(ctx: Network, x: ITensor, *_: object) -> ITensor:
    """Every operator that keeps the order of the elements.

    The resulting shape is read from the captured graph, not from the arguments.
    """
    return reshaped(ctx, x, ctx.meta(ctx.node.args[0]).shape, ctx.result().shape)


def reshaped(ctx: Network, x: ITensor, before: Sequence[Size], after: Sequence[Size]) -> ITensor:
    """Reshape between known shapes, with as few dynamic extents as possible.

    An extent that stays on its axis needs no shape tensor.
    """
    if len(before) == len(after) and all(
        expression(a) == expression(b) for a, b in zip(before, after, strict=True)
    ):
        return x
    sizes = list(after)
    unknown = [axis for axis, size in enumerate(sizes) if not isinstance(size, int)]
    for axis in unknown[:-1]:
        if axis < len(before) and expression(before[axis]) == expression(sizes[axis]):
            sizes[axis] = 0
    return ctx.reshape(x, sizes)


@converter(aten.permute.default)
def permute(ctx: Network, x: ITensor, order: Sequence[int]) -> ITensor:
    """Reorder axes."""
    return ctx.permute(x, [axis % len(order) for axis in order])


@converter(*SELF_INVERSE)
def transpose(ctx: Network, x: ITensor, a: int = -2, b: int = -1) -> ITensor:
    """Swap two axes."""
    rank = len(x.shape)
    order = list(range(rank))
    if rank > 1:
        order[a], order[b] = order[b], order[a]
    return ctx.permute(x, order)


@converter(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def expand(ctx: Network, x: ITensor, *_: object, **__: object) -> ITensor:
    """Repeat axes of extent 1."""
    return expanded(ctx, x, ctx.meta(ctx.node.args[0]).shape, ctx.result().shape)


def expanded(ctx: Network, x: ITensor, before: Sequence[Size], after: Sequence[Size]) -> ITensor:
    """Repeat axes of extent 1, between shapes of the captured graph.

    Unlike `Layers.expand` it needs no extent that TensorRT knows.
    """
    x = ctx.expand_rank(x, len(after))
    before = (*(1,) * (len(after) - len(before)), *before)
    stride = [int(expression(a) == expression(b)) for a, b in zip(before, after, strict=True)]
    return x if all(stride) else ctx.slice(x, [0] * len(after), after, stride)


@converter(aten.repeat.default)
def repeat(ctx: Network, x: ITensor, repeats: Sequence[Size]) -> ITensor:
    """Concatenate copies: expand a new axis in front of each repeated one, then merge the two."""
    sizes = (*(1,) * (len(repeats) - len(x.shape)), *ctx.meta(ctx.node.args[0]).shape)
    x = ctx.expand_rank(x, len(repeats))
    repeated = [axis for axis, times in enumerate(repeats) if expression(times) != 1]
    if not repeated:
        return x
    split: list[Size] = []
    target: list[Size] = []
    for axis, (size, times) in enumerate(zip(sizes, repeats, strict=True)):
        split += [1, size] if axis in repeated else [size]
        target += [times, size] if axis in repeated else [size]
    stride = [int(expression(a) == expression(b)) for a, b in zip(split, target, strict=True)]
    return ctx.reshape(
        ctx.slice(ctx.reshape(x, split), [0] * len(target), target, stride), ctx.result().shape
    )


def cut(
    ctx: Network,
    x: ITensor,
    shape: Sequence[Size],
    axis: int,
    start: Size,
    size: Size,
    step: int = 1,
) -> ITensor:
    """``size`` elements of one axis from ``start``; ``shape`` is that of ``x``."""
    starts: list[Size] = [0] * len(shape)
    sizes, steps = list(shape), [1] * len(shape)
    starts[axis], sizes[axis], steps[axis] = start, size, step
    if all(expression(a) == expression(b) for a, b in zip(sizes, shape, strict=True)):
        return x
    return ctx.slice(x, starts, sizes, steps)


@converter(aten.slice.Tensor)
def slice_(
    ctx: Network,
    x: ITensor,
    dim: int = 0,
    start: Size | None = None,
    end: Size | None = None,
    step: int = 1,
) -> ITensor:
    """``x[start:end:step]`` along an axis; its length is read from the captured graph."""
    shape = ctx.meta(ctx.node.args[0]).shape
    return cut(
        ctx,
        x,
        shape,
        dim % len(shape),
        offset(shape[dim], start or 0),
        ctx.result().shape[dim],
        step,
    )


def offset(extent: Size, start: Size) -> Size:
    """An index from the start of an axis, not beyond either end.

    Args:
        extent: of the axis.
        start: the index; a negative one counts from the end.
    """
    if isinstance(start, int) and start >= 0:
        return min(start, extent) if isinstance(extent, int) else start
    if isinstance(start, int):
        return (
            max(extent + start, 0) if isinstance(extent, int) else torch.sym_max(extent + start, 0)
        )
    return start


@converter(aten.narrow.default)
def narrow(ctx: Network, x: ITensor, dim: int, start: Size, length: Size) -> ITensor:
    """``length`` elements of an axis."""
    shape = ctx.meta(ctx.node.args[0]).shape
    return cut(ctx, x, shape, dim % len(shape), offset(shape[dim], start), length)


@converter(aten.select.int)
def select(ctx: Network, x: ITensor, dim: int, index: Size) -> ITensor:
    """One entry of an axis; the axis is removed."""
    shape = ctx.meta(ctx.node.args[0]).shape
    dim %= len(shape)
    one = cut(ctx, x, shape, dim, offset(shape[dim], index), 1)
    return reshaped(ctx, one, (*shape[:dim], 1, *shape[dim + 1 :]), ctx.result().shape)


@converter(
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.tensor_split.sections,
    aten.split.sizes,
)
def split(ctx: Network, x: ITensor, *_: object, **__: object) -> list[ITensor]:
    """Pieces of an axis; their lengths are read from the captured graph."""
    shape = ctx.meta(ctx.node.args[0]).shape
    dim = ctx.node.kwargs.get("dim", ctx.node.args[2] if len(ctx.node.args) > 2 else 0)
    assert isinstance(dim, int)
    pieces, start = [], 0
    for piece in ctx.node.meta["val"]:
        size = piece.shape[dim]
        pieces.append(cut(ctx, x, shape, dim % len(shape), start, size))
        start = start + size
    return pieces


@converter(aten.unbind.int)
def unbind(ctx: Network, x: ITensor, dim: int = 0) -> list[ITensor]:
    """Every entry of an axis."""
    shape = ctx.meta(ctx.node.args[0]).shape
    dim %= len(shape)
    pieces = ctx.node.meta["val"]
    whole = (*shape[:dim], 1, *shape[dim + 1 :])
    return [
        reshaped(ctx, cut(ctx, x, shape, dim, index, 1), whole, piece.shape)
        for index, piece in enumerate(pieces)
    ]


@converter(aten.cat.default, aten.concat.default)
def cat(ctx: Network, parts: Sequence[ITensor], dim: int = 0) -> ITensor:
    """Join along an axis, in the promoted type."""
    dtype = ctx.result().dtype
    tensors = [ctx.cast(part, dtype) for part in parts if tuple(part.shape) != (0,)]
    return ctx.concatenate(tensors, dim % len(ctx.result().shape))


@converter(aten.stack.default)
def stack(ctx: Network, parts: Sequence[ITensor], dim: int = 0) -> ITensor:
    """Join along a new axis."""
    dim %= len(ctx.result().shape)
    return ctx.concatenate(
        [ctx.unsqueeze(ctx.cast(part, ctx.result().dtype), [dim]) for part in parts], dim
    )


def _filled(ctx: Network, value: Number) -> ITensor:
    """A tensor of the result's shape and type that holds one value."""
    shape, dtype = ctx.result().shape, ctx.result().dtype
    return ctx.expand(ctx.scalar(value, dtype, len(shape)), shape)


@converter(aten.full.default)
def full(ctx: Network, size: Any, value: Number, **_: object) -> ITensor:
    """One value everywhere."""
    return _filled(ctx, value)


@converter(aten.full_like.default, aten.new_full.default)
def full_like(ctx: Network, x: ITensor, *arguments: Any, **_: object) -> ITensor:
    """One value everywhere; it is the last of the arguments."""
    return _filled(ctx, arguments[-1])


@converter(
    aten.zeros.default,
    aten.zeros_like.default,
    aten.new_zeros.default,
    aten.zero.default,
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.empty_strided.default,
    aten.new_empty_strided.default,
    aten.empty_permuted.default,
)
def zeros(ctx: Network, *_: object, **__: object) -> ITensor:
    """Zeros; also where the elements may be anything."""
    return _filled(ctx, 0)


@converter(aten.fill.Scalar, aten.fill.Tensor)
def fill(ctx: Network, x: ITensor, value: ITensor | Number) -> ITensor:
    """One value everywhere, in the type of ``x``."""
    shape, dtype = ctx.result().shape, ctx.result().dtype
    return ctx.expand(ctx.tensor(value, dtype, len(shape)), shape)


@converter(aten.copy.default)
def copy(ctx: Network, x: ITensor, new: ITensor, *_: object) -> ITensor:
    """``new`` in the type and the shape of ``x``."""
    result = ctx.result()
    return expanded(
        ctx, ctx.cast(new, result.dtype), ctx.meta(ctx.node.args[1]).shape, result.shape
    )


@converter(aten.ones.default, aten.ones_like.default, aten.new_ones.default)
def ones(ctx: Network, *_: object, **__: object) -> ITensor:
    """Ones."""
    return _filled(ctx, 1)


@converter(aten.scalar_tensor.default)
def scalar_tensor(ctx: Network, value: Number | Size, **_: object) -> ITensor:
    """One number, without axes."""
    return ctx.tensor(value, ctx.result().dtype)


def _integers(node: Node, ctx: Network) -> str | None:
    """In int64, int32 or float32."""
    dtype = node.meta["val"].dtype
    return (
        None
        if dtype in (torch.int32, torch.int64, torch.float32)
        else f"it counts in {dtype}; use int64, int32 or float32"
    )


@converter(aten.arange.default, aten.arange.start, aten.arange.start_step, validator=_integers)
def arange(ctx: Network, *bounds: Number | Size, **_: object) -> ITensor:
    """Numbers from ``start`` (0) up to, not including, ``end``, by ``step`` (1)."""
    dtype = ctx.result().dtype
    start, step = (bounds[0] if len(bounds) > 1 else 0), (bounds[2] if len(bounds) > 2 else 1)
    numbers = ctx.iota(ctx.result().shape[0], dtype)
    if step != 1:
        numbers = ctx.multiply(numbers, ctx.tensor(step, dtype, 1))
    if isinstance(start, torch.SymInt) or start != 0:
        numbers = ctx.add(numbers, ctx.tensor(start, dtype, 1))
    return numbers
