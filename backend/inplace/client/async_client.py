"""The asyncio client: servers, sequences and generations.

Source of sync_client.py, which tools/unasync.py writes: edit this file, then run `make
sync-client`.
"""

import asyncio
import secrets
import time
from collections import abc
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from types import TracebackType
from typing import Self, TypeVar, Unpack

import numpy as np
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from inplace.client.connections import AsyncConnections, AsyncStream
from inplace.client.errors import (
    ClientError,
    RefusedError,
    SequenceLostError,
    UnreachableError,
    parse_error,
)
from inplace.client.generation_progress import REPLAY, GenerationProgress, Piece
from inplace.client.logprobs import PromptLogprob, TokenLogprob, keep_own_tokens
from inplace.client.replay import SequenceTracker
from inplace.client.requests import (
    Array,
    GenerationOptions,
    InferRequest,
    ModelMetadata,
    ParameterArgument,
    Segment,
    SequenceRequest,
    decode_outputs,
    decode_text,
    generation_request,
    join_outputs,
)
from inplace.client.servers import NO_RETRY, Retry, ServerList
from inplace.errors import Code
from inplace.protocol import FINISH_REASON, INPUT_IDS

Result = TypeVar("Result")


SERVER_FULL = (Code.NO_FREE_SLOT, Code.QUEUE_FULL)
"""Codes of a server that has no room for a sequence now; another one may have."""

END_ATTEMPTS, END_DELAY = 4, 1.0
"""How often the END of a sequence that may be stored is sent at most, or once to each server; and
the longest delay between two tries, in seconds."""


RELEASE_DELAY, MAX_TAKEN = 0.1, 16
"""Seconds that Triton is given to free a place after an END; and how many places of an instance
that has died a client takes at once. Each costs the second after which Triton gives it up."""


class AsyncClient:
    """Servers that serve the same models. For one event loop.

    New sequences are distributed round-robin, and move to another server where theirs is lost. The
    generations of one client are one ``group``: where they wait for slots, other clients wait no
    longer because of them.

    Args:
        servers: ``host:port`` of a gRPC endpoint, or several.
        retry: how often a request is sent again.
        connect: opens a connection to ``host:port``, for TLS or other channel options; plain text
            if None.

    Raises:
        ValueError: there is no server.
    """

    def __init__(
        self,
        servers: str | abc.Iterable[str],
        *,
        retry: Retry | None = None,
        connect: abc.Callable[[str], InferenceServerClient] | None = None,
    ) -> None:
        self.retry = retry or Retry()
        self._servers = ServerList([servers] if isinstance(servers, str) else list(servers))
        self._connections = AsyncConnections(connect)
        self._models: dict[str, ModelMetadata] = {}
        self._group = secrets.token_hex(8)

    @classmethod
    def _borrow(cls, connection: InferenceServerClient) -> "AsyncClient":
        """A client for one server over the caller's own connection; it has no retries."""
        client = cls("(your connection)", retry=NO_RETRY)
        client._connections = AsyncConnections(lambda url: connection, owned=False)
        return client

    def connection(self, server: str) -> InferenceServerClient:
        """The connection to a server, for other requests: health, statistics, model control."""
        return self._connections.get(server)

    async def model(self, server: str, name: str, timeout: float) -> ModelMetadata:
        """What the client needs of a model's configuration; requested once.

        Args:
            server: the server to ask.
            name: of the model.
            timeout: seconds.

        Raises:
            tritonclient.utils.InferenceServerException: the server has no such model, or does not
                answer.
        """
        if name not in self._models:
            response = await self.connection(server).get_model_config(name, client_timeout=timeout)
            self._models[name] = ModelMetadata.of(response.config)
        return self._models[name]

    async def close(self) -> None:
        """Close the connections.

        Sequences that are still open keep their slots until their idle timeout.
        """
        await self._connections.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


