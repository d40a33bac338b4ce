"""Functions of one tensor: activations, casts, and operators without effect.

Half types are computed in float32.
"""

import math
from collections.abc import Callable

import torch
from torch.fx import Node

from inplace_builder.lower.converters.arithmetic import repeated_product, truncated
from inplace_builder.lower.layers import ITensor
from inplace_builder.lower.network import Network
from inplace_builder.lower.registry import converter

aten = torch.ops.aten


def function(
    summary: str,
    compute: Callable[[Network, ITensor], ITensor],
    *overloads: torch._ops.OpOverload,
) -> None:
    """Register a function of one tensor, computed in float32."""

    def convert(ctx: Network, x: ITensor) -> ITensor:
        return ctx.as_float32(lambda value: compute(ctx, value), x, ctx.result().dtype)

    convert.__doc__ = summary
    converter(*overloads)(convert)


for _name, _overload in {
    "EXP": aten.exp.default,
    "LOG": aten.log.default,
    "SQRT": aten.sqrt.default,
    "RECIP": aten.reciprocal.default,
    "ERF": aten.erf.default,
    "COS": aten.cos.default,
    "SIN": aten.sin.default,
    "TAN": aten.tan.default,
    "SINH": aten.sinh.default,
    "COSH": aten.cosh.default,
    "ASIN": aten.asin.default,
    "ACOS": aten.acos.default,
    "ATAN": aten.atan.default,
    "ASINH": aten.asinh.default,
    "ACOSH": aten.acosh.default,
    "ATANH": aten.atanh.default,
}.items():
    _summary = f"TensorRT's {_name}."
    function(_summary, lambda ctx, x, name=_name: ctx.unary(name, x), _overload)  # type: ignore[misc]


for _name, _overload in {
    "FLOOR": aten.floor.default,
    "CEIL": aten.ceil.default,
    "ROUND": aten.round.default,
}.items():

    @converter(_overload)
    def whole(ctx: Network, x: ITensor, name: str = _name) -> ITensor:
        """The whole number below, above or nearest; of integers, themselves."""
        if not ctx.dtype_of(x).is_floating_point:
            return x
        return ctx.as_float32(lambda value: ctx.unary(name, value), x)


for _name, _overload in {"TANH": aten.tanh.default, "SIGMOID": aten.sigmoid.default}.items():
    _summary = f"TensorRT's {_name}."
    function(_summary, lambda ctx, x, name=_name: ctx.activation(name, x), _overload)  # type: ignore[misc]


function(
    "``1 / sqrt(x)``.",
    lambda ctx, x: ctx.unary("RECIP", ctx.unary("SQRT", x)),
    aten.rsqrt.default,
)


function(
    "``x * sigmoid(x)``.",
    lambda ctx, x: ctx.multiply(x, ctx.activation("SIGMOID", x)),
    aten.silu.default,
)


def _number(ctx: Network, value: float) -> ITensor:
    return ctx.scalar(float(value), torch.float32)


for _base, _factor, _overload in (
    (2, 1 / math.log(2), aten.log2.default),
    (10, 1 / math.log(10), aten.log10.default),
):
    function(
        f"Logarithm to base {_base}.",
        lambda ctx, x, factor=_factor: ctx.multiply(  # type: ignore[misc]
            ctx.unary("LOG", x), _number(ctx, factor)
        ),
        _overload,
    )


function(
    "``2 ** x``.",
    lambda ctx, x: ctx.unary("EXP", ctx.multiply(x, _number(ctx, math.log(2)))),
    aten.exp2.default,
)


def _log1p_of(ctx: Network, x: ITensor) -> ITensor:
    """``log(1 + x)`` that keeps small ``x``, by Kahan's method: ``log(u) x / (u - 1)``."""
    one = _number(ctx, 1)
    rounded = ctx.add(x, one)
    rest = ctx.subtract(rounded, one)
    lost = ctx.equal(rest, _number(ctx, 0))
    # infinity would be divided by infinity, and what is lost by zero
    plain = ctx.elementwise("OR", lost, ctx.elementwise("GREATER", rest, _number(ctx, 1e20)))
    ratio = ctx.elementwise("DIV", ctx.select(plain, one, x), ctx.select(plain, one, rest))
    exact = ctx.multiply(ctx.unary("LOG", ctx.select(lost, one, rounded)), ratio)
    return ctx.select(lost, x, exact)


def _expm1_of(ctx: Network, x: ITensor) -> ITensor:
    """``exp(x) - 1`` that keeps small ``x``: ``2 t / (1 - t)`` with ``t = tanh(x / 2)``."""
    one, half = _number(ctx, 1), _number(ctx, 0.5)
    small = ctx.less(ctx.unary("ABS", x), half)
    tanh = ctx.activation("TANH", ctx.multiply(ctx.select(small, x, half), half))
    near = ctx.elementwise("DIV", ctx.add(tanh, tanh), ctx.subtract(one, tanh))
    return ctx.select(small, near, ctx.subtract(ctx.unary("EXP", x), one))


function("``log(1 + x)``, exact for small ``x``.", _log1p_of, aten.log1p.default)


function("``exp(x) - 1``, exact for small ``x``.", _expm1_of, aten.expm1.default)


