"""The parameter ``from``: a START begins as a copy of a live sequence, and both go on alone."""

from typing import Any

import pytest
from inplace.drivers.step_driver import StepDriver
from inplace.errors import Code
from support.copying import check_copy
from support.driving import (
    OpenDriver,
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
from support.models import CHUNK, SLOTS, Repository, greedy
from support.streaming import OpenStreams, slow_steps, wait_until

IDS = random_tokens(1, CHUNK + 5)
KEY: dict[str, Any] = {"sequence_key": "mine"}
COPY: dict[str, Any] = {"start": True, "from": 1, **KEY}


@pytest.fixture
def first(llama: StepDriver) -> StepDriver:
    """A driver whose sequence 1 holds `IDS`, with a key; sequence 2 has none."""
    llama.run([step_request(1, IDS, start=True, **KEY), step_request(2, [5], start=True)])
    return llama


def test_the_copy_and_the_sequence_give_the_bits_of_sequences_that_ran_alone(
    llama: StepDriver,
) -> None:
    for length in (1, CHUNK, 2 * CHUNK + 3):
        check_copy(llama.instance, 3, length)


def test_the_tokens_are_those_of_transformers(first: StepDriver, repository: Repository) -> None:
    answers = first.run(
        [
            step_request("a", [7], position=len(IDS), **COPY),
            step_request(1, [8], **KEY),
            step_request("b", [9], position=str(len(IDS) + 1), **COPY),
            step_request("a", [6], **KEY),
            step_request("b", [4, 3], end=True, **KEY),
        ]
    )
    expected = [[7], [8], [8, 9], [7, 6], [8, 9, 4, 3]]
    assert [next_token(answer) for answer in answers] == [
        reference_token(repository, IDS + ids) for ids in expected
    ]
    again = run_one(first, step_request("a", [1], **COPY))  # a START on a live id resets it
    assert next_token(again) == reference_token(repository, [*IDS, 8, 1])


def test_states_that_are_replaced_are_copied_whole(sums: StepDriver) -> None:
    start = sum_request(1, 1.0, start=True)
    start.parameters = KEY
    copy = sum_request(2, 10.0, start=True)
    copy.parameters = {"from": 1, **KEY}
    sums.run([start])
    answers = [sum_and_count(answer) for answer in sums.run([copy, sum_request(1, 0.5)])[:1]]
    assert answers == [([11.0] * 4, 2)]
    own = sum_request(1, 0.5)
    own.parameters = KEY
    assert sum_and_count(run_one(sums, own)) == ([1.5] * 4, 2)


@pytest.mark.parametrize(
    ("parameters", "code", "message"),
    [
        ({"from": 1}, Code.SEQUENCE_KEY, "no sequence_key, the START of the live sequence 1"),
        ({"from": 1, "sequence_key": "yours"}, Code.SEQUENCE_KEY, "set another"),
        ({"from": 2}, Code.SEQUENCE_KEY, "sequence 2 has no sequence_key"),
        ({"from": 2, **KEY}, Code.SEQUENCE_KEY, "sequence 2 has no sequence_key"),
        ({"from": "1", **KEY}, Code.UNKNOWN_SEQUENCE, "no sequence '1' is live"),
        ({"from": 3, **KEY}, Code.BAD_PARAMETER, "expected the id of another sequence"),
        ({"from": 0, **KEY}, Code.BAD_PARAMETER, "expected a correlation id"),
        ({"from": True, **KEY}, Code.BAD_PARAMETER, "expected a correlation id"),
        ({"from": "é" * 65, **KEY}, Code.BAD_PARAMETER, "expected a correlation id"),
        ({"from": 1, "position": len(IDS) - 1, **KEY}, Code.POSITION, f"holds {len(IDS)}"),
        ({"from": 1, "position": 0, **KEY}, Code.POSITION, f"holds {len(IDS)}"),
    ],
)
def test_a_copy_that_is_refused_leaves_no_slot_and_changes_nothing(
    first: StepDriver, parameters: dict[str, Any], code: Code, message: str
) -> None:
    before, steps = arena_bytes(first), len(engine_of(first).slots)
    assert_refused(run_one(first, step_request(3, [7], start=True, **parameters)), code, message)
    assert len(first.instance.table) == 2
    assert len(engine_of(first).slots) == steps
    assert same_bytes(arena_bytes(first), before)


def test_limits_are_those_of_the_sequence_that_is_copied(first: StepDriver) -> None:
    capacity = first.instance.manifest.capacity
    assert capacity is not None
    tokens = [7] * (capacity - len(IDS))
    assert_refused(
        run_one(first, step_request(3, [*tokens, 7], **COPY)),
        Code.CAPACITY,
        f"the sequence holds {len(IDS)} of {capacity} positions",
    )
    assert isinstance(run_one(first, step_request(3, tokens, **COPY)), dict)


def test_from_belongs_to_a_start(first: StepDriver) -> None:
    answer = run_one(first, step_request(2, [7], **{"from": 1}))  # type: ignore[arg-type]
    assert_refused(answer, Code.BAD_PARAMETER, "belongs to a START")


def test_the_last_slot_is_not_taken_from_the_sequence_that_is_copied(
    repository: Repository, drive: OpenDriver
) -> None:
    driver = drive(repository.path / "brief", idle_timeout=600.0)
    driver.run([step_request(1, IDS, start=True, **KEY)])
    table = driver.instance.table
    with driver._lock:  # no other thread reclaims
        table.find(1).last_response -= 601.0
        driver.instance.admit(step_request(2, [5], **COPY))
    assert {each.id for each in (table.find(1), table.find(2))} == {1, 2}


def test_without_a_free_slot_a_copy_is_refused_like_any_start(first: StepDriver) -> None:
    first.run([step_request(f"other {index}", [1], start=True) for index in range(SLOTS - 2)])
    answer = run_one(first, step_request(3, [7], **COPY))
    assert_refused(answer, Code.NO_FREE_SLOT, retryable=True)


def test_a_generation_goes_on_from_the_pending_token(
    streams: OpenStreams, repository: Repository
) -> None:
    client, tokens = streams(), greedy(repository.llama, IDS, 20)
    own = client.generate("one", IDS, 8, **KEY).wait()
    assert own.tokens == tokens[:8]
    copies = [
        client.generate(
            f"copy {index}", prompt, 12, position=len(IDS) + 8, **COPY | {"from": "one"}
        )
        for index, prompt in enumerate(([], [9, 4]))
    ]
    assert copies[0].wait().tokens == tokens[8:]
    history = [*IDS, *tokens[:8], 9, 4]
    assert copies[1].wait().tokens == greedy(repository.llama, history, 12)
    assert client.generate("one", [], 12, start=False, **KEY).wait().tokens == tokens[8:]


def test_sampled_tokens_and_penalties_are_those_of_the_whole_sequence(streams: OpenStreams) -> None:
    sampled: dict[str, Any] = {"temperature": 0.9, "seed": 3, "repetition_penalty": 1.4}
    client = streams()
    begun = client.generate("one", IDS, 6, **sampled, **KEY).wait().tokens
    copied = client.generate("two", [], 10, **sampled, **COPY | {"from": "one"}).wait().tokens
    assert copied == client.generate("all", [*IDS, *begun], 10, **sampled).wait().tokens
    assert copied == client.generate("one", [], 10, start=False, **sampled, **KEY).wait().tokens


def test_a_sequence_that_is_generating_is_not_copied(streams: OpenStreams) -> None:
    client = streams()
    with slow_steps(client, 0.01):
        running = client.generate("one", IDS, 40, **KEY).wait_for_tokens(2)
        refused = client.generate("two", [], 4, **COPY | {"from": "one"}).wait()
        refused.assert_refused(Code.SEQUENCE_BUSY, "send it again", retryable=True)
    running.wait()
    assert client.generate("two", [], 4, **COPY | {"from": "one"}).wait().finish_reason == "length"


def test_a_copy_waits_for_a_slot_in_the_group_of_its_sequence(streams: OpenStreams) -> None:
    client = streams()
    client.step("one", IDS, start=True, group="tenant", **KEY).wait()
    others = [client.step(f"other {index}", [1], start=True) for index in range(SLOTS - 1)]
    for other in others:
        other.wait()
    table, queue = client.driver.instance.table, client.driver._engine_loop._waiting
    copies = [
        client.generate(f"copy {index}", [3], 2, **COPY | {"from": "one"}) for index in range(2)
    ]
    alone = client.generate("stranger", [3], 2, group="other")
    wait_until(lambda: len(queue) == 3)
    assert len(queue._groups) == 2
    for index in range(3):
        client.end(f"other {index}").wait()
    for channel in (*copies, alone):
        assert channel.wait().finish_reason == "length"
    assert table.find("copy 0").group == "tenant"
