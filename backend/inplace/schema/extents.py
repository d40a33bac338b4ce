"""Extents of dynamic tensors as the manifest records them: integers, or texts such as ``s0 + 1`` in the symbols of a call."""

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
    """The symbols in an expression."""
    names = {
        node.id for node in ast.walk(ast.parse(text, mode="eval")) if isinstance(node, ast.Name)
    }
    return frozenset(names - _FUNCTIONS.keys())


def evaluate(extent: int | str, known: Mapping[str, Any]) -> Any:
    """The value of an extent for these values of its symbols, which may be symbolic themselves.

    Raises:
        ValueError: a symbol is not known, or the text has an operation that no extent has.
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
            found = _value(first, known, text)
            for other in rest:
                found = _FUNCTIONS[name](found, _value(other, known, text))
            return found
    raise ValueError(f"{ast.unparse(node)} in the extent {text} is not known")
