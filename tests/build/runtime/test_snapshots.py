"""Sequences that are stored by one driver and go on in another, on real engines."""

import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from inplace.drivers import StreamDriver, TokenizerConfig
from inplace.drivers.shutdown import unloading
from inplace.drivers.step_driver import StepDriver
from inplace.errors import RESTORED, Code, RequestError
from inplace.runtime import snapshots
from inplace.runtime.requests import Request
from inplace.snapshots import Bucket, SnapshotError, SnapshotReason
from support.driving import (
    RecordingEngine,
    assert_refused,
    next_token,
    random_tokens,
    reference_token,
    run_one,
    step_request,
    sum_and_count,
    sum_request,
)
from support.models import CHUNK, Repository, greedy, open_instance
from support.storing import left_in, memory_bucket, store_in
from support.streaming import StreamClient, slow_steps, wait_until
from support.vocabulary import tiny_tokenizer

KEY: dict[str, Any] = {"sequence_key": "mine"}
RESTORE: dict[str, Any] = {"start": True, "restore": True, **KEY}
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_k": 40, "seed": 5}
PROMPT = random_tokens(3, CHUNK + 4)

Open = Callable[..., StreamClient]
OpenSteps = Callable[..., StepDriver]


@pytest.fixture
def bucket() -> Bucket:
    return memory_bucket()


@pytest.fixture
def opened(repository: Repository, bucket: Bucket) -> Iterator[Open]:
    """Opens servers of one model that share a store."""
    clients: list[StreamClient] = []

    def open_client(
        every: int | None = None, config: TokenizerConfig | None = None, **options: Any
    ) -> StreamClient:
        instance = open_instance(repository.path / "llama")
        instance.engine = RecordingEngine(instance.engine)
        store_in(instance, bucket, every, **options)
        clients.append(StreamClient(StreamDriver(instance, config or TokenizerConfig(), 64)))
        return clients[-1]

    yield open_client
    for client in clients:
        close(client)


@pytest.fixture
def stepping(repository: Repository, bucket: Bucket) -> Iterator[OpenSteps]:
    """The same for step models."""
    drivers: list[StepDriver] = []

    def open_driver(model: str = "llama", every: int | None = None) -> StepDriver:
        instance = open_instance(repository.path / model)
        store_in(instance, bucket, every)
        drivers.append(StepDriver(instance))
        return drivers[-1]

    yield open_driver
    for driver in drivers:
        driver.close()
        assert driver.instance.snapshots is not None
        driver.instance.snapshots.close()


def close(client: StreamClient) -> None:
    client.driver.close()
    assert client.driver.instance.snapshots is not None
    client.driver.instance.snapshots.close()


def count(client: StreamClient | StepDriver, result: str) -> int:
    instance = client.driver.instance if isinstance(client, StreamClient) else client.instance
    return int(instance.observer.metrics.snapshot()["inplace_snapshots_total", result])


def hand_over(client: StreamClient) -> None:
    """What the shutdown does again and again."""

    def all_gone() -> bool:
        client.driver.hand_over()
        return not len(client.driver.instance.table)

    wait_until(all_gone)


def drained(client: StreamClient) -> None:
    """Let everything that was to be written or deleted be done."""
    keeper = client.driver.instance.snapshots
    assert keeper is not None
    for writer in keeper._writers:
        writer.submit(threading.get_ident).result()