class AsyncSequence:
    """One sequence of a served model. Not safe for several tasks at a time.

    Its first request carries START; leaving the ``async with`` block frees its slot.

    Errors are `ClientError`, which is also tritonclient's InferenceServerException. A request whose
    error is ``retryable`` is sent again, as the client's `Retry` says. Where a server is lost, or
    has lost the sequence, the client sends all tokens again (and texts that were answered), to
    another server if there is one, and the sequence continues there.

    Args:
        client: the servers; or a connection of your own, over which nothing is sent again.
        model: name of the model.
        id: the correlation id, an integer from 1 to 2^63 - 1 or a string of at most 128 bytes
            without NUL; a random one if None.
        timeout: seconds to wait for one answer, or for the next response of a generation.
        key: the ``sequence_key``, without NUL bytes; a random one for each sequence if None. If it
            is empty there is none, and any client that knows the id can write to the sequence.
        replay: keep what was sent, to send it again after a loss.
        server: the one of the client's servers to begin at; the next in turn if None.

    Raises:
        ValueError: Triton would not take the id or the key as it is, or the client has no such
            server.
    """

    def __init__(
        self,
        client: AsyncClient | InferenceServerClient,
        model: str,
        id: int | str | None = None,
        timeout: float = 60.0,
        *,
        key: str | None = None,
        replay: bool = True,
        server: str | None = None,
    ) -> None:
        self.model, self.timeout = model, timeout
        self._client = client if isinstance(client, AsyncClient) else AsyncClient._borrow(client)
        self._tracker = SequenceTracker(id, key, replay, self._client._group)
        if server is not None and server not in self._client._servers.urls:
            raise ValueError(
                f"the client has no server {server!r}, only {', '.join(self._client._servers.urls)}"
            )
        self._server = server or self._client._servers.choose()
        self._stream: AsyncStream | None = None
        self._generation: AsyncGeneration | None = None  # the one that was iterated last

    @property
    def id(self) -> int | str:
        """The correlation id."""
        return self._tracker.sequence_id

    @property
    def key(self) -> str:
        """The ``sequence_key`` of this sequence's START."""
        return self._tracker.key

    @property
    def length(self) -> int | None:
        """Tokens (or entries) of the sequence.

        None after a prompt that was a text: only the server knows its number of tokens.
        """
        return self._tracker.length

    @property
    def server(self) -> str:
        """The server that holds the sequence, or will get its first request."""
        return self._server

    async def step(
        self,
        inputs: abc.Mapping[str, Array],
        *,
        end: bool = False,
        parameters: abc.Mapping[str, ParameterArgument] | None = None,
        outputs: tuple[str, ...] = (),
        request_id: str = "",
    ) -> dict[str, Array]:
        """Send the sequence's next inputs and return the outputs, by name and without a batch axis.

        Args:
            inputs: by name, without a batch axis.
            end: this is the sequence's last step.
            parameters: request parameters, for example ``{"temperature": 0.8}``.
            outputs: names of the requested outputs; all but ``logits`` if empty.
            request_id: for error texts and logs; a random one if empty.

        Raises:
            RefusedError: the server refused; the sequence is as it was before.
            SequenceLostError: the sequence is lost and cannot be replayed.
            UnreachableError: no server answered.
        """
        await self._cancel_unfinished()
        request = SequenceRequest(inputs, end, parameters or {}, outputs, request_id)
        return await self._retry(lambda: self._step(request))

    async def stream(
        self,
        inputs: abc.Mapping[str, Array],
        *,
        end: bool = False,
        parameters: abc.Mapping[str, ParameterArgument] | None = None,
        outputs: tuple[str, ...] = (),
        request_id: str = "",
    ) -> abc.AsyncIterator[dict[str, Array]]:
        """Send the next inputs to a model that streams; iterate over its responses as they come.

        Each has the next ``tokens`` and their ``text_output``. The last one has a
        ``finish_reason`` and the outputs that are not tokens. `step` returns all of them joined.

        Args:
            inputs, end, parameters, outputs, request_id: as for `step`.

        Raises:
            RefusedError, SequenceLostError, UnreachableError: as `step`.
            ValueError: the model answers a step with one response.
        """
        await self._cancel_unfinished()
        request = SequenceRequest(inputs, end, parameters or {}, outputs, request_id)
        model = await self._metadata()
        if not model.streams_steps:
            raise ValueError(f"model {self.model!r} answers a step with one response: use step()")
        sent, response = await self._retry(lambda: self._begin(request, model))
        finished = False
        try:
            while True:
                finished = bool(decode_text(response, FINISH_REASON))
                if finished:
                    self._tracker.answered(request, model)
                yield response
                if finished:
                    return
                response = await self._receive(sent, self.timeout, partial=True)
        finally:
            if not finished:
                self._tracker.interrupted(sent)

    async def _begin(
        self, request: SequenceRequest, model: ModelMetadata
    ) -> tuple[InferRequest, dict[str, Array]]:
        """Send a request, and wait for its first response."""
        sent = await self._replay(request, model)
        await self._send(sent, model)
        return sent, await self._receive(sent, self.timeout)

    async def tokens(
        self,
        ids: Array | abc.Sequence[int],
        *,
        end: bool = False,
        parameters: abc.Mapping[str, ParameterArgument] | None = None,
    ) -> int:
        """Send token ids to a decoder and return the next token; otherwise as `step`."""
        inputs = {INPUT_IDS: np.asarray(ids, dtype=np.int64)}
        outputs = await self.step(inputs, end=end, parameters=parameters, outputs=("next_token",))
        return int(outputs["next_token"][0])

    def generate(
        self,
        prompt: abc.Sequence[int] | Array | str,
        max_tokens: int,
        *,
        stop: abc.Sequence[str] = (),
        text: bool = True,
        end: bool = False,
        timeout: float | None = None,
        request_id: str = "",
        **options: Unpack[GenerationOptions],
    ) -> "AsyncGeneration":
        """Let a model that is served as a stream continue the sequence; iterate over the result.

        Args:
            prompt: what is new: token ids, or a text. No token ids continue a sequence from the
                last token of its last generation.
            max_tokens: maximum number of tokens to generate.
            stop: texts that end the generation; special tokens too.
            text: request text beside tokens; a model without a tokenizer has none.
            end: free the slot when the generation finishes.
            timeout: seconds without a response after which the server counts as lost; the
                sequence's own timeout if None.
            request_id: for error texts and logs; a random one if empty.
            options: how tokens are chosen and sent, see `GenerationOptions`.
        """
        request = generation_request(prompt, max_tokens, stop, text, end, request_id, options)
        return AsyncGeneration(self, request, self.timeout if timeout is None else timeout)

    async def fork(self, id: int | str | None = None) -> "AsyncSequence":
        """A sequence that begins as a copy of this one and goes on by itself.

        The server copies the states when the copy sends its first request, which carries the key
        of this sequence. If this one has had another request by then, or its server is lost, the
        copy is made by sending all tokens again. A generation of this sequence that was not read to
        its end is cancelled.

        Args:
            id: the correlation id of the copy; a random one if None.

        Raises:
            ValueError: this sequence has no key, or Triton would not take the id.
        """
        await self._cancel_unfinished()
        copied = AsyncSequence(self._client, self.model, timeout=self.timeout)
        copied._tracker, copied._server = self._tracker.fork(id), self._server
        return copied

    async def close(self) -> None:
        """End the sequence and free its slot.

        Raises nothing: a server that does not answer frees the slot at its idle timeout.
        """
        await self._cancel_unfinished()
        if self._tracker.needs_end:
            await self._end_anywhere()
        self._tracker.reset()
        await self._close_stream()

    async def _retry(self, operation: abc.Callable[[], abc.Awaitable[Result]]) -> Result:
        """Try until it succeeds. Tenacity is asked after failures only: it takes time."""
        begin = time.monotonic()
        first: ClientError | None = None
        try:
            return await operation()
        except ClientError as error:
            if not error.retryable:
                raise
            first = error
        async for attempt in self._client.retry.since(begin).async_retrying():
            with attempt:
                if first is not None:
                    failed, first = first, None
                    raise failed
                return await operation()
        raise AssertionError("tenacity returns or raises")

    @asynccontextmanager
    async def _map_errors(
        self, request: InferRequest | None, *, partial: bool = False
    ) -> abc.AsyncIterator[None]:
        """Turn what tritonclient raises inside into the error to raise, and update the tracker.

        Args:
            request: the request that was sent, if any.
            partial: it had responses before.
        """
        try:
            yield
        except ClientError:
            raise
        except InferenceServerException as error:
            server = self._server
            mapped = self._map_error(error, request, partial)
            if isinstance(mapped, UnreachableError):
                await self._close_stream(cancel=True)
            stays = request is not None and not request.end and self._server == server
            if mapped.process_died and stays:
                await self._release()
            raise mapped from None
        except BaseException:
            self._tracker.interrupted(request)
            raise

    def _map_error(
        self, error: InferenceServerException, request: InferRequest | None, partial: bool
    ) -> ClientError:
        """The error to raise; the sequence moves if its server is gone or full."""
        mapped = parse_error(error, self.id, request.request_id if request else "")
        if request is not None:
            mapped = self._tracker.failed(mapped, request, partial=partial)
        gone = isinstance(mapped, UnreachableError)
        if gone:
            self._client._servers.mark_failed(self._server)
        if gone or (mapped.code in SERVER_FULL and not self._tracker.live):
            self._move()
        return mapped

    async def _release(self) -> None:
        """Let Triton give the sequence to another instance: the process of its own has ended.

        Triton sends every START of an id to the same instance until an END, and then the next START
        to the free place with the lowest number, which is that instance's again. So STARTs of ids
        that nobody uses take places, until one was the dead instance's, where it stays, and one an
        other's, which it leaves.
        """
        with suppress(InferenceServerException):
            model = await self._client.model(self._server, self.model, self.timeout)
            await self._ask(self._tracker.release_request(model), model)
            await asyncio.sleep(RELEASE_DELAY)
            dead, ends = 0, list[InferRequest]()
            try:
                while dead + len(ends) < MAX_TAKEN and not (dead and ends):
                    start, end = self._tracker.stranger_requests(model)
                    ends.append(end)
                    error = await self._ask(start, model)
                    if error is not None and error.process_died:
                        ends.pop()
                        dead += 1
            finally:  # also where the caller is cancelled: the others' slots are freed
                for end in ends:
                    await self._ask(end, model)
        await self._close_stream()

    async def _ask(self, request: InferRequest, model: ModelMetadata) -> ClientError | None:
        """Send a request that is not part of the sequence; returns the error, if it has one."""
        try:
            if model.decoupled:
                if self._stream is None:
                    connections = self._client._connections
                    self._stream = connections.open_stream(self._server, request.headers)
                self._stream.send(request, self.model)
                await self._stream.receive(request, self.timeout)
            else:
                await self._client.connection(self._server).infer(
                    **request.arguments(self.model),
                    headers=request.headers,
                    client_timeout=self.timeout,
                )
        except InferenceServerException as error:
            return parse_error(error, request.sequence_id, request.request_id)
        return None

    def _move(self) -> None:
        if not self._tracker.movable:
            return
        server = self._client._servers.choose(avoid=self._server)
        if server != self._server:
            self._tracker.replay_next(restore=True)
            self._tracker.needs_end = self._tracker.may_restore
            self._server = server

    async def _metadata(self) -> ModelMetadata:
        async with self._map_errors(None):
            return await self._client.model(self._server, self.model, self.timeout)

    async def _step(self, request: SequenceRequest) -> dict[str, Array]:
        model = await self._metadata()
        outputs = await self._exchange(await self._replay(request, model), model)
        self._tracker.answered(request, model)
        return keep_own_tokens(outputs, request.num_ids)

    async def _replay(
        self,
        request: SequenceRequest,
        model: ModelMetadata,
        prefix: abc.Sequence[Segment] = (),
        num_fed: int = 0,
    ) -> InferRequest:
        """Send what the sequence needs before the request, and return the request itself."""
        *before, last = self._tracker.infer_requests(request, model, prefix, num_fed)
        for earlier in before:
            await self._exchange(earlier, model)
        return last

    async def _exchange(self, request: InferRequest, model: ModelMetadata) -> dict[str, Array]:
        """Send a request and return its outputs; of a generation, those of the first response."""
        if model.decoupled:
            await self._send(request, model)
            outputs = await self._receive(request, self.timeout)
            finished = not (model.streams_steps and FINISH_REASON in request.outputs)
            finished = finished or bool(decode_text(outputs, FINISH_REASON))
            while not finished:
                more = await self._receive(request, self.timeout, partial=True)
                outputs, finished = join_outputs(outputs, more)
            return outputs
        async with self._map_errors(request):
            connection = self._client.connection(self._server)
            self._tracker.sending(request, model)
            result = await connection.infer(
                **request.arguments(self.model),
                headers=request.headers,
                client_timeout=self.timeout,
            )
            return decode_outputs(result)

    async def _send(self, request: InferRequest, model: ModelMetadata) -> None:
        """Send a request over the sequence's stream."""
        async with self._map_errors(request):
            if self._stream is None:
                self._stream = self._client._connections.open_stream(self._server, request.headers)
            self._tracker.sending(request, model)
            self._stream.send(request, self.model)

    async def _receive(
        self, request: InferRequest, timeout: float, *, partial: bool = False
    ) -> dict[str, Array]:
        """Return the outputs of the next response over the sequence's stream."""
        async with self._map_errors(request, partial=partial):
            assert self._stream is not None
            return await self._stream.receive(request, timeout)

    async def _end(self) -> None:
        """Free what the server may hold for the sequence; a running generation finishes."""
        model = await self._metadata()
        for _ in range(2):
            request = self._tracker.end_request(model)
            try:
                await self._exchange(request, model)
            except (RefusedError, SequenceLostError) as error:  # expected, see `end_request`
                forgotten = not error.from_backend and error.retryable and not request.start
                if forgotten:  # Triton has passed nothing on: the next one has START
                    continue
            break
        self._tracker.needs_end = False

    async def _end_anywhere(self) -> None:
        """Free what a server may hold for the sequence.

        If it is gone, another one deletes what is stored of the sequence: the next of the list, or
        the one that a router chooses.
        """
        retry, servers = self._client.retry, self._client._servers.urls
        attempts = max(len(servers), min(END_ATTEMPTS, retry.attempts))
        retry = replace(retry, attempts=attempts, max_delay=END_DELAY)
        with suppress(InferenceServerException):  # nothing more can be done
            async for attempt in retry.async_retrying():
                with attempt:
                    try:
                        await self._end()
                    except UnreachableError as error:  # `_map_error` has chosen another server
                        error.retryable = self._tracker.may_restore
                        raise

    async def _cancel(self, progress: GenerationProgress) -> None:
        """Cancel a running generation; what it has generated stays part of the sequence."""
        try:
            await self._end()
        except InferenceServerException:
            await self._close_stream(cancel=True)
        await self._finish(progress)

    async def _finish(self, progress: GenerationProgress) -> None:
        """Add a generation that has finished to the sequence."""
        ended = progress.finish_reason in ("cancelled", "ended")
        if progress.tokens or not ended:
            self._tracker.answered(progress.request, await self._metadata(), progress.tokens)
        if ended:
            self._tracker.replay_next()

    async def _close_stream(self, *, cancel: bool = False) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            await stream.close(cancel=cancel)

    async def _cancel_unfinished(self, next: "AsyncGeneration | None" = None) -> None:
        """Cancel the generation that was iterated last, unless it has finished or is ``next``."""
        last, self._generation = self._generation, next
        if last is not None and last is not next:
            await last.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


