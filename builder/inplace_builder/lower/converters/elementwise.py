"""Element by element: arithmetic, functions, comparisons, casts.

Half types are computed in float32 and rounded once wherever PyTorch's kernels do so: with a Python number as the other operand, and in
every function that is more than one operation.
"""

import math
from collections.abc import Callable

import torch
from torch.fx import Node

from inplace_builder.lower.extents import Extent
from inplace_builder.lower.layers import HALF, ITensor, Number
from inplace_builder.lower.network import Network
from inplace_builder.lower.registry import converter

aten = torch.ops.aten
Operand = ITensor | Extent | Number


def binary(ctx: Network, operation: str, a: Operand, b: Operand, *, dtype: torch.dtype | None = None) -> ITensor:
    """An arithmetic operation with PyTorch's type promotion, computed in ``dtype`` (default: the result's)."""
    result = ctx.result().dtype
    rank = len(ctx.result().shape)
    compute = dtype or result
    if compute in HALF and (isinstance(a, int | float) or isinstance(b, int | float)):
        compute = torch.float32
    return ctx.cast(ctx.elementwise(operation, ctx.tensor(a, compute, rank), ctx.tensor(b, compute, rank)), result)


def scaled(ctx: Network, x: Operand, factor: Number) -> Operand:
    """``alpha * x``, at the precision of the sum it is part of."""
    if factor == 1:
        return x
    if isinstance(x, int | float):
        return x * factor
    dtype = ctx.result().dtype
    compute = torch.float32 if dtype in HALF else dtype
    return ctx.multiply(ctx.tensor(x, compute), ctx.scalar(factor, compute))


@converter(aten.add.Tensor, aten.add.Scalar, aten.add_.Tensor)
def add(ctx: Network, a: Operand, b: Operand, *, alpha: Number = 1) -> ITensor:
    """``a + alpha * b``."""
    return binary(ctx, "OR" if ctx.result().dtype == torch.bool else "SUM", a, scaled(ctx, b, alpha))


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
    return None if mode in (None, "floor") else f"the rounding mode {mode!r} is not lowered; use 'floor' or none"


@converter(aten.div.Tensor_mode, aten.div.Scalar_mode, supports=_rounding)
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
def clamp(ctx: Network, x: ITensor, low: Operand | None = None, high: Operand | None = None) -> ITensor:
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
    """``x ** exponent``; whole exponents by multiplication, which is also right where ``x`` is negative."""
    dtype = ctx.result().dtype
    compute = torch.float32 if dtype in HALF else dtype
    x = ctx.cast(x, compute)
    if exponent == 0:
        found = ctx.elementwise("POW", x, ctx.scalar(0, compute))
    elif exponent == int(exponent) and 1 <= abs(exponent) <= 16:
        found = repeated_product(ctx, x, abs(int(exponent)))
        if exponent < 0:
            found = ctx.unary("RECIP", found)
    elif abs(exponent) == 0.5:
        found = ctx.unary("SQRT", x)
        if exponent < 0:
            found = ctx.unary("RECIP", found)
    else:
        found = ctx.elementwise("POW", x, ctx.scalar(exponent, compute))
    return ctx.cast(found, dtype)


@converter(aten.pow.Tensor_Tensor, aten.pow.Scalar)
def pow_tensor(ctx: Network, base: Operand, exponent: Operand) -> ITensor:
    """``base ** exponent`` in float32."""
    return binary(ctx, "POW", base, exponent, dtype=torch.float32)


def function(compute: Callable[[Network, ITensor], ITensor], *overloads: torch._ops.OpOverload) -> None:
    """Register a function of one tensor, computed in float32."""

    def convert(ctx: Network, x: ITensor) -> ITensor:
        return ctx.as_float32(lambda value: compute(ctx, value), x, ctx.result().dtype)

    converter(*overloads)(convert)


for _name, _overload in {
    "EXP": aten.exp.default,
    "LOG": aten.log.default,
    "SQRT": aten.sqrt.default,
    "RECIP": aten.reciprocal.default,
    "ERF": aten.erf.default,
    "COS": aten.cos.default,
    "SIN": aten.sin.default,
    "FLOOR": aten.floor.default,
    "CEIL": aten.ceil.default,
    "ROUND": aten.round.default,
}.items():
    function(lambda ctx, x, name=_name: ctx.unary(name, x), _overload)  # type: ignore[misc]
for _name, _overload in {"TANH": aten.tanh.default, "SIGMOID": aten.sigmoid.default}.items():
    function(lambda ctx, x, name=_name: ctx.activation(name, x), _overload)  # type: ignore[misc]
function(lambda ctx, x: ctx.unary("RECIP", ctx.unary("SQRT", x)), aten.rsqrt.default)
function(lambda ctx, x: ctx.multiply(x, ctx.activation("SIGMOID", x)), aten.silu.default)


@converter(aten.relu.default)
def relu(ctx: Network, x: ITensor) -> ITensor:
    """``max(x, 0)``."""
    return ctx.activation("RELU", x)


@converter(aten.gelu.default)
def gelu(ctx: Network, x: ITensor, *, approximate: str = "none") -> ITensor:
    """Gaussian error linear unit (arXiv:1606.08415): exact by the error function, or its tanh approximation."""

    def exact(value: ITensor) -> ITensor:
        cdf = ctx.add(ctx.unary("ERF", ctx.multiply(value, ctx.scalar(math.sqrt(0.5), torch.float32))), ctx.scalar(1.0, torch.float32))
        return ctx.multiply(ctx.multiply(value, ctx.scalar(0.5, torch.float32)), cdf)

    def approximated(value: ITensor) -> ITensor:
        cubed = ctx.multiply(repeated_product(ctx, value, 3), ctx.scalar(0.044715, torch.float32))
        inner = ctx.multiply(ctx.add(value, cubed), ctx.scalar(math.sqrt(2 / math.pi), torch.float32))
        cdf = ctx.add(ctx.activation("TANH", inner), ctx.scalar(1.0, torch.float32))
        return ctx.multiply(ctx.multiply(value, ctx.scalar(0.5, torch.float32)), cdf)

    return ctx.as_float32(approximated if approximate == "tanh" else exact, x)


