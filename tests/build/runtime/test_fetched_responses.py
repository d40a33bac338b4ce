"""Generations whose tokens are fetched, one response a request, as the generate proxy does."""

import threading

import pytest
import torch
from inplace.errors import Code, RequestError
from inplace.runtime.requests import Request
from support.driving import random_tokens
from support.models import SLOTS, Repository, greedy
from support.streaming import (
    MAX_NEW_TOKENS,
    FailingChannel,
    OpenStreams,
    RecordingChannel,
    StreamClient,
    slow_steps,
)


def fetch(client: StreamClient, sequence: str, **parameters: str) -> RecordingChannel:
    return client.send(
        Request(
            sequence,
            False,
            False,
            {"input_ids": torch.zeros(1, 0, dtype=torch.int64)},
            "r",
            {"fetch": True, **parameters},
        )
    )


def fetch_all(
    client: StreamClient, sequence: str, first: RecordingChannel
) -> tuple[list[int], str]:
    """Fetch until the end; each request has exactly one response."""
    tokens, reason, channel = [], "", first
    while True:
        channel.wait()
        assert channel.error is None, channel.error
        [response] = channel.responses
        tokens += channel.tokens
        reason = str(response["finish_reason"])
        if reason:
            return tokens, reason
        assert channel.tokens
        channel = fetch(client, sequence)


