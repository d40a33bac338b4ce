"""What the front end counts, for Prometheus.

A front end of several processes keeps its counters in files of the shared folder, and each process
answers with the sum over all of them.
"""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.exposition import generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from inplace.openai.workers import Sum, Worker

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper limits of the buckets of a histogram."""

disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """The metrics of one process of a front end.

    Args:
        worker: the process.
        in_flight: requests that run, in all processes.

    Attributes:
        prompt_tokens, cached_tokens, generated_tokens, disconnected, first_token_seconds: see their
            descriptions.
    """

    def __init__(self, worker: Worker, in_flight: Sum) -> None:
        self._worker, self._in_flight = worker, in_flight
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "inplace_openai_requests",
            "Answers, by route and status.",
            ("route", "status"),
            registry=self._registry,
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self.cached_tokens = self._counter(
            "cached_tokens", "Tokens of prompts that were computed before."
        )
        self.generated_tokens = self._counter("generated_tokens", "Tokens that were generated.")
        self.disconnected = self._counter("disconnected", "Requests whose client went away.")
        self._seconds = self._histogram("request", "From a request to the end of its answer.")
        self.first_token_seconds = self._histogram(
            "first_token", "From a request for a stream to its first token."
        )
        self._running = Gauge(
            "inplace_openai_requests_in_flight",
            "Requests that run.",
            registry=self._registry,
            multiprocess_mode="mostrecent",
        )
        self._ready = Gauge(
            "inplace_openai_server_ready",
            "Whether a server is ready.",
            ("server",),
            registry=self._registry,
            multiprocess_mode="mostrecent",
        )

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count an answer."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.observe(seconds)

    def text(self, ready: Mapping[str, bool]) -> str:
        """All metrics, in Prometheus' text format.

        Args:
            ready: whether each server is ready.
        """
        self._running.set(self._in_flight.total)
        for url, is_ready in ready.items():
            self._ready.labels(url).set(is_ready)
        registry = self._registry
        if self._worker.folder is not None:
            registry, folder = CollectorRegistry(), str(self._worker.folder)
            MultiProcessCollector(registry, folder)  # type: ignore[no-untyped-call]
        return generate_latest(registry).decode()

    def _counter(self, name: str, description: str) -> Counter:
        return Counter(f"inplace_openai_{name}", description, registry=self._registry)

    def _histogram(self, name: str, description: str) -> Histogram:
        return Histogram(
            f"inplace_openai_{name}_seconds",
            description,
            buckets=SECONDS,
            registry=self._registry,
        )
