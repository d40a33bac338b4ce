"""How a request wants its next token chosen."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch

from inplace.errors import Code, RequestError

Parameter = bool | int | float | str


WHOLE = re.compile(r"[+-]?[0-9]{1,19}")


DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")


SEEDS = torch.iinfo(torch.int64)


HOTTEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class Sampling:
    """The parameters of `inplace.operators.sample` for one row.

    Attributes:
        temperature: what scores are divided by; 0 takes the largest score.
        top_k: keep so many of the largest scores; 0 keeps all.
        top_p: of those, keep the largest that together have this probability; 1 keeps all.
        seed: of the random numbers, which depend on it and on the token's position alone.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    @classmethod
    def parse(cls, parameters: Mapping[str, Parameter], scores: int) -> Self:
        """The sampling that a request's parameters ask for; greedy where they name no temperature.

        Args:
            parameters: of the request: JSON numbers, or texts that spell them (Triton's gRPC clients send no floating-point numbers).
            scores: how many scores there are to choose from.

        Raises:
            RequestError: BAD_PARAMETER, one of them is no number or outside its range; also where the temperature is 0.
        """
        return cls(
            temperature=_decimal(
                parameters, "temperature", 0.0, 0.0, HOTTEST, "a finite number of at least 0"
            ),
            top_k=whole(
                parameters,
                "top_k",
                0,
                scores,
                f"a whole number from 0 (all) to {scores}, the size of the vocabulary",
            ),
            top_p=_decimal(
                parameters, "top_p", 1.0, math.ulp(0.0), 1.0, "a number above 0, at most 1 (all)"
            ),
            seed=whole(
                parameters,
                "seed",
                SEEDS.min,
                SEEDS.max,
                "a whole number from -2^63 to 2^63 - 1 (a larger one arrives as a floating-point number)",
            ),
        )


GREEDY = Sampling()


def _decimal(
    parameters: Mapping[str, Parameter],
    name: str,
    default: float,
    low: float,
    high: float,
    expected: str,
) -> float:
    value = parameters.get(name, default)
    if isinstance(value, bool) or (isinstance(value, str) and not DECIMAL.fullmatch(value)):
        raise _refused(name, value, expected)
    try:
        found = float(value)
    except OverflowError:  # a whole number beyond any floating-point number
        raise _refused(name, value, expected) from None
    if not low <= found <= high:  # in these words NaN is outside
        raise _refused(name, value, expected)
    return found


def whole(
    parameters: Mapping[str, Parameter],
    name: str,
    low: int,
    high: int,
    expected: str,
    default: int = 0,
) -> int:
    """A whole number among a request's parameters, from ``low`` to ``high``; a JSON number or a text that spells it.

    Raises:
        RequestError: BAD_PARAMETER, with what was expected.
    """
    value = parameters.get(name, default)
    if isinstance(value, bool | float) or (isinstance(value, str) and not WHOLE.fullmatch(value)):
        raise _refused(name, value, expected)
    found = int(value)
    if not low <= found <= high:
        raise _refused(name, value, expected)
    return found


def _refused(name: str, value: object, expected: str) -> RequestError:
    return RequestError(Code.BAD_PARAMETER, f"parameter {name!r} is {value!r}; expected {expected}")