def test_fetched_tokens_are_the_generations_own(
    streams: OpenStreams, repository: Repository
) -> None:
    client = streams()
    # Twice as many as slots, so that half of them wait.
    prompts = {f"s{seed}": random_tokens(seed, 5 + seed) for seed in range(2 * SLOTS)}
    results: dict[str, tuple[list[int], str]] = {}

    def run(name: str) -> None:
        results[name] = fetch_all(
            client, name, client.generate(name, prompts[name], 12, fetch=True)
        )
        assert client.end(name).wait().error is None

    threads = [threading.Thread(target=run, args=(name,)) for name in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {
        name: (greedy(repository.llama, ids, 12), "length") for name, ids in prompts.items()
    }
    assert client.num_free_slots() == SLOTS


def test_tokens_are_kept_until_they_are_fetched(
    streams: OpenStreams, repository: Repository
) -> None:
    client, ids = streams(), random_tokens(1, 8)
    with slow_steps(client, 0.05):  # so that the first response has not all tokens
        first = client.generate("a", ids, 6, fetch=True).wait()
        while client.driver.instance.table.find("a").busy:
            pass
    rest, reason = fetch_all(client, "a", fetch(client, "a"))
    assert first.tokens + rest == greedy(repository.llama, ids, 6)
    assert reason == "length"
    fetch(client, "a").assert_refused(Code.UNKNOWN_SEQUENCE, "nothing that could be fetched")
    assert (
        client.step("a", [3]).next_token
        == greedy(repository.llama, [*ids, *greedy(repository.llama, ids, 6), 3], 1)[0]
    )


def test_an_end_finishes_the_generation_for_a_request_that_fetches(streams: OpenStreams) -> None:
    client = streams()
    with slow_steps(client, 0.05):
        client.generate("a", random_tokens(1, 8), MAX_NEW_TOKENS, fetch=True).wait()
        waiting = fetch(client, "a")
        fetch(client, "a").assert_refused(
            Code.QUEUE_FULL, "another request is fetching", retryable=True
        )
        waiting.wait()
        waiting = fetch(client, "a")
        assert client.end("a").wait().error is None
    assert waiting.wait().error is None
    assert waiting.responses[-1]["finish_reason"] in ("ended", "")
    fetch(client, "a").assert_refused(Code.UNKNOWN_SEQUENCE)
    assert client.num_free_slots() == SLOTS


def test_only_requests_with_the_key_fetch(streams: OpenStreams) -> None:
    client = streams()
    with slow_steps(client, 0.05):
        client.generate(
            "a", random_tokens(1, 8), MAX_NEW_TOKENS, fetch=True, sequence_key="mine"
        ).wait()
        fetch(client, "a").assert_refused(Code.SEQUENCE_KEY)
        fetch(client, "a", sequence_key="other").assert_refused(Code.SEQUENCE_KEY)
        assert fetch(client, "a", sequence_key="mine").wait().tokens
        client.step("b", [3], start=True).wait()
        fetch(client, "b").assert_refused(Code.UNKNOWN_SEQUENCE)
        fetch(client, "unknown").assert_refused(Code.UNKNOWN_SEQUENCE)
        client.end("a", sequence_key="mine").wait()


def test_a_failure_of_the_engine_is_fetched(streams: OpenStreams) -> None:
    client = streams()
    engine = client.engine
    with slow_steps(client, 0.05):
        client.generate("a", random_tokens(1, 8), MAX_NEW_TOKENS, fetch=True).wait()
        engine.fail_at = 1
        waiting = fetch(client, "a")
        waiting.wait()
        if waiting.error is None:  # the token of the step before the failed one
            waiting = fetch(client, "a").wait()
    waiting.assert_refused(Code.ENGINE_FAILED, retryable=True)


def test_an_error_between_two_fetches_is_the_response_to_the_next(streams: OpenStreams) -> None:
    client = streams()
    error = RequestError(Code.SHUTDOWN, "the server is stopping", retryable=True)
    client.generate("a", random_tokens(1, 8), MAX_NEW_TOKENS, fetch=True, sequence_key="k").wait()
    client.driver.stop_running(error)
    while client.num_free_slots() < SLOTS:
        pass
    fetch(client, "a", sequence_key="other").assert_refused(Code.UNKNOWN_SEQUENCE)
    fetch(client, "a", sequence_key="k").assert_refused(
        Code.SHUTDOWN, "the server is stopping", retryable=True
    )
    fetch(client, "a", sequence_key="k").assert_refused(Code.UNKNOWN_SEQUENCE)


def test_a_new_start_forgets_the_error(streams: OpenStreams) -> None:
    client = streams()
    client.generate("a", random_tokens(1, 8), MAX_NEW_TOKENS, fetch=True).wait()
    client.driver.stop_running(RequestError(Code.SHUTDOWN, "the server is stopping"))
    client.generate("a", random_tokens(2, 8), 2).wait()
    client.end("a").wait()
    fetch(client, "a").assert_refused(Code.UNKNOWN_SEQUENCE)


@pytest.mark.parametrize(("start", "end"), [(True, False), (False, True), (True, True)])
def test_a_fetch_with_start_or_end_is_refused(streams: OpenStreams, start: bool, end: bool) -> None:
    client = streams()
    client.step("a", [3], start=True).wait()
    request = Request("a", start, end, {"input_ids": torch.tensor([[5]])}, "r", {"fetch": True})
    client.send(request).assert_refused(Code.BAD_PARAMETER, "send neither START nor END")
    assert client.num_free_slots() == SLOTS


def test_a_response_that_cannot_be_sent_is_an_error_and_the_generation_continues(
    streams: OpenStreams, repository: Repository
) -> None:
    client, ids = streams(), random_tokens(1, 8)
    with slow_steps(client, 0.05):
        first = client.generate("a", ids, 12, fetch=True).wait()
        failing = FailingChannel(only_final=False)
        request = Request(
            "a",
            False,
            False,
            {"input_ids": torch.zeros(1, 0, dtype=torch.int64)},
            "r",
            {"fetch": True},
        )
        client.driver.submit([(request, {}, failing)])
        failing.assert_refused(Code.ENGINE_FAILED, "a response could not be made (ValueError")
        rest, reason = fetch_all(client, "a", fetch(client, "a"))
    assert reason == "length"
    expected = greedy(repository.llama, ids, 12)
    assert expected[: len(first.tokens)] == first.tokens
    assert expected[-len(rest) :] == rest
