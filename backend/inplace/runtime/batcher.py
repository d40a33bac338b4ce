"""The batcher: from admitted requests to the input tensors of one step, and back to responses."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inplace.errors import RequestError
from inplace.protocol import TOP_LOGPROBS, TOP_TOKENS
from inplace.runtime.progress import ScheduleProgress
from inplace.runtime.prompt import PromptLogprobs
from inplace.runtime.requests import GREEDY, Request, SamplingParams
from inplace.runtime.sampling import ScoreAdjustments
from inplace.runtime.slots import SequenceState
from inplace.schema.programs import Program
from inplace.schema.specs import (
    ENTRY_ROLES,
    SAMPLING_OPTION_ROLES,
    SAMPLING_ROLES,
    Dtype,
    Role,
    TensorSpec,
)

TOP_OUTPUTS = frozenset({TOP_LOGPROBS, TOP_TOKENS})
"""Outputs of which a request gets as many entries as it asks for."""


NULL_SLOT = -1
"""The slot of a null row, which reads and writes no state."""


NO_OUTPUTS: tuple[Mapping[str, Tensor], int] = ({}, 0)


@dataclass(slots=True, eq=False)
class ActiveRequest:
    """An admitted request: a row of one or more steps.

    Attributes:
        request: the client's request.
        sequence: the sequence whose slot it uses.
        inputs: the validated tensors, without the batch axis.
        num_tokens: how many tokens it feeds.
        start_length: the sequence's length when the request was admitted.
        sampling_params: how its next token is chosen.
        adjustments: the scores that these adjust; None for none.
        requested_outputs: names of the outputs to compute once all its tokens are consumed.
        end_position: the position before which its generated tokens lie.
        num_computed_tokens: tokens that steps have consumed.
        pending_token: the sequence's pending token, which is the first of ``inputs`` then.
        decode_token: a generated token to feed instead of ``inputs``; only in a language model.
        step_outputs: outputs of its last step for all rows, ``[rows, ...]``, and its row.
        accepted_rows: where that step sampled several tokens of it, the row of each that counts.
        error: why the engine could not finish it.
        dropped: its client has its answer already; a step in flight must not change it any more.
        progress: its place in its schedule; None in an engine without one.
        prompt_logprobs: the log-probabilities of its own tokens; None if it does not ask for them.
        num_reused_tokens: tokens of its prompt whose states were there already.
    """

    request: Request
    sequence: SequenceState
    inputs: Mapping[str, Tensor]
    num_tokens: int
    start_length: int
    sampling_params: SamplingParams = GREEDY
    adjustments: ScoreAdjustments | None = None
    requested_outputs: frozenset[str] = frozenset()
    end_position: int = 0
    num_computed_tokens: int = 0
    pending_token: int | None = None
    decode_token: int | None = None
    step_outputs: tuple[Mapping[str, Tensor], int] = NO_OUTPUTS
    accepted_rows: tuple[int, ...] = ()
    error: RequestError | None = None
    dropped: bool = False
    progress: ScheduleProgress | None = None
    prompt_logprobs: PromptLogprobs | None = None
    num_reused_tokens: int = 0

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens that no step has consumed yet."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def finished(self) -> bool:
        """Whether it can be answered: all tokens are consumed, or the engine has failed."""
        return self.num_computed_tokens == self.num_tokens or self.error is not None

    @property
    def outputs(self) -> dict[str, Tensor]:
        """The requested outputs, ``[1, ...]``; empty until all its tokens are consumed."""
        tensors, row = self.step_outputs
        if self.progress is not None:  # they are its own
            return {name: tensors[name] for name in tensors if name in self.requested_outputs}
        outputs = {
            name: self.own_output(name, tensor[row : row + 1])
            for name, tensor in tensors.items()
            if name in self.requested_outputs
        }
        return outputs | self.prompt_outputs

    @property
    def prompt_outputs(self) -> dict[str, Tensor]:
        """The outputs of the parameter ``prompt_logprobs``; empty if it does not have it."""
        return {} if self.prompt_logprobs is None else self.prompt_logprobs.outputs()

    @property
    def scores_prompt(self) -> bool:
        """Whether a next step feeds a token that another one of it follows, and must score that."""
        return (
            self.prompt_logprobs is not None
            and self.decode_token is None
            and self.num_waiting_tokens > 1
        )

    def own_output(self, name: str, output: Tensor) -> Tensor:
        """An output of its row, ``[1, ...]``, as it is answered: ``[1, 1, n]`` of most likely ones.

        A request asks for ``n`` of them.
        """
        if name in TOP_OUTPUTS:
            return output[:, None, : self.sampling_params.logprobs]
        return output

    def count(self, token: int) -> bool:
        """Count a generated token that is fed; returns whether adjusted scores have changed."""
        return self.adjustments is not None and self.adjustments.advance(token)

    def feed(self, token: int) -> None:
        """Continue with a generated token: the next step decodes it."""
        self.decode_token, self.num_tokens, self.num_computed_tokens = token, 1, 0


Answer = dict[str, Any] | RequestError
"""The answer to a request: its outputs by name, ``[1, ...]``, or why it was refused.

