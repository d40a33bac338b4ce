"""How the next token of a request is chosen: its parameters, and the scores that they adjust.

Penalties count tokens, and only the host knows which tokens a sequence has. So the host makes a
list of adjusted tokens for each row that has penalties, biases or masks, and the sampling operator
needs no state (docs/adr/0037-sampling-options.md).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import inf
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from inplace.errors import Code, RequestError
from inplace.parameters import BY_NAME, SAMPLING_OPTIONS, SAMPLING_PARAMETERS, Parameter
from inplace.protocol import (
    ALLOWED_TOKEN_IDS,
    BANNED_TOKEN_IDS,
    LOGIT_BIAS,
    LOGPROBS,
    NUM_GENERATED,
    TOKEN_LOGPROBS,
    TOP_LOGPROBS,
    TOP_TOKENS,
)
from inplace.schema.served import Program
from inplace.schema.specs import Dtype, Role, TensorSpec


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What the sampling operator gets for one row.

    The fields are named as the request parameters.

    Attributes:
        temperature: divides the scores; 0 takes the token with the largest score.
        top_k: keep this many of the largest scores; 0 keeps all.
        top_p: of those, keep the largest that together have this probability; 1 keeps all.
        seed: of the random numbers, which depend on it and on the token's position alone.
        min_p: of those, keep the tokens that have this part of the largest probability.
        logprobs: how many of the most likely tokens are returned with their log-probabilities,
            beside the chosen one; None for no log-probabilities at all.
        repetition_penalty: divides positive scores of tokens that the sequence has, and multiplies
            their negative scores (Keskar et al., arXiv:1909.05858, as transformers'
            ``RepetitionPenaltyLogitsProcessor``).
        presence_penalty, frequency_penalty: subtracted from the scores of tokens that were
            generated, the second as often as they were (as OpenAI defines them, and vLLM's
            ``apply_penalties``).
        logit_bias: tokens, and what is added to their scores.
        allowed_token_ids: the only tokens that may be chosen; empty for all.
        banned_token_ids: tokens that may not be chosen.
        num_generated: how many of the last tokens before the one that is chosen count as generated.
        min_tokens: before so many generated tokens none of ``end_token_ids`` may be chosen.
        end_token_ids: the tokens that would end the generation.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    logprobs: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    banned_token_ids: tuple[int, ...] = ()
    num_generated: int = 0
    min_tokens: int = 0
    end_token_ids: frozenset[int] = frozenset()

    @property
    def num_logprobs(self) -> int:
        """The value of the role ``num_logprobs``."""
        return 0 if self.logprobs is None else self.logprobs + 1

    @property
    def counts_tokens(self) -> bool:
        """Whether the scores depend on the tokens so far."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @property
    def counts_generated(self) -> bool:
        """Whether the scores depend on which tokens were generated."""
        return (self.presence_penalty, self.frequency_penalty) != (0, 0)

    @property
    def adjusts(self) -> bool:
        """Whether any score is adjusted."""
        return bool(
            self.counts_tokens
            or self.logit_bias
            or self.allowed_token_ids
            or self.banned_token_ids
            or self.min_tokens
        )

    @property
    def is_greedy(self) -> bool:
        """Whether the token with the largest score is taken, and nothing else is asked for."""
        return self.temperature == 0 and self.logprobs is None and not self.adjusts

    @property
    def outputs(self) -> frozenset[str]:
        """The names of the outputs with log-probabilities that it asks for."""
        if self.logprobs is None:
            return frozenset()
        top = (TOP_LOGPROBS, TOP_TOKENS) if self.logprobs else ()
        return frozenset({TOKEN_LOGPROBS, *top})

    @classmethod
    def parse(cls, parameters: Mapping[str, Parameter], program: Program) -> Self:
        """Read the sampling parameters of a request; absent ones have their default.

        Args:
            parameters: the request's parameters; numbers may be texts.
            program: the program that chooses the token.

        Raises:
            RequestError: BAD_PARAMETER, one of them is not a number or out of range, or the program
                does not have it and its value is not what it is if absent. All are checked, also
                where the temperature is 0.
        """
        values: dict[str, Any] = {
            name: BY_NAME[name].parse(parameters[name])
            for name in SAMPLING_PARAMETERS
            if name in parameters
        }
        _check_available(parameters, values, program)
        if not program.vocab_size:
            return cls()
        _check_vocabulary(parameters, values, program.vocab_size)
        if (most := values.get(LOGPROBS)) is not None and most > program.vocab_size:
            raise BY_NAME[LOGPROBS].refusal(most, f"at most {program.vocab_size} tokens")
        return cls(**values)


