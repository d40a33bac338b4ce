"""The scores that a request adjusts: by penalties, biases and masks.

Penalties count tokens, and only the host knows which tokens a sequence has. So the host makes a
list of adjusted tokens for each row that has any, and the sampling operator needs no state
(docs/adr/0037-sampling-options.md).
"""

from collections.abc import Iterable, Sequence
from copy import copy
from math import inf
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from inplace.errors import Code, RequestError
from inplace.parameters import BY_NAME
from inplace.protocol import ALLOWED_TOKEN_IDS, BANNED_TOKEN_IDS, NUM_GENERATED
from inplace.runtime.requests import SamplingParams
from inplace.schema.programs import Program
from inplace.schema.specs import MASK_BITS, Role, mask_words


def token_mask(tokens: Iterable[int], vocab_size: int) -> NDArray[np.int32]:
    """The mask of these tokens: int32 ``[words]``, see `inplace.operators.sample_with_options`."""
    bits = np.zeros(mask_words(vocab_size) * MASK_BITS, dtype=np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view("<i4")


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
        tokens: int32 ``[entries]``.
        values: float32 ``[3, entries]``: bias, penalty and subtrahend of each.
        mask: int32 ``[words]``, the tokens that may be chosen; None for all.
        generated: the tokens before that count as generated.

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
        self.generated = token_ids[len(token_ids) - params.num_generated :]
        for token in self.generated if params.counts_tokens else ():
            self._counts[token] = self._counts.get(token, 0) + 1
        self._check_some_left(program.vocab_size)
        listed = self._listed()
        self._check_room(len(listed), program, max_new_tokens)
        self.tokens = np.full(program.max_adjusted, -1, dtype=np.int32)
        self.values = np.zeros((3, program.max_adjusted), dtype=np.float32)
        self._index: dict[int, int] = {}
        for token in listed:
            self._put(token)
        self.mask = token_mask(self._allowed, program.vocab_size) if self._allowed else None
        self._allowed_mask = self.mask

    @property
    def number(self) -> int:
        """As in `inplace.operators.sample_with_options`."""
        return len(self._index) if self.mask is None else -1 - len(self._index)

    def part(self, role: Role) -> NDArray[Any] | None:
        """The input of a role for this row; None if it is not read."""
        if role is Role.TOKEN_MASK:
            return self.mask
        if not self._index:
            return None
        return self.tokens if role is Role.ADJUSTED_TOKENS else self.values

    def set_mask(self, mask: NDArray[np.int32]) -> bool:
        """Set the tokens that the grammar allows next.

        Returns:
            Whether one of them may be chosen.
        """
        self.mask = mask if self._allowed_mask is None else mask & self._allowed_mask
        masked = [token for token in self._index if self._bias_of(token) == -inf]
        if not masked:
            return bool(self.mask.any())
        return bool((self.mask & ~token_mask(masked, len(mask) * MASK_BITS)).any())

    def after(self, token: int) -> Self:
        """The adjustments after a token, as a copy."""
        other = copy(self)
        other._seen, other._counts = self._seen.copy(), self._counts.copy()
        other._index = self._index.copy()
        other.tokens, other.values = self.tokens.copy(), self.values.copy()
        other.advance(token)
        return other

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
        seen = self._seen if self._params.repetition_penalty != 1 else self._counts.keys()
        ends = self._params.end_token_ids if self._params.min_tokens else ()
        listed = {*self._bias, *ends, *seen}
        return sorted(listed & self._allowed if self._allowed else listed)

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
        new = max_new_tokens if self._params.counts_tokens else 0
        most = min(listed + new, len(self._allowed) or program.vocab_size)
        if most > program.max_adjusted:
            raise RequestError(
                Code.BAD_PARAMETER,
                f"penalties, biases and masks of this request may adjust the scores of {most}"
                f" tokens ({listed} now, {new} that may be generated), and this engine takes"
                f" {program.max_adjusted}: lower 'max_tokens', or leave the penalties out",
            )