Outputs are tensors; the text of a schedule's tokens is a ``str``.
"""


def split_outputs(rows: list[ActiveRequest], outputs: Mapping[str, Tensor]) -> list[Answer | None]:
    """The answer of each row of a step; None for a row that still has tokens to consume.

    The same as `ActiveRequest.outputs` of each row, with one call into PyTorch for each output.

    Args:
        rows: the rows of the step.
        outputs: the outputs of the step by name, ``[rows, ...]``.
    """
    parts = {name: tensor.split(1) for name, tensor in outputs.items()}
    return [
        None
        if not active.finished
        else active.error
        or {
            name: active.own_output(name, parts[name][row])
            for name in parts
            if name in active.requested_outputs
        }
        | active.prompt_outputs
        for row, active in enumerate(rows)
    ]


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one step and its inputs.

    Attributes:
        rows: the request of each row.
        num_scheduled_tokens: how many tokens of each row the step consumes.
        inputs: the program's inputs by name, in the program's order, on the host.
        sampling_params: how the next token of each row is chosen in this step.
        adjusted: the rows whose scores are adjusted.
    """

    rows: list[ActiveRequest]
    num_scheduled_tokens: list[int]
    inputs: dict[str, Tensor]
    sampling_params: list[SamplingParams]
    adjusted: list[int]


def form_batch(
    program: Program,
    rows: list[ActiveRequest],
    token_budget: int | None = None,
    counts: list[int] | None = None,
) -> Batch:
    """Form the next step of some rows: their tokens are packed, at most ``program.chunk`` of a row.

    Args:
        program: the program that runs.
        rows: at most ``program.max_rows`` of them.
        token_budget: most tokens of the whole step, at least one a row; None for
            ``program.token_budget``.
        counts: how many tokens of each row the step consumes, if that is known (`count_tokens`).
    """
    waiting = [active.num_waiting_tokens for active in rows]
    if counts is None:
        counts = count_tokens(program, rows, token_budget)
    # The token of a row with more tokens waiting is not used, so it need not be sampled.
    sampling_params = [
        active.sampling_params if left == count else GREEDY
        for active, left, count in zip(rows, waiting, counts, strict=True)
    ]
    greedy = all(params is GREEDY for params in sampling_params)
    adjusted = [] if greedy else _count_decode_tokens(rows, sampling_params)
    lengths = np.array([active.sequence.length for active in rows], dtype=np.int64)
    columns = _position_columns(rows, lengths, None if max(waiting) == 1 else counts)
    packed = {
        Role.TOKENS: partial(_pack_tokens, rows=rows, counts=counts),
        Role.FOLLOWING_TOKENS: partial(_pack_following_tokens, program, rows=rows, counts=counts),
    }
    inputs = _inputs(program, rows, sampling_params, adjusted, columns, packed)
    return Batch(rows, counts, inputs, sampling_params, adjusted)


