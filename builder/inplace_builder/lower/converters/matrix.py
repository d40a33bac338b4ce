"""Matrix products, and attention without state."""

from collections.abc import Sequence

import torch
from torch.fx import Node

from inplace_builder.lower.layers import MASKED_SCORE, ITensor, Number
from inplace_builder.lower.network import Network
from inplace_builder.lower.registry import converter

aten = torch.ops.aten


@converter(aten.linear.default)
def linear(ctx: Network, x: ITensor, weight: ITensor, bias: ITensor | None = None) -> ITensor:
    """``x @ weight.T + bias``."""
    flat = len(x.shape) == 1
    result = ctx.matmul(ctx.expand_rank(x, 2), weight, transpose_b=True)
    if flat:
        result = ctx.reshape(result, ctx.result().shape)
    return result if bias is None else ctx.add(result, bias)


@converter(aten.matmul.default, aten.mm.default, aten.bmm.default)
def matmul(ctx: Network, a: ITensor, b: ITensor) -> ITensor:
    """Matrix product; a vector is a row on the left and a column on the right."""
    left, right = len(a.shape), len(b.shape)
    if right == 1:
        b = ctx.unsqueeze(b, [1])
    result = ctx.matmul(ctx.expand_rank(a, 2), b)
    return ctx.reshape(result, ctx.result().shape) if min(left, right) == 1 else result


@converter(aten.addmm.default, aten.baddbmm.default)
def addmm(
    ctx: Network, bias: ITensor, a: ITensor, b: ITensor, *, beta: Number = 1, alpha: Number = 1
) -> ITensor:
    """``beta * bias + alpha * a @ b``."""
    dtype = ctx.result().dtype
    product = ctx.matmul(a, b)
    if alpha != 1:
        product = ctx.multiply(product, ctx.scalar(alpha, dtype))
    if beta == 0:
        return product
    return ctx.add(product, bias if beta == 1 else ctx.multiply(bias, ctx.scalar(beta, dtype)))


def _no_dropout(node: Node, ctx: Network) -> str | None:
    """Without dropout."""
    dropout = node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0)
    return (
        f"it drops attention at random ({dropout}); call .eval() on the model" if dropout else None
    )


@converter(aten.scaled_dot_product_attention.default, validator=_no_dropout)
def scaled_dot_product_attention(
    ctx: Network,
    query: ITensor,
    key: ITensor,
    value: ITensor,
    attn_mask: ITensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> ITensor:
    """Softmax attention, scores and softmax in float32; query ``[…, heads, tokens, dim]``."""
    shapes = [ctx.meta(argument).shape for argument in ctx.node.args[:3]]
    if enable_gqa and shapes[0][-3] != shapes[1][-3]:
        key, value = (
            _repeated_heads(ctx, x, shape, shapes[0][-3])
            for x, shape in ((key, shapes[1]), (value, shapes[2]))
        )
    factor = ctx.scalar(scale if scale is not None else shapes[0][-1] ** -0.5, torch.float32)
    scores = ctx.multiply(ctx.cast(ctx.matmul(query, key, transpose_b=True), torch.float32), factor)
    if is_causal:
        rows, columns = (ctx.iota(shape[-2]) for shape in shapes[:2])
        beyond = ctx.elementwise("GREATER", ctx.unsqueeze(columns, [0]), ctx.unsqueeze(rows, [1]))
        scores = ctx.select(beyond, ctx.scalar(MASKED_SCORE, torch.float32), scores)
    if attn_mask is not None and ctx.dtype_of(attn_mask) == torch.bool:
        scores = ctx.select(attn_mask, scores, ctx.scalar(MASKED_SCORE, torch.float32))
    elif attn_mask is not None:
        scores = ctx.add(scores, ctx.cast(attn_mask, torch.float32))
    weights = ctx.softmax(scores, len(scores.shape) - 1)
    return ctx.matmul(ctx.cast(weights, ctx.dtype_of(value)), value)


def _repeated_heads(
    ctx: Network, x: ITensor, shape: Sequence[int | torch.SymInt], heads: int
) -> ITensor:
    """``[…, kv_heads, length, dim]`` with each head repeated for the query heads that share it."""
    groups = heads // int(shape[-3])
    grouped = ctx.unsqueeze(x, [len(shape) - 2])
    sizes = (*shape[:-2], groups, *shape[-2:])
    stride = [1] * len(sizes)
    stride[-3] = 0
    return ctx.reshape(
        ctx.slice(grouped, [0] * len(sizes), sizes, stride), (*shape[:-3], heads, *shape[-2:])
    )


def _positive_order(node: Node, ctx: Network) -> str | None:
    """Of an order above 0."""
    order = node.args[2]
    return None if isinstance(order, int | float) and order > 0 else f"its order is {order}"


@converter(aten._cdist_forward.default, validator=_positive_order)
def cdist(ctx: Network, a: ITensor, b: ITensor, order: float, mode: int | None) -> ITensor:
    """Distances between every row of ``a`` and every row of ``b``."""
    rank = len(a.shape)
    apart = ctx.subtract(ctx.unsqueeze(a, [rank - 1]), ctx.unsqueeze(b, [rank - 2]))
    apart = ctx.unary("ABS", ctx.cast(apart, torch.float32))
    if order == float("inf"):
        distances = ctx.reduce("MAX", apart, [rank], keep=False)
    elif order == 1:
        distances = ctx.reduce("SUM", apart, [rank], keep=False)
    elif order == 2:
        distances = ctx.reduce("SUM", ctx.multiply(apart, apart), [rank], keep=False)
        distances = ctx.unary("SQRT", distances)
    else:
        powers = ctx.elementwise("POW", apart, ctx.scalar(order, torch.float32))
        total = ctx.reduce("SUM", powers, [rank], keep=False)
        distances = ctx.elementwise("POW", total, ctx.scalar(1 / order, torch.float32))
    return ctx.cast(distances, ctx.result().dtype)
