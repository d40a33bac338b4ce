"""Sequences of a synchronous client."""

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self, TypeVar, Unpack

import numpy as np
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from inplace.client.base import GenerationBase, Options, SequenceBase, check_streams, generation
from inplace.client.calls import Array, InferRequest, ModelMetadata, Parameter, outputs_of
from inplace.client.client import Borrowed, Client
from inplace.client.errors import ClientError, RefusedError, SequenceLostError, UnreachableError
from inplace.client.ledger import Ledger
from inplace.client.progress import REPLAY, Piece, Progress
from inplace.client.stream import Stream
from inplace.client.want import Part, Want
from inplace.protocol import INPUT_IDS

Result = TypeVar("Result")


class Sequence(SequenceBase):
    """One sequence of a served model. Its first request carries START; leaving the ``with`` block frees its slot. Not thread-safe.

    What the server refuses raises `RefusedError`; it and the others (`ClientError`) are also tritonclient's InferenceServerException.
    Errors that say ``retryable`` are tried again as the client's `Retry` says. Where a server is gone or has lost the sequence, and what
    was sent were tokens (or texts that were answered), they are sent again, to another server if there is one, and the sequence goes on.

    Args:
        client: the servers; or a connection of your own, on which nothing is tried again.
        model: name of the model.
        id: the correlation id, an integer above 0 or a text; a random one if None.
        timeout: seconds to wait for one answer, or for the next response of a generation.
        key: the ``sequence_key``; a random one for each sequence if None; none if empty, then whoever knows the id may write to it.
        replay: keep what was sent, to send it again after a loss.
    """

    def __init__(
        self,
        client: Client | InferenceServerClient,
        model: str,
        id: int | str | None = None,
        timeout: float = 60.0,
        *,
        key: str | None = None,
        replay: bool = True,
    ) -> None:
        self._client = client if isinstance(client, Client) else Borrowed(client)
        super().__init__(self._client.endpoints, model, timeout, Ledger(id, key, replay))
        self._stream: Stream | None = None
        self._running: Generation | None = None

    def step(
        self,
        inputs: Mapping[str, Array],
        *,
        end: bool = False,
        parameters: Mapping[str, Parameter] | None = None,
        outputs: tuple[str, ...] = (),
        request_id: str = "",
    ) -> dict[str, Array]:
        """Send the sequence's next inputs and wait for what the model says.

        Args:
            inputs: by name, without a batch axis.
            end: this is the sequence's last step.
            parameters: custom parameters, for example ``{"logits": True}``.
            outputs: names of the outputs wanted; all if empty.
            request_id: for error texts and logs; a random one if empty.

        Returns:
            The outputs by name, without a batch axis.

        Raises:
            RefusedError: the server refused; the sequence is as it was before.
            SequenceLostError: the sequence is gone and cannot be replayed.
            UnreachableError: no server answered.
        """
        self._settle()
        return self._retried(
            lambda: self._step(Want(inputs, end, parameters or {}, outputs, request_id))
        )

    def tokens(
        self,
        ids: Array | SequenceOf[int],
        *,
        end: bool = False,
        parameters: Mapping[str, Parameter] | None = None,
    ) -> int:
        """Send token ids to a decoder and return the next token it says."""
        answer = self.step(
            {INPUT_IDS: np.asarray(ids, dtype=np.int64)},
            end=end,
            parameters=parameters,
            outputs=("next_token",),
        )
        return int(answer["next_token"][0])

    def generate(
        self,
        prompt: SequenceOf[int] | Array | str,
        max_tokens: int,
        *,
        stop: SequenceOf[str] = (),
        text: bool = True,
        end: bool = False,
        timeout: float | None = None,
        request_id: str = "",
        **options: Unpack[Options],
    ) -> "Generation":
        """Have a ``stream`` model continue the sequence by itself; iterate over what is returned.

        Args:
            prompt: what is new: token ids, or a text.
            max_tokens: tokens to say at most.
            stop: texts that end it.
            text: whether text is wanted beside tokens; there is none from a model without a tokenizer.
            end: free the slot when it finishes.
            timeout: seconds without a response after which the server counts as gone; the sequence's own if None.
            request_id: for error texts and logs; a random one if empty.
            options: how tokens are chosen and sent, see `Options`.
        """
        want = generation(prompt, max_tokens, stop, text, end, request_id, options)
        return Generation(self, want, self.timeout if timeout is None else timeout)

    def close(self) -> None:
        """End the sequence and free its slot. Raises nothing: a server that does not answer frees it when it was idle for too long."""
        self._settle()
        if self._ledger.held:
            with suppress(InferenceServerException):  # no server answers
                self._end()
        self._ledger.begin()
        self._hang_up()

    def _retried(self, request: Callable[[], Result]) -> Result:
        for attempt in self._client.retry.retrying():
            with attempt:
                return request()
        raise AssertionError("tenacity returns or raises")

    @contextmanager
    def _judging(
        self, call: InferRequest | None, progress: Progress | None = None
    ) -> Iterator[None]:
        """What tritonclient raises inside becomes the error to raise."""
        try:
            yield
        except ClientError:
            raise
        except InferenceServerException as error:
            typed = self._judged(error, call, spoke=progress is not None and progress.spoke)
            if isinstance(typed, UnreachableError):
                self._hang_up(hung=True)  # without waiting for what may never come
            raise typed from None
        except BaseException:
            self._ledger.interrupted(call)
            raise

    def _known(self) -> ModelMetadata:
        with self._judging(None):
            return self._client.model(self._server, self.model, self.timeout)

    def _step(self, want: Want) -> dict[str, Array]:
        model = self._known()
        answer = self._exchange(self._replayed(want, model), model)
        self._ledger.accepted(want, model)
        return answer

    def _replayed(
        self, want: Want, model: ModelMetadata, past: SequenceOf[Part] = ()
    ) -> InferRequest:
        """Send what must go before; returns the request that is left."""
        *before, last = self._ledger.calls(want, model, past)
        for call in before:
            self._exchange(call, model)
        return last

    def _exchange(self, call: InferRequest, model: ModelMetadata) -> dict[str, Array]:
        """Send a request and wait for its first response."""
        if model.streams:
            self._send(call, model)
            return self._receive(call, self.timeout)
        with self._judging(call):
            connection = self._client.connection(self._server)
            self._ledger.sent(call, model)
            return outputs_of(
                connection.infer(
                    **call.arguments(self.model), headers=call.headers, client_timeout=self.timeout
                )
            )

    def _send(self, call: InferRequest, model: ModelMetadata) -> None:
        with self._judging(call):
            if self._stream is None:
                self._stream = self._client.stream(self._server, call.headers)
            self._ledger.sent(call, model)
            self._stream.send(call, self.model)

    def _receive(
        self, call: InferRequest, timeout: float, progress: Progress | None = None
    ) -> dict[str, Array]:
        with self._judging(call, progress):
            assert self._stream is not None
            return self._stream.receive(call, timeout)

    def _end(self) -> None:
        """Free what the server may hold; a running generation finishes."""
        model = self._known()
        with suppress(RefusedError, SequenceLostError):  # as it is meant to be
            self._exchange(self._ledger.ending(model), model)
        self._ledger.held = False

    def _cancel(self, progress: Progress) -> None:
        try:
            self._end()
        except InferenceServerException:
            self._hang_up(hung=True)
        self._finished(progress)

    def _finished(self, progress: Progress) -> None:
        over = progress.finish_reason in ("cancelled", "ended")
        if progress.tokens or not over:
            self._ledger.accepted(progress.asked, self._known(), progress.tokens)
        if over:
            self._ledger.forget()

    def _hang_up(self, *, hung: bool = False) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close(cancel=hung)

    def _settle(self, next: "Generation | None" = None) -> None:
        """Let go of a generation that was not iterated to its end."""
        running, self._running = self._running, next
        if running is not None and running is not next:
            running.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Generation(GenerationBase):
    """What a model says, piece by piece: an iterator, made by `Sequence.generate`. Leaving its ``with`` block cancels what still runs.

    The first piece that is asked for sends the request. Where the server is lost, the rest comes from another one, and nothing twice.

    Attributes:
        tokens, text: all that was said so far.
        finish_reason: why it ended; empty while it runs.

    Raises:
        ClientError: while iterating; see `Sequence`.
    """

    def __init__(self, sequence: Sequence, want: Want, timeout: float) -> None:
        super().__init__(want, timeout)
        self._sequence = sequence

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        if self.finish_reason:
            raise StopIteration
        self._sequence._settle(self)
        while True:
            piece = self._sequence._retried(self._piece)
            if piece.tokens or piece.text or piece.finish_reason:  # not one that only repeats
                return piece

    def close(self) -> None:
        """Cancel it, if it still runs; what was said stays said. The sequence may go on."""
        if not self.finish_reason:
            self._progress.finish_reason = "cancelled"
            if self._call is not None:
                self._sequence._cancel(self._progress)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _piece(self) -> Piece:
        sequence, progress = self._sequence, self._progress
        model = sequence._known()
        check_streams(sequence, model)
        try:
            if self._call is None:
                past, want = progress.begin()
                self._call = sequence._replayed(want, model, past)
                sequence._send(self._call, model)
            outputs = sequence._receive(self._call, self.timeout, progress)
            piece = progress.take(outputs)
        except ClientError as error:
            if error.code == REPLAY:
                sequence._ledger.forget()
            self._call = None
            raise
        if piece.finish_reason:
            self._call = None
            sequence._finished(progress)
        return piece
