"""Metrics and log lines for the events of a model instance."""

import json
import logging
import re
from collections.abc import Callable, Collection, Sized
from time import monotonic

from inplace.errors import Code, RequestError
from inplace.runtime.metrics import (
    DECODE,
    ENDED,
    FIRST_TOKEN,
    GENERATIONS,
    LIVE,
    PLACES,
    PLACES_OPEN,
    PREFILL,
    QUEUE,
    REFUSED,
    ROWS,
    SLOTS,
    SLOTS_FREE,
    STARTED,
    STATE_BYTES,
    STEP,
    TOKENS,
    WAITING,
    MetricValues,
)
from inplace.runtime.slots import EndReason, SequenceId, SequenceState, SlotObserver

MAX_LINES_PER_SECOND = 10
"""Log lines a second for refused requests, and as many for ended sequences; all are counted."""


PLAIN_WORD = re.compile(r"(?!\d+$)[\w.:/+-]+")
"""Text that a log line shows without quotes: one word that is not a number."""


log = logging.getLogger("inplace")


def log_line(event: str, **fields: object) -> str:
    """Format a log line: the event, then ``key=value`` for each field.

    Text other than a plain word is written as a JSON string. Ids come from clients, and the text
    ``"12"`` is a different sequence than the number 12.
    """
    values = (f"{name}={_format_value(value)}" for name, value in fields.items())
    return " ".join([f"{event}:", *values])


def _format_value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    plain = isinstance(value, int) or (isinstance(value, str) and PLAIN_WORD.fullmatch(value))
    return str(value) if plain else json.dumps(value)


class _RateLimitedLog:
    """Logs lines of one kind at INFO, at most `MAX_LINES_PER_SECOND`, and counts the others.

    Args:
        kind: names the lines in the count of those that were not logged.
        clock: monotonic seconds.
    """

    def __init__(self, kind: str, clock: Callable[[], float]) -> None:
        self._kind, self._clock = kind, clock
        self._window_start, self._num_logged, self._num_suppressed = clock(), 0, 0

    def info(self, make_line: Callable[[], str]) -> None:
        """Log a line, unless too many were logged in this second; ``make_line`` is called then."""
        now = self._clock()
        if now - self._window_start >= 1.0:
            if self._num_suppressed:
                log.info(log_line(f"more {self._kind}", count=self._num_suppressed))
            self._window_start, self._num_logged, self._num_suppressed = now, 0, 0
        if self._num_logged == MAX_LINES_PER_SECOND:
            self._num_suppressed += 1
            return
        self._num_logged += 1
        log.info(make_line())


