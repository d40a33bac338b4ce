"""Numbers and shapes of captured graphs as an engine's files hold them."""

from collections.abc import Iterable
from typing import Any

import sympy
import torch
from inplace.schema.extents import UNKNOWN, parse, symbols
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod, PythonMod

MAX_POWER = 8
"""The largest power that is written as a product."""


def extent_text(extent: Any) -> int | str:
    """A number of a graph: an integer, or the text of its expression (`inplace.schema.extents`).

    Numbers that the expressions do not cover, floating-point ones for example, are `UNKNOWN`.
    """
    if isinstance(extent, int):
        return int(extent)
    if not isinstance(extent, torch.SymInt):
        return UNKNOWN
    expression = extent.node.expr
    if isinstance(expression, sympy.Integer):
        return int(expression)
    try:
        text = _text(expression, nested=False)
        parse(text)
    except ValueError:
        return UNKNOWN
    return text


def _text(expression: sympy.Expr, *, nested: bool = True) -> str:
    """The text of an expression, in parentheses where it is an operand."""
    if isinstance(expression, sympy.Symbol):
        return str(expression)
    if isinstance(expression, sympy.Integer):
        return str(expression)
    if isinstance(expression, Max | Min | sympy.Max | sympy.Min):
        name = "max" if isinstance(expression, Max | sympy.Max) else "min"
        return f"{name}({', '.join(_text(part, nested=False) for part in expression.args)})"
    text = f" {_sign(expression)} ".join(map(_text, _operands(expression)))
    return f"({text})" if nested else text


def _sign(expression: sympy.Expr) -> str:
    match expression:
        case FloorDiv():
            return "//"
        case Mod() | PythonMod():
            return "%"
        case sympy.Add() | sympy.Mul() if expression.as_numer_denom()[1] != 1:
            return "//"  # the quotient of an extent is whole
        case sympy.Add():
            return "+"
        case sympy.Mul() | sympy.Pow():
            return "*"
    raise ValueError(f"{expression} is no expression of a file")


def _operands(expression: sympy.Expr) -> list[sympy.Expr]:
    match expression:
        case sympy.Pow():
            base, power = expression.args
            if not isinstance(power, sympy.Integer) or not 1 <= power <= MAX_POWER:
                raise ValueError(f"{expression} is no expression of a file")
            return [base] * int(power)
        case sympy.Add() | sympy.Mul() if expression.as_numer_denom()[1] != 1:
            return list(expression.as_numer_denom())
        case sympy.Add():
            return list(expression.as_ordered_terms())
    return list(expression.args)


def dtype_and_shape(value: Any) -> tuple[torch.dtype | None, tuple[int | str, ...]]:
    """The dtype and the shape of a graph's value, as files record them.

    A number has no dtype, and itself as the one extent.
    """
    if isinstance(value, Tensor):
        return value.dtype, tuple(extent_text(extent) for extent in value.shape)
    return None, (extent_text(value),)


def symbol_ranges(
    exported: ExportedProgram, shapes: Iterable[tuple[int | str, ...]]
) -> dict[str, tuple[int | None, int | None]]:
    """The smallest and largest value of each symbol in these shapes; None is no limit."""
    texts = {
        symbol
        for shape in shapes
        for extent in shape
        if isinstance(extent, str)
        for symbol in symbols(extent)
    }
    return {
        str(symbol): _limits(limits)
        for symbol, limits in exported.range_constraints.items()
        if str(symbol) in texts
    }


def _limits(limits: Any) -> tuple[int | None, int | None]:
    low, high = (
        int(limit) if -(2**62) < limit < 2**62 else None for limit in (limits.lower, limits.upper)
    )
    return low, high
