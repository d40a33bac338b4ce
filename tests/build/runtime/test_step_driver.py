"""The step driver on real engines: order, waves, outputs, idle slots."""

import logging
import threading
import time

import pytest
from inplace.drivers.step_driver import StepDriver
from inplace.errors import Code
from support.driving import (
    OpenDriver,
    assert_refused,
    engine_of,
    next_token,
    outputs_of,
    random_tokens,
    reference_token,
    run_one,
    step_request,
)
from support.models import CHUNK, SLOTS, VOCABULARY, Repository


def test_end_start_start_of_one_id_in_one_call_take_effect_in_that_order(
    llama: StepDriver, repository: Repository
) -> None:
    first, second, third = random_tokens(1, 5), random_tokens(2, 3), random_tokens(3, 4)
    llama.run([step_request(1, first, start=True)])
    answers = llama.run(
        [
            step_request(1, [9], end=True),
            step_request(1, second, start=True),
            step_request(1, third, start=True),
        ]
    )
    assert [next_token(answer) for answer in answers] == [
        reference_token(repository, ids) for ids in ([*first, 9], second, third)
    ]
    assert len(llama.instance.table) == 1
    assert next_token(run_one(llama, step_request(1, [7], position=4))) == reference_token(
        repository, [*third, 7]
    )


def test_steps_of_one_sequence_in_one_call_run_in_order_and_so_are_the_answers(
    llama: StepDriver, repository: Repository
) -> None:
    one, two = random_tokens(1, 5), random_tokens(2, 3)
    answers = llama.run(
        [
            step_request(1, one, start=True),
            step_request(1, [3]),
            step_request("1", two, start=True),
            step_request(1, [4], end=True),
            step_request("1", [5]),
            step_request(1, [6]),
        ]
    )
    expected = [one, [*one, 3], two, [*one, 3, 4], [*two, 5]]
    assert [next_token(answer) for answer in answers[:5]] == [
        reference_token(repository, ids) for ids in expected
    ]
    assert_refused(
        answers[5], Code.UNKNOWN_SEQUENCE, "no sequence 1 is live: it has not started, has ended"
    )


def test_a_start_waits_for_the_slot_that_an_end_of_the_same_call_frees(
    repository: Repository, drive: OpenDriver
) -> None:
    driver = drive(repository.path / "brief")
    ids = random_tokens(4, 6)
    driver.run([step_request(1, [1], start=True), step_request(2, [2], start=True)])
    slot = driver.instance.table.find(1).slot
    answers = driver.run(
        [
            step_request(2, [3]),
            step_request(1, [4], end=True),
            step_request(3, ids, start=True),
            step_request(3, [5]),
            step_request(4, [6], start=True),
        ]
    )
    assert [next_token(answer) for answer in answers[:4]] == [
        reference_token(repository, seen) for seen in ([2, 3], [1, 4], ids, [*ids, 5])
    ]
    assert_refused(
        answers[4], Code.NO_FREE_SLOT, "all 2 slots are owned by live sequences", retryable=True
    )
    assert driver.instance.table.find(3).slot == slot
    # The step that ended 1 did not have 3 yet.
    assert engine_of(driver).slots[1] == [1 - slot, slot]


def test_a_start_without_an_end_in_the_same_call_is_refused_at_once(
    repository: Repository, drive: OpenDriver
) -> None:
    driver = drive(repository.path / "brief")
    driver.run([step_request(1, [1], start=True), step_request(2, [2], start=True)])
    answers = driver.run([step_request(1, [4]), step_request(3, [5], start=True)])
    assert next_token(answers[0]) == reference_token(repository, [1, 4])
    assert_refused(answers[1], Code.NO_FREE_SLOT, "retry when one has ended", retryable=True)


def test_more_requests_than_rows_are_answered_in_several_steps(
    repository: Repository, drive: OpenDriver
) -> None:
    driver = drive(repository.path / "llama", slots=20)
    prompts = [random_tokens(seed, 1 + seed % 7) for seed in range(20)]
    answers = driver.run(
        [step_request(1 + seed, ids, start=True) for seed, ids in enumerate(prompts)]
    )
    assert [next_token(answer) for answer in answers] == [
        reference_token(repository, ids) for ids in prompts
    ]
    assert [len(slots) for slots in engine_of(driver).slots] == [SLOTS, SLOTS, 4]
    assert len({slot for slots in engine_of(driver).slots for slot in slots}) == 20


def test_a_long_prompt_takes_several_steps_and_a_short_one_only_the_first(
    llama: StepDriver, repository: Repository
) -> None:
    long, short = random_tokens(1, 2 * CHUNK + 3), random_tokens(2, 2)
    answers = llama.run([step_request(1, long, start=True), step_request(2, short, start=True)])
    assert [next_token(answer) for answer in answers] == [
        reference_token(repository, long),
        reference_token(repository, short),
    ]
    assert engine_of(llama).counts == [[CHUNK, 2], [CHUNK], [3]]
    assert llama.instance.table.find(1).length == len(long)


def test_without_requests_there_is_no_step(llama: StepDriver) -> None:
    assert llama.run([]) == []
    assert engine_of(llama).slots == []


def test_optional_outputs_are_returned_on_request_only(llama: StepDriver) -> None:
    assert set(outputs_of(run_one(llama, step_request(1, [1], start=True)))) == {"next_token"}
    both = outputs_of(run_one(llama, step_request(1, [2], logits="true")))
    assert set(both) == {"next_token", "logits"}
    assert both["logits"].shape == (1, VOCABULARY)
    assert int(both["logits"].argmax()) == int(both["next_token"])


def test_a_start_waits_for_an_end_that_comes_after_it(
    llama: StepDriver, repository: Repository
) -> None:
    llama.run([step_request(n + 1, [1], start=True) for n in range(SLOTS)])
    answers = llama.run([step_request("late", [1, 2], start=True), step_request(1, [3], end=True)])
    assert next_token(answers[0]) == reference_token(repository, [1, 2])
    assert llama.instance.table.num_free == 0


def test_the_driver_reclaims_an_idle_slot_by_itself(
    repository: Repository, drive: OpenDriver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="inplace")
    driver = drive(repository.path / "brief", idle_timeout=1.0)
    driver.run([step_request("quiet", [1, 2, 3], start=True)])
    assert driver.instance.table.num_free == 1
    deadline = time.monotonic() + 60.0
    while driver.instance.table.num_free < 2:
        assert time.monotonic() < deadline, "the slot was never reclaimed"
        time.sleep(0.02)
    assert_refused(
        run_one(driver, step_request("quiet", [4])),
        Code.UNKNOWN_SEQUENCE,
        "its slot was reclaimed (idle timeout 1 s)",
    )
    assert "sequence ended: sequence=quiet slot=0 length=3 reason=idle" in caplog.text
    assert next_token(run_one(driver, step_request("quiet", [4], start=True))) == reference_token(
        repository, [4]
    )


def test_close_stops_the_thread_at_once(llama: StepDriver) -> None:
    thread = next(thread for thread in threading.enumerate() if thread is llama._reclaimer)
    assert thread.daemon
    begin = time.monotonic()
    llama.close()
    assert time.monotonic() - begin < 60.0  # it was waiting for 600 s
    assert not thread.is_alive()
