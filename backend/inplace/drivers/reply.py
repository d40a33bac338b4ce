"""The responses of one stream request: in order, with exactly one final response at the end.

`Reply` streams them through the request's own channel. `BufferedReply` keeps the tokens of a
generation until a request fetches them, so that each request has one response.
"""

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Protocol

import torch
from torch import Tensor

from inplace.drivers.detokenizer import Detokenizer
from inplace.drivers.generation import FinishReason
from inplace.errors import Code, RequestError
from inplace.protocol import (
    FETCH,
    FINISH_REASON,
    REUSED_TOKENS,
    TEXT_OUTPUT,
    TOKEN_LOGPROBS,
    TOKENS,
    TOP_LOGPROBS,
    TOP_TOKENS,
)

Outputs = Mapping[str, Tensor | str]
"""Outputs by name: tensors ``[1, ...]``; a text is a BYTES tensor ``[1, 1]``."""


StepRow = tuple[Mapping[str, Tensor], int]
"""The outputs of a step for all rows, and a row."""


NewToken = tuple[int, str | None, StepRow | None]
"""A token and the text that it adds, None if the reply's detokenizer makes the text; and where its
log-probabilities are, None where the reply has none."""


Piece = NewToken | Mapping[str, list[int]]
"""What is added to a reply: a token, or tokens by the name of the output."""


log = logging.getLogger("inplace")


class Channel(Protocol):
    """Sends the responses of one request; the server provides it.

    Attributes:
        requested_outputs: names of the outputs that the client asked for.
    """

    requested_outputs: frozenset[str]

    def send(self, outputs: Outputs, *, final: bool) -> None:
        """Send a response."""

    def send_error(self, error: RequestError) -> None:
        """Send an error as the final response."""

    def is_cancelled(self) -> bool:
        """Whether the client has cancelled the request or gone away.

        Must not be called after the final response.
        """


@dataclass(frozen=True, slots=True)
class FinalResponse:
    """How a request ends.

    Attributes:
        result: why a generation or a schedule finished; or an error; or the outputs of a step.
        text: text of a generation that no token adds.
        outputs: of a schedule, all but its tokens.
    """

    result: FinishReason | RequestError | Outputs
    text: str = ""
    outputs: Outputs = field(default_factory=dict)


