"""The parameter ``sequence_key``: who may speak for a sequence, and how its owner takes it up again after Triton forgot it."""

import re
from dataclasses import replace

import pytest
from inplace.drivers.step import StepDriver
from inplace.errors import Code, RequestError
from inplace.runtime.batcher import Answer
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import MAX_KEY_LENGTH, Request
from support.driving import (
    BAD,
    add,
    ask,
    memory,
    prompt,
    refused,
    said,
    same,
    token,
    total,
    watched,
)
from support.models import SLOTS, Repository

IDS = prompt(1, 5)


@pytest.fixture
def owned(llama: StepDriver) -> StepDriver:
    """A driver whose sequence 1 holds `IDS` under the key ``mine``."""
    llama.run([ask(1, IDS, start=True, sequence_key="mine")])
    return llama


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("key", [None, "yours", "min", "mine ", 7])
def test_without_the_key_every_request_is_refused_and_changes_nothing(
    owned: StepDriver, repository: Repository, start: bool, end: bool, key: str | int | None
) -> None:
    parameters: dict[str, str | int] = {} if key is None else {"sequence_key": key}
    before, steps, sequence = (
        memory(owned),
        len(watched(owned).slots),
        replace(owned.instance.table.find(1)),
    )
    for ids in ([7], BAD):  # the key is looked at first: nothing else is said to a stranger
        answer = owned.run([ask(1, ids, start=start, end=end, **parameters)])[0]
        has = (
            "no sequence_key, the START of the live sequence 1 set one"
            if key is None
            else "a sequence_key, .* set another"
        )
        refused(answer, Code.SEQUENCE_KEY, retryable=start)
        assert re.search(has, str(answer))
        assert "mine" not in str(answer)
    assert same(memory(owned), before)
    assert len(watched(owned).slots) == steps
    assert owned.instance.table.find(1) == sequence
    assert owned.instance.table.num_free == SLOTS - 1
    assert token(owned.run([ask(1, [7], position=5, sequence_key="mine")])[0]) == said(
        repository, [*IDS, 7]
    )


def test_a_stale_end_cannot_end_the_next_sequence_of_its_id(
    llama: StepDriver, repository: Repository
) -> None:
    """Pipelined END and START of one id may arrive in the other order."""
    llama.run([ask(1, IDS, start=True, sequence_key="first")])
    first = ask(1, [9], end=True, sequence_key="first")
    answers = llama.run(
        [
            ask(1, [3, 4], start=True, sequence_key="first"),
            first,
            ask(1, IDS, start=True, sequence_key="second"),
            first,
        ]
    )
    assert token(answers[2]) == said(repository, IDS)
    refused(answers[3], Code.SEQUENCE_KEY, "set another")
    assert token(llama.run([ask(1, [8], sequence_key="second")])[0]) == said(repository, [*IDS, 8])


def test_the_owner_ends_and_restarts_as_ever(owned: StepDriver, repository: Repository) -> None:
    assert token(owned.run([ask(1, [3, 4], start=True, sequence_key="mine")])[0]) == said(
        repository, [3, 4]
    )
    assert token(owned.run([ask(1, [5], start=True, position=0, sequence_key="mine")])[0]) == said(
        repository, [5]
    )
    refused(
        owned.run([ask(1, BAD, end=True, sequence_key="mine")])[0], Code.VALUE_RANGE
    )  # a refused END still frees
    assert owned.instance.table.num_free == SLOTS
    assert token(owned.run([ask(1, [6], start=True)])[0]) == said(
        repository, [6]
    )  # the id is anybody's again


def test_a_sequence_without_a_key_takes_any_start_but_no_step_that_was_meant_for_another(
    llama: StepDriver, repository: Repository
) -> None:
    llama.run([ask(1, IDS, start=True)])
    for end in (False, True):
        refused(
            llama.run([ask(1, [7], end=end, sequence_key="x")])[0],
            Code.SEQUENCE_KEY,
            "a sequence_key, the START of the live sequence 1 set none",
        )
    assert token(llama.run([ask(1, [7])])[0]) == said(repository, [*IDS, 7])
    assert token(llama.run([ask(1, [8], start=True, sequence_key="x")])[0]) == said(repository, [8])
    refused(llama.run([ask(1, [9])])[0], Code.SEQUENCE_KEY, "set one")


@pytest.mark.parametrize(
    ("first", "later"),
    [
        (7, "7"),
        ("7", 7),
        ("å∂", "å∂"),
        ("k" * MAX_KEY_LENGTH, "k" * MAX_KEY_LENGTH),
        ("\ud800", "\ud800"),
    ],
)
def test_a_whole_number_is_the_key_of_its_digits(
    llama: StepDriver, repository: Repository, first: str | int, later: str | int
) -> None:
    llama.run([ask(1, IDS, start=True, sequence_key=first)])
    assert token(llama.run([ask(1, [7], sequence_key=later)])[0]) == said(repository, [*IDS, 7])


