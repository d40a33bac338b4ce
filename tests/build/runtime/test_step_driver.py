"""The step driver on real engines: order, waves, outputs, idle slots."""

import logging
import threading
import time

import pytest
from inplace.drivers.step import StepDriver
from inplace.errors import Code
from support.driving import Open, ask, outputs, prompt, refused, said, token, watched
from support.models import CHUNK, SLOTS, VOCABULARY, Repository


def test_end_start_start_of_one_id_in_one_call_take_effect_in_that_order(
    llama: StepDriver, repository: Repository
) -> None:
    first, second, third = prompt(1, 5), prompt(2, 3), prompt(3, 4)
    llama.run([ask(1, first, start=True)])
    answers = llama.run(
        [ask(1, [9], end=True), ask(1, second, start=True), ask(1, third, start=True)]
    )
    assert [token(answer) for answer in answers] == [
        said(repository, ids) for ids in ([*first, 9], second, third)
    ]
    assert len(llama.instance.table) == 1
    assert token(llama.run([ask(1, [7], position=4)])[0]) == said(repository, [*third, 7])


def test_steps_of_one_sequence_in_one_call_follow_each_other_and_answers_keep_the_order_asked(
    llama: StepDriver, repository: Repository
) -> None:
    one, two = prompt(1, 5), prompt(2, 3)
    answers = llama.run(
        [
            ask(1, one, start=True),
            ask(1, [3]),
            ask("1", two, start=True),
            ask(1, [4], end=True),
            ask("1", [5]),
            ask(1, [6]),
        ]
    )
    expected = [one, [*one, 3], two, [*one, 3, 4], [*two, 5]]
    assert [token(answer) for answer in answers[:5]] == [said(repository, ids) for ids in expected]
    refused(
        answers[5], Code.UNKNOWN_SEQUENCE, "no sequence 1 is live: it has not started, has ended"
    )


def test_a_start_waits_for_the_slot_an_end_of_the_same_call_frees(
    repository: Repository, drive: Open
) -> None:
    driver = drive(repository.path / "brief")
    ids = prompt(4, 6)
    driver.run([ask(1, [1], start=True), ask(2, [2], start=True)])
    slot = driver.instance.table.find(1).slot
    answers = driver.run(
        [
            ask(2, [3]),
            ask(1, [4], end=True),
            ask(3, ids, start=True),
            ask(3, [5]),
            ask(4, [6], start=True),
        ]
    )
    assert [token(answer) for answer in answers[:4]] == [
        said(repository, seen) for seen in ([2, 3], [1, 4], ids, [*ids, 5])
    ]
    refused(
        answers[4], Code.NO_FREE_SLOT, "all 2 slots are owned by live sequences", retryable=True
    )
    assert driver.instance.table.find(3).slot == slot
    assert watched(driver).slots[1] == [1 - slot, slot]  # the step that ended 1 did not yet know 3


def test_a_start_without_an_end_beside_it_is_refused_at_once(
    repository: Repository, drive: Open
) -> None:
    driver = drive(repository.path / "brief")
    driver.run([ask(1, [1], start=True), ask(2, [2], start=True)])
    answers = driver.run([ask(1, [4]), ask(3, [5], start=True)])
    assert token(answers[0]) == said(repository, [1, 4])
    refused(answers[1], Code.NO_FREE_SLOT, "retry when one has ended", retryable=True)


def test_more_requests_than_rows_are_answered_in_several_steps(
    repository: Repository, drive: Open
) -> None:
    driver = drive(repository.path / "llama", slots=20)
    prompts = [prompt(seed, 1 + seed % 7) for seed in range(20)]
    answers = driver.run([ask(1 + seed, ids, start=True) for seed, ids in enumerate(prompts)])
    assert [token(answer) for answer in answers] == [said(repository, ids) for ids in prompts]
    assert [len(slots) for slots in watched(driver).slots] == [SLOTS, SLOTS, 4]
    assert len({slot for slots in watched(driver).slots for slot in slots}) == 20


def test_a_prompt_longer_than_the_chunk_takes_several_steps_and_a_short_one_beside_it_only_the_first(
    llama: StepDriver, repository: Repository
) -> None:
    long, short = prompt(1, 2 * CHUNK + 3), prompt(2, 2)
    answers = llama.run([ask(1, long, start=True), ask(2, short, start=True)])
    assert [token(answer) for answer in answers] == [
        said(repository, long),
        said(repository, short),
    ]
    assert watched(llama).counts == [[CHUNK, 2], [CHUNK], [3]]
    assert llama.instance.table.find(1).length == len(long)


def test_no_requests_are_no_step(llama: StepDriver) -> None:
    assert llama.run([]) == []
    assert watched(llama).slots == []


def test_outputs_on_request_come_only_then(llama: StepDriver) -> None:
    assert set(outputs(llama.run([ask(1, [1], start=True)])[0])) == {"next_token"}
    both = outputs(llama.run([ask(1, [2], logits="true")])[0])
    assert set(both) == {"next_token", "logits"}
    assert both["logits"].shape == (1, VOCABULARY)
    assert int(both["logits"].argmax()) == int(both["next_token"])


def test_a_start_before_the_end_that_frees_its_slot_waits_for_it(
    llama: StepDriver, repository: Repository
) -> None:
    llama.run([ask(n + 1, [1], start=True) for n in range(SLOTS)])
    answers = llama.run([ask("late", [1, 2], start=True), ask(1, [3], end=True)])
    assert token(answers[0]) == said(repository, [1, 2])
    assert llama.instance.table.num_free == 0


def test_the_drivers_own_thread_reclaims_an_idle_slot(
    repository: Repository, drive: Open, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="inplace")
    driver = drive(repository.path / "brief", idle_timeout=0.4)
    driver.run([ask("quiet", [1, 2, 3], start=True)])
    assert driver.instance.table.num_free == 1
    deadline = time.monotonic() + 10.0
    while driver.instance.table.num_free < 2:
        assert time.monotonic() < deadline, "the slot was never reclaimed"
        time.sleep(0.02)
    refused(
        driver.run([ask("quiet", [4])])[0],
        Code.UNKNOWN_SEQUENCE,
        "its slot was reclaimed (idle timeout 0.4 s)",
    )
    assert "sequence ended: sequence=quiet slot=0 length=3 reason=idle" in caplog.text
    assert token(driver.run([ask("quiet", [4], start=True)])[0]) == said(repository, [4])


def test_close_stops_the_thread_at_once(llama: StepDriver) -> None:
    thread = next(thread for thread in threading.enumerate() if thread is llama._reclaimer)
    assert thread.daemon
    begin = time.monotonic()
    llama.close()
    assert time.monotonic() - begin < 5.0  # its pause is 600 s
    assert not thread.is_alive()
