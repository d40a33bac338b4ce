"""Reductions over axes, and the positions of the largest and smallest values."""

from collections.abc import Sequence

import torch
from torch.fx import Node

from inplace_builder.lower.layers import HALF, ITensor, Number, Size
from inplace_builder.lower.network import Network
from inplace_builder.lower.registry import converter

aten = torch.ops.aten


MAX_K = 3840
"""Largest k of TensorRT's TopK layer."""


def _reduced(
    ctx: Network, operation: str, x: ITensor, dims: Sequence[int] | int | None, keep: bool
) -> ITensor:
    rank = len(x.shape)
    if isinstance(dims, int):
        dims = [dims]
    result = ctx.result().dtype
    compute = torch.float32 if result in HALF or ctx.dtype_of(x) in HALF else result
    value = ctx.reduce(
        operation, ctx.cast(x, compute), [dim % rank for dim in dims or range(rank)], keep=keep
    )
    return ctx.cast(value, result)


@converter(aten.mean.dim, aten.mean.default)
def mean(
    ctx: Network, x: ITensor, dim: Sequence[int] | None = None, keepdim: bool = False, **_: object
) -> ITensor:
    """Arithmetic mean."""
    return _reduced(ctx, "AVG", x, dim, keepdim)


@converter(aten.sum.dim_IntList, aten.sum.default)
def sum_(
    ctx: Network, x: ITensor, dim: Sequence[int] | None = None, keepdim: bool = False, **_: object
) -> ITensor:
    """Sum."""
    return _reduced(ctx, "SUM", x, dim, keepdim)


@converter(aten.amax.default)
def amax(ctx: Network, x: ITensor, dim: Sequence[int] = (), keepdim: bool = False) -> ITensor:
    """Largest value."""
    return _reduced(ctx, "MAX", x, dim, keepdim)


@converter(aten.amin.default)
def amin(ctx: Network, x: ITensor, dim: Sequence[int] = (), keepdim: bool = False) -> ITensor:
    """Smallest value."""
    return _reduced(ctx, "MIN", x, dim, keepdim)


@converter(aten.max.default)
def max_all(ctx: Network, x: ITensor) -> ITensor:
    """Largest value of all."""
    return _reduced(ctx, "MAX", x, None, False)


@converter(aten.min.default)
def min_all(ctx: Network, x: ITensor) -> ITensor:
    """Smallest value of all."""
    return _reduced(ctx, "MIN", x, None, False)


@converter(aten.prod.default)
def prod_all(ctx: Network, x: ITensor, **_: object) -> ITensor:
    """Product of all values."""
    return _reduced(ctx, "PROD", x, None, False)


@converter(aten.prod.dim_int)
def prod(ctx: Network, x: ITensor, dim: int, keepdim: bool = False, **_: object) -> ITensor:
    """Product."""
    return _reduced(ctx, "PROD", x, dim, keepdim)


for _operation, _overloads in {
    "MAX": (aten.any.default, aten.any.dim, aten.any.dims),
    "MIN": (aten.all.default, aten.all.dim, aten.all.dims),
}.items():

    @converter(*_overloads)
    def any_or_all(
        ctx: Network,
        x: ITensor,
        dim: Sequence[int] | int | None = None,
        keepdim: bool = False,
        operation: str = _operation,
    ) -> ITensor:
        """Whether any, or every, value is not zero."""
        dims = [dim] if isinstance(dim, int) else list(dim or range(len(x.shape)))
        axes = [each % len(x.shape) for each in dims]
        truth = ctx.cast(ctx.cast(x, torch.bool), torch.int32)
        result = truth if not axes else ctx.reduce(operation, truth, axes, keep=keepdim)
        return ctx.cast(result, torch.bool)


def _deviation(
    ctx: Network, x: ITensor, dim: Sequence[int] | int | None, correction: Number, keep: bool
) -> tuple[ITensor, ITensor]:
    """Variance and mean, in float32."""
    rank, shape = len(x.shape), ctx.meta(ctx.node.args[0]).shape
    dims = [dim] if isinstance(dim, int) else list(dim or range(rank))
    axes = [each % rank for each in dims]
    value = ctx.cast(x, torch.float32)
    mean = ctx.reduce("AVG", value, axes, keep=True)
    centred = ctx.subtract(value, mean)
    total = ctx.reduce("SUM", ctx.multiply(centred, centred), axes, keep=keep)
    count: Size = 1
    for axis in axes:
        count = count * shape[axis]
    rest = ctx.tensor(count, torch.float32, len(total.shape))
    if correction:
        rest = ctx.subtract(rest, ctx.scalar(float(correction), torch.float32, len(total.shape)))
    variance = ctx.elementwise("DIV", total, rest)
    if not keep:
        sizes = [size for axis, size in enumerate(ctx.extents.of(mean)) if axis not in axes]
        mean = ctx.reshape(mean, sizes)
    return variance, mean


@converter(
    aten.var.correction,
    aten.std.correction,
    aten.var_mean.correction,
    aten.std_mean.correction,
)
def deviation(
    ctx: Network,
    x: ITensor,
    dim: Sequence[int] | None = None,
    *,
    correction: Number | None = None,
    keepdim: bool = False,
) -> ITensor | tuple[ITensor, ITensor]:
    """Variance or standard deviation, and the mean."""
    rest = 1 if correction is None else correction
    return _deviation_as_asked(ctx, x, dim, rest, keepdim)