@pytest.mark.parametrize(
    ("value", "is_"),
    [
        ("", "has 0 characters"),
        ("k" * (MAX_KEY_LENGTH + 1), "has 257 characters"),
        (True, "is a bool"),
        (9.2e18, "is a float"),
    ],
)
@pytest.mark.parametrize(("start", "end"), [(False, False), (True, False), (False, True)])
def test_what_is_no_key_is_refused_and_changes_nothing(
    owned: StepDriver, repository: Repository, value: str | float, is_: str, start: bool, end: bool
) -> None:
    refused(
        owned.run([ask(1, [7], start=start, end=end, sequence_key=value)])[0],
        Code.BAD_PARAMETER,
        f"parameter 'sequence_key' {is_}; ",
    )
    refused(owned.run([ask(2, [7], start=True, sequence_key=value)])[0], Code.BAD_PARAMETER)
    assert owned.instance.table.num_free == SLOTS - 1
    assert token(owned.run([ask(1, [7], sequence_key="mine")])[0]) == said(repository, [*IDS, 7])


def test_the_key_is_kept_nowhere(owned: StepDriver) -> None:
    key = Request(1, False, False, {}, parameters={"sequence_key": "mine"}).key_digest()
    assert owned.instance.table.find(1).key_digest == key
    assert key is not None and len(key) == 32
    assert "mine" not in repr(owned.instance.table.find(1))


def test_a_start_with_the_key_and_a_position_goes_on_with_the_live_sequence(
    owned: StepDriver, repository: Repository
) -> None:
    def again(ids: list[int], position: int | str, end: bool = False) -> Answer:
        return owned.run(
            [ask(1, ids, start=True, end=end, position=position, sequence_key="mine")]
        )[0]

    assert token(again([7], 5)) == said(repository, [*IDS, 7])
    assert token(again([8], "6")) == said(repository, [*IDS, 7, 8])
    for position in (5, 8):
        refused(again([8], position), Code.POSITION, "the sequence holds 7")
    refused(again([8], "?"), Code.BAD_PARAMETER)
    refused(again(BAD, 7), Code.VALUE_RANGE)
    assert token(again([9], 7, end=True)) == said(repository, [*IDS, 7, 8, 9])
    assert owned.instance.table.num_free == SLOTS
    refused(again([9], 8), Code.POSITION, "meant for position 8, the sequence holds 0")
    assert owned.instance.table.num_free == SLOTS


def test_a_start_with_a_position_but_no_key_resets_and_is_refused(llama: StepDriver) -> None:
    llama.run([ask(1, IDS, start=True)])
    refused(
        llama.run([ask(1, [7], start=True, position=5)])[0], Code.POSITION, "the sequence holds 0"
    )
    assert llama.instance.table.num_free == SLOTS


def test_a_failing_engine_after_going_on_leaves_the_sequence_as_it_was(
    owned: StepDriver, repository: Repository
) -> None:
    watched(owned).fail_at = 1
    answer = owned.run([ask(1, [7], start=True, position=5, sequence_key="mine")])[0]
    refused(answer, Code.ENGINE_FAILED, "nothing was changed", retryable=True)
    assert token(owned.run([ask(1, [7], position=5, sequence_key="mine")])[0]) == said(
        repository, [*IDS, 7]
    )


def test_a_model_without_positions_has_keys_too(sums: StepDriver) -> None:
    def keyed(request: Request, key: str) -> Request:
        return replace(request, parameters={"sequence_key": key})

    assert total(sums.run([keyed(add(1, 5.0, start=True), "mine")])[0]) == ([5.0] * 4, 1)
    refused(sums.run([add(1, 5.0)])[0], Code.SEQUENCE_KEY)
    refused(
        sums.run([keyed(add(1, 5.0, start=True), "yours")])[0], Code.SEQUENCE_KEY, retryable=True
    )
    assert total(sums.run([keyed(add(1, 2.0), "mine")])[0]) == ([7.0] * 4, 2)


def test_a_stranger_learns_nothing_of_the_other_checks(owned: StepDriver) -> None:
    instance: ModelInstance = owned.instance
    texts = set()
    for ids, position in (([7], 5), ([7], 6), (BAD, 5), ([], 5)):
        with pytest.raises(RequestError) as error:
            instance.admit(ask(1, ids, position=position, sequence_key="guess"))
        texts.add(str(error.value))
    assert len(texts) == 1