GREEDY = SamplingParams()


def _check_available(
    parameters: Mapping[str, Parameter], values: Mapping[str, Any], program: Program
) -> None:
    """Refuse parameters that the program cannot use, unless they ask for nothing."""
    if program.max_adjusted:
        return
    for name in sorted(values):
        if program.vocab_size and name not in SAMPLING_OPTIONS:
            continue
        default = getattr(GREEDY, name)
        if values[name] != default:
            reason, engine = (
                ("was built without this parameter", "it again")
                if program.vocab_size
                else ("does not sample", "an engine that samples")
            )
            absent = default in (None, ())
            send = "leave it out" if absent else f"send {default} or leave it out"
            raise RequestError(
                Code.BAD_PARAMETER,
                f"parameter {name!r} is {parameters[name]!r}; this engine {reason}: {send}, or"
                f" build {engine}",
            )


def _check_vocabulary(
    parameters: Mapping[str, Parameter], values: Mapping[str, Any], vocab_size: int
) -> None:
    if values.get("top_k", 0) > vocab_size:
        limits = f"a whole number from 0 (all) to {vocab_size}, the size of the vocabulary"
        raise BY_NAME["top_k"].refusal(parameters["top_k"], limits)
    for name in (ALLOWED_TOKEN_IDS, BANNED_TOKEN_IDS):
        if any(token >= vocab_size for token in values.get(name, ())):
            raise BY_NAME[name].refusal(parameters[name], f"token ids below {vocab_size}")
    if any(token >= vocab_size for token, _ in values.get(LOGIT_BIAS, ())):
        raise BY_NAME[LOGIT_BIAS].refusal(parameters[LOGIT_BIAS], f"token ids below {vocab_size}")