class Reply:
    """The responses of one request.

    One thread adds tokens and finishes it. Sender threads send all that has been added; the reply
    is in their queue, or with one of them, at most once.

    Args:
        channel: sends the responses.
        stream_interval: fewest tokens of a response, except the last.
        detokenizer: makes the text of the tokens; None if no text is requested or every token
            comes with its text.
        logprobs: how many of the most likely tokens are sent with each token; None for no
            log-probabilities.

    Attributes:
        channel: sends the responses.
        finished: the final response has been sent.
        prompt_outputs: what the response with the first token has of the prompt. Set before that
            token is added.
        num_reused_tokens: tokens of its prompt that were not computed; set when it is admitted.
    """

    __slots__ = (
        "_detokenizer",
        "_enqueued",
        "_final",
        "_final_lock",
        "_logprobs",
        "_send_failed",
        "_stream_interval",
        "_tokens",
        "channel",
        "finished",
        "num_reused_tokens",
        "prompt_outputs",
    )

    def __init__(
        self,
        channel: Channel,
        stream_interval: int = 1,
        detokenizer: Detokenizer | None = None,
        logprobs: int | None = None,
    ) -> None:
        self.channel = channel
        self._logprobs = logprobs
        self._stream_interval = stream_interval
        self._detokenizer = detokenizer
        self._tokens: deque[Any] = deque()  # of `Piece`, all of one kind
        self._final: FinalResponse | None = None
        # Locked from when the reply is enqueued until its sender has sent.
        self._enqueued = threading.Lock()
        # Excludes `is_cancelled` from the final response: asking after it ends the server.
        self._final_lock = threading.Lock()
        self._send_failed = False
        self.finished = False
        self.prompt_outputs: Outputs = {}
        self.num_reused_tokens = 0

    def continue_text(self, prompt: list[int]) -> None:
        """Let the text go on behind these tokens; before the first token is added."""
        if self._detokenizer is not None:
            self._detokenizer = self._detokenizer.after(prompt)

    def add(self, piece: Piece) -> bool:
        """Add a token, or tokens.

        Returns:
            Whether the caller must enqueue the reply for a sender.
        """
        self._tokens.append(piece)
        return len(self._tokens) >= self._stream_interval and self._try_enqueue()

    def finish(self, final: FinalResponse) -> bool:
        """Set the final response.

        Returns:
            Whether the caller must enqueue the reply for a sender.
        """
        self._final = final
        return self._try_enqueue()

    def send(self) -> bool:
        """Send all that has been added in one response. Only for the sender that dequeued it.

        Returns:
            Whether more has been added since and the caller must enqueue the reply again.
        """
        final = self._final  # read before the tokens: all tokens come before the final response
        tokens = [self._tokens.popleft() for _ in range(len(self._tokens))]
        try:
            self._send(tokens, final)
        except Exception as error:  # the other replies must still be sent
            log.exception("a response could not be sent")
            self._fail(error)
        self._enqueued.release()
        ready = self._final is not None or len(self._tokens) >= self._stream_interval
        return not self.finished and ready and self._try_enqueue()

    def is_cancelled(self) -> bool:
        """Whether the client is gone: it has cancelled, or a response could not be sent.

        False after the final response.
        """
        with self._final_lock:
            return self._send_failed or (not self.finished and self.channel.is_cancelled())

    def _try_enqueue(self) -> bool:
        return self._enqueued.acquire(blocking=False)

    def _send(self, tokens: list[Any], final: FinalResponse | None) -> None:
        if self.finished or (final is None and not tokens):
            return
        answer = self._make_answer(tokens, final)
        if final is None:
            _send_answer(self.channel, answer, final=False)
            return
        with self._final_lock:
            try:
                _send_answer(self.channel, answer, final=True)
            except Exception as error:  # the client waits for a final response, so it gets an error
                log.exception("a final response could not be sent")
                _send_failure(self.channel, error)
            finally:
                self.finished = True

    def _fail(self, error: Exception) -> None:
        with self._final_lock:
            if not self.finished:
                _send_failure(self.channel, error)
                self._send_failed = self.finished = True

    def _make_answer(
        self, tokens: list[Any], final: FinalResponse | None
    ) -> Outputs | RequestError:
        requested = self.channel.requested_outputs
        outputs: dict[str, Tensor | str] = {}
        if final is None or isinstance(final.result, FinishReason):
            outputs = self._outputs(tokens, final)
            if FINISH_REASON in requested:
                outputs[FINISH_REASON] = "" if final is None else str(final.result)
        elif isinstance(final.result, RequestError) or not final.result:
            return final.result
        else:
            outputs |= final.result
        if final is not None and REUSED_TOKENS in requested:
            outputs[REUSED_TOKENS] = torch.tensor([[self.num_reused_tokens]])
        return outputs

    def _outputs(self, tokens: list[Any], final: FinalResponse | None) -> dict[str, Tensor | str]:
        """The outputs of a response with these tokens, but for the reason why it is the last."""
        requested = self.channel.requested_outputs
        outputs: dict[str, Tensor | str] = {}
        if tokens and self.prompt_outputs:
            outputs |= self.prompt_outputs
            self.prompt_outputs = {}
        if TOKENS in requested:
            outputs[TOKENS] = torch.tensor([[token for token, *_ in tokens]], dtype=torch.int64)
        if self._logprobs is not None:
            outputs |= _logprob_outputs([place for *_, place in tokens], self._logprobs)
        if TEXT_OUTPUT in requested:
            text = "".join(text for _, text, _ in tokens if text)
            if self._detokenizer is not None:
                added = [token for token, text, _ in tokens if text is None]
                text += self._detokenizer.append(added)
                text += "" if final is None else self._detokenizer.flush()
            outputs[TEXT_OUTPUT] = text if final is None else text + final.text
        return outputs


class ScheduleReply(Reply):
    """The responses of a schedule: tokens as its calls produce them, other outputs at the end.

    Args:
        channel: sends the responses.
        token_outputs: names of the outputs of the role ``tokens``.
        text_from: the one of them whose tokens are text.
        make_detokenizer: makes what makes that text, from the tokens before; None if no text is
            requested.
        ends: it is the last request of its sequence, so an incomplete character is sent too.

    Attributes:
        context: the last tokens of the text before it. Set before the first token is added.
    """

    __slots__ = ("_ends", "_make_detokenizer", "_token_outputs", "context", "text_from")

    def __init__(
        self,
        channel: Channel,
        token_outputs: tuple[str, ...],
        text_from: str,
        make_detokenizer: Callable[[list[int]], Detokenizer] | None,
        *,
        ends: bool,
    ) -> None:
        super().__init__(channel)
        self._token_outputs, self.text_from = token_outputs, text_from
        self._make_detokenizer, self._ends = make_detokenizer, ends
        self.context: list[int] = []

    def _outputs(self, tokens: list[Any], final: FinalResponse | None) -> dict[str, Tensor | str]:
        requested = self.channel.requested_outputs
        joined: dict[str, list[int]] = {name: [] for name in self._token_outputs}
        for piece in tokens:
            for name, part in piece.items():
                joined[name] += part
        outputs: dict[str, Tensor | str] = {
            name: torch.tensor([part], dtype=torch.int64)
            for name, part in joined.items()
            if name in requested
        }
        if self._make_detokenizer is not None:
            outputs[TEXT_OUTPUT] = self._text(joined[self.text_from], final)
        return outputs if final is None else {**outputs, **final.outputs}

    def _text(self, tokens: list[int], final: FinalResponse | None) -> str:
        assert self._make_detokenizer is not None
        if self._detokenizer is None:
            self._detokenizer = self._make_detokenizer(self.context)
        text = self._detokenizer.append(tokens)
        return text + self._detokenizer.flush() if final is not None and self._ends else text


