"""What is counted of a model instance, and the thread that hands it to the server's metrics once a second.

A call into the server costs some 20 µs, so nothing on the path of a request makes one: events change plain numbers, and what has changed
since the last second is handed over. Histograms are counted the same way and handed over as the series that Prometheus makes of a
histogram (``_bucket`` with ``le``, ``_sum``, ``_count``), for the server can only observe values one by one.
"""

import logging
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, Protocol

from inplace.errors import Code
from inplace.runtime.slots import EndReason

PERIOD = 1.0
"""Seconds between two hand-overs."""


log = logging.getLogger("inplace")


MetricKind = Literal["counter", "gauge"]


@dataclass(frozen=True)
class Metric:
    """One metric; with a ``label``, one number for each of its ``values``."""

    name: str
    kind: MetricKind
    help: str
    label: str = ""
    values: tuple[str, ...] = ("",)


@dataclass(frozen=True)
class Histogram:
    """Counts of observations up to each of some bounds.

    Attributes:
        bounds: in rising order; what is beyond the last is counted under ``+Inf``.
    """

    name: str
    help: str
    bounds: tuple[float, ...]

    @property
    def buckets(self) -> Metric:
        """Observations at or below each bound, cumulative."""
        bounds = tuple(f"{bound:g}" for bound in self.bounds)
        return Metric(f"{self.name}_bucket", "counter", self.help, "le", (*bounds, "+Inf"))

    @property
    def sum(self) -> Metric:
        """What the observations add up to."""
        return Metric(f"{self.name}_sum", "counter", self.help)

    @property
    def count(self) -> Metric:
        """How many observations there are."""
        return Metric(f"{self.name}_count", "counter", self.help)


SLOTS = Metric("inplace_slots", "gauge", "Sequences that can live at the same time.")


SLOTS_FREE = Metric("inplace_slots_free", "gauge", "Slots that no sequence owns.")


LIVE = Metric("inplace_sequences_live", "gauge", "Sequences that own a slot.")


STATE_BYTES = Metric(
    "inplace_state_bytes", "gauge", "Bytes of the memory that holds the states of all slots."
)


STARTED = Metric("inplace_sequences_started_total", "counter", "Sequences that were given a slot.")


ENDED = Metric(
    "inplace_sequences_ended_total",
    "counter",
    "Sequences that gave their slot back, by reason.",
    "reason",
    tuple(EndReason),
)


REFUSED = Metric(
    "inplace_requests_refused_total",
    "counter",
    "Requests answered with an error, by its code.",
    "code",
    tuple(Code),
)


PREFILL, DECODE = "prefill", "decode"


TOKENS = Metric(
    "inplace_tokens_total",
    "counter",
    "Tokens that steps have consumed: prefill, or decode where a request brings one token to a sequence that holds some already.",
    "phase",
    (PREFILL, DECODE),
)


WAITING = Metric("inplace_generations_waiting", "gauge", "Generations that wait for a slot.")


GENERATIONS = Metric(
    "inplace_generations_total",
    "counter",
    "Generations that finished, by reason.",
    "reason",
    ("length", "eos", "stop", "capacity", "cancelled", "ended"),
)


FIRST_TOKEN = Histogram(
    "inplace_first_token_seconds",
    "Seconds from a generation's arrival at the backend to its first token.",
    (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0),
)


QUEUE = Histogram(
    "inplace_queue_seconds",
    "Seconds from a request's arrival at the backend until it was given its sequence.",
    (
        0.0001,
        0.0002,
        0.0005,
        0.001,
        0.002,
        0.005,
        0.01,
        0.02,
        0.05,
        0.1,
        0.2,
        0.5,
        1.0,
        2.0,
        5.0,
        10.0,
        30.0,
    ),
)


STEP = Histogram(
    "inplace_step_seconds",
    "Seconds of a step of the engine, failed ones too; its sum is how long the engine was busy.",
    (
        0.0001,
        0.0002,
        0.0005,
        0.001,
        0.0015,
        0.002,
        0.003,
        0.005,
        0.01,
        0.02,
        0.05,
        0.1,
        0.2,
        0.5,
        1.0,
        2.0,
    ),
)


ROWS = Histogram(
    "inplace_step_rows", "Sequences that took part in a step.", (1, 2, 4, 8, 16, 32, 64, 128, 256)
)