class ScoreAdjustments:
    """The adjusted scores of one request: which tokens, and how.

    A score s becomes s + bias; that is divided by the penalty where it is positive and multiplied
    by it elsewhere; then the subtrahend is subtracted. So biases come before penalties, and the
    repetition penalty before the others, as in vLLM's sampler.

    Args:
        params: the parameters, which adjust something.
        token_ids: all tokens before the first one that is chosen.
        program: the program that chooses tokens.
        max_new_tokens: the most tokens that are chosen.

    Attributes:
        number: how many tokens are listed; negative if no other token may be chosen.
        tokens: int32 ``[entries]``.
        values: float32 ``[3, entries]``: bias, penalty and subtrahend of each.

    Raises:
        RequestError: BAD_PARAMETER, no token is left that may be chosen, or more scores may have to
            be adjusted than the program can.
    """

    def __init__(
        self,
        params: SamplingParams,
        token_ids: Sequence[int],
        program: Program,
        max_new_tokens: int,
    ) -> None:
        self._params = params
        self._check_generated(token_ids)
        self._allowed = frozenset(params.allowed_token_ids)
        self._bias = dict(params.logit_bias) | dict.fromkeys(params.banned_token_ids, -inf)
        self._num_generated = 0
        self._seen = set(token_ids) if params.counts_tokens else set[int]()
        self._counts: dict[int, int] = {}
        generated = len(token_ids) - params.num_generated
        for token in token_ids[generated:] if params.counts_tokens else ():
            self._counts[token] = self._counts.get(token, 0) + 1
        self._check_some_left(program.vocab_size)
        listed = self._listed()
        self._check_room(len(listed), program, max_new_tokens)
        self.tokens = np.full(program.max_adjusted, -1, dtype=np.int32)
        self.values = np.zeros((3, program.max_adjusted), dtype=np.float32)
        self._index: dict[int, int] = {}
        for token in listed:
            self._put(token)

    @property
    def number(self) -> int:
        """As in `inplace.operators.sample_with_options`."""
        return -len(self._index) if self._allowed else len(self._index)

    def advance(self, token: int) -> bool:
        """Count a token that was chosen; returns whether any adjustment has changed."""
        params = self._params
        self._num_generated += 1
        changed = False
        if params.counts_tokens:
            self._seen.add(token)
            self._counts[token] = self._counts.get(token, 0) + 1
            changed = self._put(token)
        if self._num_generated == params.min_tokens:
            for end in params.end_token_ids:
                changed |= self._put(end)
        return changed

    def _listed(self) -> list[int]:
        """The tokens that are adjusted before anything was generated."""
        if self._allowed:
            return sorted(self._allowed)
        seen = self._seen if self._params.repetition_penalty != 1 else self._counts.keys()
        ends = self._params.end_token_ids if self._params.min_tokens else ()
        return sorted({*self._bias, *ends, *seen})

    def _put(self, token: int) -> bool:
        """Set the entry of a token; returns False if the token is masked anyway."""
        if self._allowed and token not in self._allowed:
            return False
        params = self._params
        index = self._index.setdefault(token, len(self._index))
        count = self._counts.get(token, 0)
        self.tokens[index] = token
        self.values[:, index] = (
            self._bias_of(token),
            params.repetition_penalty if token in self._seen else 1.0,
            params.frequency_penalty * count + params.presence_penalty * (count > 0),
        )
        return True

    def _bias_of(self, token: int) -> float:
        masked = self._num_generated < self._params.min_tokens
        if masked and token in self._params.end_token_ids:
            return -inf
        return self._bias.get(token, 0.0)

    def _check_generated(self, token_ids: Sequence[int]) -> None:
        if self._params.num_generated > len(token_ids):
            raise BY_NAME[NUM_GENERATED].refusal(
                self._params.num_generated,
                f"at most {len(token_ids)}, the number of the sequence's tokens",
            )

    def _check_some_left(self, vocab_size: int) -> None:
        masked = {token for token, bias in self._bias.items() if bias == -inf}
        if self._params.min_tokens:
            masked |= self._params.end_token_ids
        left = len(self._allowed - masked) if self._allowed else vocab_size - len(masked)
        if not left:
            raise RequestError(
                Code.BAD_PARAMETER,
                f"no token is left that may be chosen: {ALLOWED_TOKEN_IDS!r},"
                f" {BANNED_TOKEN_IDS!r} and the end tokens that 'min_tokens' masks exclude all;"
                f" allow another token",
            )

    def _check_room(self, listed: int, program: Program, max_new_tokens: int) -> None:
        new = max_new_tokens if self._params.counts_tokens and not self._allowed else 0
        most = min(listed + new, program.vocab_size)
        if most > program.max_adjusted:
            raise RequestError(
                Code.BAD_PARAMETER,
                f"penalties, biases and masks of this request may adjust the scores of {most}"
                f" tokens ({listed} now, {new} that may be generated), and this engine takes"
                f" {program.max_adjusted}: lower 'max_tokens', or leave the penalties out",
            )


def option_values(
    spec: TensorSpec,
    params: Sequence[SamplingParams],
    adjustments: Sequence[ScoreAdjustments | None],
) -> Tensor:
    """The input of a role of `SAMPLING_OPTION_ROLES` for all rows.

    Args:
        spec: the input.
        params: of each row.
        adjustments: of each row; None where nothing is adjusted.
    """
    match spec.role:
        case Role.MIN_P | Role.NUM_LOGPROBS:
            values: list[Any] = [getattr(each, spec.role) for each in params]
            return torch.from_numpy(np.array(values, dtype=spec.dtype.value))
        case Role.NUM_ADJUSTED:
            values = [0 if each is None else each.number for each in adjustments]
            return torch.from_numpy(np.array(values, dtype=spec.dtype.value))
        case _:
            if all(each is None for each in adjustments):
                return greedy_values(spec.role, spec.dtype, (len(params), *spec.shape))
            name = "tokens" if spec.role is Role.ADJUSTED_TOKENS else "values"
            rows = np.zeros((len(params), *spec.shape), dtype=spec.dtype.value)
            for row, each in enumerate(adjustments):
                if each is not None:
                    rows[row] = getattr(each, name)
            return torch.from_numpy(rows)


@cache
def greedy_values(role: Role, dtype: Dtype, shape: tuple[int, ...]) -> Tensor:
    """The input of a sampling role where every row is `GREEDY`.

    The same tensor each time, which nothing changes: engines that have it already leave it.
    """
    value = getattr(GREEDY, role, 0)  # 0 for adjustments
    return torch.full(shape, value, dtype=dtype.as_torch)
