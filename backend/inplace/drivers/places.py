"""The places that Triton keeps for the sequences of this process, and the thread that frees them.

Triton gives a sequence a place at its START and takes it back at its END, or when the sequence has
been idle for ``max_sequence_idle_microseconds``. It has ``max_candidate_sequences`` of them; when
all are taken, a START waits in Triton without an answer. Triton does not learn that the backend has
ended a sequence (cancelled, idle, refused, failed), so the backend sends the END itself.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from time import monotonic
from typing import Protocol

from inplace.drivers.shutdown import Shutdown
from inplace.errors import Code, RequestError
from inplace.runtime.slots import EndReason, SequenceId, SequenceState

END_DELAY = 0.05
"""Seconds for which a place must be unused before it is freed. A client that was refused may send
its START again at once; an END that crosses it would take its place away."""


STEP_END_DELAY = 1.0
"""The same for a model whose requests wait in Triton while a step runs."""


RETRY_DELAY = 1.0
"""Seconds until an END of ours that could not be sent is tried again."""


CLOSE_TIMEOUT = 1.0
"""Seconds that the thread is waited for when the model is unloaded."""


PROBE_INTERVAL = 0.25
"""Seconds between two questions whether the server is stopping, while there is a sequence."""


log = logging.getLogger("inplace")


class ServerStoppingError(Exception):
    """The server takes no more requests from its models: it has begun to stop."""


class PlaceRequests(Protocol):
    """Sends requests without inputs of interest to this process's own model."""

    def end(self, sequence_id: SequenceId) -> bool:
        """Send an END; returns whether Triton knew the sequence."""

    def start(self, sequence_id: SequenceId) -> None:
        """Send a START."""

    def check_serving(self) -> None:
        """Raise `ServerStoppingError` if the server is stopping."""


@dataclass(slots=True)
class _Place:
    """A sequence that has a place, or requests here.

    Attributes:
        is_open: Triton has a place for it.
        pending: its requests without a final response.
        live: it owns a slot.
        unused_since: when it was last used, in seconds of the clock.
        last_arrival: when its last request arrived.
        ending: an END of ours is on its way.
        restarted: a START of a client has arrived since that END was sent.
        reopening: a START of ours is to be sent.
    """

    is_open: bool = False
    pending: int = 0
    live: bool = False
    unused_since: float = 0.0
    last_arrival: float = 0.0
    ending: bool = False
    restarted: bool = False
    reopening: bool = False

    @property
    def unused(self) -> bool:
        """Whether nothing here needs the place."""
        return self.is_open and not self.pending and not self.live and not self.ending