def test_a_running_generation_goes_on_elsewhere_with_the_same_tokens(
    opened: Open, bucket: Bucket
) -> None:
    first, second = opened(), opened()
    expected = first.generate("whole", PROMPT, 40, end=True, **SAMPLED, **KEY).wait().tokens
    with slow_steps(first, 0.02):
        running = first.generate("a", PROMPT, 40, **SAMPLED, **KEY).wait_for_tokens(7)
        first.generate("idle", PROMPT, 5, **KEY).wait()
        others = first.step("keyless", PROMPT, start=True)
        others.wait()
        first.driver.hand_over()
        running.assert_refused(Code.SHUTDOWN, "the sequence was stored", retryable=True)
    wait_until(lambda: len(first.driver.instance.table) == 1)
    assert [each.id for each in first.driver.instance.table.live] == ["keyless"]
    assert len(bucket.list()) == 2  # nothing of the one without a key
    first.step("idle", [1], **KEY).assert_refused(Code.SHUTDOWN, "was stored", retryable=True)
    got = len(running.tokens)
    assert 7 <= got < 40
    position = len(PROMPT) + got
    rest = second.generate("a", [], 40 - got, position=position, **SAMPLED, **RESTORE).wait()
    assert [*running.tokens, *rest.tokens] == expected
    again = second.generate("idle", [], 5, position=len(PROMPT) + 5, end=True, **RESTORE).wait()
    assert again.finish_reason == "length"
    second.end("a", **KEY).wait()
    drained(second)
    assert left_in(bucket) == []
    assert count(second, "restored") == 2


def test_what_was_fed_after_the_snapshot_is_sent_again(
    opened: Open, repository: Repository, bucket: Bucket
) -> None:
    first, second = opened(every=10), opened(every=10)
    history = list(PROMPT)
    first.step("a", history, start=True, **KEY).wait()
    for token in range(12):
        history.append(token)
        first.step("a", [token], position=len(history) - 1, **KEY).wait()
        drained(first)
    assert count(first, "written") == 2  # after the prompt, and ten positions later
    # and the server dies
    refused = second.step("a", [5], position=len(history), **RESTORE)
    stored = len(PROMPT) + 10
    refused.assert_refused(Code.POSITION, f"{RESTORED}{stored},")
    rest = second.step("a", [*history[stored:], 5], position=stored, **KEY)
    assert rest.next_token == reference_token(repository, [*history, 5])
    second.end("a", **KEY).wait()
    drained(second)
    assert left_in(bucket) == []


def test_a_generation_is_stored_while_it_runs_and_cut_back_to_what_its_client_has(
    opened: Open, repository: Repository
) -> None:
    first, second = opened(every=4), opened()
    expected = greedy(repository.llama, PROMPT, 30)
    assert first.generate("a", PROMPT, 30, **KEY).wait().tokens == expected
    drained(first)
    assert count(first, "written") >= 2
    got = 9  # its client has no more than these
    rest = second.generate("a", [], 30 - got, position=len(PROMPT) + got, **RESTORE).wait()
    assert rest.tokens == expected[got:]
    step = second.step("a", [3, 4], position=len(PROMPT) + 30, **KEY)
    assert step.next_token == reference_token(repository, [*PROMPT, *expected, 3, 4])
    keeper = first.driver.instance.snapshots
    assert keeper is not None
    keeper._find_fenced()
    keeper._wake.set()
    wait_until(lambda: first.driver.instance.table.get("a") is None)
    first.step("a", [1], **KEY).assert_refused(Code.FENCED, "another server has restored")


def test_a_generation_goes_on_with_its_grammar(opened: Open) -> None:
    config = TokenizerConfig(tiny_tokenizer(), frozenset({2}))
    first, second = opened(config=config), opened(config=config)
    grammar: dict[str, Any] = {"regex": "[a-f]{40}", "temperature": 1.0, "seed": 3, **KEY}
    expected = first.generate("whole", PROMPT, 60, end=True, **grammar).wait()
    assert re.fullmatch("[a-f]{40}", expected.text)
    with slow_steps(first, 0.002):
        running = first.generate("a", PROMPT, 60, **grammar).wait_for_tokens(7)
        first.driver.hand_over()
        running.assert_refused(Code.SHUTDOWN, "the sequence was stored", retryable=True)
    got = len(running.tokens)
    position, rest = len(PROMPT) + got, grammar | RESTORE | {"num_generated": got}
    goes_on = second.generate("a", [], 60 - got, position=position, end=True, **rest).wait()
    assert goes_on.finish_reason == expected.finish_reason == "stop"
    assert running.tokens + goes_on.tokens == expected.tokens
    assert running.text + goes_on.text == expected.text


