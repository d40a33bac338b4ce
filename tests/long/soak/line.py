"""One client's connection: a gRPC stream, one request of it under way at a time."""

from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc
import numpy as np
from fuzz.wire import Message, message, outputs
from inplace.parameters import Parameter
from tritonclient.grpc import service_pb2_grpc


class RefusedError(Exception):
    """The server answered with an error."""


class LostError(Exception):
    """The stream ended without an answer."""


class Line:
    """A stream to the server. `drop` is what a client's death looks like.

    Args:
        url: the server's gRPC endpoint.
        model: whom to talk to.
    """

    def __init__(self, url: str, model: str) -> None:
        self.model = model
        # a connection of its own: a client that vanishes shares it with no other
        self._channel = grpc.aio.insecure_channel(
            url, options=[("grpc.use_local_subchannel_pool", 1)]
        )
        self._call: Any = service_pb2_grpc.GRPCInferenceServiceStub(
            self._channel
        ).ModelStreamInfer()

    def request(
        self,
        ids: list[int],
        sequence: int | str,
        *,
        start: bool = False,
        end: bool = False,
        parameters: Mapping[str, Parameter] | None = None,
        id: str = "",
    ) -> Message:
        """A request that brings these tokens."""
        tensors = {"input_ids": np.array([ids], np.int64)}
        request = message(
            self.model, tensors, sequence, start=start, end=end, parameters=parameters, id=id
        )
        request.outputs.add(
            name="tokens" if parameters and "max_tokens" in parameters else "next_token"
        )
        return request

    async def ask(self, request: Message) -> AsyncIterator[list[int]]:
        """The tokens of each answer, up to the final one.

        Raises:
            RefusedError: with the server's text.
            LostError: the stream is no more.
        """
        try:
            await self._call.write(request)
            while True:
                response = await self._call.read()
                if response is grpc.aio.EOF:
                    raise LostError("the server closed the stream")
                if response.error_message:
                    raise RefusedError(response.error_message)
                result = outputs(response.infer_response)
                yield [
                    int(token)
                    for name in ("tokens", "next_token")
                    if name in result
                    for token in result[name][0]
                ]
                if response.infer_response.parameters["triton_final_response"].bool_param:
                    return
        except (grpc.aio.AioRpcError, grpc.aio.UsageError) as error:
            raise LostError(str(error)) from error

    async def collect(self, request: Message) -> list[int]:
        """All tokens of all answers."""
        return [token async for tokens in self.ask(request) for token in tokens]

    async def close(self) -> None:
        """Say good-bye."""
        await self._call.done_writing()
        await self._channel.close(grace=None)

    async def cancel(self) -> None:
        """Cancel what is under way, with the stream."""
        self._call.cancel()
        await self._channel.close(grace=None)

    async def drop(self) -> None:
        """The connection is gone, without a word."""
        await self._channel.close(grace=None)