def _inputs(
    program: Program,
    rows: Sequence[ActiveRequest],
    sampling_params: list[SamplingParams],
    adjusted: Sequence[int],
    columns: Mapping[Role, NDArray[np.int64]],
    packed: Mapping[Role, Callable[[TensorSpec], Tensor]],
) -> dict[str, Tensor]:
    """The inputs of a step.

    Args:
        program: the program that runs.
        rows: the rows of the step.
        sampling_params: of each row.
        adjusted: the rows whose scores are adjusted.
        columns: by role, the inputs with the places of tokens.
        packed: by role, what makes the inputs with an entry for each token.
    """
    greedy = all(params is GREEDY for params in sampling_params)
    adjustments = _adjustments(rows, adjusted)
    inputs: dict[str, Tensor] = {}
    for spec in program.inputs:
        if spec.role in packed:
            inputs[spec.name] = packed[spec.role](spec)
        elif spec.role in ENTRY_ROLES:
            inputs[spec.name] = torch.stack([active.inputs[spec.name] for active in rows])
        elif spec.role is Role.VALID_LENGTHS and spec.name in rows[0].inputs:
            lengths = torch.stack([active.inputs[spec.name] for active in rows])
            inputs[spec.name] = lengths.to(spec.dtype.as_torch)
        elif (values := columns.get(spec.role)) is not None:
            inputs[spec.name] = torch.from_numpy(values.astype(spec.dtype.value, copy=False))
        elif greedy:
            inputs[spec.name] = _greedy_values(spec.role, spec.dtype, (len(rows), *spec.shape))
        else:
            inputs[spec.name] = sampling_values(spec, sampling_params, adjustments)
    return inputs


def _count_decode_tokens(
    rows: Sequence[ActiveRequest], sampling_params: Sequence[SamplingParams]
) -> list[int]:
    """The rows whose scores are adjusted; the tokens that they feed are counted."""
    adjusted = [row for row, params in enumerate(sampling_params) if params.adjusts]
    for active in (rows[row] for row in adjusted):
        if active.decode_token is not None:
            active.count(active.decode_token)
    return adjusted


@dataclass(frozen=True, slots=True)
class Sample:
    """A further token that a row samples, behind one of its tokens that is not the last.

    Attributes:
        token: the index of that token on the packed axis.
        next_position: the position of the sampled token.
        sampling_params: how it is chosen.
        adjustments: the scores that these adjust; None for none.
    """

    token: int
    next_position: int
    sampling_params: SamplingParams
    adjustments: ScoreAdjustments | None


def add_samples(program: Program, batch: Batch, samples: Sequence[Sample]) -> Batch:
    """Add a null row for each further token to sample. It owns no token and samples behind one.

    There is one more null row if there would be as many rows as tokens: engines take such a step
    for one with a token in each row.

    Args:
        program: the program that runs, a language model.
        batch: the step; its inputs have `Batch.rows` rows.
        samples: row ``len(batch.rows) + i`` of the outputs is the i-th.
    """
    num_tokens = next(len(batch.inputs[x.name]) for x in program.inputs if x.role is Role.TOKENS)
    if len(batch.rows) + len(samples) == num_tokens:
        samples = [*samples, Sample(0, 0, GREEDY, None)]
    values: dict[Role, list[int]] = {
        Role.ROW_OFFSETS: [num_tokens] * len(samples),
        Role.LAST_TOKENS: [sample.token for sample in samples],
        Role.SLOTS: [NULL_SLOT] * len(samples),
        Role.WRITE_INDICES: [0] * len(samples),
        Role.VALID_LENGTHS: [0] * len(samples),
        Role.NEXT_POSITIONS: [sample.next_position for sample in samples],
    }
    params = [*batch.sampling_params, *(sample.sampling_params for sample in samples)]
    adjustments = _adjustments(batch.rows, batch.adjusted) + [each.adjustments for each in samples]
    greedy = all(each is GREEDY for each in params)
    inputs = dict(batch.inputs)
    for spec in program.inputs:
        if spec.role in values:
            further = torch.tensor(values[spec.role], dtype=spec.dtype.as_torch)
            inputs[spec.name] = torch.cat([inputs[spec.name], further])
        elif greedy and spec.role in _SAMPLED:
            inputs[spec.name] = _greedy_values(spec.role, spec.dtype, (len(params), *spec.shape))
        elif spec.role in _SAMPLED:
            inputs[spec.name] = sampling_values(spec, params, adjustments)
    return replace(batch, inputs=inputs)


_SAMPLED = frozenset({*SAMPLING_ROLES, *SAMPLING_OPTION_ROLES}) - {Role.NEXT_POSITIONS}
"""The roles of inputs with the sampling parameters of each row."""


