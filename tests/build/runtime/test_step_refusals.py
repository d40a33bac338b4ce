"""The step driver on real engines: a refused request changes nothing but what its flags do."""

import pytest
import torch
from inplace.drivers.step_driver import StepDriver
from inplace.errors import Code
from inplace.runtime.requests import Request
from inplace.runtime.slots import SequenceId
from support.driving import (
    INVALID_TOKENS,
    OpenDriver,
    arena_bytes,
    assert_refused,
    engine_of,
    next_token,
    outputs_of,
    random_tokens,
    reference_token,
    run_one,
    same_bytes,
    step_request,
    sum_and_count,
    sum_request,
)
from support.models import CAPACITY, SLOTS, VOCABULARY, Repository


def test_invalid_requests_do_not_change_the_others_of_a_call(
    repository: Repository, drive: OpenDriver
) -> None:
    mixed, clean = drive(repository.path / "llama"), drive(repository.path / "llama")
    starts = [step_request(seed, random_tokens(seed, 3 + seed), start=True) for seed in range(1, 5)]
    for driver in (mixed, clean):
        driver.run(starts)
    good = [
        step_request(1, [5], logits=True),
        step_request(2, random_tokens(9, 12), logits=True),
        step_request(4, [6], end=True, logits=True),
    ]
    bad = [
        step_request(3, INVALID_TOKENS),
        step_request(99, [1]),
        step_request(98, [1] * (CAPACITY + 1), start=True),
        Request(97, True, False, {}),
    ]
    answers = mixed.run([bad[0], good[0], bad[1], good[1], bad[2], good[2], bad[3]])
    alone = clean.run(good)
    assert_refused(answers[0], Code.VALUE_RANGE, f"holds {VOCABULARY}")
    assert_refused(answers[2], Code.UNKNOWN_SEQUENCE)
    assert_refused(answers[4], Code.CAPACITY, f"{CAPACITY + 1} tokens do not fit")
    assert_refused(answers[6], Code.MISSING_INPUT)
    for answer, expected in zip(answers[1::2], alone, strict=True):
        assert torch.equal(outputs_of(answer)["logits"], outputs_of(expected)["logits"])
        assert torch.isfinite(outputs_of(answer)["logits"]).all()
    assert same_bytes(arena_bytes(mixed), arena_bytes(clean))
    assert mixed.instance.table.find(3).length == clean.instance.table.find(3).length == 6


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (step_request(1, INVALID_TOKENS), Code.VALUE_RANGE),
        (step_request(1, [-1]), Code.VALUE_RANGE),
        (step_request(1, [1] * (CAPACITY - 4)), Code.CAPACITY),
        (
            Request(1, False, False, {"input_ids": torch.zeros(1, 0, dtype=torch.int64)}),
            Code.EMPTY_INPUT,
        ),
        (Request(1, False, False, {"input_ids": torch.zeros(1, 2)}), Code.BAD_DTYPE),
        (
            Request(1, False, False, {"input_ids": torch.zeros(2, 2, dtype=torch.int64)}),
            Code.BAD_SHAPE,
        ),
        (Request(1, False, False, {}), Code.MISSING_INPUT),
        (step_request(1, [1], logits="perhaps"), Code.BAD_PARAMETER),
        (step_request(1, [1], position=-1), Code.BAD_PARAMETER),
        (step_request(1, [1], max_tokens=5), Code.BAD_PARAMETER),
        (step_request(1, [1], position=4), Code.POSITION),
        (step_request(1, [1], position=6), Code.POSITION),
    ],
)
def test_a_refused_step_changes_nothing_and_the_next_one_continues(
    llama: StepDriver, repository: Repository, request_: Request, code: Code
) -> None:
    ids = random_tokens(1, 5)
    llama.run([step_request(1, ids, start=True)])
    before, addresses, steps = (
        arena_bytes(llama),
        llama.instance.arena.addresses(),
        len(engine_of(llama).slots),
    )
    assert_refused(run_one(llama, request_), code)
    assert same_bytes(arena_bytes(llama), before)
    assert llama.instance.arena.addresses() == addresses
    assert len(engine_of(llama).slots) == steps
    assert not llama.instance.table.find(1).busy
    assert next_token(run_one(llama, step_request(1, [7], position=5))) == reference_token(
        repository, [*ids, 7]
    )


def test_a_refused_start_leaves_no_slot(llama: StepDriver, repository: Repository) -> None:
    for attempt in range(2 * SLOTS):
        assert_refused(
            run_one(llama, step_request(100 + attempt, INVALID_TOKENS, start=True)),
            Code.VALUE_RANGE,
        )
    assert llama.instance.table.num_free == SLOTS
    assert_refused(
        run_one(llama, step_request(100, [1])), Code.UNKNOWN_SEQUENCE, "its START was refused"
    )
    assert next_token(run_one(llama, step_request(100, [1], start=True))) == reference_token(
        repository, [1]
    )


