"""The step driver on real engines that fail, after they have written: who must START again, who may repeat, who notices nothing."""

import pytest
import torch
from inplace.drivers.step import StepDriver
from inplace.errors import Code
from support.driving import Open, add, ask, memory, prompt, refused, said, token, total, watched
from support.models import CHUNK, SLOTS, Repository


@pytest.mark.parametrize(
    "fail_at", [1, 2]
)  # in the first and in the second chunk of the long prompt
def test_where_states_only_append_a_failed_step_is_retryable_and_unchanged(
    llama: StepDriver, repository: Repository, fail_at: int, caplog: pytest.LogCaptureFixture
) -> None:
    ids, more = prompt(1, 5), prompt(2, CHUNK + 2)
    llama.run([ask(1, ids, start=True), ask(2, ids, start=True), ask(3, ids, start=True)])
    slot = llama.instance.table.find(3).slot
    idle = {name: bits[slot].clone() for name, bits in memory(llama).items()}
    watched(llama).fail_at = fail_at
    answers = llama.run([ask(1, more), ask(2, [9])])
    says = "the engine failed (RuntimeError: out of luck); nothing was changed, send it again"
    refused(answers[0], Code.ENGINE_FAILED, says, retryable=True)
    if fail_at == 1:
        refused(answers[1], Code.ENGINE_FAILED, says, retryable=True)
    else:
        assert token(answers[1]) == said(repository, [*ids, 9])
    assert [llama.instance.table.find(number).length for number in (1, 2, 3)] == [5, 4 + fail_at, 5]
    assert all(torch.equal(bits[slot], idle[name]) for name, bits in memory(llama).items())
    assert "out of luck" in caplog.text
    assert token(llama.run([ask(1, more, position=5)])[0]) == said(repository, [*ids, *more])


def test_where_states_are_rewritten_a_failed_step_ends_its_sequences_and_no_others(
    sums: StepDriver,
) -> None:
    sums.run([add(1, 1.0, start=True), add(2, 2.0, start=True), add(3, 3.0, start=True)])
    watched(sums).fail_at = 1
    for answer in sums.run([add(1, 1.0), add(2, 2.0, end=True)]):
        refused(
            answer,
            Code.ENGINE_FAILED,
            "the engine failed (RuntimeError: out of luck); the sequence has ended, START it again",
        )
    assert (len(sums.instance.table), sums.instance.table.num_free) == (1, 3)
    refused(sums.run([add(1, 1.0)])[0], Code.UNKNOWN_SEQUENCE)
    assert total(sums.run([add(3, 3.0)])[0]) == ([6.0] * 4, 2)
    assert [
        total(answer) for answer in sums.run([add(1, 7.0, start=True), add(2, 8.0, start=True)])
    ] == [([7.0] * 4, 1), ([8.0] * 4, 1)]


def test_rows_of_the_next_step_are_not_touched_by_a_failed_one(
    repository: Repository, drive: Open
) -> None:
    driver = drive(repository.path / "accumulator", slots=6)  # 4 rows a step
    watched(driver).fail_at = 1
    answers = driver.run([add(1 + n, float(n), start=True) for n in range(6)])
    for answer in answers[:4]:
        refused(answer, Code.ENGINE_FAILED, "no slot is held, START again", retryable=True)
    assert [total(answer) for answer in answers[4:]] == [([4.0] * 4, 1), ([5.0] * 4, 1)]


def test_a_defect_of_the_driver_itself_answers_its_rows_and_leaves_no_sequence_busy(
    sums: StepDriver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sums.run([add(1, 1.0, start=True), add(2, 2.0, start=True)])
    with monkeypatch.context() as patched:
        patched.setattr("inplace.runtime.instance.form_batch", lambda *_: 1 // 0)
        for answer in sums.run([add(1, 1.0), add(3, 1.0, start=True)]):
            refused(
                answer,
                Code.ENGINE_FAILED,
                "the backend failed (ZeroDivisionError: integer division or modulo by zero); START again",
            )
    assert "the step driver failed" in caplog.text
    assert sums.instance.table.num_free == 3
    assert total(sums.run([add(2, 2.0)])[0]) == ([4.0] * 4, 2)


def test_a_request_that_cannot_be_taken_fails_alone(
    sums: StepDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = sums.instance.validate
    monkeypatch.setattr(
        sums.instance,
        "validate",
        lambda request: 1 // 0 if request.sequence_id == 1 else check(request),
    )
    one, two = sums.run([add(1, 1.0, start=True), add(2, 2.0, start=True)])
    refused(one, Code.ENGINE_FAILED, "the backend failed (ZeroDivisionError")
    assert total(two) == ([2.0] * 4, 1)


def test_a_failed_end_has_ended_and_says_so(llama: StepDriver) -> None:
    """Triton has ended the sequence whatever the answer is, so sending it again could not reach it."""
    llama.run([ask(1, [1, 2], start=True)])
    watched(llama).fail_at = 1
    refused(
        llama.run([ask(1, [3], end=True)])[0],
        Code.ENGINE_FAILED,
        "the sequence has ended, START it again",
        retryable=False,
    )
    assert llama.instance.table.num_free == SLOTS


def test_a_failed_start_leaves_no_slot(llama: StepDriver) -> None:
    watched(llama).fail_at = 1
    refused(llama.run([ask(1, [1, 2], start=True)])[0], Code.ENGINE_FAILED, retryable=True)
    assert llama.instance.table.num_free == SLOTS


def test_a_failed_start_can_be_sent_again(llama: StepDriver, repository: Repository) -> None:
    watched(llama).fail_at = 1
    refused(llama.run([ask(1, [1, 2], start=True)])[0], Code.ENGINE_FAILED, retryable=True)
    assert token(llama.run([ask(1, [1, 2], start=True)])[0]) == said(repository, [1, 2])
    assert llama.instance.table.num_free == SLOTS - 1