def _adjustments(
    rows: Sequence[ActiveRequest], adjusted: Sequence[int]
) -> list[ScoreAdjustments | None]:
    """The adjustments of each row of a step in which these rows have them."""
    adjustments: list[ScoreAdjustments | None] = [None] * len(rows)
    for row in adjusted:
        adjustments[row] = rows[row].adjustments
    return adjustments


ADVANCING_ROLES = (Role.POSITIONS, Role.WRITE_INDICES, Role.NEXT_POSITIONS)


def next_decode_batch(program: Program, batch: Batch, tokens: Tensor) -> Batch:
    """Form the decode step after ``batch``: the same rows, each with the token it has sampled.

    Args:
        program: the program that runs, a language model.
        batch: the step before, in which each row has one token.
        tokens: the sampled token of each row, ``[rows, 1]``.
    """
    inputs, rows = dict(batch.inputs), batch.rows
    changed = sum(rows[row].count(int(tokens[row])) for row in batch.adjusted)
    adjustments = _adjustments(rows, batch.adjusted)
    for spec in program.inputs:
        if spec.role is Role.TOKENS:
            inputs[spec.name] = tokens.flatten().to(spec.dtype.as_torch)
        elif spec.role in ADVANCING_ROLES:
            inputs[spec.name] = torch.from_numpy(inputs[spec.name].numpy() + 1)
        elif changed and spec.role in SAMPLING_OPTION_ROLES:
            inputs[spec.name] = sampling_values(spec, batch.sampling_params, adjustments)
    return replace(batch, inputs=inputs)


def count_tokens(
    program: Program, rows: list[ActiveRequest], token_budget: int | None = None
) -> list[int]:
    """How many tokens of each row the next step consumes; the arguments are `form_batch`'s."""
    budget = program.token_budget if token_budget is None else token_budget
    waiting = [active.num_waiting_tokens for active in rows]
    return schedule_tokens(waiting, program.chunk, budget)


def changed_decode_batch(
    program: Program,
    batch: Batch,
    tokens: Tensor,
    kept: Sequence[int],
    joined: Sequence[ActiveRequest],
) -> Batch:
    """As `next_decode_batch`, with other rows.

    Args:
        program: the program that runs, a language model.
        batch: the step before, in which each row has one token; it has not been advanced.
        tokens: the sampled token of each row, ``[rows, 1]``.
        kept: the rows of ``batch`` that go on, at least one.
        joined: requests with a token to decode, whose sequences no step in flight has.
    """
    rows = [*(batch.rows[row] for row in kept), *joined]
    ids = [int(tokens[row]) for row in kept]
    for active in joined:
        assert active.decode_token is not None
        ids.append(active.decode_token)
    lengths = np.array([active.sequence.length for active in rows], dtype=np.int64)
    lengths[: len(kept)] += 1
    params = [active.sampling_params for active in rows]
    adjusted = [row for row, each in enumerate(params) if each.adjusts]
    for row in adjusted:
        rows[row].count(ids[row])
    packed = torch.from_numpy(np.array(ids))
    columns = _position_columns(rows, lengths, None)
    pack = {Role.TOKENS: lambda spec: packed.to(spec.dtype.as_torch)}
    inputs = _inputs(program, rows, params, adjusted, columns, pack)
    return Batch(rows, [1] * len(rows), inputs, params, adjusted)


def schedule_tokens(waiting: list[int], chunk: int, token_budget: int) -> list[int]:
    """How many tokens of each row a step consumes: one each, then more in order of the rows.

    Args:
        waiting: the number of waiting tokens of each row, at least 1; returned as it is where a
            row has no more than one.
        chunk: most tokens of a row.
        token_budget: most tokens of all rows, at least one a row.
    """
    if max(waiting) == 1:
        return waiting
    counts, left = [], token_budget - len(waiting)
    for tokens in waiting:
        more = min(tokens, chunk, 1 + left) - 1
        left -= more
        counts.append(1 + more)
    return counts


