"""Tensors picked by tensors: embedding, gather, index."""

from collections.abc import Sequence

import torch
from torch.fx import Node

from inplace_builder.lower.layers import ITensor
from inplace_builder.lower.network import Network
from inplace_builder.lower.registry import converter

aten = torch.ops.aten


@converter(aten.embedding.default)
def embedding(ctx: Network, weight: ITensor, indices: ITensor, *_: object, **__: object) -> ITensor:
    """Rows of a table."""
    return ctx.gather(weight, indices, 0)


@converter(aten.index_select.default)
def index_select(ctx: Network, x: ITensor, dim: int, index: ITensor) -> ITensor:
    """Entries of an axis."""
    return ctx.gather(x, ctx.expand_rank(index, 1), dim % len(x.shape))


@converter(aten.gather.default)
def gather(
    ctx: Network, x: ITensor, dim: int, index: ITensor, *, sparse_grad: bool = False
) -> ITensor:
    """One entry of an axis for each element of ``index``."""
    layer = ctx.network.add_gather_v2(x, index, ctx.api.GatherMode.ELEMENT)
    layer.axis = dim % len(x.shape)
    return ctx.output(layer)


def _one_index(node: Node, ctx: Network) -> str | None:
    indices = [index for index in node.args[1] if index is not None]  # type: ignore[union-attr]
    if len(indices) != 1:
        return f"it has {len(indices)} index tensors; only one is lowered"
    dtype = indices[0].meta["val"].dtype  # type: ignore[union-attr]
    return (
        None
        if dtype in (torch.int32, torch.int64)
        else f"it indexes with {dtype}, so its result has no known shape; use where"
    )


@converter(aten.index.Tensor, validator=_one_index)
def index(ctx: Network, x: ITensor, indices: Sequence[ITensor | None]) -> ITensor:
    """``x[:, …, index]``; negative indices count from the end."""
    axis = next(axis for axis, index in enumerate(indices) if index is not None)
    picked = indices[axis]
    dtype = ctx.dtype_of(picked)
    extent = ctx.tensor(ctx.meta(ctx.node.args[0]).shape[axis], dtype)
    negative = ctx.less(picked, ctx.scalar(0, dtype))
    return ctx.gather(x, ctx.select(negative, ctx.add(picked, extent), picked), axis)