for _name, _overload in {"ISNAN": aten.isnan.default, "ISINF": aten.isinf.default}.items():

    @converter(_overload)
    def special(ctx: Network, x: ITensor, name: str = _name) -> ITensor:
        """Whether a number is NaN, or infinite."""
        return ctx.unary(name, ctx.cast(x, torch.float32))


@converter(aten.sign.default, aten.sgn.default)
def sign(ctx: Network, x: ITensor) -> ITensor:
    """-1, 0 or 1."""
    dtype, rank = ctx.dtype_of(x), len(x.shape)
    if dtype == torch.bool:
        return x
    zero = ctx.scalar(0, dtype, rank)
    above, below = ctx.elementwise("GREATER", x, zero), ctx.less(x, zero)
    return ctx.subtract(ctx.cast(above, dtype), ctx.cast(below, dtype))


@converter(aten.trunc.default, aten.fix.default)
def trunc(ctx: Network, x: ITensor) -> ITensor:
    """The number without its fraction."""
    if not ctx.result().dtype.is_floating_point:
        return x
    return ctx.as_float32(lambda value: truncated(ctx, value), x)


@converter(aten.leaky_relu.default)
def leaky_relu(ctx: Network, x: ITensor, negative_slope: float = 0.01) -> ITensor:
    """``x`` where it is positive, else ``negative_slope * x``."""

    def compute(value: ITensor) -> ITensor:
        positive = ctx.elementwise("GREATER", value, _number(ctx, 0))
        return ctx.select(positive, value, ctx.multiply(value, _number(ctx, negative_slope)))

    return ctx.as_float32(compute, x)


@converter(aten.elu.default)
def elu(
    ctx: Network, x: ITensor, alpha: float = 1, scale: float = 1, input_scale: float = 1
) -> ITensor:
    """``scale * x`` where it is positive, else ``scale * alpha * (exp(input_scale * x) - 1)``."""

    def compute(value: ITensor) -> ITensor:
        positive = ctx.elementwise("GREATER", value, _number(ctx, 0))
        # of a positive number the exponential might overflow
        below = ctx.multiply(
            ctx.select(positive, _number(ctx, 0), value), _number(ctx, input_scale)
        )
        curve = ctx.multiply(_expm1_of(ctx, below), _number(ctx, scale * alpha))
        return ctx.select(positive, ctx.multiply(value, _number(ctx, scale)), curve)

    return ctx.as_float32(compute, x)


@converter(aten.softplus.default)
def softplus(ctx: Network, x: ITensor, beta: float = 1, threshold: float = 20) -> ITensor:
    """``log(1 + exp(beta * x)) / beta``; ``x`` itself beyond the threshold."""

    def compute(value: ITensor) -> ITensor:
        scaled = ctx.multiply(value, _number(ctx, beta))
        rest = _log1p_of(ctx, ctx.unary("EXP", ctx.unary("NEG", ctx.unary("ABS", scaled))))
        smooth = ctx.elementwise(
            "DIV", ctx.add(ctx.activation("RELU", scaled), rest), _number(ctx, beta)
        )
        beyond = ctx.elementwise("GREATER", scaled, _number(ctx, threshold))
        return ctx.select(beyond, value, smooth)

    return ctx.as_float32(compute, x)


@converter(aten.relu.default)
def relu(ctx: Network, x: ITensor) -> ITensor:
    """``max(x, 0)``."""
    dtype = ctx.dtype_of(x)
    if dtype.is_floating_point:
        return ctx.activation("RELU", x)  # which takes no integers
    return ctx.elementwise("MAX", x, ctx.scalar(0, dtype, len(x.shape)))


@converter(aten.gelu.default)
def gelu(ctx: Network, x: ITensor, *, approximate: str = "none") -> ITensor:
    """Gaussian error linear unit (arXiv:1606.08415): exact, or its tanh approximation."""

    def exact(value: ITensor) -> ITensor:
        cdf = ctx.add(
            ctx.unary("ERF", ctx.multiply(value, ctx.scalar(math.sqrt(0.5), torch.float32))),
            ctx.scalar(1.0, torch.float32),
        )
        return ctx.multiply(ctx.multiply(value, ctx.scalar(0.5, torch.float32)), cdf)

    def approximated(value: ITensor) -> ITensor:
        cubed = ctx.multiply(repeated_product(ctx, value, 3), ctx.scalar(0.044715, torch.float32))
        inner = ctx.multiply(
            ctx.add(value, cubed), ctx.scalar(math.sqrt(2 / math.pi), torch.float32)
        )
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


@converter(
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.type_as.default,
    aten.to.other,
)
def to(ctx: Network, x: ITensor, *_: object, **__: object) -> ITensor:
    """A cast. A network has no devices, so a move between devices has no effect."""
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
    """No effect: tensors of a network are values."""
    return x


def _evaluating(node: Node, ctx: Network) -> str | None:
    """Outside of training, where it has no effect."""
    return (
        "it drops elements at random (training); call .eval() on the model"
        if node.args[2] and node.args[1]
        else None
    )


@converter(aten.dropout.default, aten.feature_dropout.default, validator=_evaluating)
def dropout(ctx: Network, x: ITensor, *_: object) -> ITensor:
    """No effect outside of training."""
    return x
