"""What happens to the sequences and requests of a model instance, as numbers and as lines of the log."""

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
    Numbers,
)
from inplace.runtime.slots import EndReason, SequenceId, SequenceState

LINES_A_SECOND = 10
"""Refused requests that get a line of the log each second, and ended sequences likewise; all are counted."""


PLAIN = re.compile(r"(?!\d+$)[\w.:/+-]+")


log = logging.getLogger("inplace")


def line(event: str, **fields: object) -> str:
    """A line of the log: the event, then ``key=value`` for each field.

    A text is written as it is where it is one word that is no number, else as a JSON string: ids come from clients, and the text ``"12"``
    is another sequence than the number 12.
    """
    return " ".join([f"{event}:", *(f"{name}={_written(value)}" for name, value in fields.items())])


def _written(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return (
        str(value)
        if isinstance(value, int) or (isinstance(value, str) and PLAIN.fullmatch(value))
        else json.dumps(value)
    )


class _Limited:
    """Lines of one kind, of which the log takes so many a second.

    Args:
        kind: what is said of those that were left out.
        clock: monotonic seconds.
    """

    def __init__(self, kind: str, clock: Callable[[], float]) -> None:
        self._kind, self._clock = kind, clock
        self._second, self._logged, self._silent = clock(), 0, 0

    def info(self, text: Callable[[], str]) -> None:
        """Log a line, if there is room for it."""
        now = self._clock()
        if now - self._second >= 1.0:
            if self._silent:
                log.info(line(f"more {self._kind}", count=self._silent))
            self._second, self._logged, self._silent = now, 0, 0
        if self._logged == LINES_A_SECOND:
            self._silent += 1
            return
        self._logged += 1
        log.info(text())


class Observer:
    """Is told of every event of one model instance. Its calls cost a few microseconds and may come from any thread.

    Starts and ends that a client asked for are logged at DEBUG, sequences that ended otherwise and refused requests at INFO, failures of
    the engine at ERROR.

    Args:
        slots: of the instance.
        state_bytes: of its arena.
        clock: monotonic seconds.
    """

    def __init__(
        self, slots: int = 0, state_bytes: int = 0, clock: Callable[[], float] = monotonic
    ) -> None:
        self.numbers = Numbers()
        self.numbers.add(SLOTS, slots)
        self.numbers.add(SLOTS_FREE, slots)
        self.numbers.add(STATE_BYTES, state_bytes)
        self._refusals, self._ends = (
            _Limited("requests refused", clock),
            _Limited("sequences ended", clock),
        )

    def started(self, sequence: SequenceState) -> None:
        """A sequence was given a slot."""
        self.numbers.add(STARTED)
        self.numbers.add(LIVE)
        self.numbers.add(SLOTS_FREE, -1)
        if log.isEnabledFor(logging.DEBUG):
            log.debug(line("sequence started", sequence=sequence.id, slot=sequence.slot))

    def ended(self, sequence: SequenceState, why: EndReason) -> None:
        """A sequence gave its slot back."""
        self.numbers.add(ENDED, value=why)
        self.numbers.add(LIVE, -1)
        self.numbers.add(SLOTS_FREE)

        def text() -> str:
            return line(
                "sequence ended",
                sequence=sequence.id,
                slot=sequence.slot,
                length=sequence.length,
                reason=why,
            )

        if log.isEnabledFor(logging.DEBUG):
            log.log(logging.DEBUG if why is EndReason.END else logging.INFO, text())
        elif why is not EndReason.END:
            self._ends.info(text)

    def admitted(self, waited: float) -> None:
        """A request was given its sequence, so many seconds after it had arrived."""
        self.numbers.observe(QUEUE, waited)

    def queue(self, waiting: Sized) -> None:
        """Generations wait in this queue, now and later."""
        self.numbers.watch(WAITING, lambda: len(waiting))

    def spoke(self, waited: float) -> None:
        """A generation said its first token, so many seconds after it had arrived."""
        self.numbers.observe(FIRST_TOKEN, waited)

    def generated(self, sequence: SequenceId, request: str, why: str, tokens: int) -> None:
        """A generation finished."""
        self.numbers.add(GENERATIONS, value=why)
        if log.isEnabledFor(logging.DEBUG):
            log.debug(
                line(
                    "generation finished",
                    sequence=sequence,
                    request=request or "-",
                    reason=why,
                    tokens=tokens,
                )
            )

    def refused(
        self, sequence: SequenceId, request: str, error: RequestError, *, end: bool
    ) -> None:
        """A request is answered with an error; ``end`` where it was an END.

        An END that is refused for its position is passed over: it has freed the slot, and is how a client ends a sequence without a step.
        """
        if end and error.code is Code.POSITION:
            return
        self.numbers.add(REFUSED, value=error.code)
        if error.code is Code.ENGINE_FAILED:
            return  # `failed` has a line for all of them
        self._refusals.info(
            lambda: line(
                "request refused",
                sequence=sequence,
                request=request or "-",
                code=error.code,
                retryable=int(error.retryable),
                because=str(error),
            )
        )

    def stepped(self, seconds: float, rows: int, prefill: int, decode: int) -> None:
        """The engine ran a step of so many rows, which consumed so many tokens."""
        self.numbers.observe(STEP, seconds)
        self.numbers.observe(ROWS, rows)
        self.numbers.add(TOKENS, prefill, PREFILL)
        self.numbers.add(TOKENS, decode, DECODE)

    def failed(
        self, seconds: float, rows: Collection[tuple[SequenceId, str]], error: Exception
    ) -> None:
        """The engine raised in a step.

        Args:
            seconds: how long the step took.
            rows: the sequence and the request of each row.
            error: what it raised.
        """
        self.numbers.observe(STEP, seconds)
        self.numbers.observe(ROWS, len(rows))
        sequences, requests = [sequence for sequence, _ in rows], [request for _, request in rows]
        log.error(
            line("engine failed", rows=len(rows), sequences=sequences, requests=requests),
            exc_info=error,
        )
