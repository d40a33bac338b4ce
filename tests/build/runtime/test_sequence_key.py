"""The parameter ``sequence_key``: only its owner changes a sequence, or continues it with START."""

import re
from dataclasses import asdict, replace

import pytest
from inplace.drivers.step_driver import StepDriver
from inplace.errors import Code, RequestError
from inplace.parameters import MAX_KEY_LENGTH
from inplace.runtime.batcher import Answer
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request
from support.driving import (
    INVALID_TOKENS,
    arena_bytes,
    assert_refused,
    engine_of,
    next_token,
    random_tokens,
    reference_token,
    run_one,
    same_bytes,
    step_request,
    sum_and_count,
    sum_request,
)
from support.models import SLOTS, Repository

IDS = random_tokens(1, 5)


@pytest.fixture
def owned(llama: StepDriver) -> StepDriver:
    """A driver whose sequence 1 holds `IDS` under the key ``mine``."""
    llama.run([step_request(1, IDS, start=True, sequence_key="mine")])
    return llama


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("key", [None, "yours", "min", "mine ", 7])
def test_without_the_key_every_request_is_refused_and_changes_nothing(
    owned: StepDriver, repository: Repository, start: bool, end: bool, key: str | int | None
) -> None:
    parameters: dict[str, str | int] = {} if key is None else {"sequence_key": key}
    before, steps, sequence = (
        arena_bytes(owned),
        len(engine_of(owned).slots),
        asdict(owned.instance.table.find(1)),
    )
    for ids in ([7], INVALID_TOKENS):  # the key is checked first
        answer = run_one(owned, step_request(1, ids, start=start, end=end, **parameters))
        message = (
            "no sequence_key, the START of the live sequence 1 set one"
            if key is None
            else "a sequence_key, .* set another"
        )
        assert_refused(answer, Code.SEQUENCE_KEY, retryable=start)
        assert re.search(message, str(answer))
        assert "mine" not in str(answer)
    assert same_bytes(arena_bytes(owned), before)
    assert len(engine_of(owned).slots) == steps
    assert asdict(owned.instance.table.find(1)) == sequence
    assert owned.instance.table.num_free == SLOTS - 1
    assert next_token(
        run_one(owned, step_request(1, [7], position=5, sequence_key="mine"))
    ) == reference_token(repository, [*IDS, 7])


def test_a_stale_end_cannot_end_the_next_sequence_of_its_id(
    llama: StepDriver, repository: Repository
) -> None:
    """Pipelined END and START of one id may arrive in the other order."""
    llama.run([step_request(1, IDS, start=True, sequence_key="first")])
    first = step_request(1, [9], end=True, sequence_key="first")
    answers = llama.run(
        [
            step_request(1, [3, 4], start=True, sequence_key="first"),
            first,
            step_request(1, IDS, start=True, sequence_key="second"),
            first,
        ]
    )
    assert next_token(answers[2]) == reference_token(repository, IDS)
    assert_refused(answers[3], Code.SEQUENCE_KEY, "set another")
    assert next_token(
        run_one(llama, step_request(1, [8], sequence_key="second"))
    ) == reference_token(repository, [*IDS, 8])


def test_requests_with_the_key_end_and_restart_the_sequence(
    owned: StepDriver, repository: Repository
) -> None:
    assert next_token(
        run_one(owned, step_request(1, [3, 4], start=True, sequence_key="mine"))
    ) == reference_token(repository, [3, 4])
    assert next_token(
        run_one(owned, step_request(1, [5], start=True, position=0, sequence_key="mine"))
    ) == reference_token(repository, [5])
    refused_end = step_request(1, INVALID_TOKENS, end=True, sequence_key="mine")
    assert_refused(run_one(owned, refused_end), Code.VALUE_RANGE)
    assert owned.instance.table.num_free == SLOTS
    anyone = run_one(owned, step_request(1, [6], start=True))
    assert next_token(anyone) == reference_token(repository, [6])