class Places:
    """Counts the open places, refuses a START near their limit, and says which are unused.

    Thread-safe. It observes the slot table (`SlotObserver`).

    Args:
        limit: ``max_candidate_sequences``; None if places are not limited.
        clock: monotonic seconds.
        end_delay: seconds for which a place must be unused before it is freed; longer than a
            request may wait in Triton.
        idle_timeout: seconds without a request after which Triton frees a place itself
            (``max_sequence_idle_microseconds``).

    Attributes:
        end_delay: as above.
        changed: notified when a place has become unused or open.
    """

    def __init__(
        self,
        limit: int | None,
        clock: Callable[[], float] = monotonic,
        end_delay: float = END_DELAY,
        idle_timeout: float = inf,
    ) -> None:
        self.limit, self.end_delay = limit, end_delay
        self._idle_timeout = idle_timeout
        # A START without a place waits in Triton unseen, so the last places are left for ENDs.
        self._gate = max(1, limit - min(64, max(1, limit // 8))) if limit is not None else None
        self._clock = clock
        self._places: dict[SequenceId, _Place] = {}
        self._num_open = 0
        self._unnamed: deque[float] = deque()  # when Triton forgets sequences without a name
        self._unused: deque[tuple[float, SequenceId]] = deque()
        self._reopen: deque[SequenceId] = deque()
        self._lock = threading.Lock()
        self.changed = threading.Condition(self._lock)

    def __len__(self) -> int:
        """The number of open places."""
        return self._num_open + len(self._unnamed)

    # Requests of clients

    def arrived(self, sequence_id: SequenceId, *, start: bool, end: bool) -> RequestError | None:
        """A request of a client has arrived from Triton. Each needs a call of `answered`.

        Returns:
            QUEUE_FULL for a START that must be refused, because too many places are open.
        """
        with self._lock:
            place = self._places.get(sequence_id)
            if place is None:
                place = self._places[sequence_id] = _Place()
                if len(self._places) == 1:
                    self.changed.notify()
            place.pending += 1
            place.last_arrival = self._clock()
            opens = not end and not place.is_open
            self._forget_unnamed()
            full = start and opens and self._gate is not None and len(self) >= self._gate
            self._set_open(place, not end)
            place.restarted |= start and not end
        if not full:
            return None
        return RequestError(
            Code.QUEUE_FULL,
            f"{self._gate} sequences have a place in the server, which has {self.limit}; send it"
            f" again later",
            retryable=True,
        )

    def unnamed_arrived(self) -> None:
        """A START has arrived whose id is not UTF-8, as HTTP allows.

        No request can name such a sequence, so its place stays open until Triton forgets it.
        """
        with self._lock:
            self._forget_unnamed()
            self._unnamed.append(self._clock() + self._idle_timeout)

    def _forget_unnamed(self) -> None:
        while self._unnamed and self._unnamed[0] <= self._clock():
            self._unnamed.popleft()

    def answered(self, sequence_id: SequenceId) -> None:
        """A request that had arrived has its final response."""
        with self._lock:
            place = self._places[sequence_id]
            place.pending -= 1
            if place.live and not (place.is_open or place.pending):
                self._reopen_place(sequence_id, place)  # an END was refused, of another client
            self._check_unused(sequence_id, place)

    # Slots

    def sequence_started(self, sequence: SequenceState) -> None:
        """A sequence was given a slot."""
        with self._lock:
            self._places.setdefault(sequence.id, _Place()).live = True

    def sequence_ended(self, sequence: SequenceState, reason: EndReason) -> None:
        """A sequence gave its slot back."""
        with self._lock:
            place = self._places[sequence.id]
            place.live = False
            self._check_unused(sequence.id, place)

    # Requests of our own

    def pop_unused(self) -> SequenceId | None:
        """A sequence whose place has been unused for `end_delay`; the caller sends its END."""
        with self._lock:
            now = self._clock()
            while self._unused and self._unused[0][0] + self.end_delay <= now:
                since, sequence_id = self._unused.popleft()
                place = self._places.get(sequence_id)
                if place is not None and place.unused and place.unused_since == since:
                    place.ending, place.restarted = True, False
                    return sequence_id
        return None

    def pop_reopened(self) -> SequenceId | None:
        """A sequence that lives and has lost its place; the caller sends a START for it."""
        with self._lock:
            while self._reopen:
                sequence_id = self._reopen.popleft()
                place = self._places.get(sequence_id)
                if place is not None and place.reopening:
                    place.reopening = False
                    if not place.is_open:
                        return sequence_id
        return None

    def own_end_arrived(self, sequence_id: SequenceId) -> None:
        """Our own END has arrived from Triton, which has closed the place."""
        with self._lock:
            place = self._places.get(sequence_id)
            if place is None:
                return
            if place.is_open and place.restarted:
                # A START overtook the END: its sequence has lost its place.
                self._reopen_place(sequence_id, place)
            self._set_open(place, False)
            place.ending = False
            self._check_unused(sequence_id, place)

    def own_start_arrived(self, sequence_id: SequenceId) -> None:
        """Our own START has arrived from Triton, which has opened a place."""
        with self._lock:
            place = self._places.setdefault(sequence_id, _Place())
            place.last_arrival, place.reopening = self._clock(), False
            self._set_open(place, True)
            self._check_unused(sequence_id, place)

    def end_finished(
        self, sequence_id: SequenceId, *, was_known: bool, retry: bool = False
    ) -> None:
        """Our own END was answered, or could not be sent and is tried again later."""
        with self._lock:
            place = self._places.get(sequence_id)
            if place is None or not place.ending:
                return
            place.ending = False
            idle = self._clock() - place.last_arrival
            if (not was_known and not place.restarted) or (retry and idle > self._idle_timeout):
                self._set_open(place, False)  # Triton has forgotten the sequence
            self._check_unused(sequence_id, place, RETRY_DELAY if retry else 0.0)

    @property
    def in_use(self) -> bool:
        """Whether a sequence has a place, a slot or a request without a final response."""
        return bool(self._places)

    def wait(self, timeout: float) -> None:
        """Wait until a place may be unused; at most ``timeout`` seconds if there is a sequence."""
        with self._lock:
            if self._reopen:
                return
            if self._unused:
                timeout = min(timeout, self._unused[0][0] + self.end_delay - self._clock())
            if timeout > 0:
                self.changed.wait(timeout if self._places else None)

    def _reopen_place(self, sequence_id: SequenceId, place: _Place) -> None:
        if not place.reopening:
            place.reopening = True
            self._reopen.append(sequence_id)
            self.changed.notify()

    def _set_open(self, place: _Place, is_open: bool) -> None:
        self._num_open += is_open - place.is_open
        place.is_open = is_open

    def _check_unused(self, sequence_id: SequenceId, place: _Place, delay: float = 0.0) -> None:
        """Note a place that has become unused, and forget a sequence without one."""
        if place.unused:
            place.unused_since = self._clock() + delay
            self._unused.append((place.unused_since, sequence_id))
            self.changed.notify()
        elif not (place.is_open or place.pending or place.live or place.ending):
            del self._places[sequence_id]


class PlaceKeeper:
    """The thread that frees unused places, and runs the shutdown once the server is stopping.

    Args:
        places: the places.
        requests: sends our own requests.
        shutdown: ends the sequences that are still live.
    """

    def __init__(self, places: Places, requests: PlaceRequests, shutdown: Shutdown) -> None:
        self._places, self._requests, self._shutdown = places, requests, shutdown
        self._closed, self._reachable = False, True
        self._thread = threading.Thread(target=self._run, name="inplace-places", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread. Places that are open stay open.

        A request that the server does not answer holds up nothing: the thread is left behind.
        """
        with self._places.changed:
            self._closed = True
            self._places.changed.notify()
        self._thread.join(CLOSE_TIMEOUT)

    def _run(self) -> None:
        next_probe = 0.0
        while not self._closed:
            try:
                # First: a shutdown must not wait for ENDs that cannot be sent.
                if self._places.in_use and monotonic() >= next_probe:
                    next_probe = monotonic() + PROBE_INTERVAL
                    self._probe()
                self._free_unused()
            except Exception:  # a defect: places stay open meanwhile
                log.exception("the thread that frees places failed")
            if not self._closed:
                self._places.wait(PROBE_INTERVAL)

    def _free_unused(self) -> None:
        while not self._closed and (unused := self._places.pop_unused()) is not None:
            was_known, retry = True, False
            try:
                was_known = self._requests.end(unused)
            except Exception as error:  # of the server, or of the way to it
                retry = True
                level = logging.WARNING if self._reachable else logging.DEBUG  # logged already
                log.log(
                    level, "no END could be sent for sequence %r, it is retried: %s", unused, error
                )
            finally:
                self._places.end_finished(unused, was_known=was_known, retry=retry)
            if retry:
                break  # the way is blocked for the others too, and a shutdown must go on
        while (lost := self._places.pop_reopened()) is not None:
            log.debug("the place of sequence %r is opened again", lost)
            try:
                self._requests.start(lost)
            except Exception as error:
                log.warning("the place of sequence %r could not be opened again: %s", lost, error)

    def _probe(self) -> None:
        if not self._shutdown.has_begun:
            try:
                self._requests.check_serving()
                self._reachable = True
            except ServerStoppingError:
                self._places.end_delay = 0.0  # few clients START any more
                self._shutdown.begin()
            except Exception as error:  # of the way to the server
                if self._reachable:
                    log.warning("the server cannot be asked whether it is stopping: %s", error)
                self._reachable = False
        if self._shutdown.has_begun:
            self._shutdown.advance()
