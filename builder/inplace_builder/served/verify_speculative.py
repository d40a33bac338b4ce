"""Verify speculative decoding: rounds of drafted tokens, against the model.

Three generations of different lengths run rounds together, in which different numbers of tokens are
accepted: first of tokens that are known to be right and wrong, then of those that the draft gives.
The scores behind accepted tokens are compared with the model's, and what is sampled from them is
compared with the sampling operator. No byte may change but those of the tokens that were fed.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from inplace.operators import sample
from inplace.runtime.batcher import ActiveRequest
from inplace.runtime.instance import ModelInstance
from inplace.runtime.loading import load_engine, make_arena
from inplace.runtime.requests import Request, SamplingParams
from inplace.runtime.speculative import DecodeRound, SpeculativeInstance
from inplace.schema.files import EngineFolder
from inplace.schema.schedule import DEFAULT_SCHEDULE, STEP
from inplace.schema.served import Manifest
from torch import Tensor

from inplace_builder.capture.drafted import DRAFT, SpeculativeCapture
from inplace_builder.compare import fill_with_sentinel, same_bits
from inplace_builder.engine_files import load_errors
from inplace_builder.errors import rejected
from inplace_builder.served.verify import (
    NUM_SEQUENCES,
    SAMPLING,
    SPARE_SLOTS,
    OutputComparison,
    verify,
    written_parts,
)

KNOWN_ROUNDS, DRAFTED_ROUNDS = 3, 3
"""Rounds with tokens that are known to be right or wrong, and with those of the draft."""


def verify_speculative(
    folder: Path, manifest: Manifest, capture: SpeculativeCapture
) -> dict[str, str]:
    """Verify both programs of an engine, then rounds of them.

    Returns:
        What the manifest records: the largest relative error of an output, and how many of the
        draft's tokens were accepted. Those are of random prompts.

    Raises:
        BuildError: as `inplace_builder.served.verify.verify`; or a round gives other scores or
            other tokens than the model.
    """
    notes = verify(folder, manifest, capture.model)
    verify(folder, _draft_alone(manifest), capture.draft)
    return notes | _Rounds(folder, manifest, capture).run()


def _draft_alone(manifest: Manifest) -> Manifest:
    """The manifest of the draft's program as if it was the only one."""
    program = manifest.program(DRAFT)
    states = tuple(state for state in manifest.states if state.name in program.states)
    return manifest.model_copy(
        update={
            "programs": (program.model_copy(update={"name": STEP}),),
            "schedules": (DEFAULT_SCHEDULE,),
            "states": states,
        }
    )


class _KnownDrafts(SpeculativeInstance):
    """Drafts the tokens that it is given, and counts what is drafted.

    Attributes:
        known: by sequence, the tokens to draft; None for those of the draft.
        num_drafted: how many were drafted.
    """

    known: dict[int | str, list[int]] | None = None
    num_drafted = 0

    def _draft_all(
        self,
        rows: list[ActiveRequest],
        rounds: Sequence[DecodeRound | None],
        counts: Sequence[int],
    ) -> None:
        if self.known is None:
            super()._draft_all(rows, rounds, counts)
        for each in rounds:
            if each is None:
                continue
            known = {} if self.known is None else self.known
            for token in known.get(each.active.sequence.id, [])[: each.most - 1]:
                each.add(token)
            self.num_drafted += len(each.tokens) - 1


