"""The servers an asyncio client talks to."""

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from tritonclient.grpc.aio import InferenceServerClient

from inplace.client.calls import ModelMetadata
from inplace.client.client import CHANNEL
from inplace.client.endpoints import Endpoints
from inplace.client.retry import Retry

Connect = Callable[[str], InferenceServerClient]


class Client:
    """Servers that serve the same models, for one event loop; see `inplace.client.Client`.

    Args:
        servers: ``host:port`` of a gRPC endpoint, or several.
        retry: how often a request is tried again.
        connect: makes a connection, for TLS or other channel options; plain text if None.
    """

    def __init__(
        self,
        servers: str | Iterable[str],
        *,
        retry: Retry | None = None,
        connect: Connect | None = None,
    ) -> None:
        self.endpoints = Endpoints([servers] if isinstance(servers, str) else list(servers))
        self.retry = retry or Retry()
        self._connect: Connect = connect or (
            lambda url: InferenceServerClient(url, channel_args=CHANNEL)
        )
        self._connections: dict[str, InferenceServerClient] = {}
        self._models: dict[str, ModelMetadata] = {}

    def connection(self, server: str) -> InferenceServerClient:
        """The connection to one of the servers, for what Triton offers beside sequences: health, statistics, model control."""
        if server not in self._connections:
            self._connections[server] = self._connect(server)
        return self._connections[server]

    async def model(self, server: str, name: str, timeout: float) -> ModelMetadata:
        """What a model is; the server is asked once.

        Raises:
            tritonclient.utils.InferenceServerException: it serves no such model, or does not answer.
        """
        if name not in self._models:
            answer = await self.connection(server).get_model_config(name, client_timeout=timeout)
            self._models[name] = ModelMetadata.of(answer.config)
        return self._models[name]

    async def close(self) -> None:
        """Close the connections. Sequences that are still open keep their slots until they are idle for too long."""
        while self._connections:
            await self._connections.popitem()[1].close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
