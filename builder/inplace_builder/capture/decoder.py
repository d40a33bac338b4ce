"""The step of a decoder, which all decoder front-ends share.

Packed tokens go in; each row's next token and scores come out; each layer keeps a pair of caches.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from inplace.kernels.gumbel import MAX_LOGPROBS
from inplace.schema.programs import Program
from inplace.schema.schedule import PROMPT_LOGPROBS
from inplace.schema.specs import (
    PROMPT_LOGPROB_ROLES,
    SAMPLING_OPTION_ROLES,
    SAMPLING_ROLES,
    Dtype,
    Role,
    StateSpec,
    TensorSpec,
    Update,
    mask_words,
)
from torch import Tensor
from torch.export import Dim

from inplace_builder.capture.capture import control_input

SAMPLING_INPUTS = (*SAMPLING_ROLES, *SAMPLING_OPTION_ROLES)
"""The inputs of `inplace.operators.sample_with_options` besides the scores, in its order."""


CONTROL_ROLES = (
    Role.POSITIONS,
    Role.ROW_OFFSETS,
    Role.LAST_TOKENS,
    Role.SLOTS,
    Role.WRITE_INDICES,
    *SAMPLING_INPUTS,
)
"""What the runtime fills, in the order of the graph's inputs after the token ids.

Each input is named like its role.
"""


MAX_ADJUSTED = 4096
"""Scores of a row that can be adjusted: by a bias, a mask or a penalty."""


TOKEN_IDS = "input_ids"
"""The name of the input of token ids."""


INPUT_NAMES = (TOKEN_IDS, *(role.value for role in CONTROL_ROLES))
"""The names of the graph's inputs before its states."""


LOGPROB_OUTPUTS = (
    TensorSpec(
        name=Role.TOKEN_LOGPROBS.value,
        role=Role.TOKEN_LOGPROBS,
        dtype=Dtype.FLOAT32,
        shape=(1,),
        on_request=True,
    ),
    TensorSpec(
        name=Role.TOP_LOGPROBS.value,
        role=Role.TOP_LOGPROBS,
        dtype=Dtype.FLOAT32,
        shape=(MAX_LOGPROBS,),
        on_request=True,
    ),
    TensorSpec(
        name=Role.TOP_TOKENS.value,
        role=Role.TOP_TOKENS,
        dtype=Dtype.INT64,
        shape=(MAX_LOGPROBS,),
        on_request=True,
    ),
)
"""The outputs of `inplace.operators.sample_with_options` besides the tokens, in its order."""


def prompt_outputs(num_scores: int) -> tuple[TensorSpec, ...]:
    """The outputs of `prompt_logprobs`, in its order."""
    top = min(MAX_LOGPROBS, num_scores)
    return tuple(
        TensorSpec(name=role.value, role=role, dtype=dtype, shape=shape, on_request=True)
        for role, dtype, shape in zip(
            PROMPT_LOGPROB_ROLES,
            (Dtype.FLOAT32, Dtype.INT64, Dtype.FLOAT32, Dtype.INT64),
            ((-1,), (-1,), (-1, top), (-1, top)),
            strict=True,
        )
    )


def prompt_logprobs(scores: Tensor, following: Tensor) -> tuple[Tensor, ...]:
    """The log-probabilities of the tokens behind fed ones, in float32.

    Args:
        scores: of each fed token, ``[tokens, scores]`` float32.
        following: the token behind each, ``[tokens]``.

    Returns:
        Of each such token the log-probability ``[tokens]``, and the rank: 1 more than the number of
        tokens with larger scores. The largest log-probabilities ``[tokens, top]``, and their
        tokens.
    """
    shifted = scores - scores.amax(-1, keepdim=True)
    log_sum = shifted.exp().sum(-1, keepdim=True).log()
    chosen = shifted.gather(1, following.to(torch.int64).unsqueeze(1))
    rank = (shifted > chosen).sum(-1) + 1
    top = shifted.topk(min(MAX_LOGPROBS, scores.shape[1]))
    return (chosen - log_sum).squeeze(1), rank, top.values - log_sum, top.indices


