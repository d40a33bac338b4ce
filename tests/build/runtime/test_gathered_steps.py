"""Steps wait for one another while the answers of the last ones are being sent: who is answered comes again."""

import threading
import time

import pytest
import torch
from inplace.drivers import engine_loop as runner
from inplace.drivers.reply import Outputs
from inplace.runtime.requests import Request
from support.driving import prompt
from support.models import SLOTS, Repository, greedy
from support.streaming import OUTPUTS, Heard, OpenStreams, Streams, until

IDS = [prompt(seed, 1) for seed in range(SLOTS)]


class Slow(Heard):
    """A channel whose response is being sent until it is let go."""

    def __init__(self, let_go: threading.Event) -> None:
        super().__init__(OUTPUTS)
        self._let_go = let_go

    def send(self, outputs: Outputs, *, final: bool) -> None:
        assert self._let_go.wait(60)
        super().send(outputs, final=final)


@pytest.fixture
def let_go() -> threading.Event:
    return threading.Event()


@pytest.fixture
def answering(streams: OpenStreams, let_go: threading.Event) -> Streams:
    """A driver that has computed a step of every slot, whose answers cannot be sent yet."""
    driver = streams()
    driver.driver.submit(
        (Request(f"s{slot}", True, False, {"input_ids": torch.tensor([ids])}), {}, Slow(let_go))
        for slot, ids in enumerate(IDS)
    )
    until(lambda: driver.driver._senders.behind)
    return driver


def test_steps_that_come_while_answers_are_being_sent_share_one(
    answering: Streams,
    repository: Repository,
    let_go: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "MAX_GATHER_TIME", 60.0)
    said = [answering.ask(f"s{slot}", [3]) for slot in range(SLOTS - 1)]
    time.sleep(0.1)
    assert len(answering.engine.slots) == 1
    let_go.set()
    assert [heard.next_token for heard in said] == [
        greedy(repository.llama, [*IDS[slot], 3], 1)[0] for slot in range(SLOTS - 1)
    ]
    assert [len(rows) for rows in answering.engine.slots] == [SLOTS, SLOTS - 1]


def test_a_step_with_a_row_for_everybody_waits_for_nobody(
    answering: Streams, let_go: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "MAX_GATHER_TIME", 60.0)
    for slot in range(SLOTS):
        answering.ask(f"s{slot}", [3])
    until(lambda: sum(len(rows) for rows in answering.engine.slots) == 2 * SLOTS)
    let_go.set()


def test_nobody_waits_for_long(answering: Streams, let_go: threading.Event) -> None:
    begin = time.monotonic()
    answering.ask("s0", [3])
    until(lambda: len(answering.engine.slots) == 2)
    assert time.monotonic() - begin > runner.MAX_GATHER_TIME
    let_go.set()


def test_generations_wait_for_no_step(
    answering: Streams,
    repository: Repository,
    let_go: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "MAX_GATHER_TIME", 60.0)
    answering.ask("s0", [3])
    answering.generate("s1", [3], 4, start=False)
    until(lambda: len(answering.engine.slots) > 1)
    let_go.set()
