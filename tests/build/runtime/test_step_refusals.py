"""The step driver on real engines: what is refused is refused alone, and changes nothing but what its flags say."""

import pytest
import torch
from inplace.drivers.step import StepDriver
from inplace.errors import Code
from inplace.runtime.requests import Request
from inplace.runtime.slots import SequenceId
from support.driving import (
    BAD,
    Open,
    add,
    ask,
    memory,
    outputs,
    prompt,
    refused,
    said,
    same,
    token,
    total,
    watched,
)
from support.models import CAPACITY, SLOTS, VOCABULARY, Repository


def test_one_bad_request_among_good_ones_harms_nobody(repository: Repository, drive: Open) -> None:
    mixed, clean = drive(repository.path / "llama"), drive(repository.path / "llama")
    starts = [ask(seed, prompt(seed, 3 + seed), start=True) for seed in range(1, 5)]
    for driver in (mixed, clean):
        driver.run(starts)
    good = [
        ask(1, [5], logits=True),
        ask(2, prompt(9, 12), logits=True),
        ask(4, [6], end=True, logits=True),
    ]
    bad = [
        ask(3, BAD),
        ask(99, [1]),
        ask(98, [1] * (CAPACITY + 1), start=True),
        Request(97, True, False, {}),
    ]
    answers = mixed.run([bad[0], good[0], bad[1], good[1], bad[2], good[2], bad[3]])
    alone = clean.run(good)
    refused(answers[0], Code.VALUE_RANGE, f"holds {VOCABULARY}")
    refused(answers[2], Code.UNKNOWN_SEQUENCE)
    refused(answers[4], Code.CAPACITY, f"{CAPACITY + 1} tokens do not fit")
    refused(answers[6], Code.MISSING_INPUT)
    for answer, expected in zip(answers[1::2], alone, strict=True):
        assert torch.equal(outputs(answer)["logits"], outputs(expected)["logits"])
        assert torch.isfinite(outputs(answer)["logits"]).all()
    assert same(memory(mixed), memory(clean))
    assert mixed.instance.table.find(3).length == clean.instance.table.find(3).length == 6


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (ask(1, BAD), Code.VALUE_RANGE),
        (ask(1, [-1]), Code.VALUE_RANGE),
        (ask(1, [1] * (CAPACITY - 4)), Code.CAPACITY),
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
        (ask(1, [1], logits="perhaps"), Code.BAD_PARAMETER),
        (ask(1, [1], position=-1), Code.BAD_PARAMETER),
        (ask(1, [1], max_tokens=5), Code.BAD_PARAMETER),
        (ask(1, [1], position=4), Code.POSITION),
        (ask(1, [1], position=6), Code.POSITION),
    ],
)
def test_a_refused_step_changes_nothing_and_a_good_one_goes_on(
    llama: StepDriver, repository: Repository, request_: Request, code: Code
) -> None:
    ids = prompt(1, 5)
    llama.run([ask(1, ids, start=True)])
    before, addresses, steps = (
        memory(llama),
        llama.instance.arena.addresses(),
        len(watched(llama).slots),
    )
    refused(llama.run([request_])[0], code)
    assert same(memory(llama), before)
    assert llama.instance.arena.addresses() == addresses
    assert len(watched(llama).slots) == steps
    assert not llama.instance.table.find(1).busy
    assert token(llama.run([ask(1, [7], position=5)])[0]) == said(repository, [*ids, 7])


def test_a_refused_start_leaves_no_slot(llama: StepDriver, repository: Repository) -> None:
    for attempt in range(2 * SLOTS):
        refused(llama.run([ask(100 + attempt, BAD, start=True)])[0], Code.VALUE_RANGE)
    assert llama.instance.table.num_free == SLOTS
    refused(llama.run([ask(100, [1])])[0], Code.UNKNOWN_SEQUENCE, "its START was refused")
    assert token(llama.run([ask(100, [1], start=True)])[0]) == said(repository, [1])


