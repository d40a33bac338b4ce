"""What a model instance counts and logs while drivers step a real engine."""

import logging
import time

import pytest
from inplace.drivers import StepDriver, TokenizerConfig
from inplace.runtime.metrics import (
    ENDED,
    QUEUE,
    ROWS,
    STEP,
    exported_metrics,
)
from inplace.runtime.slots import EndReason
from support.driving import BAD, Open, ask, watched
from support.models import CHUNK, SLOTS, Repository
from support.streaming import OpenStreams, slowed, until


def now(driver: StepDriver) -> dict[tuple[str, str], float]:
    return driver.instance.observer.metrics.snapshot()


def test_every_number_is_there_before_anything_has_happened(llama: StepDriver) -> None:
    found = now(llama)
    assert set(found) == {
        (metric.name, value) for metric in exported_metrics() for value in metric.label_values
    }
    arena = llama.instance.arena
    assert {key: value for key, value in found.items() if value} == {
        ("inplace_slots", ""): SLOTS,
        ("inplace_slots_free", ""): SLOTS,
        ("inplace_state_bytes", ""): arena.bytes,
    }


def test_steps_tokens_and_sequences_are_counted(llama: StepDriver) -> None:
    llama.run(
        [ask(1, list(range(2 * CHUNK + 3)), start=True), ask(2, [1], start=True)]
    )  # 3 steps, the first of 2 rows
    llama.run([ask(1, [3]), ask(2, [4])])
    llama.run([ask(1, [5], end=True), ask(2, [6, 7])])
    llama.run([ask(2, [8], start=True)])
    found = now(llama)
    assert (found["inplace_tokens_total", "prefill"], found["inplace_tokens_total", "decode"]) == (
        2 * CHUNK + 3 + 1 + 2 + 1,
        3,
    )
    assert found["inplace_sequences_started_total", ""] == 3
    assert {why: found[ENDED.name, why] for why in EndReason if found[ENDED.name, why]} == {
        EndReason.END: 1,
        EndReason.START: 1,
    }
    assert (found["inplace_sequences_live", ""], found["inplace_slots_free", ""]) == (1, SLOTS - 1)
    assert (found[STEP.count.name, ""], found[ROWS.count.name, ""], found[ROWS.sum.name, ""]) == (
        6,
        6,
        2 + 1 + 1 + 2 + 2 + 1,
    )
    assert found[QUEUE.count.name, ""] == 7
    assert 0 < found[STEP.sum.name, ""] < 10


def test_the_wait_for_a_place_is_the_queue_time(llama: StepDriver) -> None:
    late = ask(1, [1], start=True)
    time.sleep(0.03)
    llama.run([late])
    assert now(llama)[QUEUE.buckets.name, "0.02"] == 0
    assert 0.03 <= now(llama)[QUEUE.sum.name, ""] < 5


def test_a_failed_step_is_a_step_without_tokens_and_one_error_line_names_its_requests(
    llama: StepDriver, caplog: pytest.LogCaptureFixture
) -> None:
    llama.run([ask(1, [1], start=True)])
    watched(llama).fail_at = 1
    caplog.clear()
    llama.run([ask(1, [2], end=True), ask("two", [3], start=True)])
    found = now(llama)
    assert found[ENDED.name, EndReason.ENGINE_FAILED] == 2
    assert (found["inplace_tokens_total", "prefill"], found["inplace_tokens_total", "decode"]) == (
        1,
        0,
    )
    assert found[STEP.count.name, ""] == 2
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [record.getMessage() for record in errors] == [
        'engine failed: rows=2 sequences=[1, "two"] requests=["", ""]'
    ]
    assert errors[0].exc_info is not None
    assert "out of luck" in str(errors[0].exc_info[1])


def test_a_start_that_was_refused_has_ended_what_it_replaces(
    llama: StepDriver, repository: Repository
) -> None:
    llama.run([ask(1, [1], start=True)])
    llama.run([ask(1, BAD, start=True)])
    assert now(llama)[ENDED.name, EndReason.START] == 1
    assert now(llama)["inplace_sequences_started_total", ""] == 1


def test_generations_are_counted_when_they_speak_and_when_they_finish(streams: OpenStreams) -> None:
    talk = streams(TokenizerConfig(eos_token_ids=frozenset()))
    assert talk.generate(1, [1, 2, 3], 4).reason == "length"
    assert talk.generate(2, [1, 2, 3], 4, end=True, temperature=0).reason == "length"
    found = talk.driver.instance.observer.metrics.snapshot()
    assert found["inplace_generations_total", "length"] == 2
    assert found["inplace_first_token_seconds_count", ""] == 2
    assert (found["inplace_tokens_total", "prefill"], found["inplace_tokens_total", "decode"]) == (
        6,
        6,
    )  # the last one said is not fed
    assert found["inplace_sequences_live", ""] == 1


def test_generations_that_wait_for_a_slot_are_shown(streams: OpenStreams) -> None:
    talk = streams()
    numbers = talk.driver.instance.observer.metrics
    with slowed(talk, 0.02):
        running = [talk.generate(1 + number, [1, 2], 40, end=True) for number in range(SLOTS)]
        late = [talk.generate(100 + number, [3], 1, end=True) for number in range(3)]
        until(lambda: numbers.snapshot()["inplace_generations_waiting", ""] == 3)
        assert all(heard.reason == "length" for heard in [*running, *late])
    found = numbers.snapshot()
    assert found["inplace_generations_waiting", ""] == 0
    assert found["inplace_generations_total", "length"] == SLOTS + 3
    assert (
        found["inplace_queue_seconds_bucket", "0.05"] <= SLOTS
    )  # those that waited are in no small bucket


def test_idle_sequences_are_counted_and_logged(
    repository: Repository, drive: Open, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="inplace")
    driver = drive(repository.path / "brief", idle_timeout=0.2)
    driver.run([ask("x y", [1, 2], start=True)])
    deadline = time.monotonic() + 10.0
    while now(driver)["inplace_slots_free", ""] < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert now(driver)[ENDED.name, EndReason.IDLE] == 1
    assert 'sequence ended: sequence="x y" slot=0 length=2 reason=idle' in caplog.text
    assert "sequence started" not in caplog.text  # at DEBUG


def test_starts_and_ends_are_logged_at_debug(
    llama: StepDriver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="inplace")
    llama.run([ask(7, [1, 2], start=True)])
    llama.run([ask(7, [3], end=True)])
    found = [record.getMessage() for record in caplog.records if record.name == "inplace"]
    assert found == [
        "sequence started: sequence=7 slot=0",
        "sequence ended: sequence=7 slot=0 length=3 reason=end",
    ]
