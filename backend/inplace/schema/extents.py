"""Extents of tensors with dynamic shapes.

A file records an extent as an integer or as an expression such as ``s0 + 1``. Its symbols have a
value in each call. The expressions are a small language of their own, so that reading one runs
nothing::

    sum     = product { ("+" | "-") product }
    product = factor { ("*" | "//" | "%") factor }
    factor  = integer | symbol | "-" factor | "(" sum ")" | ("min" | "max") "(" sum { "," sum } ")"

An extent that this language cannot express, because it depends on the values of tensors, is
`UNKNOWN`.
"""

import operator
import re
from collections.abc import Callable, Mapping
from functools import lru_cache, reduce
from typing import Annotated, Any

import torch
from pydantic import AfterValidator

UNKNOWN = "?"
"""An extent that only the graph computes."""

MAX_LENGTH = 2000
"""Characters of an expression."""

MAX_DEPTH = 50
"""Parentheses and signs inside one another."""

_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
}

_FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {"max": torch.sym_max, "min": torch.sym_min}

_TOKEN = re.compile(r" *(?:(\d{1,19})|([A-Za-z_][A-Za-z0-9_]{0,63})|(//|[-+*%(),]))", re.ASCII)

Expression = int | str | tuple[Any, ...]
"""A parsed expression: an integer, a symbol, or an operation and its operands."""


@lru_cache(maxsize=4096)
def parse(text: str) -> Expression:
    """Parse an expression.

    Raises:
        ValueError: it is no expression of this language.
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"an extent has {len(text)} characters, more than {MAX_LENGTH}")
    parser = _Parser(text)
    expression = parser.sum(0)
    if parser.token != ("end", ""):
        raise ValueError(f"the extent {text!r} is not an expression")
    return expression


def symbols(text: str) -> frozenset[str]:
    """The names of the symbols in an expression.

    Raises:
        ValueError: it is no expression.
    """
    return frozenset() if text == UNKNOWN else frozenset(_symbols(parse(text)))


def evaluate(extent: int | str, known: Mapping[str, Any]) -> Any:
    """Evaluate an extent.

    Args:
        extent: an integer or an expression.
        known: the values of the symbols: integers or `torch.SymInt`.

    Raises:
        ValueError: it is no expression, is `UNKNOWN`, has an unknown symbol or divides by zero.
    """
    if isinstance(extent, int):
        return extent
    if extent == UNKNOWN:
        raise ValueError("the extent depends on values of tensors")
    try:
        return _value(parse(extent), known)
    except KeyError as error:
        raise ValueError(f"{error.args[0]} in the extent {extent} is not known") from None
    except ZeroDivisionError:
        raise ValueError(f"the extent {extent} divides by zero") from None


def _checked(extent: int | str) -> int | str:
    if isinstance(extent, str) and extent != UNKNOWN:
        parse(extent)
    return extent


Extent = Annotated[int | str, AfterValidator(_checked)]
"""A field of a record that is an extent."""


class _Parser:
    """Recursive descent; ``token`` is the next one, as (kind, text)."""

    def __init__(self, text: str) -> None:
        self._text, self._position = text.rstrip(" "), 0
        self.token = self._next()

    def _next(self) -> tuple[str, str]:
        if self._position == len(self._text):
            return "end", ""
        match = _TOKEN.match(self._text, self._position)
        if match is None:
            raise ValueError(f"the extent {self._text!r} is not an expression")
        self._position = match.end()
        kinds = ("integer", "symbol", "operator")
        return next((kind, text) for kind, text in zip(kinds, match.groups(), strict=True) if text)

    def _take(self, *operators: str) -> str | None:
        """The next token if it is one of these operators, which is then consumed."""
        kind, text = self.token
        if kind != "operator" or text not in operators:
            return None
        self.token = self._next()
        return text

    def _expect(self, text: str) -> None:
        if self._take(text) is None:
            raise ValueError(f"the extent {self._text!r} lacks {text!r}")

    def sum(self, depth: int) -> Expression:
        if depth > MAX_DEPTH:
            raise ValueError(f"an extent is nested more than {MAX_DEPTH} deep")
        value = self._product(depth)
        while sign := self._take("+", "-"):
            value = (sign, value, self._product(depth))
        return value

    def _product(self, depth: int) -> Expression:
        value = self._factor(depth)
        while sign := self._take("*", "//", "%"):
            value = (sign, value, self._factor(depth))
        return value

    def _factor(self, depth: int) -> Expression:
        if depth > MAX_DEPTH:
            raise ValueError(f"an extent is nested more than {MAX_DEPTH} deep")
        if self._take("-"):
            return ("-", 0, self._factor(depth + 1))
        if self._take("("):
            value = self.sum(depth + 1)
            self._expect(")")
            return value
        kind, text = self.token
        if kind not in ("integer", "symbol"):
            raise ValueError(f"the extent {self._text!r} is not an expression")
        self.token = self._next()
        if kind == "integer":
            return int(text)
        if text in _FUNCTIONS and self._take("("):
            operands = [self.sum(depth + 1)]
            while self._take(","):
                operands.append(self.sum(depth + 1))
            self._expect(")")
            return (text, *operands)
        return text


def _symbols(expression: Expression) -> set[str]:
    if isinstance(expression, str):
        return {expression}
    if isinstance(expression, int):
        return set()
    return set().union(*map(_symbols, expression[1:]))


def _value(expression: Expression, known: Mapping[str, Any]) -> Any:
    if isinstance(expression, int):
        return expression
    if isinstance(expression, str):
        return known[expression]
    name, *operands = expression
    return reduce(_BINARY.get(name) or _FUNCTIONS[name], (_value(part, known) for part in operands))
