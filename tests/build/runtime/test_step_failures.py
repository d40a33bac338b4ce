"""The step driver on real engines that fail after they have written memory.

Some sequences must START again, some requests can be repeated, the others are unchanged.
"""

import pytest
import torch
from inplace.drivers.step_driver import StepDriver
from inplace.errors import Code
from support.driving import (
    OpenDriver,
    arena_bytes,
    assert_refused,
    engine_of,
    next_token,
    random_tokens,
    reference_token,
    run_one,
    step_request,
    sum_and_count,
    sum_request,
)
from support.models import CHUNK, SLOTS, Repository


@pytest.mark.parametrize("fail_at", [1, 2], ids=["first chunk", "second chunk"])
def test_where_states_only_append_a_failed_step_is_retryable_and_unchanged(
    llama: StepDriver, repository: Repository, fail_at: int, caplog: pytest.LogCaptureFixture
) -> None:
    ids, more = random_tokens(1, 5), random_tokens(2, CHUNK + 2)
    llama.run(
        [
            step_request(1, ids, start=True),
            step_request(2, ids, start=True),
            step_request(3, ids, start=True),
        ]
    )
    slot = llama.instance.table.find(3).slot
    idle = {name: bits[slot].clone() for name, bits in arena_bytes(llama).items()}
    engine_of(llama).fail_at = fail_at
    answers = llama.run([step_request(1, more), step_request(2, [9])])
    message = "the engine failed (RuntimeError: out of luck); nothing was changed, send it again"
    assert_refused(answers[0], Code.ENGINE_FAILED, message, retryable=True)
    if fail_at == 1:
        assert_refused(answers[1], Code.ENGINE_FAILED, message, retryable=True)
    else:
        assert next_token(answers[1]) == reference_token(repository, [*ids, 9])
    assert [llama.instance.table.find(number).length for number in (1, 2, 3)] == [5, 4 + fail_at, 5]
    assert all(torch.equal(bits[slot], idle[name]) for name, bits in arena_bytes(llama).items())
    assert "out of luck" in caplog.text
    assert next_token(run_one(llama, step_request(1, more, position=5))) == reference_token(
        repository, [*ids, *more]
    )


def test_where_states_are_rewritten_a_failed_step_ends_its_sequences_and_no_others(
    sums: StepDriver,
) -> None:
    sums.run(
        [
            sum_request(1, 1.0, start=True),
            sum_request(2, 2.0, start=True),
            sum_request(3, 3.0, start=True),
        ]
    )
    engine_of(sums).fail_at = 1
    for answer in sums.run([sum_request(1, 1.0), sum_request(2, 2.0, end=True)]):
        assert_refused(
            answer,
            Code.ENGINE_FAILED,
            "the engine failed (RuntimeError: out of luck); the sequence has ended, START it again",
        )
    assert (len(sums.instance.table), sums.instance.table.num_free) == (1, 3)
    assert_refused(run_one(sums, sum_request(1, 1.0)), Code.UNKNOWN_SEQUENCE)
    assert sum_and_count(run_one(sums, sum_request(3, 3.0))) == ([6.0] * 4, 2)
    assert [
        sum_and_count(answer)
        for answer in sums.run([sum_request(1, 7.0, start=True), sum_request(2, 8.0, start=True)])
    ] == [([7.0] * 4, 1), ([8.0] * 4, 1)]


def test_rows_of_the_next_step_are_not_changed_by_a_failed_one(
    repository: Repository, drive: OpenDriver
) -> None:
    driver = drive(repository.path / "accumulator", slots=6)  # 4 rows a step
    engine_of(driver).fail_at = 1
    answers = driver.run([sum_request(1 + n, float(n), start=True) for n in range(6)])
    for answer in answers[:4]:
        assert_refused(answer, Code.ENGINE_FAILED, "no slot is held, START again", retryable=True)
    assert [sum_and_count(answer) for answer in answers[4:]] == [([4.0] * 4, 1), ([5.0] * 4, 1)]


def test_a_defect_of_the_driver_answers_its_rows_and_leaves_no_sequence_busy(
    sums: StepDriver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sums.run([sum_request(1, 1.0, start=True), sum_request(2, 2.0, start=True)])
    with monkeypatch.context() as patched:
        patched.setattr("inplace.runtime.instance.form_batch", lambda *_, **__: 1 // 0)
        for answer in sums.run([sum_request(1, 1.0), sum_request(3, 1.0, start=True)]):
            assert_refused(
                answer,
                Code.ENGINE_FAILED,
                "failed (ZeroDivisionError: integer division or modulo by zero); START again",
            )
    assert "the step driver failed" in caplog.text
    assert sums.instance.table.num_free == 3
    assert sum_and_count(run_one(sums, sum_request(2, 2.0))) == ([4.0] * 4, 2)


def test_a_defect_in_one_request_fails_that_request_alone(
    sums: StepDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = sums.instance.validate
    monkeypatch.setattr(
        sums.instance,
        "validate",
        lambda request: 1 // 0 if request.sequence_id == 1 else check(request),
    )
    one, two = sums.run([sum_request(1, 1.0, start=True), sum_request(2, 2.0, start=True)])
    assert_refused(one, Code.ENGINE_FAILED, "the backend failed (ZeroDivisionError")
    assert sum_and_count(two) == ([2.0] * 4, 1)


def test_a_failed_end_has_ended_its_sequence(llama: StepDriver) -> None:
    """Triton has ended the sequence whatever the answer is: a retry could not reach it."""
    llama.run([step_request(1, [1, 2], start=True)])
    engine_of(llama).fail_at = 1
    assert_refused(
        run_one(llama, step_request(1, [3], end=True)),
        Code.ENGINE_FAILED,
        "the sequence has ended, START it again",
        retryable=False,
    )
    assert llama.instance.table.num_free == SLOTS


def test_a_failed_start_leaves_no_slot(llama: StepDriver) -> None:
    engine_of(llama).fail_at = 1
    assert_refused(
        run_one(llama, step_request(1, [1, 2], start=True)), Code.ENGINE_FAILED, retryable=True
    )
    assert llama.instance.table.num_free == SLOTS


def test_a_failed_start_can_be_sent_again(llama: StepDriver, repository: Repository) -> None:
    engine_of(llama).fail_at = 1
    assert_refused(
        run_one(llama, step_request(1, [1, 2], start=True)), Code.ENGINE_FAILED, retryable=True
    )
    assert next_token(run_one(llama, step_request(1, [1, 2], start=True))) == reference_token(
        repository, [1, 2]
    )
    assert llama.instance.table.num_free == SLOTS - 1
