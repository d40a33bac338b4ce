"""How a request's next token is chosen: temperature, top-k, top-p and seed."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch

from inplace.errors import Code, RequestError

Parameter = bool | int | float | str
"""The value of a request parameter in Triton."""


INTEGER = re.compile(r"[+-]?[0-9]{1,19}")


DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")


INT64 = torch.iinfo(torch.int64)


MAX_TEMPERATURE = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The arguments of `inplace.operators.sample` for one row.

    The fields are named as the request parameters and as the roles of the program's inputs.

    Attributes:
        temperature: divides the scores; 0 takes the token with the largest score.
        top_k: keep this many of the largest scores; 0 keeps all.
        top_p: of those, keep the largest that together have this probability; 1 keeps all.
        seed: of the random numbers, which depend on it and on the token's position alone.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    @classmethod
    def parse(cls, parameters: Mapping[str, Parameter], vocab_size: int) -> Self:
        """Read the sampling parameters of a request; absent ones have their default.

        Args:
            parameters: the request's parameters: JSON numbers, or numbers as text (Triton's gRPC
                clients cannot send floating-point parameters).
            vocab_size: the number of scores.

        Raises:
            RequestError: BAD_PARAMETER, one of them is not a number or out of range. All are
                checked, also where the temperature is 0.
        """
        return cls(
            temperature=_parse_number(
                parameters,
                "temperature",
                0.0,
                0.0,
                MAX_TEMPERATURE,
                "a finite number of at least 0",
            ),
            top_k=parse_integer(
                parameters,
                "top_k",
                0,
                vocab_size,
                f"a whole number from 0 (all) to {vocab_size}, the size of the vocabulary",
            ),
            top_p=_parse_number(
                parameters, "top_p", 1.0, math.ulp(0.0), 1.0, "a number above 0, at most 1 (all)"
            ),
            seed=parse_integer(
                parameters,
                "seed",
                INT64.min,
                INT64.max,
                "a whole number from -2^63 to 2^63 - 1 (a larger one arrives as a floating-point"
                " number)",
            ),
        )


GREEDY = SamplingParams()


def _parse_number(
    parameters: Mapping[str, Parameter],
    name: str,
    default: float,
    low: float,
    high: float,
    expected: str,
) -> float:
    value = parameters.get(name, default)
    if isinstance(value, bool) or (isinstance(value, str) and not DECIMAL.fullmatch(value)):
        raise _bad_parameter(name, value, expected)
    try:
        number = float(value)
    except OverflowError:  # an integer beyond the range of floats
        raise _bad_parameter(name, value, expected) from None
    if not low <= number <= high:  # also true for NaN
        raise _bad_parameter(name, value, expected)
    return number


def parse_integer(
    parameters: Mapping[str, Parameter],
    name: str,
    low: int,
    high: int,
    expected: str,
    default: int = 0,
) -> int:
    """Read an integer parameter, sent as a JSON number or as text.

    Args:
        parameters: the request's parameters.
        name: of the parameter.
        low: smallest value allowed.
        high: largest value allowed.
        expected: describes the allowed values, for the error.
        default: the value of an absent parameter.

    Raises:
        RequestError: BAD_PARAMETER.
    """
    value = parameters.get(name, default)
    if isinstance(value, bool | float) or (isinstance(value, str) and not INTEGER.fullmatch(value)):
        raise _bad_parameter(name, value, expected)
    integer = int(value)
    if not low <= integer <= high:
        raise _bad_parameter(name, value, expected)
    return integer


def _bad_parameter(name: str, value: object, expected: str) -> RequestError:
    return RequestError(Code.BAD_PARAMETER, f"parameter {name!r} is {value!r}; expected {expected}")