class AsyncGeneration:
    """A generation: an asynchronous iterator of `Piece`, made by `AsyncSequence.generate`.

    The request is sent when the first piece is asked for. Where the server is lost, the rest comes
    from another one, without repetition. Leaving the ``async with`` block cancels a generation that
    still runs.

    Args:
        sequence: the sequence that it continues.
        request: the generation.
        timeout: seconds without a response after which the server counts as lost.

    Raises:
        ClientError: while iterating; see `AsyncSequence`.
    """

    def __init__(self, sequence: AsyncSequence, request: SequenceRequest, timeout: float) -> None:
        self.timeout = timeout
        self._sequence = sequence
        self._progress = GenerationProgress(request)
        self._in_flight: InferRequest | None = None

    @property
    def tokens(self) -> list[int]:
        """All tokens so far."""
        return list(self._progress.tokens)

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """The log-probability of each token so far; empty unless they were asked for."""
        return list(self._progress.logprobs)

    @property
    def prompt_logprobs(self) -> list[PromptLogprob]:
        """The log-probability of each token of the prompt, once the first token is there.

        Empty unless they were asked for.
        """
        return list(self._progress.prompt_logprobs)

    @property
    def reused_tokens(self) -> int:
        """Tokens of the prompt that were not computed, once it has finished.

        See `prefix_reuse` in docs/operations.md.
        """
        return self._progress.reused_tokens

    @property
    def text(self) -> str:
        """All text so far."""
        return self._progress.text

    @property
    def finish_reason(self) -> str:
        """Why it finished, see `Piece`; empty while it runs."""
        return self._progress.finish_reason

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        if self.finish_reason:
            raise StopAsyncIteration
        await self._sequence._cancel_unfinished(self)
        while True:
            piece = await self._sequence._retry(self._next_piece)
            # a piece of a replay may have nothing new
            if piece.tokens or piece.text or piece.finish_reason:
                return piece

    async def close(self) -> None:
        """Cancel it if it still runs.

        What it has generated stays part of the sequence, which can continue.
        """
        if not self.finish_reason:
            self._progress.finish_reason = "cancelled"
            if self._in_flight is not None:
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

    async def _next_piece(self) -> Piece:
        sequence, progress = self._sequence, self._progress
        try:
            if self._in_flight is None:
                model = await sequence._metadata()
                self._check_generates(model)
                prefix, request = progress.begin(restores=sequence._tracker.restores)
                self._in_flight = await sequence._replay(request, model, prefix, progress.num_fed)
                await sequence._send(self._in_flight, model)
            outputs = await sequence._receive(
                self._in_flight, self.timeout, partial=progress.partial
            )
            piece = progress.add_response(outputs)
        except ClientError as error:
            if error.code == REPLAY:
                sequence._tracker.replay_next()
            self._in_flight = None
            raise
        if piece.finish_reason:
            self._in_flight = None
            await sequence._finish(progress)
        return piece

    def _check_generates(self, model: ModelMetadata) -> None:
        """Raise the error of a model that is served step by step."""
        if model.decoupled:
            return
        text = (
            f"model {self._sequence.model!r} is served step by step and generates nothing: "
            "build it with --serve stream, or step it with tokens()"
        )
        raise RefusedError(
            InferenceServerException(text),
            code=Code.BAD_PARAMETER,
            reason=text,
            retryable=False,
            sequence=self._sequence.id,
            request="",
        )
