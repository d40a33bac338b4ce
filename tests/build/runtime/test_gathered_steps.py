"""A step waits for more requests while answers are being sent: their clients ask again at once."""

import threading
import time

import pytest
import torch
from inplace.drivers import stream_driver
from inplace.drivers.reply import Outputs
from inplace.runtime.requests import Request
from support.driving import random_tokens
from support.models import SLOTS, Repository, greedy
from support.streaming import ALL_OUTPUTS, OpenStreams, RecordingChannel, StreamClient, wait_until

IDS = [random_tokens(seed, 1) for seed in range(SLOTS)]


class BlockedChannel(RecordingChannel):
    """A channel whose response is being sent until an event is set."""

    def __init__(self, unblock: threading.Event) -> None:
        super().__init__(ALL_OUTPUTS)
        self._unblock = unblock

    def send(self, outputs: Outputs, *, final: bool) -> None:
        assert self._unblock.wait(60)
        super().send(outputs, final=final)


@pytest.fixture
def unblock() -> threading.Event:
    return threading.Event()


@pytest.fixture
def answering_client(streams: OpenStreams, unblock: threading.Event) -> StreamClient:
    """The client of a driver that has computed a step of every slot and cannot send the answers."""
    client = streams()
    client.driver.submit(
        (
            Request(f"s{slot}", True, False, {"input_ids": torch.tensor([ids])}),
            {},
            BlockedChannel(unblock),
        )
        for slot, ids in enumerate(IDS)
    )
    wait_until(lambda: client.driver._senders.behind)
    return client


def test_requests_that_arrive_while_answers_are_being_sent_share_a_step(
    answering_client: StreamClient,
    repository: Repository,
    unblock: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream_driver, "MAX_GATHER_TIME", 60.0)
    channels = [answering_client.step(f"s{slot}", [3]) for slot in range(SLOTS - 1)]
    time.sleep(0.1)
    assert len(answering_client.engine.slots) == 1
    unblock.set()
    assert [channel.next_token for channel in channels] == [
        greedy(repository.llama, [*IDS[slot], 3], 1)[0] for slot in range(SLOTS - 1)
    ]
    assert [len(rows) for rows in answering_client.engine.slots] == [SLOTS, SLOTS - 1]


def test_a_full_step_is_not_delayed(
    answering_client: StreamClient, unblock: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_driver, "MAX_GATHER_TIME", 60.0)
    for slot in range(SLOTS):
        answering_client.step(f"s{slot}", [3])
    wait_until(lambda: sum(len(rows) for rows in answering_client.engine.slots) == 2 * SLOTS)
    unblock.set()


def test_a_step_is_delayed_for_the_gather_time_at_most(
    answering_client: StreamClient, unblock: threading.Event
) -> None:
    begin = time.monotonic()
    answering_client.step("s0", [3])
    wait_until(lambda: len(answering_client.engine.slots) == 2)
    assert time.monotonic() - begin > stream_driver.MAX_GATHER_TIME
    unblock.set()


def test_generations_are_not_delayed(
    answering_client: StreamClient,
    repository: Repository,
    unblock: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream_driver, "MAX_GATHER_TIME", 60.0)
    answering_client.step("s0", [3])
    answering_client.generate("s1", [3], 4, start=False)
    wait_until(lambda: len(answering_client.engine.slots) > 1)
    unblock.set()