def decoder_input(role: Role, vocab_size: int) -> TensorSpec:
    """The description of an input that the runtime fills, which is named like its role."""
    shapes = {
        Role.ADJUSTED_TOKENS: (MAX_ADJUSTED,),
        Role.ADJUSTMENTS: (3, MAX_ADJUSTED),
        Role.TOKEN_MASK: (mask_words(vocab_size),),
    }
    return control_input(role.value, role, shapes.get(role, ()))


@dataclass(frozen=True)
class DecoderOptions:
    """The limits that a decoder is built for.

    Raises:
        ValueError: a chunk is longer than the (smallest) capacity.

    Attributes:
        capacity: maximum number of positions of a sequence.
        max_rows: maximum number of sequences in a step.
        chunk: maximum number of tokens of one sequence in a step.
        max_tokens: maximum number of tokens of a step; None for as many as rows and chunk allow.
        min_capacity: the smallest capacity that may be chosen at load; None fixes it.
        prompt_logprobs: capture a second program, with log-probabilities of every fed token.
    """

    capacity: int
    max_rows: int
    chunk: int
    max_tokens: int | None = None
    min_capacity: int | None = None
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        capacity = self.min_capacity or self.capacity
        if self.chunk > capacity:
            raise ValueError(
                f"chunk is {self.chunk}, the smallest capacity is {capacity}: a chunk must fit "
                "into an empty sequence"
            )

    @property
    def dynamic_min_capacity(self) -> int | None:
        """The smallest capacity of a range; None if there is only one capacity."""
        return None if self.min_capacity == self.capacity else self.min_capacity


def decoder_program(
    vocab_size: int, num_scores: int, options: DecoderOptions, *, lookahead: bool = False
) -> Program:
    """The description of a decoder's step.

    Args:
        vocab_size: number of token ids that it takes.
        num_scores: number of scores that it returns for a token.
        options: what it is built for.
        lookahead: tokens that are fed together see each other. Whole chunks of all rows then fit
            into a step.
    """
    return Program(
        name="step",
        row_layout="packed",
        inputs=(
            TensorSpec(
                name=TOKEN_IDS,
                role=Role.TOKENS,
                dtype=Dtype.INT64,
                shape=(-1,),
                minimum=0,
                maximum=vocab_size - 1,
            ),
            *(decoder_input(role, num_scores) for role in CONTROL_ROLES),
        ),
        outputs=(
            TensorSpec(
                name="next_token",
                role=Role.TOKEN,
                dtype=Dtype.INT64,
                shape=(1,),
                sampled_from="logits",
            ),
            TensorSpec(
                name="logits",
                role=Role.LOGITS,
                dtype=Dtype.FLOAT32,
                shape=(num_scores,),
                on_request=True,
            ),
            *LOGPROB_OUTPUTS,
        ),
        aliases=(),
        max_rows=options.max_rows,
        chunk=options.chunk,
        max_tokens=None if lookahead else options.max_tokens,
        lookahead=lookahead,
    )


def prompt_program(step: Program, num_scores: int) -> Program:
    """The description of the program with log-probabilities of every fed token.

    Args:
        step: the decoder's step.
        num_scores: number of scores that it returns for a token.
    """
    return step.model_copy(
        update={
            "name": PROMPT_LOGPROBS,
            "inputs": (*step.inputs, decoder_input(Role.FOLLOWING_TOKENS, num_scores)),
            "outputs": (*step.outputs, *prompt_outputs(num_scores)),
        }
    )


@dataclass(frozen=True)
class LayerCache:
    """The keys and values that a layer keeps.

    Attributes:
        heads: key-value heads.
        key_dim, value_dim: elements of a head; no values are kept if the latter is 0.
        dtype: element type.
        reach: how many positions up to its own a token may see; 0 for all.
    """

    heads: int
    key_dim: int
    value_dim: int
    dtype: Dtype
    reach: int = 0

    def positions(self, options: DecoderOptions) -> int:
        """Positions that a slot holds: the capacity, or what ``reach`` needs if that is less.

        A token must still see all that it may see when the last token of its chunk is appended.
        """
        if not self.reach:
            return options.capacity
        return min(options.capacity, self.reach + options.chunk - 1)

    def is_ring(self, options: DecoderOptions) -> bool:
        """Whether a slot holds fewer positions than the capacity, so that it must be a ring."""
        return self.positions(options) < options.capacity


