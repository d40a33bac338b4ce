"""Which schedule a request runs: by its flags, and by the inputs that it has."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from inplace.drivers import StepDriver
from inplace.errors import Code, RequestError
from inplace.runtime.requests import Request
from inplace.runtime.schedules import ScheduledInstance
from inplace.schema.served import Manifest
from inplace.server.model_config import ServerTensor
from inplace_builder import (
    BuildError,
    BuildOptions,
    Call,
    RowOptions,
    Schedule,
    capture_programs,
    write_engine,
)
from inplace_builder.served.model_config import model_config
from support.sums import SCHEDULES, Set, Total, capture_sums

OPTIONS = BuildOptions(slots=4, max_rows=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("choice") / "sums"
    write_engine(capture_sums(SCHEDULES), path, OPTIONS)
    return path / "1"


@pytest.fixture
def driver(folder: Path) -> Iterator[StepDriver]:
    running = StepDriver(ScheduledInstance.open(folder))
    yield running
    running.close()


def run(driver: StepDriver, flags: str = "", **inputs: list[float]) -> dict[str, Any]:
    """The outputs of a request of one sequence, as lists; raises its error."""
    tensors = {name: torch.tensor([values]) for name, values in inputs.items()}
    [answer] = driver.run([Request(1, "start" in flags, "end" in flags, tensors)])
    if isinstance(answer, RequestError):
        raise answer
    return {name: tensor[0].tolist() for name, tensor in answer.items()}


def refusal(driver: StepDriver, code: Code, flags: str = "", **inputs: list[float]) -> str:
    with pytest.raises(RequestError) as error:
        run(driver, flags, **inputs)
    assert error.value.code is code
    return str(error.value)


def test_flags_and_inputs_choose_the_schedule(driver: StepDriver) -> None:
    assert run(driver, "start", entries=[1, 2, 3, 4.0]) == {"tokens": [10], "counted": [4]}
    assert run(driver, entries=[1, 1, 1, 1.0]) == {"tokens": [14], "counted": [4]}
    answer = run(driver, value=[100.0], entries=[1, 1, 1, 1.0])
    assert answer == {"was_set": [100], "tokens": [104], "counted": [4]}
    answer = run(driver, "end", entries=[1, 2, 3, 4.0])
    assert answer == {"tokens": [114], "counted": [4], "last": [1114]}
    assert len(driver.instance.table) == 0


def test_the_last_chunk_may_be_shorter(driver: StepDriver) -> None:
    assert run(driver, "start", entries=[1, 2, 3, 4.0])["tokens"] == [10]
    message = refusal(driver, Code.BAD_SHAPE, entries=[1.0, 2.0])
    assert "input 'entries' has 2 entries, a request has 4: only the last one, with END" in message
    assert run(driver, "end", entries=[5.0])["last"] == [1015]
    assert run(driver, "start end", entries=[1.0, 6.0]) == {"tokens": [7], "counted": [2]}
    assert len(driver.instance.table) == 0


def test_an_end_without_inputs_flushes(driver: StepDriver) -> None:
    run(driver, "start", entries=[1, 2, 3, 4.0])
    assert run(driver, "end", entries=[]) == {"last": [1010]}
    assert len(driver.instance.table) == 0


def test_an_end_without_a_schedule_only_ends(tmp_path: Path) -> None:
    chunk = Schedule(name="chunk", calls=(Call(program="add"),), requests=("start", "next"))
    write_engine(capture_sums([chunk], shorter="any"), tmp_path / "sums", OPTIONS)
    driver = StepDriver(ScheduledInstance.open(tmp_path / "sums" / "1"))
    try:
        run(driver, "start", entries=[1.0])
        assert run(driver, entries=[1.0, 2.0])["tokens"] == [4]
        assert run(driver, "end", entries=[]) == {}
        assert "no sequence 1 is live" in refusal(driver, Code.UNKNOWN_SEQUENCE, "end", entries=[])
        run(driver, "start", entries=[1.0])
        message = refusal(driver, Code.BAD_INPUT, "end", entries=[1.0])
        assert "a request (end) has the inputs ['entries']; no schedule of this model" in message
        assert len(driver.instance.table) == 0  # an END takes effect all the same
    finally:
        driver.close()


def test_inputs_that_no_schedule_has_are_refused(driver: StepDriver) -> None:
    message = refusal(driver, Code.MISSING_INPUT, "start")
    assert "a request (start) has the inputs []; it takes ['entries']" in message
    message = refusal(driver, Code.BAD_INPUT, "start", value=[1.0], entries=[1, 1, 1, 1.0])
    assert "a request (start) has the inputs ['entries', 'value']; it takes ['entries']" in message
    run(driver, "start", entries=[1, 2, 3, 4.0])
    message = refusal(driver, Code.MISSING_INPUT, value=[1.0])
    assert "it takes ['entries'] or ['entries', 'value']" in message


def test_the_server_may_leave_inputs_out(folder: Path) -> None:
    manifest = Manifest.load(folder)
    assert manifest.optional_inputs == {"entries", "value"}
    config = model_config(manifest, OPTIONS)
    expected = [ServerTensor(name, "TYPE_FP32", (-1,), True, True) for name in ("entries", "value")]
    assert list(config.inputs) == expected


def test_schedules_that_no_request_can_tell_apart_are_refused() -> None:
    chunk, other = (Schedule(name=name, calls=(Call(program="add"),)) for name in ("one", "two"))
    with pytest.raises(BuildError, match=r"schedules one and two are both for requests \(start\)"):
        capture_sums([chunk, other])
    with pytest.raises(BuildError, match=r"schedules \['one'\] are given more than once"):
        capture_sums([chunk, chunk])
    with pytest.raises(BuildError, match=r"none of the schedules .* is for requests with START"):
        capture_sums([chunk.model_copy(update={"requests": ("next",)})])
    mixed: Any = [chunk, Call(program="add")]
    programs = {"add": (Set(Total()), RowOptions(max_rows=2), (torch.zeros(1),))}
    with pytest.raises(BuildError, match="give either calls and loops, or schedules"):
        capture_programs(programs, mixed)
