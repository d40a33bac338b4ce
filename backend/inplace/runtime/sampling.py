"""How a request's next token is chosen: temperature, top-k, top-p and seed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from inplace.parameters import BY_NAME, SAMPLING_PARAMETERS, Parameter


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
            parameters: the request's parameters; numbers may be texts.
            vocab_size: the number of scores.

        Raises:
            RequestError: BAD_PARAMETER, one of them is not a number or out of range. All are
                checked, also where the temperature is 0.
        """
        spec = BY_NAME["top_k"]
        values: dict[str, Any] = {
            name: BY_NAME[name].parse(parameters[name])
            for name in SAMPLING_PARAMETERS
            if name in parameters
        }
        if values.get("top_k", 0) > vocab_size:
            limits = f"a whole number from 0 (all) to {vocab_size}, the size of the vocabulary"
            raise spec.refusal(parameters["top_k"], limits)
        return cls(**values)


GREEDY = SamplingParams()
