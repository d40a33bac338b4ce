"""The step driver: the requests of one call are validated, run and answered inside that call."""

import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from tokenizers import Tokenizer

from inplace.drivers.detokenizer import Detokenizer, TokenizerError, special_tokens
from inplace.drivers.parsing import check_no_special_tokens, text_output
from inplace.drivers.shutdown import fenced, stored
from inplace.errors import Code, RequestError, backend_failure
from inplace.protocol import ADD_SPECIAL_TOKENS, MAX_TOKENS, TEXT_OUTPUT
from inplace.runtime.batcher import ActiveRequest, Answer, split_outputs
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request
from inplace.runtime.schedules import ScheduledInstance
from inplace.runtime.slots import EndReason, SequenceId, SequenceState
from inplace.runtime.snapshots import MAX_CAPTURED, SnapshotKeeper
from inplace.snapshots import SnapshotError

NO_GENERATIONS = (
    f"parameter {MAX_TOKENS!r} asks for a generation, but this model is served step by step: leave"
    f" it out, or build with --serve stream"
)


log = logging.getLogger("inplace")


class _QueuedCall:
    """Requests that were given to `StepDriver.run` together.

    Attributes:
        answers: one a request; None until they are known.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.answers: list[Answer] | None = None


class StepDriver:
    """Runs a model instance for a server that calls with batches of requests.

    A thread reclaims idle slots: Triton tells a backend nothing about sequences that stay silent.

    Args:
        instance: the model instance; nothing else uses it.
        tokenizer: of the tokens that a schedule produces; None if they are not text.
    """

    def __init__(self, instance: ModelInstance, tokenizer: Tokenizer | None = None) -> None:
        self.instance = instance
        self._tokenizer = tokenizer
        self._text_output = text_output(instance.program)
        self._special = frozenset[int]()
        if tokenizer is not None:
            self._special = frozenset(special_tokens(tokenizer).values())
        self._lock = threading.Lock()
        self._calls: deque[_QueuedCall] = deque()
        self._not_stored = set[SequenceState]()
        if instance.snapshots is not None:
            instance.snapshots.on_fenced = self._fence
        self._closing = threading.Event()
        self._reclaimer = threading.Thread(
            target=self._reclaim, name="inplace-reclaim", daemon=True
        )
        self._reclaimer.start()

    def run(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer every request, in order. Those of one sequence take effect in the order given.

        Thread-safe: calls that come while another one runs are answered together after it, so that
        their requests share steps.
        """
        if (snapshots := self.instance.snapshots) is not None:
            requests = [self._fetch(request, snapshots) for request in requests]
        call = _QueuedCall(requests)
        self._calls.append(call)
        with self._lock:
            if call.answers is None:
                calls = [self._calls.popleft() for _ in range(len(self._calls))]
                self._run_calls(calls)
        if call.answers is None:
            raise RuntimeError("the requests of another thread failed, and these with them")
        return call.answers

    def _run_calls(self, calls: Sequence["_QueuedCall"]) -> None:
        """Answer the requests of several calls as those of one."""
        requests = [request for call in calls for request in call.requests]
        answers: list[Answer | None] = [None] * len(requests)
        waiting = list(enumerate(requests))
        with self.instance.engine.on_stream():
            while waiting:
                waiting = self._run_wave(waiting, answers)
        given = iter(answer for answer in answers if answer is not None)
        for call in calls:
            call.answers = list(islice(given, len(call.requests)))

    def _fetch(self, request: Request, snapshots: SnapshotKeeper) -> Request:
        """A request with the sequence that it asks for, if that is not live."""
        if not request.asks_to_restore or request.offered or request.refusal is not None:
            return request
        try:
            key_digest = request.key_digest()
            if not request.restores() or key_digest is None:
                return request
            with self._lock:
                if self.instance.table.get(request.sequence_id) is not None:
                    return request
            restored = snapshots.fetch(request.sequence_id, key_digest).result()
        except SnapshotError as error:
            return replace(request, refusal=error.as_refusal())
        except RequestError:
            return request  # `validate` refuses it
        return replace(request, restored=restored)

    def _fence(self, sequence: SequenceState) -> None:
        """End a sequence that another server has restored."""
        with self._lock:
            if self.instance.table.get(sequence.id) is sequence:
                self.instance.table.leave(sequence, EndReason.FENCED, fenced())

    def hand_over(self) -> None:
        """Store the sequences that may be stored, then end them."""
        snapshots, table = self.instance.snapshots, self.instance.table
        while snapshots is not None:
            with self._lock, self.instance.engine.on_stream():
                idle = [each for each in table.idle_for(0.0) if snapshots.is_stored(each)]
                leaving = [each for each in idle if each not in self._not_stored][:MAX_CAPTURED]
                results = [
                    (each, snapshots.write(each, each.pending_token, wait=True)) for each in leaving
                ]
                for sequence, result in results:
                    assert result is not None
                    if result.result():
                        table.leave(sequence, EndReason.SHUTDOWN, stored())
                    else:
                        self._not_stored.add(sequence)
            if not leaving:
                return

    def end_idle(self, seconds: float) -> None:
        """End the sequences that have had no request for so many seconds."""
        with self._lock:
            for sequence in self.instance.table.idle_for(seconds):
                self.instance.table.end(sequence, EndReason.SHUTDOWN)

    def stop_running(self, error: RequestError) -> None:
        """End all sequences. Every request has been answered when a call of `run` returns."""
        self.hand_over()
        self.end_idle(0.0)

    def close(self) -> None:
        """Stop the reclaiming thread."""
        self._closing.set()
        self._reclaimer.join()

    def _run_wave(
        self, waiting: list[tuple[int, Request]], answers: list[Answer | None]
    ) -> list[tuple[int, Request]]:
        """Run the first request of every sequence.

        One call may have the END of a sequence and the START of another. A START that finds no free
        slot waits if an END of the same call is about to free one, and one that copies a sequence
        waits for the requests of that sequence before it.

        Args:
            waiting: requests without an answer, and their index in the call.
            answers: answers are put here.

        Returns:
            The requests that must wait for the next wave.
        """
        admitted: list[tuple[int, ActiveRequest]] = []
        later: list[tuple[int, Request]] = []
        seen: set[SequenceId] = set()
        for index, request in waiting:
            if request.sequence_id in seen:
                later.append((index, request))
                continue
            seen.add(request.sequence_id)
            try:
                active = self._admit(request)
                if active is None:
                    answers[index] = {}
                else:
                    admitted.append((index, active))
            except RequestError as error:
                if self._succeeds_later(error, waiting, admitted):
                    later.append((index, request))
                else:
                    answers[index] = error
            except Exception as error:  # a defect: the other requests must not suffer
                log.exception("a request could not be taken")
                answers[index] = backend_failure(error)
        self._run_steps(admitted, answers)
        return later

    def _admit(self, request: Request) -> ActiveRequest | None:
        """Admit a request; None if it was an END that had nothing to compute."""
        if MAX_TOKENS in request.parameters:
            request = replace(request, refusal=RequestError(Code.BAD_PARAMETER, NO_GENERATIONS))
        elif ADD_SPECIAL_TOKENS in request.parameters:
            try:
                check_no_special_tokens(request)
            except RequestError as error:
                request = replace(request, refusal=error)
        validated = self.instance.validate(request)
        if validated.only_ends:
            self.instance.end_sequence(validated)
            return None
        return self.instance.admit_validated(validated)

    def _succeeds_later(
        self,
        error: RequestError,
        waiting: list[tuple[int, Request]],
        admitted: list[tuple[int, ActiveRequest]],
    ) -> bool:
        """Whether a request that was refused may be admitted in the next wave of this call."""
        if error.code is Code.SEQUENCE_BUSY:
            return bool(admitted)
        return error.code is Code.NO_FREE_SLOT and any(
            request.end and self.instance.table.get(request.sequence_id) is not None
            for _, request in waiting
        )

    def _run_steps(
        self, admitted: list[tuple[int, ActiveRequest]], answers: list[Answer | None]
    ) -> None:
        """Step until every request is answered; a prompt longer than the chunk takes several."""
        if isinstance(self.instance, ScheduledInstance):
            self._run_schedules(self.instance, admitted, answers)
            return
        max_rows = self.instance.program.max_rows
        while admitted:
            rows = admitted[:max_rows]
            try:
                self._step(rows, answers)
            except Exception as error:  # a defect; errors of the engine are answers
                log.exception("the step driver failed")
                self._fail(rows, answers, backend_failure(error))
                admitted = admitted[max_rows:]
            admitted = [(index, active) for index, active in admitted if not active.finished]

    def _step(self, rows: list[tuple[int, ActiveRequest]], answers: list[Answer | None]) -> None:
        actives = [active for _, active in rows]
        row_answers = split_outputs(actives, self.instance.step(actives))
        for (index, active), answer in zip(rows, row_answers, strict=True):
            if answer is not None:
                answers[index] = answer
                self.instance.finish(active)

    def _run_schedules(
        self,
        instance: ScheduledInstance,
        admitted: list[tuple[int, ActiveRequest]],
        answers: list[Answer | None],
    ) -> None:
        """Call programs until every schedule has ended; rows that were called go to the back."""
        indices = {active: index for index, active in admitted}
        waiting = []
        for active, index in indices.items():
            if not active.finished:
                waiting.append(active)
                continue
            self._finish_schedule(index, active, answers)  # it has nothing to call
        while waiting:
            rows = instance.next_rows(waiting)
            called = set(rows)
            waiting = [active for active in waiting if active not in called]
            try:
                instance.step(rows)
            except Exception as error:  # a defect; errors of the engine are answers
                log.exception("the step driver failed")
                failed = [(indices[active], active) for active in rows]
                self._fail(failed, answers, backend_failure(error))
                continue
            for active in rows:
                if active.finished:
                    self._finish_schedule(indices[active], active, answers)
                else:
                    waiting.append(active)

    def _finish_schedule(
        self, index: int, active: ActiveRequest, answers: list[Answer | None]
    ) -> None:
        """Answer a request whose schedule has ended, or whose call has failed."""
        try:
            answers[index] = active.error or self._with_text(active)
        except TokenizerError as error:
            self._fail([(index, active)], answers, backend_failure(error))
        self.instance.finish(active)

    def _with_text(self, active: ActiveRequest) -> Answer:
        """The outputs of a schedule, with the text that its tokens add to the sequence's."""
        outputs: dict[str, Any] = {**active.outputs}
        progress, sequence = active.progress, active.sequence
        if self._tokenizer is None or progress is None or self._text_output is None:
            return outputs
        text = sequence.driver_state
        if not isinstance(text, Detokenizer):
            before = text if isinstance(text, list) else []
            text = sequence.driver_state = Detokenizer(self._tokenizer, before, self._special)
        piece = text.append(progress.tokens.get(self._text_output, []))
        outputs[TEXT_OUTPUT] = piece + text.flush() if active.request.end else piece
        return outputs

    def _fail(
        self,
        rows: list[tuple[int, ActiveRequest]],
        answers: list[Answer | None],
        error: RequestError,
    ) -> None:
        """Answer these rows with an error and end their sequences, whose states are unknown."""
        for index, active in rows:
            answers[index] = error
            if self.instance.table.get(active.sequence.id) is active.sequence:
                self.instance.table.end(active.sequence, EndReason.ENGINE_FAILED)

    def _reclaim(self) -> None:
        while not self._closing.wait(self._reclaim_delay()):
            with self._lock:
                self.instance.table.reclaim_idle()

    def _reclaim_delay(self) -> float:
        with self._lock:
            return self.instance.table.reclaim_delay()
