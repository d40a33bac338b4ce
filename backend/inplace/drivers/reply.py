"""The way back of one request on a stream: responses in order, a final one on every path, and nothing after it.

A generation whose responses are fetched: each request for them has one response.
"""

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from inplace.drivers.generation import FinishReason
from inplace.drivers.text import Detokenizer
from inplace.errors import Code, RequestError
from inplace.protocol import FETCH, FINISH_REASON, TEXT_OUTPUT, TOKENS

Outputs = Mapping[str, Tensor | str]
"""Outputs by name, ``[1, ...]``; a text is a BYTES tensor ``[1, 1]``."""


log = logging.getLogger("inplace")


class Channel(Protocol):
    """What a server gives to answer one request with.

    Attributes:
        wanted: names of the outputs that the client asked for.
    """

    wanted: frozenset[str]

    def send(self, outputs: Outputs, *, final: bool) -> None:
        """Send a response."""

    def refuse(self, error: RequestError) -> None:
        """Send an error as the final response."""

    def cancelled(self) -> bool:
        """Whether the client has cancelled the request or gone away. Must not be called after the final response."""


@dataclass(frozen=True, slots=True)
class FinalResponse:
    """How a request ends.

    Attributes:
        what: why a generation finished; an error; or the outputs of a step.
        rest: text that no token brings.
    """

    what: FinishReason | RequestError | Outputs
    rest: str = ""


class Reply:
    """The responses of one request. One thread puts in what there is to say, a sender's thread takes out all that is there.

    Args:
        channel: how to send.
        interval: fewest tokens of a response.
        detokenizer: makes the text that tokens add; None where nobody wants it or it comes with the tokens.

    Attributes:
        done: the final response was sent.
    """

    __slots__ = (
        "_border",
        "_broken",
        "_channel",
        "_detokenizer",
        "_interval",
        "_last",
        "_said",
        "_turn",
        "done",
    )

    def __init__(
        self, channel: Channel, interval: int = 1, detokenizer: Detokenizer | None = None
    ) -> None:
        self._channel = channel
        self._interval = interval
        self._detokenizer = detokenizer
        self._said: deque[tuple[int, str | None]] = deque()
        self._last: FinalResponse | None = None
        self._turn = (
            threading.Lock()
        )  # held from when it is queued for a sender until that sender has sent
        self._border = (
            threading.Lock()
        )  # the final response and `cancelled` exclude each other: asking after it ends the server
        self._broken = False  # a response could not be sent, so that was its end
        self.done = False

    @property
    def channel(self) -> Channel:
        """How it is sent."""
        return self._channel

    def say(self, token: int, text: str | None) -> bool:
        """Add a token, and the text it adds, None where the detokenizer knows. True: the reply must be queued for a sender now."""
        self._said.append((token, text))
        return len(self._said) >= self._interval and self._turn.acquire(blocking=False)

    def finish(self, last: FinalResponse) -> bool:
        """Say how it ends. True: it must be queued for a sender now."""
        self._last = last
        return self._turn.acquire(blocking=False)

    def send(self) -> bool:
        """Send all that is there, in one response. True: there is more by now, queue it again. Only by who holds its turn."""
        last = self._last  # read before the tokens: everything that was said before it is there
        said = [self._said.popleft() for _ in range(len(self._said))]
        try:
            self._respond(last, said)
        except Exception as error:  # the others must still be served
            log.exception("a response could not be sent")
            self._give_up(error)
        self._turn.release()
        more = not self.done and (self._last is not None or len(self._said) >= self._interval)
        return more and self._turn.acquire(blocking=False)

    def cancelled(self) -> bool:
        """Whether nobody listens any more: the client has cancelled, or could not be answered. False after the final response."""
        with self._border:
            return self._broken or (not self.done and self._channel.cancelled())

    def _respond(self, last: FinalResponse | None, said: list[tuple[int, str | None]]) -> None:
        if self.done or (last is None and not said):
            return
        if last is None:
            self._channel.send(self._outputs(said, None), final=False)
            return
        what = last.what
        outputs = (
            what
            if isinstance(what, Mapping)
            else None
            if isinstance(what, RequestError)
            else self._outputs(said, last)
        )
        with self._border:
            try:
                if isinstance(what, RequestError):
                    self._channel.refuse(what)
                elif outputs is not None:
                    self._channel.send(outputs, final=True)
            except Exception as error:  # it must have a final response: the client waits for one
                log.exception("a final response could not be sent")
                self._fail(error)
            finally:
                self.done = True

    def _give_up(self, error: Exception) -> None:
        with self._border:
            if not self.done:
                self._fail(error)
                self._broken = self.done = True

    def _fail(self, error: Exception) -> None:
        give_up(self._channel, error)

    def _outputs(self, said: list[tuple[int, str | None]], last: FinalResponse | None) -> Outputs:
        wanted = self._channel.wanted
        outputs: dict[str, Tensor | str] = {}
        tokens = [token for token, _ in said]
        if TOKENS in wanted:
            outputs[TOKENS] = torch.tensor([tokens], dtype=torch.int64)
        if TEXT_OUTPUT in wanted:
            text = "".join(text for _, text in said if text)
            if self._detokenizer is not None:
                text += self._detokenizer.add([token for token, text in said if text is None])
            outputs[TEXT_OUTPUT] = text if last is None else text + last.rest
        if FINISH_REASON in wanted:
            outputs[FINISH_REASON] = "" if last is None else str(last.what)
        return outputs


def give_up(channel: Channel, error: Exception) -> None:
    """Refuse a request whose response could not be made."""
    with contextlib.suppress(
        Exception
    ):  # a server takes nothing for a request that it has given up
        channel.refuse(
            RequestError(
                Code.ENGINE_FAILED,
                f"a response could not be made ({type(error).__name__}: {error})",
            )
        )


class BufferedReply(Reply):
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

    def __init__(
        self, channel: Channel, interval: int = 1, detokenizer: Detokenizer | None = None
    ) -> None:
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
                    Code.QUEUE_FULL,
                    "another request is fetching what the generation says; wait for its response",
                    retryable=True,
                )
            self._fetching = self._channel = channel
            return self._due()

    def say(self, token: int, text: str | None) -> bool:
        """See `Reply.say`."""
        with self._lock:
            self._said.append((token, text))
            return self._due()

    def finish(self, last: FinalResponse) -> bool:
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


def _nothing_to_fetch() -> RequestError:
    return RequestError(
        Code.UNKNOWN_SEQUENCE,
        f"the sequence says nothing that could be fetched; begin a generation with {FETCH!r}",
    )
