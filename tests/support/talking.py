"""One face for the synchronous and the asyncio client, so that the same tests drive both."""

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

import inplace.client
from inplace.client import Piece, Retry

Result = TypeVar("Result")


class Talker:
    """The synchronous client."""

    def client(self, servers: list[str], retry: Retry | None = None) -> Any:
        return inplace.client.Client(servers, retry=retry)

    def sequence(self, client: Any, model: str, **options: Any) -> Any:
        return inplace.client.Sequence(client, model, **options)

    def wait(self, result: Any) -> Any:
        """What a call returns, once it is there."""
        return result

    def pieces(self, generation: Any) -> Iterator[Piece]:
        return iter(generation)

    def close(self) -> None:
        pass


class AsyncTalker(Talker):
    """The asyncio client, on an event loop of its own."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()

    def client(self, servers: list[str], retry: Retry | None = None) -> Any:
        async def made() -> inplace.client.AsyncClient:  # grpc.aio wants a running loop
            return inplace.client.AsyncClient(servers, retry=retry)

        return self._runner.run(made())

    def sequence(self, client: Any, model: str, **options: Any) -> Any:
        return inplace.client.AsyncSequence(client, model, **options)

    def wait(self, result: Coroutine[Any, Any, Result]) -> Result:
        return self._runner.run(result)

    def pieces(self, generation: Any) -> Iterator[Piece]:
        async def following() -> Piece | None:
            return await anext(generation, None)

        while (piece := self._runner.run(following())) is not None:
            yield piece

    def close(self) -> None:
        self._runner.close()
