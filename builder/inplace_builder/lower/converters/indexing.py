"""Entries picked by a tensor of positions along one axis: embedding, index_select, gather."""

import torch

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