def _logprob_outputs(places: Sequence[StepRow | None], count: int) -> dict[str, Tensor]:
    """The log-probabilities of tokens: ``[1, tokens]`` and ``[1, tokens, count]``.

    Args:
        places: where those of each token are.
        count: how many of the most likely tokens are asked for.
    """
    rows = [place for place in places if place is not None]
    chosen = [outputs[TOKEN_LOGPROBS][row] for outputs, row in rows]
    answer = {TOKEN_LOGPROBS: torch.cat([torch.zeros(0), *chosen])[None]}
    if count:
        for name, dtype in ((TOP_LOGPROBS, torch.float32), (TOP_TOKENS, torch.int64)):
            top = [outputs[name][row : row + 1, :count] for outputs, row in rows]
            answer[name] = torch.cat([torch.zeros((0, count), dtype=dtype), *top])[None]
    return answer


class BufferedReply(Reply):
    """The tokens of a generation, kept until a request fetches them.

    For requests that are made inside the server (BLS), as the generate proxy makes them. If such a
    request has several responses, Triton's Python backend deadlocks (24.10) when one thread wakes
    for a response while another is handed the first response of its own request: the first keeps
    the lock of its iterator and waits for the GIL; the second has the GIL and waits for the map of
    iterators, which the thread that brings the next response keeps while it waits for the iterator
    (``ResponseIterator::Next``, ``GetResponseIterator``, ``ProcessBLSResponseDecoupled``). With one
    response a request, no thread waits in an iterator.

    Args:
        channel: of the request that began the generation; it has the first response.
        stream_interval: fewest tokens of a response, except the last.
        detokenizer, logprobs: as in `Reply`.
    """

    __slots__ = ("_fetched_at", "_fetching", "_is_enqueued", "_lock")

    def __init__(
        self,
        channel: Channel,
        stream_interval: int = 1,
        detokenizer: Detokenizer | None = None,
        logprobs: int | None = None,
    ) -> None:
        super().__init__(channel, stream_interval, detokenizer, logprobs)
        self._lock = threading.Lock()
        self._fetching: Channel | None = channel
        self._fetched_at = 0.0
        self._is_enqueued = False

    def copy(self) -> None:
        """A copy of the sequence has nothing to fetch."""

    def fetch(self, channel: Channel) -> bool:
        """Answer this request next.

        Returns:
            Whether the caller must enqueue the reply for a sender.

        Raises:
            RequestError: UNKNOWN_SEQUENCE, the final response has been sent; QUEUE_FULL, another
                request is fetching.
        """
        with self._lock:
            if self.finished:
                raise nothing_to_fetch()
            if self._fetching is not None:
                raise RequestError(
                    Code.QUEUE_FULL,
                    "another request is fetching tokens of this generation; wait for its response",
                    retryable=True,
                )
            self._fetching = self.channel = channel
            return self._enqueue_if_ready()

    def add(self, piece: Piece) -> bool:
        """Add a token; returns whether the caller must enqueue the reply for a sender."""
        with self._lock:
            self._tokens.append(piece)
            return self._enqueue_if_ready()

    def finish(self, final: FinalResponse) -> bool:
        """Set the final response; returns whether the caller must enqueue the reply."""
        with self._lock:
            self._final = final
            return self._enqueue_if_ready()

    def send(self) -> bool:
        """Answer the request that fetches with all that has been added; returns False."""
        with self._lock:
            channel, self._fetching, self._is_enqueued = self._fetching, None, False
            self._fetched_at = monotonic()
            final, tokens = self._final, list(self._tokens)
            self._tokens.clear()
            self.finished = final is not None
        assert channel is not None
        try:
            _send_answer(channel, self._make_answer(tokens, final), final=True)
        except Exception as error:  # the other replies must still be sent
            log.exception("a response could not be sent")
            _send_failure(channel, error)
        return False

    def is_cancelled(self) -> bool:
        """False: cancellation does not reach BLS requests. Their client ends the sequence."""
        return False

    def unfetched_for(self, seconds: float) -> bool:
        """Whether no request has fetched for so many seconds."""
        with self._lock:
            return self._fetching is None and monotonic() - self._fetched_at >= seconds

    def _enqueue_if_ready(self) -> bool:
        ready = self._final is not None or len(self._tokens) >= self._stream_interval
        enqueue = ready and self._fetching is not None and not self._is_enqueued
        self._is_enqueued = self._is_enqueued or enqueue
        return enqueue


def nothing_to_fetch() -> RequestError:
    """The error of a request that fetches from a sequence without a buffered generation."""
    return RequestError(
        Code.UNKNOWN_SEQUENCE,
        f"the sequence has nothing that could be fetched; begin a generation with {FETCH!r}",
    )


def _send_answer(channel: Channel, answer: Outputs | RequestError, *, final: bool) -> None:
    if isinstance(answer, RequestError):
        channel.send_error(answer)
    else:
        channel.send(answer, final=final)


def _send_failure(channel: Channel, error: Exception) -> None:
    """Answer a request whose response could not be sent."""
    text = f"a response could not be made ({type(error).__name__}: {error})"
    with contextlib.suppress(Exception):  # the server may have dropped the request already
        channel.send_error(RequestError(Code.ENGINE_FAILED, text))
