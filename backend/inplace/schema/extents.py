"""Extents of tensors with dynamic shapes.

The manifest records an extent as an integer or as an expression such as ``s0 + 1``. Its symbols
have a value in each call.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch

_OPERATIONS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


_FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "Max": torch.sym_max,
    "Min": torch.sym_min,
}


def symbols(text: str) -> frozenset[str]:
    """The names of the symbols in an expression."""
    names = {
        node.id for node in ast.walk(ast.parse(text, mode="eval")) if isinstance(node, ast.Name)
    }
    return frozenset(names - _FUNCTIONS.keys())


def evaluate(extent: int | str, known: Mapping[str, Any]) -> Any:
    """Evaluate an extent.

    Args:
        extent: an integer or an expression.
        known: the values of the symbols: integers or `torch.SymInt`.

    Raises:
        ValueError: the expression has an unknown symbol or an unsupported operation.
    """
    if isinstance(extent, int):
        return extent
    return _value(ast.parse(extent, mode="eval").body, known, extent)


def _value(node: ast.AST, known: Mapping[str, Any], text: str) -> Any:
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.Name(id=name) if name in known:
            return known[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, known, text)
        case ast.BinOp(left=left, op=operation, right=right) if type(operation) in _OPERATIONS:
            return _OPERATIONS[type(operation)](
                _value(left, known, text), _value(right, known, text)
            )
        case ast.Call(func=ast.Name(id=name), args=[first, *rest], keywords=[]) if (
            name in _FUNCTIONS and rest
        ):
            value = _value(first, known, text)
            for other in rest:
                value = _FUNCTIONS[name](value, _value(other, known, text))
            return value
    raise ValueError(f"{ast.unparse(node)} in the extent {text} is not known")