def test_a_replica_that_writes_too_late_is_fenced(opened: Open, bucket: Bucket) -> None:
    first, second = opened(every=1), opened()
    first.step("a", PROMPT, start=True, **KEY).wait()
    first.step("a", [1], **KEY).wait()
    drained(first)
    position = len(PROMPT)
    second.step("a", [1], position=position, **RESTORE).wait()
    before = {entry.name for entry in bucket.list()}
    first.step("a", [2], **KEY).wait()  # it does not know yet
    wait_until(lambda: first.driver.instance.table.get("a") is None)
    first.step("a", [3], **KEY).assert_refused(Code.FENCED)
    assert count(first, "fenced") == 1
    assert {entry.name for entry in bucket.list()} == before
    ended = first.metrics()["inplace_sequences_ended_total", "fenced"]
    assert ended == 1
    assert second.step("a", [2], position=position + 1, **KEY).wait().error is None


def test_end_leaves_nothing_and_a_new_sequence_does_not_begin_with_an_old_one(
    opened: Open, bucket: Bucket
) -> None:
    first, second = opened(every=1), opened(every=1)
    for name in ("a", "b"):
        first.step(name, PROMPT, start=True, **KEY).wait()
        first.step(name, [1], **KEY).wait()
    drained(first)
    assert len(bucket.list()) == 2
    first.end("a", **KEY).wait()
    drained(first)
    assert len(bucket.list()) == 1
    second.end("b", **KEY).assert_refused(Code.UNKNOWN_SEQUENCE)  # it is not live here
    drained(second)
    assert left_in(bucket) == []
    first.step("b", [2], **KEY).wait()
    wait_until(lambda: first.driver.instance.table.get("b") is None)  # it has ended elsewhere
    first.step("c", PROMPT, start=True, **KEY).wait()
    first.step("c", [1], **KEY).wait()
    drained(first)
    second.step("c", PROMPT[:3], start=True, **KEY).wait()
    drained(second)
    third = opened()
    third.step("c", [1], position=len(PROMPT), **RESTORE).assert_refused(Code.NO_SNAPSHOT)


def test_a_snapshot_that_cannot_be_restored_is_refused_with_the_reason(
    opened: Open, bucket: Bucket
) -> None:
    first, second = opened(), opened()
    first.step("a", PROMPT, start=True, **KEY).wait()
    hand_over(first)
    position = len(PROMPT)
    none = second.step("b", [1], position=position, **RESTORE)
    none.assert_refused(Code.NO_SNAPSHOT, "missing: the store has no snapshot")
    other: dict[str, Any] = {**RESTORE, "sequence_key": "yours"}
    second.step("a", [1], position=position, **other).assert_refused(Code.NO_SNAPSHOT)
    [entry] = bucket.list()
    content = bytes(bucket.read(entry.name))
    bucket.write(entry.name, [content[:-1], bytes([content[-1] ^ 1])])
    second.step("a", [1], position=position, **RESTORE).assert_refused(
        Code.BAD_SNAPSHOT, "tampered: the MAC"
    )
    assert len(second.driver.instance.table) == 0
    bucket.write(entry.name, [content])
    assert second.step("a", [1], position=position, **RESTORE).wait().error is None
    for parameters, message in (
        ({**RESTORE, "position": 0}, "a 'position' above 0"),
        (RESTORE, "a 'position' above 0"),
        ({"start": True, "restore": True, "position": 3}, "belongs to a START with"),
        ({"restore": True, "position": 3, **KEY}, "belongs to a START with"),
        ({**RESTORE, "position": 3, "from": "a"}, "without 'from'"),
    ):
        second.step("d", [1], **parameters).assert_refused(Code.BAD_PARAMETER, message)


def test_a_live_sequence_goes_on_without_the_store(opened: Open) -> None:
    first = opened()
    first.step("a", PROMPT, start=True, **KEY).wait()
    answer = first.step("a", [1], position=len(PROMPT), **RESTORE)
    assert answer.wait().error is None
    assert count(first, "restored") == 0


