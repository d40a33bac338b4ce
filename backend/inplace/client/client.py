"""The servers a synchronous client talks to."""

import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from tritonclient.grpc import InferenceServerClient

from inplace.client.calls import ModelMetadata
from inplace.client.endpoints import Endpoints
from inplace.client.retry import ONCE, Retry
from inplace.client.stream import Stream

Connect = Callable[[str], InferenceServerClient]


CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
]
"""A server that comes back is found again within two seconds; gRPC's own default is up to two minutes."""


class Client:
    """Servers that serve the same models; sequences begin on each in turn and move where one is lost. Thread-safe.

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
        self._lock = threading.Lock()

    def connection(self, server: str) -> InferenceServerClient:
        """The connection to one of the servers, for what Triton offers beside sequences: health, statistics, model control."""
        with self._lock:
            if server not in self._connections:
                self._connections[server] = self._connect(server)
            return self._connections[server]

    def model(self, server: str, name: str, timeout: float) -> ModelMetadata:
        """What a model is; the server is asked once.

        Raises:
            tritonclient.utils.InferenceServerException: it serves no such model, or does not answer.
        """
        if name not in self._models:
            self._models[name] = ModelMetadata.of(
                self.connection(server).get_model_config(name, client_timeout=timeout).config
            )
        return self._models[name]

    def stream(self, server: str, headers: dict[str, str]) -> Stream:
        """A stream to one of the servers. tritonclient has one a connection, so it gets a connection of its own."""
        return Stream(self._connect(server), headers, close=True)

    def close(self) -> None:
        """Close the connections. Sequences that are still open keep their slots until they are idle for too long."""
        with self._lock:
            while self._connections:
                self._connections.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Borrowed(Client):
    """One server over a connection of the user's own, which stays open. Nothing is tried again, and there is one stream at a time.

    Args:
        connection: the user's.
    """

    def __init__(self, connection: InferenceServerClient) -> None:
        super().__init__("(your connection)", retry=ONCE, connect=lambda url: connection)

    def stream(self, server: str, headers: dict[str, str]) -> Stream:
        """The connection's only stream."""
        return Stream(self.connection(server), headers, close=False)

    def close(self) -> None:
        """Leave the connection to its owner."""
