"""Outputs of the role accepted: how many of a call's tokens count."""

from pathlib import Path
from typing import Any

import pytest
import torch
from inplace.drivers import StepDriver, StreamDriver, TokenizerConfig, engine_thread
from inplace.engines import Finish
from inplace.errors import Code, RequestError
from inplace.runtime.requests import Request
from inplace.runtime.schedules import ScheduledInstance
from inplace_builder import (
    BuildError,
    BuildOptions,
    Call,
    ProgramsCapture,
    Role,
    RowOptions,
    capture_programs,
    write_engine,
)
from support.streaming import RecordingChannel, StreamClient
from torch import Tensor, nn

PROPOSED, CAPACITY, PER_REQUEST = 3, 24, 7
OPTIONS = BuildOptions(slots=4, max_rows=4)


class Verify(nn.Module):
    """Proposes the next numbers of a sequence and accepts some of them, until there are enough."""

    written: Tensor
    length: Tensor
    left: Tensor

    def __init__(self, first: "First") -> None:
        super().__init__()
        self.first = first
        self.register_buffer("written", torch.zeros(1, CAPACITY + PROPOSED, 1))
        self.register_buffer("length", torch.zeros(1, dtype=torch.int64))

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        length, left = self.length, self.first.left
        proposed = length[:, None] + torch.arange(PROPOSED)
        active = left > 0
        places = length + torch.arange(PROPOSED)
        entries = torch.where(
            active[:, None, None],
            proposed[..., None].to(torch.float32),
            self.written.index_select(1, places),
        )
        self.written.index_copy_(1, places, entries)
        accepted = torch.where(active, torch.minimum(1 + length % PROPOSED, left), 0)
        self.length.add_(accepted)
        left.sub_(accepted)
        return proposed, accepted, left == 0


class First(nn.Module):
    """How many tokens the request has."""

    left: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("left", torch.zeros(1, dtype=torch.int64))

    def forward(self, count: Tensor) -> Tensor:
        self.left.copy_(count)
        return count * 1


def capture(**options: Any) -> ProgramsCapture:
    first = First()
    fields: dict[str, Any] = {
        "max_rows": 4,
        "outputs": ("tokens", "accepted", "done"),
        "roles": {"tokens": Role.TOKENS, "accepted": Role.ACCEPTED, "done": Role.DONE},
        "max_positions": CAPACITY,
    }
    count = RowOptions(max_rows=4, outputs=("asked",), limits={"count": (PER_REQUEST, PER_REQUEST)})
    programs = {
        "first": (first, count, (torch.ones(1, dtype=torch.int64),)),
        "verify": (Verify(first), RowOptions(**fields | options), ()),
    }
    calls = [Call(program="first"), Call(program="verify", until="done", at_most=PER_REQUEST)]
    return capture_programs(programs, calls)


def rounds(length: int) -> list[int]:
    """How many tokens are accepted in each call of a request of a sequence of this length."""
    accepted, left = [], PER_REQUEST
    while left:
        accepted.append(min(1 + length % PROPOSED, left))
        length, left = length + accepted[-1], left - accepted[-1]
    return accepted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("accepted") / "verify"
    write_engine(capture(), path, OPTIONS)
    return path / "1"


def request(sequence: int, *, start: bool) -> Request:
    return Request(sequence, start, False, {"count": torch.full((1, 1), PER_REQUEST)})


@pytest.mark.parametrize("loop_calls", [1, 2, 8])
def test_only_accepted_tokens_count(folder: Path, loop_calls: int) -> None:
    instance = ScheduledInstance.open(folder)
    instance.loop_calls = loop_calls
    driver, length = StepDriver(instance), 0
    try:
        for _ in range(3):
            [answer] = driver.run([request(1, start=length == 0)])
            assert isinstance(answer, dict), answer
            assert answer["tokens"].tolist() == [list(range(length, length + PER_REQUEST))]
            assert answer["accepted"].tolist() == [rounds(length)]
            length += PER_REQUEST
            assert instance.table.find(1).positions == {"verify": length}
        [error] = driver.run([request(1, start=False)])
        assert isinstance(error, RequestError)
        assert error.code is Code.CAPACITY
        assert "used 22 of the sequence's 24 positions, and a call may take 3" in str(error)
    finally:
        driver.close()


def test_a_stream_has_them_as_they_come(folder: Path) -> None:
    outputs = frozenset({"tokens", "accepted", "asked", "finish_reason"})
    driver = StreamDriver(ScheduledInstance.open(folder), TokenizerConfig(), 4, engine_thread())
    try:
        channel: RecordingChannel = StreamClient(driver).send(
            request(1, start=True), requested_outputs=outputs
        )
        assert channel.finish_reason == "done"
    finally:
        driver.close()
    assert channel.tokens == list(range(PER_REQUEST))
    given: Any = [response["accepted"] for response in channel.responses]
    assert torch.cat(given, 1).tolist() == [rounds(0)]


class TooMany:
    """Accepts more tokens than there are."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def launch(self, *arguments: Any) -> Finish:
        finish: Finish = self.engine.launch(*arguments)

        def wrong(waiting: Any) -> dict[str, Tensor]:
            outputs = finish(waiting)
            return outputs | {"accepted": outputs["accepted"] + PROPOSED}

        return wrong


def test_an_engine_that_accepts_too_many_has_failed(folder: Path) -> None:
    instance = ScheduledInstance.open(folder)
    wrong: Any = TooMany(instance.engines["verify"])
    instance.engines = {**instance.engines, "verify": wrong}
    driver = StepDriver(instance)
    try:
        [error] = driver.run([request(1, start=True)])
    finally:
        driver.close()
    assert isinstance(error, RequestError)
    assert error.code is Code.ENGINE_FAILED
    assert "program verify accepts 4 of 3 tokens" in str(error)


def test_accepted_is_of_tokens() -> None:
    with pytest.raises(
        BuildError, match=r"outputs \['accepted'\] have the role accepted; one, bes"
    ):
        capture(roles={"accepted": Role.ACCEPTED, "done": Role.DONE})
