"""What the front end counts, in Prometheus' text format."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper limits of the buckets of a histogram."""


class SecondsHistogram:
    """A histogram of seconds.

    Args:
        name: of the metric.
        description: one line.
    """

    def __init__(self, name: str, description: str) -> None:
        self._name, self._description = name, description
        self._counts = [0] * (len(SECONDS) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """Count one value."""
        self._counts[bisect_left(SECONDS, seconds)] += 1
        self._sum += seconds

    def lines(self) -> Iterator[str]:
        """In Prometheus' format."""
        yield from _head(self._name, self._description, "histogram")
        total = 0
        for limit, count in zip((*SECONDS, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{self._name}_bucket{{le="{limit}"}} {total}'
        yield f"{self._name}_sum {self._sum:.6f}"
        yield f"{self._name}_count {total}"


class Metrics:
    """The metrics of one front end."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self.disconnected = 0
        self._requests: Counter[tuple[str, int]] = Counter()
        self.seconds = SecondsHistogram(
            "inplace_openai_request_seconds", "From a request to the end of its answer."
        )
        self.first_token_seconds = SecondsHistogram(
            "inplace_openai_first_token_seconds", "From a request to its first token."
        )

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count an answer."""
        self._requests[route, status] += 1
        self.seconds.add(seconds)

    def text(self, ready: Mapping[str, bool]) -> str:
        """All metrics.

        Args:
            ready: whether each server is ready.
        """
        return "\n".join(self._lines(ready)) + "\n"

    def _lines(self, ready: Mapping[str, bool]) -> Iterator[str]:
        name = "inplace_openai_requests_total"
        yield from _head(name, "Answers, by route and status.", "counter")
        for (route, status), count in sorted(self._requests.items()):
            yield f'{name}{{route="{route}",status="{status}"}} {count}'
        for name, description, value in (
            ("prompt_tokens", "Tokens of prompts.", self.prompt_tokens),
            ("cached_tokens", "Tokens of prompts that were computed before.", self.cached_tokens),
            ("generated_tokens", "Tokens that were generated.", self.generated_tokens),
            ("disconnected", "Requests whose client went away.", self.disconnected),
        ):
            yield from _head(f"inplace_openai_{name}_total", description, "counter")
            yield f"inplace_openai_{name}_total {value}"
        yield from _head("inplace_openai_requests_in_flight", "Requests that run.", "gauge")
        yield f"inplace_openai_requests_in_flight {self.in_flight}"
        yield from _head("inplace_openai_server_ready", "Whether a server is ready.", "gauge")
        for url, is_ready in ready.items():
            yield f'inplace_openai_server_ready{{server="{url}"}} {int(is_ready)}'
        yield from self.seconds.lines()
        yield from self.first_token_seconds.lines()


def _head(name: str, description: str, kind: str) -> tuple[str, str]:
    return f"# HELP {name} {description}", f"# TYPE {name} {kind}"
