"""Calls of a loop that are made in succession, without a look at what they gave in between."""

from pathlib import Path
from typing import Any

import pytest
import torch
from inplace.drivers import StepDriver
from inplace.engines import NO_OTHER_THREADS
from inplace.runtime.batcher import form_batch
from inplace.runtime.requests import Request
from inplace.runtime.schedules import ScheduledInstance
from inplace_builder import BuildOptions, Call, RowOptions, capture_programs, write_engine
from support.long import long_except
from support.transducing import check_streams, chunks
from torch import Tensor, nn
from transducer import FRAMES, MAX_SYMBOLS, Decode, Encode, capture, modules

REPEATED = (1, 2, 3, 8, 64)


@pytest.fixture(scope="module")
def parts() -> tuple[Encode, Decode]:
    return modules()


@pytest.fixture(scope="module")
def folder(parts: tuple[Encode, Decode], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("repeated") / "transducer"
    write_engine(capture(*parts), path, BuildOptions(slots=4, max_rows=4))
    return path / "1"


class Counting:
    """An engine that records how many calls each launch has."""

    def __init__(self, engine: Any, launches: list[int]) -> None:
        self.engine, self.launches = engine, launches

    def launch(self, *arguments: Any) -> Any:
        self.launches.append(1)
        return self.engine.launch(*arguments)

    def launch_repeated(self, *arguments: Any, count: int) -> Any:
        self.launches.append(count)
        return self.engine.launch_repeated(*arguments, count)


def counting(instance: ScheduledInstance, program: str) -> list[int]:
    launches: list[int] = []
    engine: Any = Counting(instance.engines[program], launches)
    instance.engines = {**instance.engines, program: engine}
    return launches


@pytest.mark.parametrize("most", long_except([3, 64], REPEATED))
def test_streams_get_the_same_tokens_however_many_calls_are_made_at_once(
    folder: Path, parts: tuple[Encode, Decode], most: int
) -> None:
    instance = ScheduledInstance.open(folder)
    instance.loop_calls, launches = most, counting(instance, "decode")
    driver = StepDriver(instance)
    try:
        check_streams(driver, parts, 8)
    finally:
        driver.close()
    assert max(launches) == most if most < 4 else 4 <= max(launches) <= FRAMES * MAX_SYMBOLS
    single = sum(count == 1 for count in launches)
    assert single == len(launches) if most == 1 else single < len(launches) / 2


def test_rows_that_are_done_keep_every_byte(folder: Path) -> None:
    """Whatever the states hold, twelve calls at once leave what twelve calls leave."""
    one, many = (ScheduledInstance.open(folder) for _ in range(2))
    [chunk] = chunks(3, 1)
    for instance in (one, many):
        encoded = instance.admit(Request(1, True, False, {"features": chunk[None]}))
        instance.step([encoded])
        batch = form_batch(instance.programs["decode"], [encoded]).inputs
        engine, outputs = instance.engines["decode"], ["tokens", "done"]
        if instance is one:
            expected = [engine.launch(batch, outputs)(NO_OTHER_THREADS) for _ in range(12)]
        else:
            actual = engine.launch_repeated(batch, outputs, 12)(NO_OTHER_THREADS)
    for index, step in enumerate(expected):
        assert all(torch.equal(step[name], actual[name][index]) for name in outputs)
    for name, tensor in one.arena.tensors.items():
        assert torch.equal(tensor.view(torch.uint8), many.arena.tensors[name].view(torch.uint8))


class Counter(nn.Module):
    """Counts its calls."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1, dtype=torch.int64))

    def forward(self) -> Tensor:
        self.calls.add_(1)
        return self.calls * 1


@pytest.mark.parametrize("most", long_except([3], REPEATED))
def test_no_row_is_called_beyond_its_limit(tmp_path: Path, most: int) -> None:
    options = RowOptions(max_rows=2, outputs=("count",))
    captured = capture_programs(
        {"count": (Counter(), options, ())}, [Call(program="count", at_most=5)]
    )
    write_engine(captured, tmp_path / "count", BuildOptions(slots=2, max_rows=2))
    instance = ScheduledInstance.open(tmp_path / "count" / "1")
    instance.loop_calls = most
    requests = [
        Request(number, True, False, {}, requested_outputs=frozenset()) for number in (1, 2)
    ]
    first = instance.admit(requests[0])
    instance.step([first])  # the second joins at another count
    rows = [first, instance.admit(requests[1])]
    while waiting := [row for row in rows if not row.finished]:
        instance.step(waiting)
    assert instance.arena.tensors["calls"].flatten().tolist() == [5, 5]