def test_a_refused_start_on_a_live_id_ends_it(llama: StepDriver, repository: Repository) -> None:
    llama.run([ask(1, prompt(1, 5), start=True)])
    refused(llama.run([ask(1, BAD, start=True)])[0], Code.VALUE_RANGE)
    assert llama.instance.table.num_free == SLOTS
    refused(llama.run([ask(1, [1])])[0], Code.UNKNOWN_SEQUENCE)
    assert token(llama.run([ask(1, [1], start=True)])[0]) == said(repository, [1])


def test_a_start_on_a_live_id_resets_it_without_a_second_slot(sums: StepDriver) -> None:
    sums.run([add(1, 5.0, start=True), add(2, 1.0, start=True)])
    assert total(sums.run([add(1, 2.0, start=True)])[0]) == ([2.0] * 4, 1)
    assert (len(sums.instance.table), sums.instance.table.num_free) == (2, 2)
    assert total(sums.run([add(2, 1.0)])[0]) == ([2.0] * 4, 2)


def test_a_refused_end_frees(repository: Repository, drive: Open) -> None:
    driver = drive(repository.path / "brief")
    for attempt in range(5):
        assert token(driver.run([ask(1 + attempt, [3], start=True)])[0]) == said(repository, [3])
        refused(driver.run([ask(1 + attempt, BAD, end=True)])[0], Code.VALUE_RANGE)
        assert driver.instance.table.num_free == 2
    driver.run([ask(1, [1], start=True), ask(2, [2], start=True)])
    answers = driver.run([ask(1, BAD, end=True), ask(3, [4], start=True)])
    refused(answers[0], Code.VALUE_RANGE)
    assert token(answers[1]) == said(repository, [4])  # in the slot that the refused END freed


def test_a_refused_start_with_end_leaves_no_slot(llama: StepDriver) -> None:
    refused(llama.run([ask(1, BAD, start=True, end=True)])[0], Code.VALUE_RANGE)
    assert token(llama.run([ask(1, [1], start=True, end=True)])[0]) >= 0
    assert llama.instance.table.num_free == SLOTS


@pytest.mark.parametrize("sequence", [0, ""])
def test_a_request_without_an_id_is_refused(llama: StepDriver, sequence: SequenceId) -> None:
    refused(
        llama.run([ask(sequence, [1], start=True)])[0],
        Code.NO_SEQUENCE_ID,
        "send a correlation id that is not 0 or empty",
    )
    assert llama.instance.table.num_free == SLOTS


def test_a_position_must_be_the_cached_length(llama: StepDriver, repository: Repository) -> None:
    refused(
        llama.run([ask(1, [1, 2], start=True, position=1)])[0],
        Code.POSITION,
        "meant for position 1, the sequence holds 0",
    )
    assert token(llama.run([ask(1, [1, 2], start=True, position=0)])[0]) == said(repository, [1, 2])
    assert token(llama.run([ask(1, [3], position=2)])[0]) == said(repository, [1, 2, 3])
    refused(
        llama.run([ask(1, [3], position=2)])[0],
        Code.POSITION,
        "meant for position 2, the sequence holds 3",
    )
    assert token(llama.run([ask(1, [4], position="3")])[0]) == said(repository, [1, 2, 3, 4])


def test_exactly_the_capacity_fits_and_not_one_more(
    llama: StepDriver, repository: Repository
) -> None:
    ids = prompt(1, CAPACITY)
    assert token(llama.run([ask(1, ids[:-1], start=True)])[0]) == said(repository, ids[:-1])
    refused(
        llama.run([ask(1, [1, 2])])[0],
        Code.CAPACITY,
        f"2 tokens do not fit: the sequence holds {CAPACITY - 1} of {CAPACITY}",
    )
    assert token(llama.run([ask(1, ids[-1:])])[0]) == said(repository, ids)
    refused(llama.run([ask(1, [1])])[0], Code.CAPACITY, "0 are left")
