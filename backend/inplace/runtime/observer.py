"""What happens to a model instance: its metrics and its log lines.

A call into Triton's metrics costs about 20 µs, so the path of a request makes none: events change
plain numbers, and the exporter thread passes on what has changed once a second. Triton's own
histograms take one observation a call, so ours are counted here too and exported as the counters
that Prometheus makes of a histogram: ``_bucket`` with the label ``le``, ``_sum`` and ``_count``.

To add a metric: define it, list it in `METRICS` or `HISTOGRAMS`, change it in `Observer`, and
describe it in docs/operations.md.
"""

import logging
import threading
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping, Sized
from dataclasses import dataclass
from itertools import accumulate
from time import monotonic
from typing import Literal, Protocol

from inplace.errors import Code, RequestError
from inplace.log_lines import log_line
from inplace.runtime.slots import EndReason, SequenceId, SequenceState, SlotObserver
from inplace.snapshots import SnapshotError, SnapshotReason

EXPORT_INTERVAL = 1.0
"""Seconds between two exports."""


MAX_LINES_PER_SECOND = 10
"""Log lines a second for refused requests, and as many for ended sequences; all are counted."""


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


ACCEPTED, REJECTED = "accepted", "rejected"


DRAFTED = Metric(
    "inplace_draft_tokens_total",
    "counter",
    "Tokens that a draft has proposed, by whether the model has chosen them too.",
    "result",
    (ACCEPTED, REJECTED),
)


TAKEN, COPIED = "taken", "copied"


REUSES = Metric(
    "inplace_prefix_reuses_total",
    "counter",
    "Sequences that began with the states of an earlier one: in its slot (taken), or copied.",
    "how",
    (TAKEN, COPIED),
)


REUSED = Metric(
    "inplace_prefix_tokens_total",
    "counter",
    "Tokens of prompts that were not computed, because an earlier sequence had the same.",
)


WRITTEN, RESTORED = "written", "restored"


SNAPSHOTS = Metric(
    "inplace_snapshots_total",
    "counter",
    "Snapshots of sequences that were written or restored, or why that failed.",
    "result",
    (WRITTEN, RESTORED, *SnapshotReason),
)


SNAPSHOT_BYTES = Metric(
    "inplace_snapshot_bytes_total",
    "counter",
    "Bytes of snapshots that were written and restored.",
    "direction",
    (WRITTEN, RESTORED),
)


SLOTS_KEPT = Metric(
    "inplace_slots_kept", "gauge", "Free slots that are kept with the tokens of a prefix."
)


FORWARDED = Metric(
    "inplace_requests_forwarded_total",
    "counter",
    "Requests that were passed on to another instance of the model, which has their sequence or may"
    " have a free slot.",
)


WAITING = Metric("inplace_requests_waiting", "gauge", "Requests that wait for a slot.")


PLACES = Metric(
    "inplace_places", "gauge", "Sequences that Triton accepts at the same time for this instance."
)


PLACES_OPEN = Metric("inplace_places_open", "gauge", "Sequences that have a place in Triton.")


GENERATIONS = Metric(
    "inplace_generations_total",
    "counter",
    "Generations and streamed schedules that finished, by reason.",
    "reason",
    ("length", "eos", "stop", "capacity", "cancelled", "ended", "done"),
)


