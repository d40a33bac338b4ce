"""Arithmetic, with PyTorch's type promotion.

Half types are computed in float32 and rounded once, where PyTorch's kernels do so: if the other
operand is a Python number, and in everything that is more than one operation.
"""

import math

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


@converter(aten.div.Tensor_mode, aten.div.Scalar_mode)
def div_mode(ctx: Network, a: Operand, b: Operand, *, rounding_mode: str | None) -> ITensor:
    """``a / b``, rounded down or towards zero."""
    if rounding_mode == "trunc":
        return _truncated_division(ctx, a, b)
    return binary(ctx, "FLOOR_DIV" if rounding_mode else "DIV", a, b)


def _truncated_division(ctx: Network, a: Operand, b: Operand) -> ITensor:
    """``a / b`` rounded towards zero; TensorRT divides integers so."""
    dtype, rank = ctx.result().dtype, len(ctx.result().shape)
    compute = torch.float32 if dtype in HALF else dtype
    quotient = ctx.elementwise("DIV", ctx.tensor(a, compute, rank), ctx.tensor(b, compute, rank))
    if compute.is_floating_point:
        quotient = truncated(ctx, quotient)
    return ctx.cast(quotient, dtype)


def truncated(ctx: Network, x: ITensor) -> ITensor:
    """Floating-point numbers without their fraction."""
    negative = ctx.less(x, ctx.scalar(0.0, ctx.dtype_of(x), len(x.shape)))
    return ctx.select(negative, ctx.unary("CEIL", x), ctx.unary("FLOOR", x))


@converter(aten.fmod.Tensor, aten.fmod.Scalar)
def fmod(ctx: Network, a: Operand, b: Operand) -> ITensor:
    """``a - b * trunc(a / b)``: the sign is that of ``a``."""
    dtype, rank = ctx.result().dtype, len(ctx.result().shape)
    compute = torch.float32 if dtype in HALF else dtype
    a, b = ctx.tensor(a, compute, rank), ctx.tensor(b, compute, rank)
    quotient = ctx.cast(_truncated_division(ctx, a, b), compute)
    return ctx.cast(ctx.subtract(a, ctx.multiply(quotient, b)), dtype)


@converter(aten.atan2.default)
def atan2(ctx: Network, y: ITensor, x: ITensor) -> ITensor:
    """The angle of the point ``(x, y)``, in ``[-π, π]``; 0 at the origin."""
    dtype, rank = ctx.result().dtype, len(ctx.result().shape)
    y, x = ctx.tensor(y, torch.float32, rank), ctx.tensor(x, torch.float32, rank)
    zero, pi = (ctx.scalar(value, torch.float32, rank) for value in (0.0, math.pi))
    angle = ctx.unary("ATAN", ctx.elementwise("DIV", y, x))
    offset = ctx.select(ctx.less(y, zero), ctx.unary("NEG", pi), pi)
    angle = ctx.select(ctx.less(x, zero), ctx.add(angle, offset), angle)
    origin = ctx.logical_and(ctx.equal(x, zero), ctx.equal(y, zero))
    return ctx.cast(ctx.select(origin, zero, angle), dtype)


def _known_shift(node: Node, ctx: Network) -> str | None:
    """By a constant number of bits."""
    return None if isinstance(node.args[1], int) else "it shifts by a tensor"


@converter(aten.bitwise_left_shift.Tensor_Scalar, aten.__lshift__.Scalar, validator=_known_shift)
def left_shift(ctx: Network, x: ITensor, bits: int) -> ITensor:
    """``x * 2 ** bits``."""
    return binary(ctx, "PROD", x, 1 << bits)


@converter(aten.bitwise_right_shift.Tensor_Scalar, aten.__rshift__.Scalar, validator=_known_shift)
def right_shift(ctx: Network, x: ITensor, bits: int) -> ITensor:
    """``floor(x / 2 ** bits)``."""
    return binary(ctx, "FLOOR_DIV", x, 1 << bits)


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


@converter(
    aten.clamp.default,
    aten.clamp.Tensor,
    aten.clamp_min.default,
    aten.clamp_max.default,
    aten.clamp_min.Tensor,
    aten.clamp_max.Tensor,
    aten.hardtanh.default,
)
def clamp(
    ctx: Network, x: ITensor, low: Operand | None = None, high: Operand | None = None
) -> ITensor:
    """Not below ``low`` and not above ``high``."""
    if ctx.node.target is aten.hardtanh.default:
        low, high = -1 if low is None else low, 1 if high is None else high
    if ctx.node.target in (aten.clamp_max.default, aten.clamp_max.Tensor):
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
