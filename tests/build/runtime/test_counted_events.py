"""What a model instance counts and logs while drivers step a real engine."""

import logging
import time

import pytest
from inplace.drivers import StepDriver, TokenizerConfig
from inplace.runtime.observer import (
    ENDED,
    QUEUE,
    ROWS,
    STEP,
    exported_metrics,
)
from inplace.runtime.slots import EndReason
from support.driving import INVALID_TOKENS, OpenDriver, engine_of, step_request
from support.models import CHUNK, SLOTS, Repository
from support.streaming import OpenStreams, slow_steps, wait_until


def snapshot(driver: StepDriver) -> dict[tuple[str, str], float]:
    return driver.instance.observer.metrics.snapshot()


def test_every_metric_is_there_before_anything_has_happened(llama: StepDriver) -> None:
    metrics = snapshot(llama)
    assert set(metrics) == {
        (metric.name, value) for metric in exported_metrics() for value in metric.label_values
    }
    arena = llama.instance.arena
    assert {key: value for key, value in metrics.items() if value} == {
        ("inplace_slots", ""): SLOTS,
        ("inplace_slots_free", ""): SLOTS,
        ("inplace_state_bytes", ""): arena.bytes,
    }


def test_steps_tokens_and_sequences_are_counted(llama: StepDriver) -> None:
    prompt = list(range(2 * CHUNK + 3))  # 3 steps, the first of 2 rows
    llama.run([step_request(1, prompt, start=True), step_request(2, [1], start=True)])
    llama.run([step_request(1, [3]), step_request(2, [4])])
    llama.run([step_request(1, [5], end=True), step_request(2, [6, 7])])
    llama.run([step_request(2, [8], start=True)])
    metrics = snapshot(llama)
    assert metrics["inplace_tokens_total", "prefill"] == 2 * CHUNK + 3 + 1 + 2 + 1
    assert metrics["inplace_tokens_total", "decode"] == 3
    assert metrics["inplace_sequences_started_total", ""] == 3
    assert {
        reason: metrics[ENDED.name, reason] for reason in EndReason if metrics[ENDED.name, reason]
    } == {
        EndReason.END: 1,
        EndReason.START: 1,
    }
    assert (metrics["inplace_sequences_live", ""], metrics["inplace_slots_free", ""]) == (
        1,
        SLOTS - 1,
    )
    assert (
        metrics[STEP.count.name, ""],
        metrics[ROWS.count.name, ""],
        metrics[ROWS.sum.name, ""],
    ) == (
        6,
        6,
        2 + 1 + 1 + 2 + 2 + 1,
    )
    assert metrics[QUEUE.count.name, ""] == 7
    assert metrics[STEP.sum.name, ""] > 0


def test_the_queue_time_is_the_time_until_admission(llama: StepDriver) -> None:
    late = step_request(1, [1], start=True)
    time.sleep(0.03)
    llama.run([late])
    assert snapshot(llama)[QUEUE.buckets.name, "0.02"] == 0
    assert snapshot(llama)[QUEUE.sum.name, ""] >= 0.03


def test_a_failed_step_counts_no_tokens_and_logs_one_line_with_its_requests(
    llama: StepDriver, caplog: pytest.LogCaptureFixture
) -> None:
    llama.run([step_request(1, [1], start=True)])
    engine_of(llama).fail_at = 1
    caplog.clear()
    llama.run([step_request(1, [2], end=True), step_request("two", [3], start=True)])
    metrics = snapshot(llama)
    assert metrics[ENDED.name, EndReason.ENGINE_FAILED] == 2
    assert (
        metrics["inplace_tokens_total", "prefill"],
        metrics["inplace_tokens_total", "decode"],
    ) == (
        1,
        0,
    )
    assert metrics[STEP.count.name, ""] == 2
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [record.getMessage() for record in errors] == [
        'engine failed: rows=2 sequences=[1, "two"] requests=["", ""]'
    ]
    assert errors[0].exc_info is not None
    assert "out of luck" in str(errors[0].exc_info[1])


def test_a_refused_start_ends_the_sequence_that_it_replaces(
    llama: StepDriver, repository: Repository
) -> None:
    llama.run([step_request(1, [1], start=True)])
    llama.run([step_request(1, INVALID_TOKENS, start=True)])
    assert snapshot(llama)[ENDED.name, EndReason.START] == 1
    assert snapshot(llama)["inplace_sequences_started_total", ""] == 1


def test_generations_are_counted_at_the_first_token_and_when_they_finish(
    streams: OpenStreams,
) -> None:
    client = streams(TokenizerConfig(eos_token_ids=frozenset()))
    assert client.generate(1, [1, 2, 3], 4).finish_reason == "length"
    assert client.generate(2, [1, 2, 3], 4, end=True, temperature=0).finish_reason == "length"
    metrics = client.driver.instance.observer.metrics.snapshot()
    assert metrics["inplace_generations_total", "length"] == 2
    assert metrics["inplace_first_token_seconds_count", ""] == 2
    assert metrics["inplace_tokens_total", "prefill"] == 6
    assert metrics["inplace_tokens_total", "decode"] == 6  # the last token is not fed
    assert metrics["inplace_sequences_live", ""] == 1


def test_generations_that_wait_for_a_slot_are_a_metric(streams: OpenStreams) -> None:
    client = streams()
    numbers = client.driver.instance.observer.metrics
    with slow_steps(client, 0.02):
        running = [client.generate(1 + number, [1, 2], 40, end=True) for number in range(SLOTS)]
        late = [client.generate(100 + number, [3], 1, end=True) for number in range(3)]
        wait_until(lambda: numbers.snapshot()["inplace_requests_waiting", ""] == 3)
        assert all(channel.finish_reason == "length" for channel in [*running, *late])
    metrics = numbers.snapshot()
    assert metrics["inplace_requests_waiting", ""] == 0
    assert metrics["inplace_generations_total", "length"] == SLOTS + 3
    assert metrics["inplace_queue_seconds_bucket", "0.05"] <= SLOTS  # those that waited took longer


def test_idle_sequences_are_counted_and_logged(
    repository: Repository, drive: OpenDriver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="inplace")
    driver = drive(repository.path / "brief", idle_timeout=0.2)
    driver.run([step_request("x y", [1, 2], start=True)])
    deadline = time.monotonic() + 60.0
    while snapshot(driver)["inplace_slots_free", ""] < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert snapshot(driver)[ENDED.name, EndReason.IDLE] == 1
    assert 'sequence ended: sequence="x y" slot=0 length=2 reason=idle' in caplog.text
    assert "sequence started" not in caplog.text  # at DEBUG


def test_starts_and_ends_are_logged_at_debug(
    llama: StepDriver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="inplace")
    llama.run([step_request(7, [1, 2], start=True)])
    llama.run([step_request(7, [3], end=True)])
    lines = [record.getMessage() for record in caplog.records if record.name == "inplace"]
    assert lines == [
        "sequence started: sequence=7 slot=0",
        "sequence ended: sequence=7 slot=0 length=3 reason=end",
    ]
