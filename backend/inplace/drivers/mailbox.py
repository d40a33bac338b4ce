"""A generation whose responses are fetched: each request for them has one response."""

import logging
import threading
from collections.abc import Iterable

from inplace.drivers.job import Job
from inplace.drivers.reply import Channel, Last, Reply, give_up
from inplace.errors import Code, RequestError
from inplace.sequences import Sequence
from inplace.text import Detokenizer
from inplace.wire import FETCH

log = logging.getLogger("inplace")


class Mailbox(Reply):
    """What a generation says, kept until somebody fetches it.

    For requests that are made from within the server (BLS), as the front makes them. Where such a request has several responses, Triton's
    Python backend stands still for good as soon as one thread wakes for a response while another is handed the first of its own: the
    former keeps the iterator's lock and waits for Python's, the latter has Python's and waits for the map of iterators, which the thread
    that brings the next response keeps while it waits for the iterator's (24.10, ``ResponseIterator::Next``, ``GetResponseIterator``,
    ``ProcessBLSResponseDecoupled``). With one response a request nobody ever waits in an iterator.

    Args:
        channel: of the request that began the generation; it has the first response.
        interval: fewest tokens of a response.
        detokenizer: as `Reply`'s.
    """

    __slots__ = ("_fetching", "_lock", "_queued")

    def __init__(self, channel: Channel, interval: int = 1, detokenizer: Detokenizer | None = None) -> None:
        super().__init__(channel, interval, detokenizer)
        self._lock = threading.Lock()
        self._fetching: Channel | None = channel
        self._queued = False

    def fetch(self, channel: Channel) -> bool:
        """Answer this request next. True: the mailbox must be queued for a sender now.

        Raises:
            RequestError: everything was said, or another request is waiting for more.
        """
        with self._lock:
            if self.done:
                raise _nothing_to_fetch()
            if self._fetching is not None:
                raise RequestError(
                    Code.QUEUE_FULL, "another request is fetching what the generation says; wait for its response", retryable=True
                )
            self._fetching = self._channel = channel
            return self._due()

    def say(self, token: int, text: str | None) -> bool:
        """See `Reply.say`."""
        with self._lock:
            self._said.append((token, text))
            return self._due()

    def finish(self, last: Last) -> bool:
        """See `Reply.finish`."""
        with self._lock:
            self._last = last
            return self._due()

    def send(self) -> bool:
        """Answer who is fetching, with all that is there."""
        with self._lock:
            channel, self._fetching, self._queued = self._fetching, None, False
            last, said = self._last, list(self._said)
            self._said.clear()
            self.done = last is not None
        assert channel is not None
        try:
            if last is not None and isinstance(last.what, RequestError):
                channel.refuse(last.what)
            else:
                channel.send(self._outputs(said, last), final=True)
        except Exception as error:  # the others must still be served
            log.exception("a response could not be sent")
            give_up(channel, error)
        return False

    def cancelled(self) -> bool:
        """Never: cancellation does not reach requests that a backend makes. Who fetches ends the sequence."""
        return False

    def _due(self) -> bool:
        ready = self._last is not None or len(self._said) >= self._interval
        due = ready and self._fetching is not None and not self._queued
        self._queued = self._queued or due
        return due


def mailbox_of(job: Job, under_way: Iterable[Job], live: Sequence | None) -> Mailbox:
    """The mailbox that a request may fetch from: of a generation that is under way, or of the last one.

    Args:
        job: the request.
        under_way: what is under way of its sequence.
        live: the sequence, where it has a slot.

    Raises:
        RequestError: SEQUENCE_KEY or UNKNOWN_SEQUENCE.
    """
    generation = next((other for other in under_way if isinstance(other.reply, Mailbox)), None)
    if live is not None:
        live.check_key(job.checked.key, start=False)
    elif generation is None or generation.checked.key != job.checked.key:  # it waits for a slot: others do not learn of it
        raise _nothing_to_fetch()
    found = generation.reply if generation is not None else live.rest if live is not None else None
    if not isinstance(found, Mailbox):
        raise _nothing_to_fetch()
    return found


def _nothing_to_fetch() -> RequestError:
    return RequestError(Code.UNKNOWN_SEQUENCE, f"the sequence says nothing that could be fetched; begin a generation with {FETCH!r}")