@converter(
    aten.var.dim,
    aten.std.dim,
    aten.var_mean.dim,
    aten.std_mean.dim,
)
def deviation_of_axes(
    ctx: Network,
    x: ITensor,
    dim: Sequence[int] | None,
    unbiased: bool = True,
    keepdim: bool = False,
) -> ITensor | tuple[ITensor, ITensor]:
    """Variance or standard deviation, and the mean, over axes."""
    return _deviation_as_asked(ctx, x, dim, int(unbiased), keepdim)


@converter(
    aten.var.default,
    aten.std.default,
    aten.var_mean.default,
    aten.std_mean.default,
)
def deviation_of_all(
    ctx: Network, x: ITensor, unbiased: bool = True
) -> ITensor | tuple[ITensor, ITensor]:
    """Variance or standard deviation, and the mean, of all values."""
    return _deviation_as_asked(ctx, x, None, int(unbiased), False)


def _deviation_as_asked(
    ctx: Network, x: ITensor, dim: Sequence[int] | None, correction: Number, keep: bool
) -> ITensor | tuple[ITensor, ITensor]:
    name = ctx.node.target._schema.name  # type: ignore[union-attr]
    variance, mean = _deviation(ctx, x, dim, correction, keep)
    result = ctx.unary("SQRT", variance) if "std" in name else variance
    dtype = ctx.dtype_of(x)
    if name.endswith("_mean"):
        return ctx.cast(result, dtype), ctx.cast(mean, dtype)
    return ctx.cast(result, dtype)


def top_k(ctx: Network, operation: str, x: ITensor, k: int, dim: int) -> tuple[ITensor, ITensor]:
    """The k largest (``MAX``) or smallest (``MIN``) values of an axis, in order.

    Returns:
        The values in the type of ``x``, and their indices in int64.
    """
    dtype = ctx.dtype_of(x)
    rank = len(x.shape)
    # TopK takes no bfloat16 and no vector
    value = ctx.expand_rank(ctx.cast(x, torch.float32) if dtype in HALF else x, 2)
    axis = dim % rank + len(value.shape) - rank
    layer = ctx.checked(
        ctx.network.add_topk(value, getattr(ctx.api.TopKOperation, operation), k, 1 << axis)
    )
    values, indices = layer.get_output(0), layer.get_output(1)
    if rank == 1:
        values, indices = (ctx.reshape(output, (k,)) for output in (values, indices))
    return ctx.cast(values, dtype), ctx.cast(indices, torch.int64)


def _without(ctx: Network, x: ITensor, dim: int, keep: bool) -> ITensor:
    """Drop an axis of extent 1."""
    if keep:
        return x
    sizes = list(ctx.extents.of(x))
    del sizes[dim % len(sizes)]
    return ctx.reshape(x, sizes)


@converter(aten.argmax.default)
def argmax(ctx: Network, x: ITensor, dim: int | None = None, keepdim: bool = False) -> ITensor:
    """Position of the largest value."""
    return _position(ctx, "MAX", x, dim, keepdim)


@converter(aten.argmin.default)
def argmin(ctx: Network, x: ITensor, dim: int | None = None, keepdim: bool = False) -> ITensor:
    """Position of the smallest value."""
    return _position(ctx, "MIN", x, dim, keepdim)


def _position(ctx: Network, operation: str, x: ITensor, dim: int | None, keep: bool) -> ITensor:
    if dim is None:  # of the tensor as one vector
        place = top_k(ctx, operation, ctx.reshape(x, [-1]), 1, 0)[1]
        return ctx.reshape(place, ctx.result().shape)
    return _without(ctx, top_k(ctx, operation, x, 1, dim)[1], dim, keep)


@converter(aten.max.dim)
def max_dim(ctx: Network, x: ITensor, dim: int, keepdim: bool = False) -> tuple[ITensor, ITensor]:
    """Largest value of an axis and its position."""
    values, indices = top_k(ctx, "MAX", x, 1, dim)
    return _without(ctx, values, dim, keepdim), _without(ctx, indices, dim, keepdim)


@converter(aten.min.dim)
def min_dim(ctx: Network, x: ITensor, dim: int, keepdim: bool = False) -> tuple[ITensor, ITensor]:
    """Smallest value of an axis and its position."""
    values, indices = top_k(ctx, "MIN", x, 1, dim)
    return _without(ctx, values, dim, keepdim), _without(ctx, indices, dim, keepdim)


def _small_k(node: Node, ctx: Network) -> str | None:
    """A constant k of at most 3840."""
    k = node.args[1]
    return (
        None
        if isinstance(k, int) and 1 <= k <= MAX_K
        else f"k is {k}; TensorRT takes a constant from 1 to {MAX_K}"
    )


@converter(aten.topk.default, validator=_small_k)
def topk(
    ctx: Network, x: ITensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[ITensor, ITensor]:
    """The k largest or smallest values in order, and their positions."""
    return top_k(ctx, "MAX" if largest else "MIN", x, k, dim)