def test_a_refused_start_on_a_live_id_ends_it(llama: StepDriver, repository: Repository) -> None:
    llama.run([step_request(1, random_tokens(1, 5), start=True)])
    assert_refused(run_one(llama, step_request(1, INVALID_TOKENS, start=True)), Code.VALUE_RANGE)
    assert llama.instance.table.num_free == SLOTS
    assert_refused(run_one(llama, step_request(1, [1])), Code.UNKNOWN_SEQUENCE)
    assert next_token(run_one(llama, step_request(1, [1], start=True))) == reference_token(
        repository, [1]
    )


def test_a_start_on_a_live_id_resets_it_without_a_second_slot(sums: StepDriver) -> None:
    sums.run([sum_request(1, 5.0, start=True), sum_request(2, 1.0, start=True)])
    assert sum_and_count(run_one(sums, sum_request(1, 2.0, start=True))) == ([2.0] * 4, 1)
    assert (len(sums.instance.table), sums.instance.table.num_free) == (2, 2)
    assert sum_and_count(run_one(sums, sum_request(2, 1.0))) == ([2.0] * 4, 2)


def test_a_refused_end_frees_its_slot(repository: Repository, drive: OpenDriver) -> None:
    driver = drive(repository.path / "brief")
    for attempt in range(5):
        assert next_token(
            run_one(driver, step_request(1 + attempt, [3], start=True))
        ) == reference_token(repository, [3])
        assert_refused(
            run_one(driver, step_request(1 + attempt, INVALID_TOKENS, end=True)), Code.VALUE_RANGE
        )
        assert driver.instance.table.num_free == 2
    driver.run([step_request(1, [1], start=True), step_request(2, [2], start=True)])
    answers = driver.run(
        [step_request(1, INVALID_TOKENS, end=True), step_request(3, [4], start=True)]
    )
    assert_refused(answers[0], Code.VALUE_RANGE)
    # In the slot that the refused END freed.
    assert next_token(answers[1]) == reference_token(repository, [4])


def test_a_refused_start_with_end_leaves_no_slot(llama: StepDriver) -> None:
    assert_refused(
        run_one(llama, step_request(1, INVALID_TOKENS, start=True, end=True)), Code.VALUE_RANGE
    )
    assert next_token(run_one(llama, step_request(1, [1], start=True, end=True))) >= 0
    assert llama.instance.table.num_free == SLOTS


@pytest.mark.parametrize("sequence", [0, ""])
def test_a_request_without_an_id_is_refused(llama: StepDriver, sequence: SequenceId) -> None:
    assert_refused(
        run_one(llama, step_request(sequence, [1], start=True)),
        Code.NO_SEQUENCE_ID,
        "send a correlation id that is not 0 or empty",
    )
    assert llama.instance.table.num_free == SLOTS


def test_a_position_must_be_the_cached_length(llama: StepDriver, repository: Repository) -> None:
    assert_refused(
        run_one(llama, step_request(1, [1, 2], start=True, position=1)),
        Code.POSITION,
        "meant for position 1, the sequence holds 0",
    )
    assert next_token(
        run_one(llama, step_request(1, [1, 2], start=True, position=0))
    ) == reference_token(repository, [1, 2])
    assert next_token(run_one(llama, step_request(1, [3], position=2))) == reference_token(
        repository, [1, 2, 3]
    )
    assert_refused(
        run_one(llama, step_request(1, [3], position=2)),
        Code.POSITION,
        "meant for position 2, the sequence holds 3",
    )
    assert next_token(run_one(llama, step_request(1, [4], position="3"))) == reference_token(
        repository, [1, 2, 3, 4]
    )


def test_exactly_the_capacity_fits_and_not_one_more(
    llama: StepDriver, repository: Repository
) -> None:
    ids = random_tokens(1, CAPACITY)
    assert next_token(run_one(llama, step_request(1, ids[:-1], start=True))) == reference_token(
        repository, ids[:-1]
    )
    assert_refused(
        run_one(llama, step_request(1, [1, 2])),
        Code.CAPACITY,
        f"2 tokens do not fit: the sequence holds {CAPACITY - 1} of {CAPACITY}",
    )
    assert next_token(run_one(llama, step_request(1, ids[-1:]))) == reference_token(repository, ids)
    assert_refused(run_one(llama, step_request(1, [1])), Code.CAPACITY, "0 are left")
