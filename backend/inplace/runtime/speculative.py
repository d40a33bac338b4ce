"""Speculative decoding: a second program drafts tokens, and a step of the model verifies them.

A round drafts up to k tokens of each generation, with k calls of the program that drafts, and then
runs one step that is fed the last token and the drafted ones. The step samples behind each of them.
A drafted token is accepted if the model has sampled it too, up to the first one that differs; the
model's counts in its place. So a round adds 1 to k + 1 tokens, which are those of the model alone.
Draft and model sample with the same random numbers, which depend on the seed and the position only
(docs/adr/0040-speculative-decoding.md).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Self

import torch
from torch import Tensor

from inplace.engines import StepEngine
from inplace.engines.arena import Arena
from inplace.runtime.batcher import (
    ActiveRequest,
    Batch,
    Sample,
    add_samples,
    form_batch,
    schedule_tokens,
)
from inplace.runtime.instance import InFlightStep, ModelInstance
from inplace.runtime.loading import load_engine
from inplace.runtime.requests import GREEDY, SamplingParams
from inplace.runtime.sampling import ScoreAdjustments
from inplace.schema.files import EngineFolder
from inplace.schema.served import Manifest


@dataclass(slots=True, eq=False)
class DecodeRound:
    """A round of one generation.

    Attributes:
        active: the generation.
        most: the most tokens that the step is fed.
        tokens: its last token, then the drafted ones.
        adjustments: the scores that are adjusted after each of these tokens; None for none.
        samples: the row of the outputs behind each of these tokens.
    """

    active: ActiveRequest
    most: int
    tokens: list[int]
    adjustments: list[ScoreAdjustments | None]
    samples: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, active: ActiveRequest, most: int) -> "DecodeRound | None":
        """A round in which nothing is drafted yet; None if the request has other tokens to feed."""
        if active.decode_token is None:
            return None
        given = active.adjustments
        after = None if given is None else given.after(active.decode_token)
        return cls(active, most, [active.decode_token], [after])

    @property
    def position(self) -> int:
        """The position of the last of its tokens."""
        return self.active.sequence.length + len(self.tokens) - 1

    def add(self, token: int) -> None:
        """Add a drafted token."""
        last = self.adjustments[-1]
        self.tokens.append(token)
        self.adjustments.append(None if last is None else last.after(token))


@dataclass(slots=True)
class VerificationStep(InFlightStep):
    """A step that verifies drafted tokens.

    Attributes:
        rounds: by row, the round of a generation; None in a row with other tokens.
    """

    rounds: list[DecodeRound | None] = field(default_factory=list)


class SpeculativeInstance(ModelInstance):
    """A model instance whose generations are decoded in rounds of drafted tokens.

    A step is a round: `launch` drafts, and launches the step that verifies.

    Args:
        manifest: describes the engine.
        arena: the memory of the states of both programs.
        engine: runs a step of the model.
        draft: runs a step of the program that drafts.
        idle_timeout: seconds after its last response at which a sequence loses its slot.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        manifest: Manifest,
        arena: Arena,
        engine: StepEngine,
        draft: StepEngine,
        idle_timeout: float,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        super().__init__(manifest, arena, engine, idle_timeout, clock)
        schedule, io = manifest.decode_schedule, self.program.decoder_io
        assert schedule is not None
        assert io is not None
        self._token_input, self._token_output = io
        self._draft_name, self._draft_tokens = schedule.draft
        self._draft_engine, self._draft = draft, manifest.program(self._draft_name)
        # A draft of the model's own layers keeps nothing that a step does not write.
        written = {alias.input for alias in manifest.program(self.program.name).aliases}
        self._draft_has_states = bool(set(self._draft.states) - written)

    @classmethod
    def _load(
        cls, files: EngineFolder, manifest: Manifest, arena: Arena, idle_timeout: float
    ) -> Self:
        assert manifest.decode_schedule is not None
        draft, _ = manifest.decode_schedule.draft
        engine = load_engine(files, manifest, arena)
        return cls(
            manifest, arena, engine, load_engine(files, manifest, arena, draft), idle_timeout
        )

    @property
    def overlaps(self) -> bool:
        """False: what the next round drafts follows from what this one accepts."""
        return False

    def launch(self, rows: list[ActiveRequest], token_budget: int | None = None) -> InFlightStep:
        """Draft tokens for the generations among these rows, and launch the step that verifies.

        Args:
            rows: at most `Manifest.max_sequences` requests of different sequences.
            token_budget: as in `form_batch`.
        """
        try:
            return self._launch_round(rows, token_budget)
        except Exception as error:  # raised in `wait`, like an error of the step itself
            counts = [1] * len(rows)
            batch = Batch(rows, counts, {}, [GREEDY] * len(rows), [])
            return VerificationStep(batch, frozenset(), monotonic(), error)

    def _launch_round(
        self, rows: list[ActiveRequest], token_budget: int | None
    ) -> VerificationStep:
        launch_time = monotonic()
        limits = [self._draft_limit(active) for active in rows]
        budget = self.program.token_budget if token_budget is None else token_budget
        waiting = [
            active.num_waiting_tokens + limit for active, limit in zip(rows, limits, strict=True)
        ]
        counts = schedule_tokens(waiting, self.program.chunk, budget)
        rounds = [DecodeRound.of(active, count) for active, count in zip(rows, counts, strict=True)]
        self._draft_all(rows, rounds, counts)
        return self._verify(rows, rounds, counts, launch_time)

    def _draft_limit(self, active: ActiveRequest) -> int:
        """How many tokens to draft: none beyond the last that the generation may have."""
        if active.decode_token is None or active.sampling_params.structured:
            return 0  # a grammar allows other tokens after each token, which is not known yet
        end, capacity = active.end_position, self.manifest.capacity
        end = end if capacity is None else min(end, capacity)
        return max(0, min(self._draft_tokens, end - 2 - active.sequence.length))

    # Drafting

    def _draft_all(
        self,
        rows: list[ActiveRequest],
        rounds: Sequence[DecodeRound | None],
        counts: Sequence[int],
    ) -> None:
        """Draft tokens for all rounds; feed the draft what the other rows feed the model."""
        calls: list[tuple[ActiveRequest, DecodeRound | None]] = []
        for active, each, count in zip(rows, rounds, counts, strict=True):
            if self._draft_has_states:
                calls += self._catch_up(active, each, count)
            elif each is not None and each.most > 1:
                calls.append((self._draft_row(each), each))
        while calls:
            tokens = self._call_draft([row for row, _ in calls])
            drafting = []
            for (_, each), token in zip(calls, tokens, strict=True):
                if each is not None:
                    each.add(token)
                    drafting.append(each)
            calls = [
                (self._draft_row(each), each) for each in drafting if len(each.tokens) < each.most
            ]

    def _catch_up(
        self, active: ActiveRequest, each: DecodeRound | None, count: int
    ) -> list[tuple[ActiveRequest, DecodeRound | None]]:
        """What the first call of a round feeds the draft's own states of a sequence.

        Beside the tokens that the model is fed these are tokens that the states lack: after a round
        in which all drafted tokens were accepted, the last of them.

        Returns:
            A row, or none; and its round if a token is drafted in it: if the states then have all
            tokens of the sequence.
        """
        sequence = active.sequence
        begin = sequence.positions.get(self._draft_name, 0)
        if each is not None:
            new = each.tokens
        else:
            first = active.num_computed_tokens
            new = active.inputs[self._token_input][first : first + count].tolist()
        lacking = [*sequence.token_ids[begin : sequence.length], *new]
        is_up_to_date = len(lacking) <= self._draft.chunk
        if each is not None and each.most == 1 and is_up_to_date:
            return []
        ids = lacking[: self._draft.chunk]
        sequence.positions[self._draft_name] = begin + len(ids)
        adjustments = None if each is None else each.adjustments[-1]
        row = _feeding(active, ids, begin, adjustments, _without_logprobs(active.sampling_params))
        return [(row, each if is_up_to_date and each is not None and each.most > 1 else None)]

    def _draft_row(self, each: DecodeRound) -> ActiveRequest:
        """A row that feeds the draft the last token of a round."""
        active = each.active
        if self._draft_has_states:
            active.sequence.positions[self._draft_name] = each.position + 1
        params = _without_logprobs(active.sampling_params)
        return _feeding(active, each.tokens[-1:], each.position, each.adjustments[-1], params)

    def _call_draft(self, rows: list[ActiveRequest]) -> list[int]:
        """Call the draft once; the token that each row samples."""
        batch = form_batch(self._draft, rows, sum(row.num_tokens for row in rows))
        finish = self._draft_engine.launch(batch.inputs, frozenset({self._token_output}))
        tokens: list[int] = finish(self.gil_released)[self._token_output].flatten().tolist()
        return tokens

    # Verification

    def _verify(
        self,
        rows: list[ActiveRequest],
        rounds: list[DecodeRound | None],
        counts: Sequence[int],
        launch_time: float,
    ) -> VerificationStep:
        """Launch the step that verifies what was drafted."""
        fed, total = [], 0
        requested: frozenset[str] = frozenset()
        for active, each, count in zip(rows, rounds, counts, strict=True):
            if each is None:
                fed.append(active)
                total += count
            else:
                position, after = active.sequence.length, each.adjustments[-1]
                fed.append(_feeding(active, each.tokens, position, after, active.sampling_params))
                total += len(each.tokens)
            if each is not None or active.num_waiting_tokens == count:
                requested |= active.requested_outputs
        batch = form_batch(self.program, fed, total)
        samples: list[Sample] = []
        first = 0
        for row, (each, count) in enumerate(zip(rounds, batch.num_scheduled_tokens, strict=True)):
            if each is not None:
                begin = len(rows) + len(samples)
                each.samples = [*range(begin, begin + count - 1), row]
                samples += self._samples(each, first)
            first += count
        if samples:
            batch = add_samples(self.program, batch, samples)
        step = self._launch(self.engine.launch, replace(batch, rows=rows), requested)
        return VerificationStep(
            step.batch, step.requested_outputs, launch_time, step.finish, rounds=rounds
        )

    @staticmethod
    def _samples(each: DecodeRound, first: int) -> list[Sample]:
        """What a round samples behind all its tokens but the last.

        Args:
            each: the round.
            first: the index of its first token on the packed axis.
        """
        active = each.active
        return [
            Sample(
                first + index,
                active.sequence.length + index + 1,
                active.sampling_params,
                each.adjustments[index],
            )
            for index in range(len(each.tokens) - 1)
        ]

    def _advance_row(
        self, step: InFlightStep, outputs: Mapping[str, Tensor], row: int, active: ActiveRequest
    ) -> int:
        """Advance a row; a generation by the tokens that are accepted and the one after them."""
        assert isinstance(step, VerificationStep)
        each = step.rounds[row]
        if each is None:
            return super()._advance_row(step, outputs, row, active)
        sampled = outputs[self._token_output].flatten()
        chosen = sampled[each.samples].tolist()
        drafted = each.tokens[1:]
        accepted = 0
        while accepted < len(drafted) and drafted[accepted] == chosen[accepted]:
            accepted += 1
        self.observer.tokens_drafted(len(drafted), accepted)
        sequence, count = active.sequence, 1 + accepted
        sequence.token_ids.extend(each.tokens[:count])
        # Of the tokens after these, which the states have too, nothing is read any more.
        sequence.roll_back(sequence.length + count)
        active.num_computed_tokens = active.num_tokens
        active.adjustments = each.adjustments[accepted]
        active.accepted_rows = tuple(each.samples[:count])
        active.step_outputs = (outputs, each.samples[0])
        return count


def _feeding(
    active: ActiveRequest,
    ids: list[int],
    position: int,
    adjustments: ScoreAdjustments | None,
    sampling_params: SamplingParams,
) -> ActiveRequest:
    """A row that feeds tokens of a request's sequence from a position on, as a prompt."""
    return replace(
        active,
        sequence=replace(active.sequence, length=position),
        inputs=dict.fromkeys(active.inputs, torch.tensor(ids)),
        num_tokens=len(ids),
        num_computed_tokens=0,
        decode_token=None,
        adjustments=adjustments,
        sampling_params=sampling_params,
    )


def _without_logprobs(params: SamplingParams) -> SamplingParams:
    """The parameters by which a token is chosen."""
    if params.logprobs is None:
        return params
    params = replace(params, logprobs=None)
    return GREEDY if params.is_greedy else params
