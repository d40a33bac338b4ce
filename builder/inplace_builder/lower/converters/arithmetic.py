"""Arithmetic, with PyTorch's type promotion.

Half types are computed in float32 and rounded once, where PyTorch's kernels do so: if the other
operand is a Python number, and in everything that is more than one operation.
"""

import torch
from torch.fx import Node

from inplace_builder.lower.layers import HALF, Extent, ITensor, Number
from inplace_builder.lower.network import Network
from inplace_builder.lower.registry import converter

aten = torch.ops.aten


Operand = ITensor | Extent | Number


def binary(
    ctx: Network, operation: str, a: Operand, b: Operand, *, dtype: torch.dtype | None = None
) -> ITensor:
    """An arithmetic operation with PyTorch's type promotion.

    Args:
        ctx: the network.
        operation: a member of TensorRT's ElementWiseOperation.
        a, b: the operands.
        dtype: element type that it is computed in; None is that of the result.
    """
    result = ctx.result().dtype
    rank = len(ctx.result().shape)
    compute = dtype or result
    if compute in HALF and (isinstance(a, int | float) or isinstance(b, int | float)):
        compute = torch.float32
    return ctx.cast(
        ctx.elementwise(operation, ctx.tensor(a, compute, rank), ctx.tensor(b, compute, rank)),
        result,
    )


def scaled(ctx: Network, x: Operand, factor: Number) -> Operand:
    """``factor * x``, at the precision of the sum that it is part of."""
    if factor == 1:
        return x
    if isinstance(x, int | float):
        return x * factor
    dtype = ctx.result().dtype
    compute = torch.float32 if dtype in HALF else dtype
    return ctx.multiply(ctx.tensor(x, compute), ctx.scalar(factor, compute))


@converter(aten.add.Tensor, aten.add.Scalar)
def add(ctx: Network, a: Operand, b: Operand, *, alpha: Number = 1) -> ITensor:
    """``a + alpha * b``."""
    return binary(
        ctx, "OR" if ctx.result().dtype == torch.bool else "SUM", a, scaled(ctx, b, alpha)
    )


@converter(aten.sub.Tensor, aten.sub.Scalar)
def sub(ctx: Network, a: Operand, b: Operand, *, alpha: Number = 1) -> ITensor:
    """``a - alpha * b``."""
    return binary(ctx, "SUB", a, scaled(ctx, b, alpha))


@converter(aten.rsub.Scalar, aten.rsub.Tensor)
def rsub(ctx: Network, a: Operand, b: Operand, alpha: Number = 1) -> ITensor:
    """``b - alpha * a``."""
    return binary(ctx, "SUB", b, scaled(ctx, a, alpha))


@converter(aten.mul.Tensor, aten.mul.Scalar)
def mul(ctx: Network, a: Operand, b: Operand) -> ITensor:
    """``a * b``."""
    return binary(ctx, "AND" if ctx.result().dtype == torch.bool else "PROD", a, b)


@converter(aten.div.Tensor, aten.div.Scalar)
def div(ctx: Network, a: Operand, b: Operand) -> ITensor:
    """``a / b``, a floating-point number also for integers."""
    return binary(ctx, "DIV", a, b)


def _rounding(node: Node, ctx: Network) -> str | None:
    mode = node.kwargs.get("rounding_mode")
    return (
        None
        if mode in (None, "floor")
        else f"the rounding mode {mode!r} is not lowered; use 'floor' or none"
    )


@converter(aten.div.Tensor_mode, aten.div.Scalar_mode, validator=_rounding)
def div_mode(ctx: Network, a: Operand, b: Operand, *, rounding_mode: str | None) -> ITensor:
    """``floor(a / b)``."""
    return binary(ctx, "FLOOR_DIV" if rounding_mode else "DIV", a, b)


@converter(aten.floor_divide.default, aten.floor_divide.Scalar)
def floor_divide(ctx: Network, a: Operand, b: Operand) -> ITensor:
    """``floor(a / b)``."""
    return binary(ctx, "FLOOR_DIV", a, b)


@converter(aten.remainder.Scalar, aten.remainder.Tensor)
def remainder(ctx: Network, a: Operand, b: Operand) -> ITensor:
    """``a - b * floor(a / b)``: the sign is that of ``b``."""
    dtype = ctx.result().dtype
    compute = torch.float32 if dtype in HALF else dtype
    a, b = ctx.tensor(a, compute), ctx.tensor(b, compute)
    return ctx.cast(ctx.subtract(a, ctx.multiply(ctx.elementwise("FLOOR_DIV", a, b), b)), dtype)


@converter(aten.maximum.default, aten.max.other)
def maximum(ctx: Network, a: Operand, b: Operand) -> ITensor:
    """The larger of both."""
    return binary(ctx, "MAX", a, b)


@converter(aten.minimum.default, aten.min.other)
def minimum(ctx: Network, a: Operand, b: Operand) -> ITensor:
    """The smaller of both."""
    return binary(ctx, "MIN", a, b)


@converter(aten.clamp.default, aten.clamp.Tensor, aten.clamp_min.default, aten.clamp_max.default)
def clamp(
    ctx: Network, x: ITensor, low: Operand | None = None, high: Operand | None = None
) -> ITensor:
    """Not below ``low`` and not above ``high``."""
    if ctx.node.target is aten.clamp_max.default:
        low, high = None, low
    for operation, bound in (("MAX", low), ("MIN", high)):
        if bound is not None:
            x = ctx.cast(binary(ctx, operation, x, bound), ctx.result().dtype)
    return x


def repeated_product(ctx: Network, x: ITensor, exponent: int) -> ITensor:
    """``x`` to a power of at least 1, by squaring."""
    result = None
    while True:
        if exponent % 2:
            result = x if result is None else ctx.multiply(result, x)
        exponent //= 2
        if not exponent:
            return result
        x = ctx.multiply(x, x)


@converter(aten.pow.Tensor_Scalar)
def pow_scalar(ctx: Network, x: ITensor, exponent: Number) -> ITensor:
    """``x ** exponent``; whole exponents by multiplication, which also holds for negative ``x``."""
    dtype = ctx.result().dtype
    compute = torch.float32 if dtype in HALF else dtype
    if exponent == 0:
        return ctx.expand(ctx.scalar(1, dtype, len(x.shape)), ctx.result().shape)
    x = ctx.cast(x, compute)
    if exponent == int(exponent) and 1 <= abs(exponent) <= 16:
        power = repeated_product(ctx, x, abs(int(exponent)))
        if exponent < 0:
            power = ctx.unary("RECIP", power)
    elif abs(exponent) == 0.5:
        power = ctx.unary("SQRT", x)
        if exponent < 0:
            power = ctx.unary("RECIP", power)
    else:
        power = ctx.elementwise("POW", x, ctx.scalar(exponent, compute))
    return ctx.cast(power, dtype)


@converter(aten.pow.Tensor_Tensor, aten.pow.Scalar)
def pow_tensor(ctx: Network, base: Operand, exponent: Operand) -> ITensor:
    """``base ** exponent`` in float32."""
    return binary(ctx, "POW", base, exponent, dtype=torch.float32)
