"""The tritonservers behind the front end: which one a generation goes to, and which are ready."""

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager

from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from inplace.client import AsyncClient, AsyncSequence, Retry

log = logging.getLogger("inplace.openai")

POLL_INTERVAL = 2.0
"""Seconds between two questions whether a server is ready."""

POLL_TIMEOUT = 2.0
"""Seconds after which a server that does not answer counts as not ready."""

MAX_LOAD_FACTOR = 1.25
"""How many times the average number of generations a server may have before it is passed over."""


class Replicas:
    """Servers that serve the same models. For one event loop.

    Generations with the same affinity go to the same server, unless it has far more to do than the
    others: consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam, 2018).

    Args:
        urls: ``host:port`` of each server's gRPC endpoint.
        models: the names of the models that generations are for. A server is asked for each of
            them: Triton's own readiness is of all its models, and one of others may be broken.
        connect: opens a connection; in plain text if None.
        retry: how often a request is sent again.
    """

    def __init__(
        self,
        urls: Sequence[str],
        models: Collection[str],
        connect: Callable[[str], InferenceServerClient] | None = None,
        retry: Retry | None = None,
    ) -> None:
        self.urls = tuple(urls)
        self._client = AsyncClient(urls, connect=connect, retry=retry or Retry(timeout=30.0))
        self._in_flight = dict.fromkeys(urls, 0)
        self._models = tuple(models)
        self._ready: dict[str, frozenset[str]] = dict.fromkeys(urls, frozenset())
        self._poller: asyncio.Task[None] | None = None

    @property
    def ready(self) -> dict[str, bool]:
        """Which servers had a model that was ready when they were asked last."""
        return {url: bool(models) for url, models in self._ready.items()}

    def choose(self, model: str, affinity: bytes) -> str:
        """The server for a generation."""
        ready = [url for url in self.urls if model in self._ready[url]] or list(self.urls)
        most = MAX_LOAD_FACTOR * (sum(self._in_flight[url] for url in ready) + 1) / len(ready)
        ranked = sorted(
            ready, key=lambda url: hashlib.blake2b(affinity + url.encode()).digest(), reverse=True
        )
        return next(url for url in ranked if self._in_flight[url] < most)

    @asynccontextmanager
    async def sequence(self, model: str, affinity: bytes) -> AsyncIterator[AsyncSequence]:
        """A sequence for one generation, which ends with the block.

        Args:
            model: the name of the model.
            affinity: sequences with the same bytes prefer the same server.
        """
        url = self.choose(model, affinity)
        self._in_flight[url] += 1
        try:
            async with AsyncSequence(self._client, model, server=url) as sequence:
                yield sequence
        finally:
            self._in_flight[url] -= 1

    async def start(self) -> None:
        """Ask every server which models are ready, now and from now on."""
        await self._poll()
        self._poller = asyncio.create_task(self._keep_polling())

    async def close(self) -> None:
        """Close the connections."""
        if self._poller is not None:
            self._poller.cancel()
            await asyncio.wait([self._poller])
        await self._client.close()

    async def _keep_polling(self) -> None:
        while True:
            await asyncio.sleep(POLL_INTERVAL)
            await self._poll()

    async def _poll(self) -> None:
        answers = await asyncio.gather(*map(self._ready_models, self.urls))
        for url, ready in zip(self.urls, answers, strict=True):
            if ready != self._ready[url]:
                names = ", ".join(sorted(ready))
                log.info("%s is %s", url, f"ready: {names}" if ready else "not ready")
            self._ready[url] = ready

    async def _ready_models(self, url: str) -> frozenset[str]:
        try:
            connection = self._client.connection(url)
            ready = [
                await connection.is_model_ready(model, client_timeout=POLL_TIMEOUT)
                for model in self._models
            ]
        except InferenceServerException:
            return frozenset()
        return frozenset(
            model for model, is_ready in zip(self._models, ready, strict=True) if is_ready
        )