def test_an_end_that_a_closing_server_refuses_leaves_nothing(opened: Open, bucket: Bucket) -> None:
    first = opened()
    with slow_steps(first, 0.002):
        running = first.generate("a", PROMPT, 100, **KEY).wait_for_tokens(3)
        ended = first.step("a", [1], end=True, **KEY)  # it lets the generation finish
        first.driver.close()
        running.wait()
        ended.assert_refused(Code.SHUTDOWN, retryable=True)
    first.step("b", PROMPT, end=True, **KEY).assert_refused(Code.SHUTDOWN, retryable=True)
    drained(first)
    assert left_in(bucket) == []


def test_an_instance_that_is_offered_a_sequence_declines_it_for_its_position(opened: Open) -> None:
    """So that the next one is asked, which may have it; also where the request has no tokens."""
    first = opened()
    for parameters in (RESTORE, {"start": True, **KEY}):
        given = {"max_tokens": 3, "position": 9, **parameters}
        given.pop("start")
        ids = torch.zeros((1, 0), dtype=torch.int64)
        request = Request("a", True, False, {"input_ids": ids}, "r", given, offered=True)
        answer = first.send(request).wait()
        assert answer.error is not None
        assert request.may_succeed_elsewhere(answer.error), answer.error


def test_a_server_without_a_store_has_no_snapshots(repository: Repository) -> None:
    instance = open_instance(repository.path / "llama")
    instance.engine = RecordingEngine(instance.engine)
    client = StreamClient(StreamDriver(instance, TokenizerConfig(), 64))
    client.step("a", [1], position=3, **RESTORE).assert_refused(
        Code.NO_SNAPSHOT, "stores no sequences"
    )
    client.driver.close()


def test_a_restored_sequence_waits_for_a_slot(opened: Open) -> None:
    first, second = opened(), opened()
    expected = first.generate("whole", PROMPT, 12, end=True, **KEY).wait().tokens
    first.generate("a", PROMPT, 5, **KEY).wait()
    hand_over(first)
    slots = second.num_free_slots()
    for number in range(slots):
        second.step(f"other{number}", [1], start=True).wait()
    position = len(PROMPT) + 5
    waiting = second.generate("a", [], 7, position=position, **RESTORE)
    step = second.step("b", [1], position=position, **RESTORE)
    step.assert_refused(Code.NO_SNAPSHOT)
    second.end("other0").wait()
    assert waiting.wait().tokens == expected[5:]


def test_a_store_that_fails_stops_nothing(
    opened: Open, monkeypatch: pytest.MonkeyPatch, repository: Repository
) -> None:
    first = opened(every=1)

    def fail(*_: object) -> int:
        raise SnapshotError(SnapshotReason.UNAVAILABLE, "the store failed")

    keeper = first.driver.instance.snapshots
    assert keeper is not None
    monkeypatch.setattr(keeper._store, "write", fail)
    tokens = first.generate("a", PROMPT, 10, **KEY).wait().tokens
    assert tokens == greedy(repository.llama, PROMPT, 10)
    assert count(first, "unavailable") >= 1
    first.driver.hand_over()
    wait_until(lambda: count(first, "unavailable") >= 2)
    answer = first.step("a", [1], position=len(PROMPT) + 10, **KEY)  # it lives on
    assert answer.wait().error is None
    with slow_steps(first, 0.002):
        running = first.generate("b", PROMPT, 100, **KEY).wait_for_tokens(3)
        first.driver.hand_over()
        running.assert_refused(Code.SHUTDOWN, "is being unloaded", retryable=True)