def cache_states(
    caches: Mapping[int, LayerCache], options: DecoderOptions
) -> tuple[StateSpec, ...]:
    """The states of all layers that attend: the keys of each, then the values of each."""
    return tuple(
        StateSpec(
            name=f"{part}_states_{layer}",
            shape=(
                cache.heads,
                cache.positions(options),
                cache.key_dim if part == "key" else cache.value_dim,
            ),
            dtype=cache.dtype,
            update=Update.RING if cache.is_ring(options) else Update.APPEND,
            axis=1,
            reset=False,  # attention reads only what lies within the cached length
        )
        for part in ("key", "value")
        for layer, cache in caches.items()
        if part == "key" or cache.value_dim
    )


@dataclass(frozen=True)
class StepExamples:
    """Example arguments of a decoder's step, two rows of two tokens, and which extents vary.

    With ``scores_prompt``, those of the program with log-probabilities of every fed token.

    The number of rows varies in the graph even if a batch has one row only: the runtime pads steps
    with null rows, verification steps more slots than a server may, and if row r is slot r, there
    are as many rows as slots in the arena.
    """

    options: DecoderOptions
    states: tuple[StateSpec, ...]
    num_scores: int
    scores_prompt: bool = False

    def inputs(self) -> tuple[Tensor, ...]:
        """Token ids and what the runtime fills."""
        return self._of_rows(torch.zeros(4, dtype=torch.int64), 2, 0)

    def one_token(self, token: int, position: int) -> tuple[Tensor, ...]:
        """The same of one row with one token, at a position of slot 0."""
        return self._of_rows(torch.tensor([token]), 1, position)

    def _of_rows(self, ids: Tensor, rows: int, position: int) -> tuple[Tensor, ...]:
        """Inputs of rows with as many tokens each, from a position on."""
        tokens = len(ids) // rows
        offsets = torch.arange(0, len(ids) + 1, tokens, dtype=torch.int32)
        return (
            ids,
            torch.arange(position, position + tokens, dtype=torch.int32).repeat(rows),
            offsets,
            offsets[1:] - 1,
            torch.arange(rows, dtype=torch.int32),
            torch.full((rows,), position, dtype=torch.int32),
            *(
                torch.zeros((rows, *spec.shape), dtype=spec.dtype.as_torch)
                for spec in (decoder_input(role, self.num_scores) for role in SAMPLING_INPUTS)
            ),
            *([torch.zeros_like(ids, dtype=torch.int32)] if self.scores_prompt else ()),
        )

    def memory(self) -> list[Tensor]:
        """States of two slots; never touched, so they cost address space only."""
        return [torch.empty((2, *state.shape), dtype=state.dtype.as_torch) for state in self.states]

    def input_shapes(self, min_rows: int = 1, min_tokens: int = 1) -> tuple[Any, ...]:
        """Which extents of `inputs` vary.

        Args:
            min_rows, min_tokens: the smallest numbers of rows and of tokens.
        """
        max_rows = max(2, self.options.max_rows)
        max_tokens = max(2 * max_rows, max_rows * self.options.chunk)
        tokens = {0: Dim("tokens", min=min_tokens, max=max_tokens)}
        num_rows = Dim("rows", min=min_rows, max=max_rows)
        rows: Any = {0: num_rows}
        following = (tokens,) if self.scores_prompt else ()
        sampling = [rows] * len(SAMPLING_INPUTS)
        return (tokens, tokens, {0: num_rows + 1}, rows, rows, rows, *sampling, *following)

    def memory_shapes(self) -> list[dict[int, Any]]:
        """Which extents of `memory` vary."""
        slots, smallest = Dim("slots", min=1), self.options.dynamic_min_capacity
        if smallest is None:
            return [{0: slots} for _ in self.states]
        capacity = Dim("capacity", min=smallest, max=self.options.capacity)
        return [
            {0: slots, 2: capacity} if state.update is Update.APPEND else {0: slots}
            for state in self.states
        ]
