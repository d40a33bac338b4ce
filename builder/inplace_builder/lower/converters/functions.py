"""Functions of one tensor: activations, casts, and operators without effect.

Half types are computed in float32.
"""

import math
from collections.abc import Callable

import torch
from torch.fx import Node

from inplace_builder.lower.converters.arithmetic import repeated_product
from inplace_builder.lower.layers import ITensor
from inplace_builder.lower.network import Network
from inplace_builder.lower.registry import converter

aten = torch.ops.aten


def function(
    compute: Callable[[Network, ITensor], ITensor], *overloads: torch._ops.OpOverload
) -> None:
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
    return (
        "it drops elements at random (training); call .eval() on the model"
        if node.args[2] and node.args[1]
        else None
    )


@converter(aten.dropout.default, aten.feature_dropout.default, validator=_evaluating)
def dropout(ctx: Network, x: ITensor, *_: object) -> ITensor:
    """No effect outside of training."""
    return x
