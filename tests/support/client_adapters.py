"""One interface to the synchronous and the asyncio client: the same tests run with both."""

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

import inplace.client
from inplace.client import Piece, Retry

Result = TypeVar("Result")


class SyncAdapter:
    """The synchronous client."""

    def client(self, servers: list[str], retry: Retry | None = None) -> Any:
        return inplace.client.Client(servers, retry=retry)

    def sequence(self, client: Any, model: str, **options: Any) -> Any:
        return inplace.client.Sequence(client, model, **options)

    def wait(self, result: Any) -> Any:
        """The result of a call."""
        return result

    def pieces(self, generation: Any) -> Iterator[Piece]:
        return iter(generation)

    def close(self) -> None:
        pass


class AsyncAdapter(SyncAdapter):
    """The asyncio client, on an event loop of its own."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()

    def client(self, servers: list[str], retry: Retry | None = None) -> Any:
        async def create() -> inplace.client.AsyncClient:  # grpc.aio needs a running loop
            return inplace.client.AsyncClient(servers, retry=retry)

        return self._runner.run(create())

    def sequence(self, client: Any, model: str, **options: Any) -> Any:
        return inplace.client.AsyncSequence(client, model, **options)

    def wait(self, result: Coroutine[Any, Any, Result]) -> Result:
        return self._runner.run(result)

    def pieces(self, generation: Any) -> Iterator[Piece]:
        async def next_piece() -> Piece | None:
            return await anext(generation, None)

        while (piece := self._runner.run(next_piece())) is not None:
            yield piece

    def close(self) -> None:
        self._runner.close()
