"""Generations whose responses are fetched, one a request: as the front asks, for Triton's BLS cannot be trusted with more."""

import threading

import pytest
import torch
from inplace.errors import Code
from inplace.runtime.requests import Request
from support.driving import prompt
from support.models import SLOTS, Repository, greedy
from support.streaming import FREE, Deaf, Heard, OpenStreams, Streams, slowed


def fetch(driver: Streams, sequence: str, **parameters: str) -> Heard:
    return driver.send(
        Request(
            sequence,
            False,
            False,
            {"input_ids": torch.zeros(1, 0, dtype=torch.int64)},
            "r",
            {"fetch": True, **parameters},
        )
    )


def all_of(driver: Streams, sequence: str, first: Heard) -> tuple[list[int], str]:
    """Fetch until the end; each request has exactly one response."""
    tokens, reason, heard = [], "", first
    while True:
        heard.wait()
        assert heard.error is None, heard.error
        [response] = heard.responses
        tokens += heard.tokens
        reason = str(response["finish_reason"])
        if reason:
            return tokens, reason
        assert heard.tokens
        heard = fetch(driver, sequence)


def test_what_is_fetched_is_what_would_have_been_sent(
    streams: OpenStreams, repository: Repository
) -> None:
    driver = streams()
    prompts = {
        f"s{number}": prompt(number, 5 + number) for number in range(2 * SLOTS)
    }  # half of them wait for a slot
    found: dict[str, tuple[list[int], str]] = {}

    def one(name: str) -> None:
        found[name] = all_of(driver, name, driver.generate(name, prompts[name], 12, fetch=True))
        assert driver.end(name).wait().error is None

    threads = [threading.Thread(target=one, args=(name,)) for name in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {
        name: (greedy(repository.llama, ids, 12), "length") for name, ids in prompts.items()
    }
    assert driver.free() == SLOTS


def test_what_nobody_fetched_yet_is_kept_until_the_next_request(
    streams: OpenStreams, repository: Repository
) -> None:
    driver, ids = streams(), prompt(1, 8)
    first = driver.generate("a", ids, 6, fetch=True).wait()
    while driver.driver.instance.table.find("a").busy:
        pass
    rest, reason = all_of(
        driver, "a", fetch(driver, "a")
    )  # several, where the last token is still on its way to the mailbox
    assert first.tokens + rest == greedy(repository.llama, ids, 6)
    assert reason == "length"
    fetch(driver, "a").refused(Code.UNKNOWN_SEQUENCE, "nothing that could be fetched")
    assert (
        driver.ask("a", [3]).next_token
        == greedy(repository.llama, [*ids, *greedy(repository.llama, ids, 6), 3], 1)[0]
    )


def test_an_end_says_so_to_who_is_fetching(streams: OpenStreams) -> None:
    driver = streams()
    with slowed(driver, 0.05):
        driver.generate("a", prompt(1, 8), FREE, fetch=True).wait()
        waiting = fetch(driver, "a")
        fetch(driver, "a").refused(Code.QUEUE_FULL, "another request is fetching", retryable=True)
        waiting.wait()
        waiting = fetch(driver, "a")
        assert driver.end("a").wait().error is None
    assert waiting.wait().error is None
    assert waiting.responses[-1]["finish_reason"] in ("ended", "")
    fetch(driver, "a").refused(Code.UNKNOWN_SEQUENCE)
    assert driver.free() == SLOTS


def test_nobody_else_fetches(streams: OpenStreams) -> None:
    driver = streams()
    with slowed(driver, 0.05):
        driver.generate("a", prompt(1, 8), FREE, fetch=True, sequence_key="mine").wait()
        fetch(driver, "a").refused(Code.SEQUENCE_KEY)
        fetch(driver, "a", sequence_key="other").refused(Code.SEQUENCE_KEY)
        assert fetch(driver, "a", sequence_key="mine").wait().tokens
        driver.ask("b", [3], start=True).wait()
        fetch(driver, "b").refused(Code.UNKNOWN_SEQUENCE)
        fetch(driver, "nobody").refused(Code.UNKNOWN_SEQUENCE)
        driver.end("a", sequence_key="mine").wait()


def test_an_engine_that_fails_is_heard_of_by_who_fetches(streams: OpenStreams) -> None:
    driver = streams()
    engine = driver.engine
    with slowed(driver, 0.05):
        driver.generate("a", prompt(1, 8), FREE, fetch=True).wait()
        engine.fail_at = 1
        waiting = fetch(driver, "a")
        waiting.wait()
        if waiting.error is None:  # it was said before the step that failed
            waiting = fetch(driver, "a").wait()
    assert waiting.error is not None and waiting.error.code in (
        Code.ENGINE_FAILED,
        Code.UNKNOWN_SEQUENCE,
    )


@pytest.mark.parametrize(("start", "end"), [(True, False), (False, True), (True, True)])
def test_what_fetches_neither_starts_nor_ends(streams: OpenStreams, start: bool, end: bool) -> None:
    driver = streams()
    driver.ask("a", [3], start=True).wait()
    request = Request("a", start, end, {"input_ids": torch.tensor([[5]])}, "r", {"fetch": True})
    driver.send(request).refused(Code.BAD_PARAMETER, "send neither START nor END")
    assert driver.free() == SLOTS


def test_a_response_that_cannot_be_sent_is_an_error_and_the_generation_goes_on(
    streams: OpenStreams, repository: Repository
) -> None:
    driver, ids = streams(), prompt(1, 8)
    with slowed(driver, 0.05):
        first = driver.generate("a", ids, 12, fetch=True).wait()
        lost = Deaf(last=False)
        request = Request(
            "a",
            False,
            False,
            {"input_ids": torch.zeros(1, 0, dtype=torch.int64)},
            "r",
            {"fetch": True},
        )
        driver.driver.submit([(request, {}, lost)])
        lost.refused(Code.ENGINE_FAILED, "a response could not be made (ValueError")
        rest, reason = all_of(driver, "a", fetch(driver, "a"))
    assert reason == "length"
    said = greedy(repository.llama, ids, 12)
    assert said[: len(first.tokens)] == first.tokens
    assert said[-len(rest) :] == rest