class _Rounds:
    """The generations of a verification.

    Args:
        folder: the engine's.
        manifest: the engine's.
        capture: what it was captured from.
    """

    def __init__(self, folder: Path, manifest: Manifest, capture: SpeculativeCapture) -> None:
        files = EngineFolder(folder)
        with load_errors():
            self._arena = make_arena(files, manifest, NUM_SEQUENCES + SPARE_SLOTS)
            engine = load_engine(files, manifest, self._arena)
            draft = load_engine(files, manifest, self._arena, DRAFT)
        for tensor in self._arena.tensors.values():
            fill_with_sentinel(tensor)
        forever = float("inf")
        self._plain = ModelInstance(manifest, self._arena, engine, forever)
        self._instance = _KnownDrafts(manifest, self._arena, engine, draft, forever)
        self._manifest, self._capture = manifest, capture
        self._reference = capture.model.reference
        self._comparison = OutputComparison(capture.model, manifest)
        io = self._instance.program.decoder_io
        assert io is not None
        self._input, self._output = io
        self._scores = next(
            spec.sampled_from or "" for spec in self._instance.program.outputs if spec.sampled_from
        )
        self._histories: dict[int | str, list[int]] = {}
        self._num_accepted = 0

    def run(self) -> dict[str, str]:
        """Run the rounds; what the manifest records."""
        size = self._manifest.tokens_per_decode
        num_tokens = KNOWN_ROUNDS * size + 1
        right = [self._generate(self._plain, index, num_tokens) for index in range(NUM_SEQUENCES)]
        active = [self._begin(self._instance, index, 1 << 20) for index in range(NUM_SEQUENCES)]
        for index in range(KNOWN_ROUNDS):
            # In each round another number of the tokens is right. The third generation begins late.
            self._instance.known = {
                each.sequence.id: self._known(each, right[sequence], (index + sequence) % size)
                for sequence, each in enumerate(active)
            }
            self._round(active if index else active[:2])
        if not 0 < self._num_accepted < self._instance.num_drafted:
            raise rejected(
                f"of {self._instance.num_drafted} drafted tokens {self._num_accepted} were "
                f"accepted, where some are what the model chooses and others are not"
            )
        self._num_accepted = self._instance.num_drafted = 0
        self._instance.known = None
        for _ in range(DRAFTED_ROUNDS):
            self._round(active)
        accepted, drafted = self._num_accepted, self._instance.num_drafted
        return {"draft_accepted": f"{accepted} of {drafted} tokens after random prompts"}

    def _begin(self, instance: ModelInstance, index: int, num_tokens: int) -> ActiveRequest:
        """Begin a generation: its prompt, and its first token."""
        vocabulary = self._instance.program.vocab_size
        generator = torch.Generator().manual_seed(index)
        capacity = self._manifest.capacity or 1 << 20
        length = min(2 + 2 * index, max(1, capacity // 4))
        prompt = torch.randint(0, vocabulary, (1, length), generator=generator)
        request = Request(
            index + 1,
            start=True,
            end=False,
            inputs={self._input: prompt},
            parameters=dict(SAMPLING[index]),
            requested_outputs=frozenset({self._output, self._scores}),
        )
        validated = replace(instance.validate(request), max_new_tokens=num_tokens)
        active = instance.admit_validated(validated)
        while not active.finished:
            outputs = self._step(instance, [active])
        token = int(outputs[self._output][0])
        self._histories[active.sequence.id] = [*prompt[0].tolist(), token]
        active.feed(token)
        return active

    def _generate(self, instance: ModelInstance, index: int, num_tokens: int) -> list[int]:
        """The tokens of a generation without a draft, from its prompt on."""
        active = self._begin(instance, index, num_tokens)
        history = self._histories[active.sequence.id]
        while active.sequence.length + 1 < min(active.end_position, self._manifest.capacity or 1):
            token = int(self._step(instance, [active])[self._output][0])
            history.append(token)
            active.feed(token)
        instance.table.end(active.sequence)
        return history

    def _known(self, active: ActiveRequest, right: list[int], count: int) -> list[int]:
        """Tokens to draft, of which the first ``count`` are right."""
        vocabulary = self._instance.program.vocab_size
        begin = active.sequence.length + 1
        tokens = right[begin : begin + self._manifest.tokens_per_decode - 1]
        return [
            token if index < count else (token + 1) % vocabulary
            for index, token in enumerate(tokens)
        ]

    def _step(self, instance: ModelInstance, rows: list[ActiveRequest]) -> dict[str, Tensor]:
        outputs = instance.step(rows)
        for active in rows:
            if active.error is not None:
                raise rejected(str(active.error))
        return outputs

    def _round(self, rows: list[ActiveRequest]) -> None:
        """Run a round, and compare memory and outputs."""
        capacity = self._manifest.capacity or 1 << 20
        rows = [active for active in rows if active.sequence.length < capacity]
        before = {name: tensor.clone() for name, tensor in self._arena.tensors.items()}
        starts = [active.sequence.length for active in rows]
        begins = [
            active.sequence.positions.get(DRAFT, start)
            for active, start in zip(rows, starts, strict=True)
        ]
        size = self._manifest.tokens_per_decode
        for first in range(0, len(rows), self._manifest.max_sequences):
            part = rows[first : first + self._manifest.max_sequences]
            outputs = self._step(self._instance, part)
            for active in part:
                self._compare(active, outputs)
        for spec in self._manifest.states:
            allowed, now = before[spec.name], self._arena.tensors[spec.name]
            for active, start, begin in zip(rows, starts, begins, strict=True):
                slot = active.sequence.slot
                end = min(capacity, start + size)
                for old, new in written_parts(
                    spec, allowed[slot], now[slot], min(start, begin), end
                ):
                    old.copy_(new)
            if not same_bits(allowed, now):
                raise rejected(
                    f"a round changed bytes of state {spec.name} outside the tokens it was fed"
                )

    def _compare(self, active: ActiveRequest, outputs: dict[str, Tensor]) -> None:
        """Compare the tokens of a round with what the model gives after each of them."""
        history = self._histories[active.sequence.id]
        for index, row in enumerate(active.accepted_rows):
            where = f"the round of sequence {active.sequence.id} after {len(history)} tokens"
            fed: Any = [{self._input: torch.tensor(history)}]
            if index in (0, len(active.accepted_rows) - 1):
                expected = self._reference(fed)[self._scores]
                scores = outputs[self._scores][row]
                exact = partial(self._comparison.in_float32, fed, self._scores)
                others = partial(self._comparison.perturbed, fed, self._scores)
                self._comparison.check_close(where, scores, expected, exact, others)
            token = int(outputs[self._output][row])
            chosen = _sampled(outputs[self._scores][row], active.sampling_params, len(history))
            if token != chosen:
                raise rejected(f"{where} gives the token {token}, expected {chosen}")
            history.append(token)
        self._num_accepted += len(active.accepted_rows) - 1
        active.feed(history[-1])


def _sampled(scores: Tensor, params: SamplingParams, position: int) -> int:
    """The token at a position that the sampling operator takes on the CPU."""
    arguments = [
        torch.tensor([params.temperature], dtype=torch.float32),
        torch.tensor([params.top_k], dtype=torch.int32),
        torch.tensor([params.top_p], dtype=torch.float32),
        torch.tensor([params.seed], dtype=torch.int64),
        torch.tensor([position], dtype=torch.int32),
    ]
    return int(sample(scores[None], *arguments))
