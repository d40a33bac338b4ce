"""Comparisons, logic, and choices made by them."""

import torch
from torch.fx import Node

from inplace_builder.lower.converters.arithmetic import Operand
from inplace_builder.lower.layers import ITensor
from inplace_builder.lower.network import Network
from inplace_builder.lower.registry import converter

aten = torch.ops.aten


def _compared(ctx: Network, a: Operand, b: Operand) -> tuple[ITensor, ITensor]:
    """Both operands in the type PyTorch compares them in."""
    values = [ctx.meta(argument) for argument in ctx.node.args[:2]]
    dtype = torch.result_type(
        *(0 if isinstance(value, torch.SymInt) else value for value in values)
    )
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
    return ctx.logical_not(ctx.equal(*_compared(ctx, a, b)))


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
    """Booleans; the logical ones take every type."""
    dtypes = {argument.meta["val"].dtype for argument in node.all_input_nodes}
    logical = "logical" in str(node.target)
    return (
        None
        if logical or dtypes == {torch.bool}
        else f"it takes {sorted(map(str, dtypes))}; only bool is lowered"
    )


for _name, _overloads in {
    "AND": (
        aten.logical_and.default,
        aten.bitwise_and.Tensor,
        aten.bitwise_and.Scalar,
        aten.__and__.Tensor,
    ),
    "OR": (
        aten.logical_or.default,
        aten.bitwise_or.Tensor,
        aten.bitwise_or.Scalar,
        aten.__or__.Tensor,
    ),
    "XOR": (
        aten.logical_xor.default,
        aten.bitwise_xor.Tensor,
        aten.bitwise_xor.Scalar,
        aten.__xor__.Tensor,
    ),
}.items():

    @converter(*_overloads, validator=_booleans)
    def logical(ctx: Network, a: ITensor, b: ITensor | bool, name: str = _name) -> ITensor:
        """Logical and, or, xor."""
        return ctx.elementwise(name, ctx.cast(a, torch.bool), ctx.tensor(b, torch.bool))


@converter(aten.logical_not.default, aten.bitwise_not.default, validator=_booleans)
def logical_not(ctx: Network, x: ITensor) -> ITensor:
    """Logical not."""
    return ctx.logical_not(ctx.cast(x, torch.bool))


@converter(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def where(ctx: Network, condition: ITensor, yes: Operand, no: Operand) -> ITensor:
    """``yes`` where the condition holds, else ``no``."""
    dtype, rank = ctx.result().dtype, len(ctx.result().shape)
    return ctx.select(
        ctx.cast(condition, torch.bool), ctx.tensor(yes, dtype, rank), ctx.tensor(no, dtype, rank)
    )


@converter(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(ctx: Network, x: ITensor, mask: ITensor, value: Operand) -> ITensor:
    """``value`` where the mask holds, else ``x``."""
    return where(ctx, mask, value, x)