@converter(aten.neg.default)
def neg(ctx: Network, x: ITensor) -> ITensor:
    """``-x``."""
    return ctx.unary("NEG", x)


@converter(aten.abs.default)
def absolute(ctx: Network, x: ITensor) -> ITensor:
    """``|x|``."""
    return ctx.unary("ABS", x)


def _compared(ctx: Network, a: Operand, b: Operand) -> tuple[ITensor, ITensor]:
    """Both operands in the type PyTorch compares them in."""
    values = [ctx.meta(argument) for argument in ctx.node.args[:2]]
    dtype = torch.result_type(*(0 if isinstance(value, torch.SymInt) else value for value in values))
    if dtype == torch.bool:
        dtype = torch.int32
    rank = len(ctx.result().shape)
    return ctx.tensor(a, dtype, rank), ctx.tensor(b, dtype, rank)


@converter(aten.eq.Tensor, aten.eq.Scalar)
def eq(ctx: Network, a: Operand, b: Operand) -> ITensor:
    """``a == b``."""
    return ctx.equal(*_compared(ctx, a, b))


@converter(aten.ne.Tensor, aten.ne.Scalar)
def ne(ctx: Network, a: Operand, b: Operand) -> ITensor:
    """``a != b``."""
    return ctx.invert(ctx.equal(*_compared(ctx, a, b)))


@converter(aten.gt.Tensor, aten.gt.Scalar)
def gt(ctx: Network, a: Operand, b: Operand) -> ITensor:
    """``a > b``."""
    return ctx.elementwise("GREATER", *_compared(ctx, a, b))


@converter(aten.lt.Tensor, aten.lt.Scalar)
def lt(ctx: Network, a: Operand, b: Operand) -> ITensor:
    """``a < b``."""
    return ctx.less(*_compared(ctx, a, b))


@converter(aten.ge.Tensor, aten.ge.Scalar)
def ge(ctx: Network, a: Operand, b: Operand) -> ITensor:
    """``a >= b``; not the inverse of ``<``, which would hold for NaN."""
    a, b = _compared(ctx, a, b)
    return ctx.elementwise("OR", ctx.elementwise("GREATER", a, b), ctx.equal(a, b))


@converter(aten.le.Tensor, aten.le.Scalar)
def le(ctx: Network, a: Operand, b: Operand) -> ITensor:
    """``a <= b``; not the inverse of ``>``, which would hold for NaN."""
    a, b = _compared(ctx, a, b)
    return ctx.elementwise("OR", ctx.less(a, b), ctx.equal(a, b))


def _booleans(node: Node, ctx: Network) -> str | None:
    dtypes = {argument.meta["val"].dtype for argument in node.all_input_nodes}
    logical = "logical" in str(node.target)
    return None if logical or dtypes == {torch.bool} else f"it takes {sorted(map(str, dtypes))}; only bool is lowered"


for _name, _overloads in {
    "AND": (aten.logical_and.default, aten.bitwise_and.Tensor, aten.__and__.Tensor),
    "OR": (aten.logical_or.default, aten.bitwise_or.Tensor, aten.__or__.Tensor),
    "XOR": (aten.logical_xor.default, aten.bitwise_xor.Tensor, aten.__xor__.Tensor),
}.items():

    @converter(*_overloads, supports=_booleans)
    def logical(ctx: Network, a: ITensor, b: ITensor, name: str = _name) -> ITensor:
        """Logical and, or, xor."""
        return ctx.elementwise(name, ctx.cast(a, torch.bool), ctx.cast(b, torch.bool))


@converter(aten.logical_not.default, aten.bitwise_not.default, supports=_booleans)
def logical_not(ctx: Network, x: ITensor) -> ITensor:
    """Logical not."""
    return ctx.invert(ctx.cast(x, torch.bool))


@converter(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def where(ctx: Network, condition: ITensor, yes: Operand, no: Operand) -> ITensor:
    """``yes`` where the condition holds, else ``no``."""
    dtype, rank = ctx.result().dtype, len(ctx.result().shape)
    return ctx.select(ctx.cast(condition, torch.bool), ctx.tensor(yes, dtype, rank), ctx.tensor(no, dtype, rank))


@converter(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(ctx: Network, x: ITensor, mask: ITensor, value: Operand) -> ITensor:
    """``value`` where the mask holds, else ``x``."""
    return where(ctx, mask, value, x)


@converter(aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default, aten.to.other)
def to(ctx: Network, x: ITensor, *_: object, **__: object) -> ITensor:
    """A cast; where the tensor lies is TensorRT's business."""
    return ctx.cast(x, ctx.result().dtype)


@converter(
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.positive.default,
)
def same(ctx: Network, x: ITensor, *_: object, **__: object) -> ITensor:
    """Nothing: tensors of a network are values."""
    return x


def _evaluating(node: Node, ctx: Network) -> str | None:
    return "it drops elements at random (training); call .eval() on the model" if node.args[2] and node.args[1] else None


@converter(aten.dropout.default, aten.feature_dropout.default, supports=_evaluating)
def dropout(ctx: Network, x: ITensor, *_: object) -> ITensor:
    """Nothing, outside training."""
    return x