def _position_columns(
    rows: Sequence[ActiveRequest], lengths: NDArray[np.int64], counts: list[int] | None
) -> dict[Role, NDArray[np.int64]]:
    """Where the tokens of a step lie in the batch, in their sequences and in the arena, by role.

    Args:
        rows: the rows of the step.
        lengths: of their sequences, before the step.
        counts: how many tokens each row has; None if each has one.
    """
    if counts is None:
        offsets, positions, next_positions = _arange(len(rows) + 1), lengths, lengths + 1
        each = _ones(len(rows))
    else:
        each = np.array(counts, dtype=np.int64)
        offsets = np.concatenate(([0], np.cumsum(each)))
        positions = np.repeat(lengths - offsets[:-1], each) + _arange(int(offsets[-1]))
        next_positions = lengths + each
    return {
        Role.POSITIONS: positions,
        Role.ROW_OFFSETS: offsets,
        Role.LAST_TOKENS: offsets[1:] - 1,
        Role.SLOTS: np.array([active.sequence.slot for active in rows]),
        Role.WRITE_INDICES: lengths,
        Role.NEXT_POSITIONS: next_positions,
        Role.VALID_LENGTHS: each,
    }


@cache
def _arange(end: int) -> NDArray[np.int64]:
    """0, 1, …; read-only. Cached, because `numpy.arange` lets other threads take the GIL."""
    return np.arange(end)


@cache
def _ones(count: int) -> NDArray[np.int64]:
    """As many ones; read-only."""
    return np.ones(count, dtype=np.int64)


def _pack_tokens(spec: TensorSpec, rows: list[ActiveRequest], counts: list[int]) -> Tensor:
    """The next tokens of all rows, ``[tokens, ...]``; adjacent decode tokens make one tensor."""
    decode_tokens: list[int] = []
    parts: list[Tensor] = []
    for active, count in zip(rows, counts, strict=True):
        if active.decode_token is not None:
            decode_tokens.append(active.decode_token)
            continue
        if decode_tokens:
            parts.append(torch.from_numpy(np.array(decode_tokens)))
            decode_tokens = []
        tensor, begin = active.inputs[spec.name], active.num_computed_tokens
        parts.append(tensor if count == tensor.shape[0] else tensor[begin : begin + count])
    if decode_tokens:
        parts.append(torch.from_numpy(np.array(decode_tokens)))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _pack_following_tokens(
    program: Program, spec: TensorSpec, rows: list[ActiveRequest], counts: list[int]
) -> Tensor:
    """For each of the next tokens of all rows the one that its request feeds after it, or 0."""
    assert program.decoder_io is not None
    name, parts = program.decoder_io[0], list[Tensor]()
    for active, count in zip(rows, counts, strict=True):
        following = torch.zeros(0, dtype=torch.int64)
        if active.decode_token is None:
            begin = active.num_computed_tokens + 1
            following = active.inputs[name][begin : begin + count]
        parts += [following, following.new_zeros(count - len(following))]
    return torch.cat(parts).to(spec.dtype.as_torch)


def sampling_values(
    spec: TensorSpec,
    params: Sequence[SamplingParams],
    adjustments: Sequence[ScoreAdjustments | None],
) -> Tensor:
    """The input of a sampling role for all rows.

    Args:
        spec: the input.
        params: of each row.
        adjustments: of each row; None where no score is adjusted.
    """
    match spec.role:
        case Role.NUM_ADJUSTED:
            values: list[Any] = [0 if each is None else each.number for each in adjustments]
            return torch.from_numpy(np.array(values, dtype=spec.dtype.value))
        case Role.ADJUSTED_TOKENS | Role.ADJUSTMENTS | Role.TOKEN_MASK:
            parts = [None if each is None else each.part(spec.role) for each in adjustments]
            if all(part is None for part in parts):
                return _greedy_values(spec.role, spec.dtype, (len(params), *spec.shape))
            rows = np.zeros((len(params), *spec.shape), dtype=spec.dtype.value)
            for row, part in enumerate(parts):
                if part is not None:
                    rows[row] = part
            return torch.from_numpy(rows)
        case _:
            values = [getattr(each, spec.role) for each in params]
            return torch.from_numpy(np.array(values, dtype=spec.dtype.value))


@cache
def _greedy_values(role: Role, dtype: Dtype, shape: tuple[int, ...]) -> Tensor:
    """The input of a sampling role where every row is `GREEDY`.

    The same tensor each time, which nothing changes: engines that have it already leave it. It is
    one number of memory, expanded: a tensor for each number of rows is kept.
    """
    value = getattr(GREEDY, role, 0)  # 0 for adjustments
    return torch.tensor(value, dtype=dtype.as_torch).expand(shape)