def test_what_runs_is_stored_when_the_model_is_unloaded(opened: Open) -> None:
    first, second = opened(), opened()
    expected = first.generate("whole", PROMPT, 60, end=True, **KEY).wait().tokens
    with slow_steps(first, 0.002):
        running = first.generate("a", PROMPT, 60, **KEY).wait_for_tokens(3)
        first.driver.stop_running(unloading())
        running.assert_refused(Code.SHUTDOWN, "was stored", retryable=True)
    got = running.tokens
    rest = second.generate(
        "a", [], 60 - len(got), position=len(PROMPT) + len(got), **RESTORE
    ).wait()
    assert [*got, *rest.tokens] == expected


def test_steps_of_a_step_model_are_handed_over(
    stepping: OpenSteps, repository: Repository, bucket: Bucket
) -> None:
    first, second = stepping(), stepping()
    names = [f"s{number}" for number in range(2 * snapshots.MAX_CAPTURED + 1)][:6]
    prompts = {name: random_tokens(place, 5 + place) for place, name in enumerate(names)}
    for name, ids in prompts.items():
        run_one(first, step_request(name, ids, start=True, **KEY))
    run_one(first, step_request("keyless", [1], start=True))
    first.hand_over()
    assert [each.id for each in first.instance.table.live] == ["keyless"]
    refused = run_one(first, step_request(names[0], [1], **KEY))
    assert_refused(refused, Code.SHUTDOWN, "was stored", retryable=True)
    for name, ids in prompts.items():
        request = step_request(name, [7], position=len(ids), **RESTORE)
        assert next_token(run_one(second, request)) == reference_token(repository, [*ids, 7])
        run_one(second, step_request(name, [1], end=True, **KEY))
    assert second.instance.snapshots is not None
    second.instance.snapshots.close()
    assert left_in(bucket) == []


def test_states_that_are_replaced_are_stored_before_the_next_request(
    stepping: OpenSteps,
) -> None:
    first, second = stepping("accumulator", every=3), stepping("accumulator")
    for number in range(9):
        request = sum_request(1, float(number), start=number == 0)
        request.parameters = KEY
        run_one(first, request)
    keeper = first.instance.snapshots
    assert keeper is not None
    for writer in keeper._writers:
        writer.submit(threading.get_ident).result()
    again = sum_request(1, 9.0, start=True)
    again.parameters = {**KEY, "restore": True, "position": 9}
    answer = run_one(second, again)
    assert isinstance(answer, RequestError)
    assert answer.code is Code.POSITION
    stored = int(str(answer).removeprefix(RESTORED).partition(",")[0])
    assert 6 <= stored < 9
    for number in range(stored, 10):
        request = sum_request(1, float(number))
        request.parameters = {**KEY, "position": number}
        result = run_one(second, request)
    assert sum_and_count(result) == ([45.0] * 4, 10)


def test_an_end_that_is_restored_behind_leaves_its_sequence_alive(
    stepping: OpenSteps, bucket: Bucket
) -> None:
    """The client sends what is missing, and then the END again."""
    first, second = stepping("accumulator", every=3), stepping("accumulator")
    for number in range(9):
        request = sum_request(1, float(number), start=number == 0)
        request.parameters = KEY
        run_one(first, request)
    keeper = first.instance.snapshots
    assert keeper is not None
    for writer in keeper._writers:
        writer.submit(threading.get_ident).result()
    last = sum_request(1, 9.0, end=True)
    last.parameters = {**KEY, "position": 9}
    asked = replace(last, start=True, parameters={**KEY, "restore": True, "position": 9})
    for request in (last, replace(asked, offered=True)):  # a server, or an instance, that lacks it
        assert isinstance(run_one(second, request), RequestError)
    answer = run_one(second, asked)
    assert isinstance(answer, RequestError)
    assert answer.code is Code.POSITION
    stored = int(str(answer).removeprefix(RESTORED).partition(",")[0])
    for number in range(stored, 10):
        request = sum_request(1, float(number), start=number == stored, end=number == 9)
        request.parameters = {**KEY, "position": number}
        result = run_one(second, request)
    assert sum_and_count(result) == ([45.0] * 4, 10)
    assert second.instance.snapshots is not None
    second.instance.snapshots.close()
    assert left_in(bucket) == []
