"""The tritonservers behind the front end: which one a generation goes to, and which are ready."""

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager

from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from inplace.client import AsyncClient, AsyncSequence, Retry
from inplace.openai.prefixes import MAX_SERVERS, PrefixRecord
from inplace.openai.workers import Worker

log = logging.getLogger("inplace.openai")

POLL_INTERVAL = 2.0
"""Seconds between two questions whether a server is ready."""

POLL_TIMEOUT = 2.0
"""Seconds after which a server that does not answer counts as not ready."""

MAX_LOAD_FACTOR = 1.25
"""How many times the average number of generations a server may have before it is passed over."""


class Replicas:
    """Servers that serve the same models. For one event loop.

    A generation goes to the server that has computed the longest beginning of its prompt. Others
    with the same affinity go to the same server. In both cases not if that has far more to do than
    the others: consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam, 2018).

    Args:
        urls: ``host:port`` of each server's gRPC endpoint.
        models: the names of the models that generations are for. A server is asked for each of
            them: Triton's own readiness is of all its models, and one of others may be broken.
        connect: opens a connection; in plain text if None.
        retry: how often a request is sent again.
        worker: the process of the front end.

    Raises:
        ValueError: there are more than `MAX_SERVERS` servers.
    """

    def __init__(
        self,
        urls: Sequence[str],
        models: Collection[str],
        connect: Callable[[str], InferenceServerClient] | None = None,
        retry: Retry | None = None,
        worker: Worker | None = None,
    ) -> None:
        if len(urls) > MAX_SERVERS:
            raise ValueError(f"{len(urls)} servers; at most {MAX_SERVERS} are possible")
        self.urls = tuple(urls)
        self._client = AsyncClient(urls, connect=connect, retry=retry or Retry(timeout=30.0))
        self._in_flight = dict.fromkeys(urls, 0)
        self._models = tuple(models)
        self._ready: dict[str, frozenset[str]] = dict.fromkeys(urls, frozenset())
        self._prefixes = PrefixRecord(self.urls, worker)
        self._poller: asyncio.Task[None] | None = None

    @property
    def ready(self) -> dict[str, bool]:
        """Which servers had a model that was ready when they were asked last."""
        return {url: bool(models) for url, models in self._ready.items()}

    def choose(
        self, model: str, affinity: bytes, scope: bytes = b"", prompt: Sequence[int] = ()
    ) -> str:
        """The server for a generation.

        Args:
            model: the name of the model.
            affinity: generations with the same bytes prefer the same server.
            scope: who may use what it computes, see `computed`; empty if nobody.
            prompt: its tokens.
        """
        ready = [url for url in self.urls if model in self._ready[url]] or list(self.urls)
        most = MAX_LOAD_FACTOR * (sum(self._in_flight[url] for url in ready) + 1) / len(ready)
        ranked = sorted(
            ready, key=lambda url: hashlib.blake2b(affinity + url.encode()).digest(), reverse=True
        )
        if scope and (holder := self._prefixes.find(scope, prompt, ready)) is not None:
            ranked.insert(0, holder)
        return next(url for url in ranked if self._in_flight[url] < most)

    def computed(self, scope: bytes, tokens: Sequence[int], url: str) -> None:
        """Record that a server has a sequence with these tokens.

        Args:
            scope: names the model, and those who may use what was computed; empty if nobody.
            tokens: of the sequence.
            url: the server.
        """
        if scope:
            self._prefixes.add(scope, tokens, url)

    @asynccontextmanager
    async def sequence(
        self,
        model: str,
        affinity: bytes,
        *,
        key: str | None = None,
        scope: bytes = b"",
        prompt: Sequence[int] = (),
    ) -> AsyncIterator[AsyncSequence]:
        """A sequence for one generation, which ends with the block.

        Args:
            model: the name of the model.
            key: its ``sequence_key``; a random one if None.
            affinity, scope, prompt: see `choose`.
        """
        url = self.choose(model, affinity, scope, prompt)
        self.computed(scope, prompt, url)  # for those that begin while it runs
        self._in_flight[url] += 1
        try:
            async with AsyncSequence(self._client, model, key=key, server=url) as sequence:
                yield sequence
        finally:
            self._in_flight[url] -= 1

    @asynccontextmanager
    async def copied(self, sequence: AsyncSequence) -> AsyncIterator[AsyncSequence]:
        """A copy of a sequence, for one generation, inside the block.

        Args:
            sequence: as `AsyncSequence.fork` returned it.
        """
        url = sequence.server
        self._in_flight[url] += 1
        try:
            async with sequence:
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