def test_a_sequence_without_a_key_accepts_any_start_but_no_step_with_a_key(
    llama: StepDriver, repository: Repository
) -> None:
    llama.run([step_request(1, IDS, start=True)])
    for end in (False, True):
        assert_refused(
            run_one(llama, step_request(1, [7], end=end, sequence_key="x")),
            Code.SEQUENCE_KEY,
            "a sequence_key, the START of the live sequence 1 set none",
        )
    assert next_token(run_one(llama, step_request(1, [7]))) == reference_token(
        repository, [*IDS, 7]
    )
    assert next_token(
        run_one(llama, step_request(1, [8], start=True, sequence_key="x"))
    ) == reference_token(repository, [8])
    assert_refused(run_one(llama, step_request(1, [9])), Code.SEQUENCE_KEY, "set one")


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
    llama.run([step_request(1, IDS, start=True, sequence_key=first)])
    assert next_token(run_one(llama, step_request(1, [7], sequence_key=later))) == reference_token(
        repository, [*IDS, 7]
    )


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
def test_an_invalid_key_is_refused_and_changes_nothing(
    owned: StepDriver, repository: Repository, value: str | float, is_: str, start: bool, end: bool
) -> None:
    assert_refused(
        run_one(owned, step_request(1, [7], start=start, end=end, sequence_key=value)),
        Code.BAD_PARAMETER,
        f"parameter 'sequence_key' {is_}; ",
    )
    assert_refused(
        run_one(owned, step_request(2, [7], start=True, sequence_key=value)), Code.BAD_PARAMETER
    )
    assert owned.instance.table.num_free == SLOTS - 1
    assert next_token(run_one(owned, step_request(1, [7], sequence_key="mine"))) == reference_token(
        repository, [*IDS, 7]
    )


def test_only_a_digest_of_the_key_is_kept(owned: StepDriver) -> None:
    key = Request(1, False, False, {}, parameters={"sequence_key": "mine"}).key_digest()
    assert owned.instance.table.find(1).key_digest == key
    assert key is not None and len(key) == 32
    assert "mine" not in repr(owned.instance.table.find(1))


def test_a_start_with_the_key_and_a_position_continues_the_live_sequence(
    owned: StepDriver, repository: Repository
) -> None:
    def again(ids: list[int], position: int | str, end: bool = False) -> Answer:
        return run_one(
            owned, step_request(1, ids, start=True, end=end, position=position, sequence_key="mine")
        )

    assert next_token(again([7], 5)) == reference_token(repository, [*IDS, 7])
    assert next_token(again([8], "6")) == reference_token(repository, [*IDS, 7, 8])
    for position in (5, 8):
        assert_refused(again([8], position), Code.POSITION, "the sequence holds 7")
    assert_refused(again([8], "?"), Code.BAD_PARAMETER)
    assert_refused(again(INVALID_TOKENS, 7), Code.VALUE_RANGE)
    assert next_token(again([9], 7, end=True)) == reference_token(repository, [*IDS, 7, 8, 9])
    assert owned.instance.table.num_free == SLOTS
    assert_refused(again([9], 8), Code.POSITION, "meant for position 8, the sequence holds 0")
    assert owned.instance.table.num_free == SLOTS


def test_a_start_with_a_position_but_no_key_resets_and_is_refused(llama: StepDriver) -> None:
    llama.run([step_request(1, IDS, start=True)])
    assert_refused(
        run_one(llama, step_request(1, [7], start=True, position=5)),
        Code.POSITION,
        "the sequence holds 0",
    )
    assert llama.instance.table.num_free == SLOTS


def test_a_failed_step_of_a_continued_sequence_restores_it(
    owned: StepDriver, repository: Repository
) -> None:
    engine_of(owned).fail_at = 1
    answer = run_one(owned, step_request(1, [7], start=True, position=5, sequence_key="mine"))
    assert_refused(answer, Code.ENGINE_FAILED, "nothing was changed", retryable=True)
    assert next_token(
        run_one(owned, step_request(1, [7], position=5, sequence_key="mine"))
    ) == reference_token(repository, [*IDS, 7])


def test_a_model_without_positions_has_keys(sums: StepDriver) -> None:
    def keyed(request: Request, key: str) -> Request:
        return replace(request, parameters={"sequence_key": key})

    assert sum_and_count(run_one(sums, keyed(sum_request(1, 5.0, start=True), "mine"))) == (
        [5.0] * 4,
        1,
    )
    assert_refused(run_one(sums, sum_request(1, 5.0)), Code.SEQUENCE_KEY)
    assert_refused(
        run_one(sums, keyed(sum_request(1, 5.0, start=True), "yours")),
        Code.SEQUENCE_KEY,
        retryable=True,
    )
    assert sum_and_count(run_one(sums, keyed(sum_request(1, 2.0), "mine"))) == ([7.0] * 4, 2)


def test_without_the_key_the_error_tells_nothing_of_the_other_checks(owned: StepDriver) -> None:
    instance: ModelInstance = owned.instance
    texts = set()
    for ids, position in (([7], 5), ([7], 6), (INVALID_TOKENS, 5), ([], 5)):
        with pytest.raises(RequestError) as error:
            instance.admit(step_request(1, ids, position=position, sequence_key="guess"))
        texts.add(str(error.value))
    assert len(texts) == 1
