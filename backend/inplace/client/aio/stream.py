"""A gRPC stream of requests and responses, as an asyncio client uses it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from inplace.client.calls import Array, InferRequest, outputs_of
from inplace.client.errors import concerns, silent


class Stream:
    """One gRPC stream of one sequence. What arrives is kept until it is asked for: a caller that is cancelled loses nothing.

    Args:
        connection: to the server.
        headers: to begin with.
    """

    def __init__(self, connection: InferenceServerClient, headers: dict[str, str]) -> None:
        self._requests: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._answers: asyncio.Queue[tuple[Any, InferenceServerException | None]] = asyncio.Queue()
        self._responses = connection.stream_infer(self._sent(), headers=headers)
        self._reader = asyncio.create_task(self._read())

    def send(self, call: InferRequest, model: str) -> None:
        """Put a request on its way."""
        self._requests.put_nowait(call.arguments(model))

    async def receive(self, call: InferRequest, timeout: float) -> dict[str, Array]:
        """The outputs of the next response to a request; those to earlier ones are dropped.

        Raises:
            tritonclient.utils.InferenceServerException: an error came, the stream broke, or nothing came for ``timeout`` seconds.
        """
        while True:
            try:
                async with asyncio.timeout(timeout):
                    result, error = await self._answers.get()
            except TimeoutError:
                raise silent(timeout) from None
            if error is not None and concerns(error, call.request):
                raise error
            if result is not None and result.get_response().id == call.request:
                return outputs_of(result)

    async def close(self) -> None:
        """Close it; the server cancels what is still to come."""
        self._requests.put_nowait(None)
        self._responses.cancel()
        self._reader.cancel()
        await asyncio.wait([self._reader])

    async def _sent(self) -> AsyncIterator[dict[str, Any]]:
        while (request := await self._requests.get()) is not None:
            yield request

    async def _read(self) -> None:
        ended = InferenceServerException(
            "the stream was closed here, or a request could not be sent",
            str(grpc.StatusCode.CANCELLED),
        )
        try:
            async for answer in self._responses:
                self._answers.put_nowait(answer)
            ended = InferenceServerException(
                "the server closed the stream", str(grpc.StatusCode.UNAVAILABLE)
            )
        except grpc.RpcError as error:
            ended = InferenceServerException(error.details(), str(error.code()))
        finally:  # whoever waits must hear of it
            self._answers.put_nowait((None, ended))
