"""Metrics and log lines of a model instance's events: names, histograms, rate limits."""

import logging
import re
from pathlib import Path

import inplace.runtime.observer
import pytest
from inplace.drivers.generation import FinishReason
from inplace.errors import Code, RequestError
from inplace.log_lines import log_line
from inplace.runtime.observer import (
    ENDED,
    GENERATIONS,
    HISTOGRAMS,
    MAX_LINES_PER_SECOND,
    METRICS,
    ROWS,
    MetricsExporter,
    MetricValues,
    Observer,
    exported_metrics,
)
from inplace.runtime.slots import EndReason, SequenceState

REFUSAL = RequestError(Code.CAPACITY, "too many")


@pytest.mark.parametrize(
    ("fields", "written"),
    [
        ({"sequence": 12, "slot": 0}, "event: sequence=12 slot=0"),
        ({"sequence": "12"}, 'event: sequence="12"'),  # a different sequence than 12
        ({"sequence": "stream-7.a/b:c"}, "event: sequence=stream-7.a/b:c"),
        ({"sequence": 'a "b"\nsequence=3'}, r'event: sequence="a \"b\"\nsequence=3"'),
        ({"sequences": [1, "1"], "seconds": 0.25}, 'event: sequences=[1, "1"] seconds=0.25'),
    ],
)
def test_a_log_line_quotes_everything_but_plain_words_and_numbers(
    fields: dict[str, object], written: str
) -> None:
    assert log_line("event", **fields) == written


def test_metric_names_follow_the_conventions_of_prometheus() -> None:
    for metric in METRICS:
        assert re.fullmatch(r"inplace_[a-z_]+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert metric.help.endswith(".")
    assert all(list(histogram.bounds) == sorted(set(histogram.bounds)) for histogram in HISTOGRAMS)
    assert len({metric.name for metric in exported_metrics()}) == len(list(exported_metrics()))


def test_a_bucket_counts_observations_at_or_below_its_bound() -> None:
    metrics = MetricValues()
    for rows in (1, 2, 2, 3, 8, 1000):
        metrics.observe(ROWS, rows)
    values = metrics.snapshot()
    assert [values[ROWS.buckets.name, bound] for bound in ("1", "2", "4", "8", "256", "+Inf")] == [
        1,
        3,
        4,
        5,
        5,
        6,
    ]
    assert (values[ROWS.count.name, ""], values[ROWS.sum.name, ""]) == (6, 1016)


def test_the_reasons_of_generations_are_the_finish_reasons() -> None:
    assert GENERATIONS.label_values == tuple(FinishReason)


def test_all_refusals_are_counted_and_some_a_second_are_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="inplace")
    clock = [100.0]
    observer = Observer(clock=lambda: clock[0])
    for number in range(MAX_LINES_PER_SECOND + 5):
        observer.request_refused(number + 1, f"r{number}", REFUSAL, end=False)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        f"request refused: sequence={number + 1} request=r{number} code=CAPACITY retryable=0"
        f' reason="too many"'
        for number in range(MAX_LINES_PER_SECOND)
    ]
    clock[0] += 1.0
    observer.request_refused("late", "", REFUSAL, end=True)
    lines = [record.getMessage() for record in caplog.records[MAX_LINES_PER_SECOND:]]
    assert lines == [
        "more requests refused: count=5",
        'request refused: sequence=late request=- code=CAPACITY retryable=0 reason="too many"',
    ]
    assert (
        observer.metrics.snapshot()["inplace_requests_refused_total", "CAPACITY"]
        == MAX_LINES_PER_SECOND + 6
    )


def test_all_ended_sequences_are_counted_and_some_a_second_are_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="inplace")
    clock = [100.0]
    observer = Observer(clock=lambda: clock[0])
    for number in range(MAX_LINES_PER_SECOND + 3):
        observer.sequence_ended(SequenceState(number + 1, slot=0), EndReason.IDLE)
    clock[0] += 1.0
    observer.sequence_ended(SequenceState("late", slot=1), EndReason.CANCELLED)
    assert [record.getMessage() for record in caplog.records[MAX_LINES_PER_SECOND:]] == [
        "more sequences ended: count=3",
        "sequence ended: sequence=late slot=1 length=0 reason=cancelled",
    ]
    assert (
        observer.metrics.snapshot()["inplace_sequences_ended_total", "idle"]
        == MAX_LINES_PER_SECOND + 3
    )


def test_an_end_refused_for_its_position_is_not_counted() -> None:
    observer = Observer()
    position = RequestError(Code.POSITION, "elsewhere")
    observer.request_refused(1, "r", position, end=True)
    assert observer.metrics.snapshot()["inplace_requests_refused_total", "POSITION"] == 0
    observer.request_refused(1, "r", position, end=False)
    assert observer.metrics.snapshot()["inplace_requests_refused_total", "POSITION"] == 1


class RecordedSeries:
    """A series that remembers its value."""

    def __init__(self) -> None:
        self.value = 0.0

    def increment(self, value: float) -> None:
        self.value += value

    def set(self, value: float) -> None:
        self.value = value


def test_values_are_exported_at_the_start_and_at_the_end() -> None:
    observer = Observer(num_slots=8, state_bytes=100)
    series: dict[str, RecordedSeries] = {}
    exporter = MetricsExporter(
        observer.metrics,
        {},
        lambda metric, labels: series.setdefault(
            metric.name + "".join(labels.values()), RecordedSeries()
        ),
        3600,
    )
    assert {name: kept.value for name, kept in series.items() if kept.value} == {
        "inplace_slots": 8,
        "inplace_slots_free": 8,
        "inplace_state_bytes": 100,
    }
    observer.sequence_started(SequenceState(1, 0))
    observer.sequence_ended(SequenceState(1, 0), EndReason.IDLE)
    observer.sequence_started(SequenceState(2, 0))
    exporter.close()
    assert series["inplace_sequences_started_total"].value == 2
    assert series["inplace_sequences_ended_totalidle"].value == 1
    assert series["inplace_slots_free"].value == 7


def test_the_documentation_names_every_metric_reason_and_log_line() -> None:
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    assert all(f"`{metric.name}`" in text for metric in (*METRICS, *HISTOGRAMS))
    assert all(f"`{why}`" in text for why in (*ENDED.label_values, *GENERATIONS.label_values))
    source = (Path(inplace.runtime.observer.__file__)).read_text()
    for event in re.findall(r'line\(\s*"([a-z ]+)"', source):
        assert f"{event}:" in text, event