FIRST_TOKEN = Histogram(
    "inplace_first_token_seconds",
    "Seconds from the arrival of a generation or a streamed schedule to its first token.",
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


SNAPSHOT = Histogram(
    "inplace_snapshot_seconds",
    "Seconds that a thread took to write or to restore a snapshot.",
    (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0),
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
    FORWARDED,
    TOKENS,
    DRAFTED,
    REUSES,
    REUSED,
    SLOTS_KEPT,
    SNAPSHOTS,
    SNAPSHOT_BYTES,
    WAITING,
    PLACES,
    PLACES_OPEN,
    GENERATIONS,
)


HISTOGRAMS = (QUEUE, FIRST_TOKEN, STEP, ROWS, SNAPSHOT)


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


class _RateLimitedLog:
    """Logs lines of one kind at INFO, at most `MAX_LINES_PER_SECOND`, and counts the others.

    Args:
        kind: names the lines in the count of those that were not logged.
        clock: monotonic seconds.
    """

    def __init__(self, kind: str, clock: Callable[[], float]) -> None:
        self._kind, self._clock = kind, clock
        self._window_start, self._num_logged, self._num_suppressed = clock(), 0, 0

    def info(self, make_line: Callable[[], str]) -> None:
        """Log a line, unless too many were logged in this second; ``make_line`` is called then."""
        now = self._clock()
        if now - self._window_start >= 1.0:
            if self._num_suppressed:
                log.info(log_line(f"more {self._kind}", count=self._num_suppressed))
            self._window_start, self._num_logged, self._num_suppressed = now, 0, 0
        if self._num_logged == MAX_LINES_PER_SECOND:
            self._num_suppressed += 1
            return
        self._num_logged += 1
        log.info(make_line())


class Observer:
    """Counts and logs the events of one model instance. Thread-safe; a call takes microseconds.

    Levels: DEBUG for the starts and ends that clients ask for, INFO for sequences that end
    otherwise and for refused requests, ERROR for failed steps.

    Args:
        num_slots: slots of the instance.
        state_bytes: bytes of its arena.
        clock: monotonic seconds.

    Attributes:
        metrics: the values of the instance's metrics.
    """

    def __init__(
        self, num_slots: int = 0, state_bytes: int = 0, clock: Callable[[], float] = monotonic
    ) -> None:
        self.metrics = MetricValues()
        self.metrics.add(SLOTS, num_slots)
        self.metrics.add(SLOTS_FREE, num_slots)
        self.metrics.add(STATE_BYTES, state_bytes)
        self._slot_observers: list[SlotObserver] = []
        self._refusal_log = _RateLimitedLog("requests refused", clock)
        self._end_log = _RateLimitedLog("sequences ended", clock)
        self._snapshot_log = _RateLimitedLog("snapshots failed", clock)

    def forward_to(self, observer: SlotObserver) -> None:
        """Pass the starts and ends of sequences on."""
        self._slot_observers.append(observer)

    def sequence_started(self, sequence: SequenceState) -> None:
        """A sequence was given a slot."""
        for observer in self._slot_observers:
            observer.sequence_started(sequence)
        self.metrics.add(STARTED)
        self.metrics.add(LIVE)
        self.metrics.add(SLOTS_FREE, -1)
        if log.isEnabledFor(logging.DEBUG):
            log.debug(log_line("sequence started", sequence=sequence.id, slot=sequence.slot))

    def sequence_ended(self, sequence: SequenceState, reason: EndReason) -> None:
        """A sequence gave its slot back."""
        for observer in self._slot_observers:
            observer.sequence_ended(sequence, reason)
        self.metrics.add(ENDED, label_value=reason)
        self.metrics.add(LIVE, -1)
        self.metrics.add(SLOTS_FREE)

        def make_line() -> str:
            return log_line(
                "sequence ended",
                sequence=sequence.id,
                slot=sequence.slot,
                length=sequence.length,
                reason=reason,
            )

        if log.isEnabledFor(logging.DEBUG):
            log.log(logging.DEBUG if reason is EndReason.END else logging.INFO, make_line())
        elif reason is not EndReason.END:
            self._end_log.info(make_line)

    def request_admitted(self, queue_seconds: float) -> None:
        """A request was given its sequence, ``queue_seconds`` after it had arrived."""
        self.metrics.observe(QUEUE, queue_seconds)

    def prefix_reused(self, num_tokens: int, *, copied: bool) -> None:
        """A sequence began with ``num_tokens`` of its prompt computed already."""
        self.metrics.add(REUSES, label_value=COPIED if copied else TAKEN)
        self.metrics.add(REUSED, num_tokens)

    def watch_kept(self, kept: Sized) -> None:
        """Report how many free slots are kept with their tokens, now and later."""
        self.metrics.set_function(SLOTS_KEPT, lambda: len(kept))

    def request_forwarded(self, num_requests: int = 1) -> None:
        """Requests were passed on to another instance of the model."""
        self.metrics.add(FORWARDED, num_requests)

    def snapshot_written(self, num_bytes: int, seconds: float) -> None:
        """A sequence was stored."""
        self.metrics.add(SNAPSHOTS, label_value=WRITTEN)
        self.metrics.add(SNAPSHOT_BYTES, num_bytes, WRITTEN)
        self.metrics.observe(SNAPSHOT, seconds)

    def snapshot_restored(self, num_bytes: int, seconds: float) -> None:
        """A sequence was read from the store."""
        self.metrics.add(SNAPSHOTS, label_value=RESTORED)
        self.metrics.add(SNAPSHOT_BYTES, num_bytes, RESTORED)
        self.metrics.observe(SNAPSHOT, seconds)

    def snapshot_failed(self, error: SnapshotError) -> None:
        """A sequence could not be stored, restored or deleted."""
        self.metrics.add(SNAPSHOTS, label_value=error.reason)
        self._snapshot_log.info(
            lambda: log_line("snapshot failed", code=error.reason, reason=str(error))
        )

    def watch_waiting(self, waiting: Sized) -> None:
        """Report the length of this queue, now and later, as the requests that wait for a slot."""
        self.metrics.set_function(WAITING, lambda: len(waiting))

    def watch_places(self, places: Sized, limit: int) -> None:
        """Report how many places of Triton are open, now and later, and how many it has."""
        self.metrics.set_function(PLACES_OPEN, lambda: len(places))
        self.metrics.add(PLACES, limit)

    def first_token(self, seconds: float) -> None:
        """A request has its first token, ``seconds`` after it had arrived."""
        self.metrics.observe(FIRST_TOKEN, seconds)

    def generation_finished(
        self, sequence_id: SequenceId, request_id: str, finish_reason: str, num_tokens: int
    ) -> None:
        """A generation, or a streamed schedule, finished with ``num_tokens`` tokens."""
        self.metrics.add(GENERATIONS, label_value=finish_reason)
        if log.isEnabledFor(logging.DEBUG):
            log.debug(
                log_line(
                    "generation finished",
                    sequence=sequence_id,
                    request=request_id or "-",
                    reason=finish_reason,
                    tokens=num_tokens,
                )
            )

    def request_refused(
        self, sequence_id: SequenceId, request_id: str, error: RequestError, *, end: bool
    ) -> None:
        """A request is answered with an error; ``end`` if it has the END flag.

        An END refused with POSITION is not counted: it has freed the slot, and it is how a client
        ends a sequence without a step.
        """
        if end and error.code is Code.POSITION:
            return
        self.metrics.add(REFUSED, label_value=error.code)
        if error.code is Code.ENGINE_FAILED:
            return  # `step_failed` logs one line for all rows
        self._refusal_log.info(
            lambda: log_line(
                "request refused",
                sequence=sequence_id,
                request=request_id or "-",
                code=error.code,
                retryable=int(error.retryable),
                reason=str(error),
            )
        )

    def step_finished(
        self, seconds: float, num_rows: int, num_prefill_tokens: int, num_decode_tokens: int
    ) -> None:
        """The engine ran a step."""
        self.metrics.observe(STEP, seconds)
        self.metrics.observe(ROWS, num_rows)
        self.metrics.add(TOKENS, num_prefill_tokens, PREFILL)
        self.metrics.add(TOKENS, num_decode_tokens, DECODE)

    def tokens_drafted(self, num_drafted: int, num_accepted: int) -> None:
        """A step has verified drafted tokens."""
        self.metrics.add(DRAFTED, num_accepted, ACCEPTED)
        self.metrics.add(DRAFTED, num_drafted - num_accepted, REJECTED)

    def step_failed(
        self, seconds: float, rows: Collection[tuple[SequenceId, str]], error: Exception
    ) -> None:
        """The engine raised in a step.

        Args:
            seconds: how long the step took.
            rows: the sequence id and the request id of each row.
            error: what the engine raised.
        """
        self.metrics.observe(STEP, seconds)
        self.metrics.observe(ROWS, len(rows))
        sequences, requests = [sequence for sequence, _ in rows], [request for _, request in rows]
        log.error(
            log_line("engine failed", rows=len(rows), sequences=sequences, requests=requests),
            exc_info=error,
        )


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
