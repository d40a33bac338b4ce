"""Reductions over axes, and the positions of the largest and smallest values."""

from collections.abc import Sequence

import torch
from torch.fx import Node

from inplace_builder.lower.layers import HALF, ITensor
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


def _one_axis(node: Node, ctx: Network) -> str | None:
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    return None if isinstance(dim, int) else "it has no axis; give it one"


@converter(aten.argmax.default, validator=_one_axis)
def argmax(ctx: Network, x: ITensor, dim: int, keepdim: bool = False) -> ITensor:
    """Position of the largest value."""
    return _without(ctx, top_k(ctx, "MAX", x, 1, dim)[1], dim, keepdim)


@converter(aten.argmin.default, validator=_one_axis)
def argmin(ctx: Network, x: ITensor, dim: int, keepdim: bool = False) -> ITensor:
    """Position of the smallest value."""
    return _without(ctx, top_k(ctx, "MIN", x, 1, dim)[1], dim, keepdim)


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
