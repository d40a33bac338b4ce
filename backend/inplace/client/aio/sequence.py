"""Sequences of an asyncio client."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self, TypeVar, Unpack

import numpy as np
from tritonclient.utils import InferenceServerException

from inplace.client.aio.client import Client
from inplace.client.aio.stream import Stream
from inplace.client.base import GenerationBase, Options, SequenceBase, check_streams, generation
from inplace.client.calls import Array, InferRequest, ModelMetadata, Parameter, outputs_of
from inplace.client.errors import ClientError, RefusedError, SequenceLostError, UnreachableError
from inplace.client.ledger import Ledger
from inplace.client.progress import REPLAY, Piece, Progress
from inplace.client.want import Part, Want
from inplace.protocol import INPUT_IDS

Result = TypeVar("Result")


class Sequence(SequenceBase):
    """One sequence of a served model; see `inplace.client.SequenceState`. For one task at a time.

    Args:
        client: the servers.
        model: name of the model.
        id: the correlation id, an integer above 0 or a text; a random one if None.
        timeout: seconds to wait for one answer, or for the next response of a generation.
        key: the ``sequence_key``; a random one for each sequence if None; none if empty, then whoever knows the id may write to it.
        replay: keep what was sent, to send it again after a loss.
    """

    def __init__(
        self,
        client: Client,
        model: str,
        id: int | str | None = None,
        timeout: float = 60.0,
        *,
        key: str | None = None,
        replay: bool = True,
    ) -> None:
        super().__init__(client.endpoints, model, timeout, Ledger(id, key, replay))
        self._client = client
        self._stream: Stream | None = None
        self._running: Generation | None = None

    async def step(
        self,
        inputs: Mapping[str, Array],
        *,
        end: bool = False,
        parameters: Mapping[str, Parameter] | None = None,
        outputs: tuple[str, ...] = (),
        request_id: str = "",
    ) -> dict[str, Array]:
        """Send the sequence's next inputs and wait for what the model says; see `inplace.client.SequenceState.step`."""
        await self._settle()
        want = Want(inputs, end, parameters or {}, outputs, request_id)
        return await self._retried(lambda: self._step(want))

    async def tokens(
        self,
        ids: Array | SequenceOf[int],
        *,
        end: bool = False,
        parameters: Mapping[str, Parameter] | None = None,
    ) -> int:
        """Send token ids to a decoder and return the next token it says."""
        inputs = {INPUT_IDS: np.asarray(ids, dtype=np.int64)}
        answer = await self.step(inputs, end=end, parameters=parameters, outputs=("next_token",))
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
        """Have a ``stream`` model continue the sequence by itself; iterate over what is returned. See the synchronous one."""
        want = generation(prompt, max_tokens, stop, text, end, request_id, options)
        return Generation(self, want, self.timeout if timeout is None else timeout)

    async def close(self) -> None:
        """End the sequence and free its slot. Raises nothing: a server that does not answer frees it when it was idle for too long."""
        await self._settle()
        if self._ledger.held:
            with suppress(InferenceServerException):  # no server answers
                await self._end()
        self._ledger.begin()
        await self._hang_up()

    async def _retried(self, request: Callable[[], Awaitable[Result]]) -> Result:
        async for attempt in self._client.retry.retrying_async():
            with attempt:
                try:
                    return await request()
                except UnreachableError:
                    await self._hang_up()
                    raise
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
            raise self._judged(error, call, spoke=progress is not None and progress.spoke) from None
        except asyncio.CancelledError:
            self._ledger.interrupted(call)
            raise

    async def _known(self) -> ModelMetadata:
        with self._judging(None):
            return await self._client.model(self._server, self.model, self.timeout)

    async def _step(self, want: Want) -> dict[str, Array]:
        model = await self._known()
        answer = await self._exchange(await self._replayed(want, model), model)
        self._ledger.accepted(want, model)
        return answer

    async def _replayed(
        self, want: Want, model: ModelMetadata, past: SequenceOf[Part] = ()
    ) -> InferRequest:
        """Send what must go before; returns the request that is left."""
        *before, last = self._ledger.calls(want, model, past)
        for call in before:
            await self._exchange(call, model)
        return last

    async def _exchange(self, call: InferRequest, model: ModelMetadata) -> dict[str, Array]:
        """Send a request and wait for its first response."""
        if model.streams:
            self._send(call, model)
            return await self._receive(call, self.timeout)
        with self._judging(call):
            connection = self._client.connection(self._server)
            self._ledger.sent(call, model)
            return outputs_of(
                await connection.infer(
                    **call.arguments(self.model), headers=call.headers, client_timeout=self.timeout
                )
            )

    def _send(self, call: InferRequest, model: ModelMetadata) -> None:
        if self._stream is None:
            self._stream = Stream(self._client.connection(self._server), call.headers)
        self._ledger.sent(call, model)
        self._stream.send(call, self.model)

    async def _receive(
        self, call: InferRequest, timeout: float, progress: Progress | None = None
    ) -> dict[str, Array]:
        with self._judging(call, progress):
            assert self._stream is not None
            return await self._stream.receive(call, timeout)

    async def _end(self) -> None:
        """Free what the server may hold; a running generation finishes."""
        model = await self._known()
        with suppress(RefusedError, SequenceLostError):  # as it is meant to be
            await self._exchange(self._ledger.ending(model), model)
        self._ledger.held = False

    async def _cancel(self, progress: Progress) -> None:
        try:
            await self._end()
        except InferenceServerException:
            await self._hang_up()
        await self._finished(progress)

    async def _finished(self, progress: Progress) -> None:
        over = progress.finish_reason in ("cancelled", "ended")
        if progress.tokens or not over:
            self._ledger.accepted(progress.asked, await self._known(), progress.tokens)
        if over:
            self._ledger.forget()

    async def _hang_up(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            await stream.close()

    async def _settle(self, next: "Generation | None" = None) -> None:
        """Let go of a generation that was not iterated to its end."""
        running, self._running = self._running, next
        if running is not None and running is not next:
            await running.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


class Generation(GenerationBase):
    """What a model says, piece by piece: an asynchronous iterator, made by `Sequence.generate`; see `inplace.client.GenerationState`.

    A task that is cancelled while it waits for a piece loses none: ask again, or close.

    Args:
        sequence: whose it is.
        want: what was asked.
        timeout: seconds without a response after which the server counts as gone.
    """

    def __init__(self, sequence: Sequence, want: Want, timeout: float) -> None:
        super().__init__(want, timeout)
        self._sequence = sequence

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        if self.finish_reason:
            raise StopAsyncIteration
        await self._sequence._settle(self)
        while True:
            piece = await self._sequence._retried(self._piece)
            if piece.tokens or piece.text or piece.finish_reason:  # not one that only repeats
                return piece

    async def close(self) -> None:
        """Cancel it, if it still runs; what was said stays said. The sequence may go on."""
        if not self.finish_reason:
            self._progress.finish_reason = "cancelled"
            if self._call is not None:
                await self._sequence._cancel(self._progress)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _piece(self) -> Piece:
        sequence, progress = self._sequence, self._progress
        model = await sequence._known()
        check_streams(sequence, model)
        try:
            if self._call is None:
                past, want = progress.begin()
                self._call = await sequence._replayed(want, model, past)
                sequence._send(self._call, model)
            outputs = await sequence._receive(self._call, self.timeout, progress)
            piece = progress.take(outputs)
        except ClientError as error:
            if error.code == REPLAY:
                sequence._ledger.forget()
            self._call = None
            raise
        if piece.finish_reason:
            self._call = None
            await sequence._finished(progress)
        return piece
