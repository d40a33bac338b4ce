"""Which schedule a request runs: by its flags, and by the inputs that it has."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from inplace.drivers import StepDriver
from inplace.errors import Code, RequestError
from inplace.parameters import Parameter
from inplace.protocol import LANGUAGE, POSITION, SAMPLE_RATE, SEQUENCE_KEY
from inplace.runtime.batcher import Answer
from inplace.runtime.requests import NO_PARAMETERS, Request
from inplace.runtime.schedules import ScheduledInstance
from inplace.schema.programs import Program, check_schedules
from inplace.schema.served import Manifest
from inplace.schema.specs import Dtype, Role, TensorSpec
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


def run(
    driver: StepDriver,
    flags: str = "",
    parameters: Mapping[str, Parameter] = NO_PARAMETERS,
    **inputs: list[float],
) -> dict[str, Any]:
    """The outputs of a request of one sequence, as lists; raises its error."""
    tensors = {name: torch.tensor([values]) for name, values in inputs.items()}
    request = Request(1, "start" in flags, "end" in flags, tensors, parameters=parameters)
    [answer] = driver.run([request])
    if isinstance(answer, RequestError):
        raise answer
    return {name: tensor[0].tolist() for name, tensor in answer.items()}


def refusal(
    driver: StepDriver,
    code: Code,
    flags: str = "",
    parameters: Mapping[str, Parameter] = NO_PARAMETERS,
    **inputs: list[float],
) -> str:
    with pytest.raises(RequestError) as error:
        run(driver, flags, parameters, **inputs)
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


def test_a_start_that_continues_runs_the_schedule_of_a_later_request(driver: StepDriver) -> None:
    """Triton has forgotten the sequence, so the client sends its request with START."""
    run(driver, "start", {SEQUENCE_KEY: "k", POSITION: 0}, entries=[1, 2, 3, 4.0])
    later: dict[str, Parameter] = {SEQUENCE_KEY: "k", POSITION: 1}
    answer = run(driver, "start", later, value=[100.0], entries=[1, 1, 1, 1.0])
    assert answer == {"was_set": [100], "tokens": [104], "counted": [4]}
    run(driver, "end", {SEQUENCE_KEY: "k"}, entries=[])
    message = refusal(driver, Code.POSITION, "start", later, value=[1.0], entries=[1, 1, 1, 1.0])
    assert "meant for position 1, the sequence holds 0" in message


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
        rate = {SAMPLE_RATE: 16000}
        message = refusal(driver, Code.BAD_PARAMETER, "end", rate, entries=[])
        assert "does not have the parameters ['sample_rate']; it takes no audio" in message
        run(driver, "start", entries=[1.0])
        message = refusal(driver, Code.BAD_INPUT, "end", entries=[1.0])
        assert "a request (end) has the inputs ['entries']; no schedule of this model" in message
        assert len(driver.instance.table) == 0  # an END takes effect all the same
    finally:
        driver.close()


def test_an_output_that_its_schedule_does_not_have_is_refused(driver: StepDriver) -> None:
    def answer(named: frozenset[str]) -> Answer:
        inputs = {"entries": torch.tensor([[1, 2, 3, 4.0]])}
        return driver.run([Request(1, True, True, inputs, requested_outputs=named)])[0]

    every = frozenset(spec.name for spec in driver.instance.program.outputs)
    assert "was_set" in every  # Triton names all where the client names none
    for named, given in ((every, {"tokens", "counted"}), ({"tokens"}, {"tokens"})):
        outputs = answer(frozenset(named))
        assert not isinstance(outputs, RequestError)
        assert outputs.keys() == given
    error = answer(frozenset({"tokens", "was_set"}))
    assert isinstance(error, RequestError)
    assert error.code is Code.BAD_OUTPUT
    assert "has no outputs ['was_set']; with its inputs and flags it has ['counted'," in str(error)


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


def test_parameters_choose_no_schedule(folder: Path) -> None:
    add = Manifest.load(folder).program("add")
    option = TensorSpec(
        name=LANGUAGE, role=Role.OPTION, dtype=Dtype.INT64, shape=(1,), choices=("", "en")
    )
    fields: dict[str, Any] = {name: getattr(add, name) for name in Program.model_fields}
    spoken = Program(**fields | {"name": "spoken", "inputs": (*add.inputs, option)})
    plain, with_language = (
        Schedule(name=name, calls=(Call(program=name),)) for name in ("add", "spoken")
    )
    with pytest.raises(ValueError, match="schedules add and spoken are both for requests"):
        check_schedules([plain, with_language], [add, spoken])
