"""The metrics of a model instance, and the thread that exports them to the server once a second.

A call into Triton's metrics costs about 20 µs, so the path of a request makes none: events change
plain numbers, and the exporter thread passes on what has changed. Triton's own histograms take one
observation a call, so ours are counted here too and exported as the counters that Prometheus makes
of a histogram: ``_bucket`` with the label ``le``, ``_sum`` and ``_count``.

To add a metric: define it here, list it in `METRICS` or `HISTOGRAMS`, change it in
`inplace.runtime.observer`, and describe it in docs/operations.md.
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

EXPORT_INTERVAL = 1.0
"""Seconds between two exports."""


log = logging.getLogger("inplace")


MetricKind = Literal["counter", "gauge"]


@dataclass(frozen=True)
class Metric:
    """A counter or a gauge.

    Attributes:
        name: as it appears in ``/metrics``.
        kind: counters only grow.
        help: one sentence, shown in ``/metrics``.
        label: the label that splits it into several numbers; empty for one number.
        label_values: the values of that label, all of them.
    """

    name: str
    kind: MetricKind
    help: str
    label: str = ""
    label_values: tuple[str, ...] = ("",)


@dataclass(frozen=True)
class Histogram:
    """A histogram with fixed buckets.

    Attributes:
        name: as it appears in ``/metrics``, without a suffix.
        help: one sentence, shown in ``/metrics``.
        bounds: upper bounds of the buckets, rising; larger values are in the bucket ``+Inf``.
    """

    name: str
    help: str
    bounds: tuple[float, ...]

    @property
    def buckets(self) -> Metric:
        """The number of observations at or below each bound."""
        bounds = tuple(f"{bound:g}" for bound in self.bounds)
        return Metric(f"{self.name}_bucket", "counter", self.help, "le", (*bounds, "+Inf"))

    @property
    def sum(self) -> Metric:
        """The sum of all observations."""
        return Metric(f"{self.name}_sum", "counter", self.help)

    @property
    def count(self) -> Metric:
        """The number of observations."""
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
    "Tokens that steps have consumed: prefill, or decode where a request brings one token to a"
    " sequence that holds some already.",
    "phase",
    (PREFILL, DECODE),
)


WAITING = Metric("inplace_requests_waiting", "gauge", "Requests that wait for a slot.")


PLACES = Metric(
    "inplace_places", "gauge", "Sequences that Triton accepts at the same time for this instance."
)


PLACES_OPEN = Metric("inplace_places_open", "gauge", "Sequences that have a place in Triton.")


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
    PLACES,
    PLACES_OPEN,
    GENERATIONS,
)


HISTOGRAMS = (QUEUE, FIRST_TOKEN, STEP, ROWS)


def exported_metrics() -> Iterator[Metric]:
    """Everything that appears in ``/metrics``: metrics, and the counters of each histogram."""
    yield from METRICS
    for histogram in HISTOGRAMS:
        yield from (histogram.buckets, histogram.sum, histogram.count)


class MetricValues:
    """The current values of one instance's metrics. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values = {
            (metric.name, value): 0.0 for metric in METRICS for value in metric.label_values
        }
        self._counts = {
            histogram.name: [0] * (len(histogram.bounds) + 1) for histogram in HISTOGRAMS
        }
        self._sums = {histogram.name: 0.0 for histogram in HISTOGRAMS}
        self._functions: dict[tuple[str, str], Callable[[], float]] = {}

    def set_function(self, gauge: Metric, function: Callable[[], float]) -> None:
        """Read a gauge from ``function`` at every snapshot, on the exporter's thread."""
        self._functions[gauge.name, ""] = function

    def add(self, metric: Metric, amount: float = 1, label_value: str = "") -> None:
        """Add to a counter, or to a gauge, whose amount may be negative."""
        with self._lock:
            self._values[metric.name, label_value] += amount

    def observe(self, histogram: Histogram, value: float) -> None:
        """Add one observation to a histogram."""
        with self._lock:
            self._counts[histogram.name][bisect_left(histogram.bounds, value)] += 1
            self._sums[histogram.name] += value

    def snapshot(self) -> dict[tuple[str, str], float]:
        """All values of `exported_metrics`, by the metric's name and the value of its label."""
        with self._lock:
            values = self._values | {key: read() for key, read in self._functions.items()}
            for histogram in HISTOGRAMS:
                cumulative = list(accumulate(self._counts[histogram.name]))
                buckets = histogram.buckets
                values |= {
                    (buckets.name, bound): count
                    for bound, count in zip(buckets.label_values, cumulative, strict=True)
                }
                values[histogram.count.name, ""] = cumulative[-1]
                values[histogram.sum.name, ""] = self._sums[histogram.name]
        return values


class TimeSeries(Protocol):
    """One number in the server's metrics: a metric with one set of labels."""

    def increment(self, value: float) -> None:
        """Add to a counter."""

    def set(self, value: float) -> None:
        """Set a gauge."""


class MetricsExporter:
    """Exports all values when it is created, and what has changed once a second from a thread.

    Args:
        values: what to export.
        labels: labels of every time series: model, version, instance.
        make_series: makes a time series of the server from a metric and its labels.
        interval: seconds between two exports.
    """

    def __init__(
        self,
        values: MetricValues,
        labels: Mapping[str, str],
        make_series: Callable[[Metric, Mapping[str, str]], TimeSeries],
        interval: float = EXPORT_INTERVAL,
    ) -> None:
        self._values = values
        self._kinds = {metric.name: metric.kind for metric in exported_metrics()}
        self._series = {
            (metric.name, value): make_series(
                metric, {**labels, metric.label: value} if metric.label else labels
            )
            for metric in exported_metrics()
            for value in metric.label_values
        }
        self._exported = dict.fromkeys(self._series, 0.0)
        self._interval = interval
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="inplace-metrics", daemon=True)
        self.export()  # so that a model that has just loaded does not show 0 slots for a second
        self._thread.start()

    def export(self) -> None:
        """Export the values that have changed since the last time. Not while the thread runs."""
        for key, value in self._values.snapshot().items():
            exported = self._exported[key]
            if value != exported:
                if self._kinds[key[0]] == "gauge":
                    self._series[key].set(value)
                else:
                    self._series[key].increment(value - exported)
                self._exported[key] = value

    def close(self) -> None:
        """Stop the thread, export the last values and drop the series; the server forgets them."""
        self._closing.set()
        self._thread.join()
        self.export()
        self._series.clear()

    def _run(self) -> None:
        try:
            while not self._closing.wait(self._interval):
                self.export()
        except Exception:  # an error of the server: the model is served on, its metrics stand still
            log.exception("metrics are not exported any more")
