"""gRPC connections and streams, over tritonclient's two interfaces.

The streams of the two differ: tritonclient's synchronous stream calls back from a thread of its
own, and a connection has only one; an asyncio connection has any number. So this module has both by
hand.
"""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from tritonclient.grpc import InferenceServerClient, InferResult
from tritonclient.grpc import aio as grpc_aio
from tritonclient.utils import InferenceServerException

from inplace.client.errors import may_answer, response_timeout
from inplace.client.requests import Array, InferRequest, decode_outputs

CHANNEL_ARGUMENTS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
]
"""Reconnect to a restarted server within two seconds; gRPC's default is up to two minutes."""


class Connections:
    """Connections to several servers, opened at first use. Thread-safe.

    Args:
        connect: opens a connection to ``host:port``; in plain text if None.
        owned: `close` closes them. False for a connection of the caller's own, which then has the
            only stream there is.
    """

    def __init__(
        self, connect: Callable[[str], InferenceServerClient] | None, *, owned: bool = True
    ) -> None:
        self._connect = connect or (
            lambda url: InferenceServerClient(url, channel_args=CHANNEL_ARGUMENTS)
        )
        self._owned = owned
        self._open: dict[str, InferenceServerClient] = {}
        self._lock = threading.Lock()

    def get(self, server: str) -> InferenceServerClient:
        """The connection to a server."""
        with self._lock:
            if server not in self._open:
                self._open[server] = self._connect(server)
            return self._open[server]

    def open_stream(self, server: str, headers: dict[str, str]) -> "Stream":
        """A stream to a server, over a connection of its own unless that is the caller's."""
        connection = self._connect(server) if self._owned else self.get(server)
        return Stream(connection, headers, owns_connection=self._owned)

    def close(self) -> None:
        """Close the connections."""
        with self._lock:
            while self._open:
                _, connection = self._open.popitem()
                if self._owned:
                    connection.close()


class Stream:
    """A gRPC stream of one sequence. Errors may have no request id, so sequences do not share one.

    Args:
        connection: has no stream yet.
        headers: gRPC metadata.
        owns_connection: close the connection with the stream.
    """

    def __init__(
        self, connection: InferenceServerClient, headers: dict[str, str], *, owns_connection: bool
    ) -> None:
        self._responses: queue.SimpleQueue[
            tuple[InferResult | None, InferenceServerException | None]
        ] = queue.SimpleQueue()
        self._connection, self._owns_connection = connection, owns_connection
        connection.start_stream(
            lambda result, error: self._responses.put((result, error)), headers=headers
        )

    def send(self, request: InferRequest, model: str) -> None:
        """Send a request.

        Raises:
            tritonclient.utils.InferenceServerException: the stream has broken.
        """
        try:
            self._connection.async_stream_infer(**request.arguments(model))
        except InferenceServerException as error:  # without a status
            if "stream" not in (error.message() or "").lower():
                raise  # the request itself is wrong
            raise InferenceServerException(error.message(), "StatusCode.UNAVAILABLE") from error

    def receive(self, request: InferRequest, timeout: float) -> dict[str, Array]:
        """The outputs of the next response to a request; responses to earlier requests are dropped.

        Raises:
            tritonclient.utils.InferenceServerException: an error, a broken stream, or no response
                for ``timeout`` seconds.
        """
        while True:
            try:
                result, error = self._responses.get(timeout=timeout)
            except queue.Empty:
                raise response_timeout(timeout) from None
            if error is not None and may_answer(error, request.request_id):
                raise error
            if result is not None and result.get_response().id == request.request_id:
                return decode_outputs(result)

    def close(self, *, cancel: bool) -> None:
        """Close it.

        Args:
            cancel: do not wait for responses that are still to come. tritonclient then leaves a
                thread behind, so this is for servers that do not answer.
        """
        self._connection.stop_stream(cancel_requests=cancel)
        if self._owns_connection:
            self._connection.close()


class AsyncConnections:
    """Connections to several servers, opened at first use, for one event loop.

    Args:
        connect: opens a connection to ``host:port``; in plain text if None.
        owned: `close` closes them. False for a connection of the caller's own.
    """

    def __init__(
        self,
        connect: Callable[[str], grpc_aio.InferenceServerClient] | None,
        *,
        owned: bool = True,
    ) -> None:
        self._connect = connect or (
            lambda url: grpc_aio.InferenceServerClient(url, channel_args=CHANNEL_ARGUMENTS)
        )
        self._owned = owned
        self._open: dict[str, grpc_aio.InferenceServerClient] = {}

    def get(self, server: str) -> grpc_aio.InferenceServerClient:
        """The connection to a server."""
        if server not in self._open:
            self._open[server] = self._connect(server)
        return self._open[server]

    def open_stream(self, server: str, headers: dict[str, str]) -> "AsyncStream":
        """A stream to a server; all streams share the server's connection."""
        return AsyncStream(self.get(server), headers)

    async def close(self) -> None:
        """Close the connections."""
        while self._open:
            _, connection = self._open.popitem()
            if self._owned:
                await connection.close()


class AsyncStream:
    """A gRPC stream of one sequence.

    Responses are kept until they are asked for: a caller that is cancelled while it waits loses
        none.

    Args:
        connection: to the server.
        headers: gRPC metadata.
    """

    def __init__(self, connection: grpc_aio.InferenceServerClient, headers: dict[str, str]) -> None:
        self._requests: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._responses: asyncio.Queue[tuple[Any, InferenceServerException | None]] = (
            asyncio.Queue()
        )
        self._call = connection.stream_infer(self._queued_requests(), headers=headers)
        self._reader = asyncio.create_task(self._read())

    def send(self, request: InferRequest, model: str) -> None:
        """Send a request."""
        self._requests.put_nowait(request.arguments(model))

    async def receive(self, request: InferRequest, timeout: float) -> dict[str, Array]:
        """The outputs of the next response to a request; responses to earlier requests are dropped.

        Raises:
            tritonclient.utils.InferenceServerException: an error, a broken stream, or no response
                for ``timeout`` seconds.
        """
        while True:
            try:
                result, error = self._responses.get_nowait()
            except asyncio.QueueEmpty:
                result, error = await self._next_response(timeout)
            if error is not None and may_answer(error, request.request_id):
                raise error
            if result is not None and result.get_response().id == request.request_id:
                return decode_outputs(result)

    async def _next_response(self, timeout: float) -> tuple[Any, InferenceServerException | None]:
        try:
            async with asyncio.timeout(timeout):
                return await self._responses.get()
        except TimeoutError:
            raise response_timeout(timeout) from None

    async def close(self, *, cancel: bool) -> None:
        """Close it; the server cancels what is still to come.

        Args:
            cancel: as in `Stream.close`; no difference here, since an asyncio stream never waits.
        """
        self._requests.put_nowait(None)
        self._call.cancel()
        self._reader.cancel()
        await asyncio.wait([self._reader])

    async def _queued_requests(self) -> AsyncIterator[dict[str, Any]]:
        while (request := await self._requests.get()) is not None:
            yield request

    async def _read(self) -> None:
        ended = InferenceServerException(
            "the client closed the stream, or could not send a request",
            str(grpc.StatusCode.CANCELLED),
        )
        try:
            async for response in self._call:
                self._responses.put_nowait(response)
            ended = InferenceServerException(
                "the server closed the stream", str(grpc.StatusCode.UNAVAILABLE)
            )
        except grpc.RpcError as error:
            ended = InferenceServerException(error.details(), str(error.code()))
        finally:  # a caller that waits must get an error
            self._responses.put_nowait((None, ended))