class Observer:
    """Counts and logs the events of one model instance. Thread-safe; a call takes microseconds.

    Levels: DEBUG for the starts and ends that clients ask for, INFO for sequences that end
    otherwise and for refused requests, ERROR for failed steps.

    Args:
        num_slots: slots of the instance.
        state_bytes: bytes of its arena.
        clock: monotonic seconds.

    Attributes:
        metrics: the values of the instance's metrics.
    """

    def __init__(
        self, num_slots: int = 0, state_bytes: int = 0, clock: Callable[[], float] = monotonic
    ) -> None:
        self.metrics = MetricValues()
        self.metrics.add(SLOTS, num_slots)
        self.metrics.add(SLOTS_FREE, num_slots)
        self.metrics.add(STATE_BYTES, state_bytes)
        self._slot_observers: list[SlotObserver] = []
        self._refusal_log = _RateLimitedLog("requests refused", clock)
        self._end_log = _RateLimitedLog("sequences ended", clock)

    def forward_to(self, observer: SlotObserver) -> None:
        """Pass the starts and ends of sequences on."""
        self._slot_observers.append(observer)

    def sequence_started(self, sequence: SequenceState) -> None:
        """A sequence was given a slot."""
        for observer in self._slot_observers:
            observer.sequence_started(sequence)
        self.metrics.add(STARTED)
        self.metrics.add(LIVE)
        self.metrics.add(SLOTS_FREE, -1)
        if log.isEnabledFor(logging.DEBUG):
            log.debug(log_line("sequence started", sequence=sequence.id, slot=sequence.slot))

    def sequence_ended(self, sequence: SequenceState, reason: EndReason) -> None:
        """A sequence gave its slot back."""
        for observer in self._slot_observers:
            observer.sequence_ended(sequence, reason)
        self.metrics.add(ENDED, label_value=reason)
        self.metrics.add(LIVE, -1)
        self.metrics.add(SLOTS_FREE)

        def make_line() -> str:
            return log_line(
                "sequence ended",
                sequence=sequence.id,
                slot=sequence.slot,
                length=sequence.length,
                reason=reason,
            )

        if log.isEnabledFor(logging.DEBUG):
            log.log(logging.DEBUG if reason is EndReason.END else logging.INFO, make_line())
        elif reason is not EndReason.END:
            self._end_log.info(make_line)

    def request_admitted(self, queue_seconds: float) -> None:
        """A request was given its sequence, ``queue_seconds`` after it had arrived."""
        self.metrics.observe(QUEUE, queue_seconds)

    def watch_waiting(self, waiting: Sized) -> None:
        """Report the length of this queue, now and later, as the requests that wait for a slot."""
        self.metrics.set_function(WAITING, lambda: len(waiting))

    def watch_places(self, places: Sized, limit: int) -> None:
        """Report how many places of Triton are open, now and later, and how many it has."""
        self.metrics.set_function(PLACES_OPEN, lambda: len(places))
        self.metrics.add(PLACES, limit)

    def first_token(self, seconds: float) -> None:
        """A generation has its first token, ``seconds`` after its request had arrived."""
        self.metrics.observe(FIRST_TOKEN, seconds)

    def generation_finished(
        self, sequence_id: SequenceId, request_id: str, finish_reason: str, num_tokens: int
    ) -> None:
        """A generation finished with ``num_tokens`` tokens."""
        self.metrics.add(GENERATIONS, label_value=finish_reason)
        if log.isEnabledFor(logging.DEBUG):
            log.debug(
                log_line(
                    "generation finished",
                    sequence=sequence_id,
                    request=request_id or "-",
                    reason=finish_reason,
                    tokens=num_tokens,
                )
            )

    def request_refused(
        self, sequence_id: SequenceId, request_id: str, error: RequestError, *, end: bool
    ) -> None:
        """A request is answered with an error; ``end`` if it has the END flag.

        An END refused with POSITION is not counted: it has freed the slot, and it is how a client
        ends a sequence without a step.
        """
        if end and error.code is Code.POSITION:
            return
        self.metrics.add(REFUSED, label_value=error.code)
        if error.code is Code.ENGINE_FAILED:
            return  # `step_failed` logs one line for all rows
        self._refusal_log.info(
            lambda: log_line(
                "request refused",
                sequence=sequence_id,
                request=request_id or "-",
                code=error.code,
                retryable=int(error.retryable),
                reason=str(error),
            )
        )

    def step_finished(
        self, seconds: float, num_rows: int, num_prefill_tokens: int, num_decode_tokens: int
    ) -> None:
        """The engine ran a step."""
        self.metrics.observe(STEP, seconds)
        self.metrics.observe(ROWS, num_rows)
        self.metrics.add(TOKENS, num_prefill_tokens, PREFILL)
        self.metrics.add(TOKENS, num_decode_tokens, DECODE)

    def step_failed(
        self, seconds: float, rows: Collection[tuple[SequenceId, str]], error: Exception
    ) -> None:
        """The engine raised in a step.

        Args:
            seconds: how long the step took.
            rows: the sequence id and the request id of each row.
            error: what the engine raised.
        """
        self.metrics.observe(STEP, seconds)
        self.metrics.observe(ROWS, len(rows))
        sequences, requests = [sequence for sequence, _ in rows], [request for _, request in rows]
        log.error(
            log_line("engine failed", rows=len(rows), sequences=sequences, requests=requests),
            exc_info=error,
        )