METRICS = (
    SLOTS,
    SLOTS_FREE,
    LIVE,
    STATE_BYTES,
    STARTED,
    ENDED,
    REFUSED,
    TOKENS,
    WAITING,
    GENERATIONS,
)


HISTOGRAMS = (QUEUE, FIRST_TOKEN, STEP, ROWS)


def families() -> Iterator[Metric]:
    """Everything that appears in the server's metrics."""
    yield from METRICS
    for histogram in HISTOGRAMS:
        yield from (histogram.buckets, histogram.sum, histogram.count)


class Numbers:
    """The present values of one instance's metrics; may be used from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values = {(metric.name, value): 0.0 for metric in METRICS for value in metric.values}
        self._counts = {
            histogram.name: [0] * (len(histogram.bounds) + 1) for histogram in HISTOGRAMS
        }
        self._sums = {histogram.name: 0.0 for histogram in HISTOGRAMS}
        self._read: dict[tuple[str, str], Callable[[], float]] = {}

    def watch(self, gauge: Metric, read: Callable[[], float]) -> None:
        """Let a gauge be what ``read`` returns when it is looked at, from another thread."""
        self._read[gauge.name, ""] = read

    def add(self, metric: Metric, amount: float = 1, value: str = "") -> None:
        """Let a counter or a gauge grow (a gauge may shrink); ``value`` is that of the metric's label."""
        with self._lock:
            self._values[metric.name, value] += amount

    def observe(self, histogram: Histogram, value: float) -> None:
        """Count one observation."""
        with self._lock:
            self._counts[histogram.name][bisect_left(histogram.bounds, value)] += 1
            self._sums[histogram.name] += value

    def now(self) -> dict[tuple[str, str], float]:
        """Every number by the metric's name and its label's value, histograms as the series they are handed over as."""
        with self._lock:
            found = self._values | {key: read() for key, read in self._read.items()}
            for histogram in HISTOGRAMS:
                cumulative = list(accumulate(self._counts[histogram.name]))
                buckets = histogram.buckets
                found |= {
                    (buckets.name, bound): count
                    for bound, count in zip(buckets.values, cumulative, strict=True)
                }
                found[histogram.count.name, ""] = cumulative[-1]
                found[histogram.sum.name, ""] = self._sums[histogram.name]
        return found


class Series(Protocol):
    """One number in the server's metrics."""

    def increment(self, value: float) -> None:
        """Let a counter grow."""

    def set(self, value: float) -> None:
        """Give a gauge its value."""


class Exporter:
    """Hands the numbers to the server when it is made, and from then on what has changed once a second, from a thread of its own.

    Args:
        numbers: what to hand over.
        labels: of every series: model, version, instance.
        series: makes a series of the server's: a metric and its labels.
        period: seconds between two hand-overs.
    """

    def __init__(
        self,
        numbers: Numbers,
        labels: Mapping[str, str],
        series: Callable[[Metric, Mapping[str, str]], Series],
        period: float = PERIOD,
    ) -> None:
        self._numbers = numbers
        self._kinds = {metric.name: metric.kind for metric in families()}
        self._series = {
            (metric.name, value): series(
                metric, {**labels, metric.label: value} if metric.label else labels
            )
            for metric in families()
            for value in metric.values
        }
        self._last = dict.fromkeys(self._series, 0.0)
        self._period = period
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="inplace-metrics", daemon=True)
        self.flush()  # a model that is ready must not say for a second that it has no slots
        self._thread.start()

    def flush(self) -> None:
        """Hand over what has changed since the last time. Not to be called while the thread runs."""
        for key, value in self._numbers.now().items():
            last = self._last[key]
            if value != last:
                if self._kinds[key[0]] == "gauge":
                    self._series[key].set(value)
                else:
                    self._series[key].increment(value - last)
                self._last[key] = value

    def close(self) -> None:
        """Hand over the rest and let go of the series; the server forgets them."""
        self._closing.set()
        self._thread.join()
        self.flush()
        self._series.clear()

    def _run(self) -> None:
        try:
            while not self._closing.wait(self._period):
                self.flush()
        except Exception:  # the server's own errors: serving goes on, its numbers stand still
            log.exception("metrics are handed over no more")
