"""States to which a program of a schedule appends: how long they last, and calls taken back."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from inplace.drivers.step_driver import StepDriver
from inplace.engines import Finish
from inplace.errors import Code, RequestError
from inplace.runtime.requests import Request
from inplace.runtime.schedules import ScheduledInstance
from inplace.schema.served import Manifest
from inplace_builder import (
    BuildError,
    BuildOptions,
    Call,
    Role,
    RowOptions,
    capture_exported_rows,
    capture_programs,
    write_engine,
)
from inplace_builder.capture.programs import ProgramsCapture
from torch import Tensor, nn

CAPACITY, WIDTH, VOCABULARY, PER_REQUEST, LIMIT = 16, 8, 23, 3, 10
OPTIONS = BuildOptions(slots=4, max_rows=4)


class Memory(nn.Module):
    """The context that decoding attends to, and how many tokens have been decoded."""

    context: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("context", torch.zeros(1, WIDTH))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))


class Encode(nn.Module):
    """Sets the context. Decoding begins anew."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory, self.linear = memory, nn.Linear(WIDTH, WIDTH)

    def forward(self, value: Tensor) -> Tensor:
        self.memory.context.copy_(self.linear(value))
        self.memory.count.zero_()
        return self.memory.context.sum(1)


class Decode(nn.Module):
    """A decoder with a cache: a token each call, which it feeds itself."""

    keys: Tensor
    last: Tensor

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory, self.embedding = memory, nn.Embedding(VOCABULARY, WIDTH)
        self.key, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.register_buffer("keys", torch.zeros(1, CAPACITY, WIDTH))
        self.register_buffer("last", torch.zeros(1, dtype=torch.int64))

    def forward(self, hint: Tensor) -> Tensor:
        count = self.memory.count
        hidden = self.embedding(self.last) + self.memory.context + hint
        self.keys.index_copy_(1, count, self.key(hidden)[:, None])
        visible = torch.arange(CAPACITY) <= count[:, None]
        scores = (self.keys @ hidden[:, :, None])[..., 0].masked_fill(~visible, float("-inf"))
        seen = (scores.softmax(1)[:, :, None] * self.keys).sum(1)
        token: Tensor = self.head(seen + hidden).argmax(1)
        self.last.copy_(token)
        self.memory.count.add_(1)
        return token


def modules() -> tuple[Encode, Decode]:
    torch.manual_seed(3)
    memory = Memory()
    return Encode(memory).eval(), Decode(memory).eval()


class Eager:
    """One sequence, in eager PyTorch, with all keys in a list."""

    def __init__(self, encoder: Encode, decoder: Decode) -> None:
        self.encoder, self.decoder = encoder, decoder
        self.context, self.keys, self.last = torch.zeros(1, WIDTH), list[Tensor](), 0

    @torch.no_grad()
    def encode(self, value: Tensor) -> None:
        self.context, self.keys = self.encoder.linear(value), []

    @torch.no_grad()
    def decode(self, hint: Tensor) -> list[int]:
        tokens = []
        for _ in range(PER_REQUEST):
            hidden = self.decoder.embedding(torch.tensor([self.last])) + self.context + hint
            self.keys.append(self.decoder.key(hidden))
            keys = torch.cat(self.keys)
            seen = (keys @ hidden[0]).softmax(0) @ keys
            self.last = int(self.decoder.head(seen + hidden[0]).argmax())
            tokens.append(self.last)
        return tokens


def decode(module: Decode, **options: Any) -> tuple[nn.Module, RowOptions, tuple[Tensor, ...]]:
    return (
        module,
        RowOptions(
            max_rows=4,
            outputs=("tokens",),
            roles={"tokens": Role.TOKENS},
            **options,
        ),
        (torch.zeros(1, WIDTH),),
    )


def capture(module: Decode, limit: int = LIMIT) -> ProgramsCapture:
    programs = {"decode": decode(module, max_positions=limit)}
    return capture_programs(programs, [Call(program="decode", at_most=PER_REQUEST)])


@pytest.fixture(scope="module")
def parts() -> tuple[Encode, Decode]:
    return modules()


@pytest.fixture(scope="module")
def folder(parts: tuple[Encode, Decode], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("states") / "decoder"
    write_engine(capture(parts[1]), path, OPTIONS)
    return path / "1"


@pytest.fixture
def instance(folder: Path) -> ScheduledInstance:
    return ScheduledInstance.open(folder)


@pytest.fixture
def driver(instance: ScheduledInstance) -> Iterator[StepDriver]:
    running = StepDriver(instance)
    yield running
    running.close()


def hints(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, WIDTH, generator=generator) for _ in range(count)]


def run(driver: StepDriver, sequence: int, start: bool, **inputs: Tensor) -> list[int]:
    """The tokens of a request; raises its error."""
    [answer] = driver.run([Request(sequence, start, False, inputs)])
    if isinstance(answer, RequestError):
        raise answer
    tokens: list[int] = answer["tokens"][0].tolist()
    return tokens


class FailsOnce:
    """Fails in its n-th launch, after the states were written."""

    def __init__(self, engine: Any, launches: int) -> None:
        self.engine, self.launches = engine, launches

    def launch(self, inputs: Any, requested: Any) -> Finish:
        self.launches -= 1
        finish: Finish = self.engine.launch(inputs, requested)
        if self.launches:
            return finish

        def fail(waiting: Any) -> dict[str, Tensor]:
            finish(waiting)
            raise RuntimeError("out of luck")

        return fail


def test_a_request_is_taken_back_where_states_only_append(
    instance: ScheduledInstance, driver: StepDriver, parts: tuple[Encode, Decode]
) -> None:
    assert instance.manifest.program("decode").appended == ("keys",)
    eager, (first, lost, second) = Eager(*parts), hints(3)
    assert run(driver, 1, True, hint=first) == eager.decode(first)
    failing: Any = FailsOnce(instance.engines["decode"], 2)
    instance.engines = {"decode": failing}
    with pytest.raises(RequestError, match="nothing was changed, send it again") as error:
        run(driver, 1, False, hint=lost)
    assert error.value.code is Code.ENGINE_FAILED
    assert error.value.retryable
    assert run(driver, 1, False, hint=second) == eager.decode(second)


def test_a_request_that_finds_no_room_is_refused(
    instance: ScheduledInstance, driver: StepDriver, parts: tuple[Encode, Decode]
) -> None:
    """Ten positions are room for three requests; the fourth is taken back after one call."""
    eager = Eager(*parts)
    for place, hint in enumerate(hints(3)):
        assert run(driver, 1, place == 0, hint=hint) == eager.decode(hint)
    for _ in range(2):
        with pytest.raises(RequestError, match=r"used 10 of the sequence's 10 positions") as error:
            run(driver, 1, False, hint=hints(1)[0])
        assert error.value.code is Code.CAPACITY
        assert "the request is not done; nothing was changed: START it again" in str(error.value)
    assert instance.table.find(1).positions == {"decode": 9}
    anew = Eager(*parts)
    assert run(driver, 1, True, hint=hints(1)[0]) == anew.decode(hints(1)[0])


def test_a_full_sequence_is_refused_at_once(parts: tuple[Encode, Decode], tmp_path: Path) -> None:
    write_engine(capture(parts[1], 2 * PER_REQUEST), tmp_path / "decoder", OPTIONS)
    instance = ScheduledInstance.open(tmp_path / "decoder" / "1")
    driver = StepDriver(instance)
    try:
        [hint] = hints(1)
        for start in (True, False):
            run(driver, 1, start, hint=hint)
        with pytest.raises(
            RequestError, match=r"used 6 of the sequence's 6 .*; nothing was changed"
        ):
            run(driver, 1, False, hint=hint)
        assert len(instance.table) == 1
    finally:
        driver.close()


def test_a_program_may_begin_another_anew(parts: tuple[Encode, Decode], tmp_path: Path) -> None:
    options = RowOptions(max_rows=4, outputs=("level",), restarts=("decode",))
    programs = {
        "encode": (parts[0], options, (torch.zeros(1, WIDTH),)),
        "decode": decode(parts[1], max_positions=PER_REQUEST),
    }
    calls = [Call(program="encode"), Call(program="decode", at_most=PER_REQUEST)]
    write_engine(capture_programs(programs, calls), tmp_path / "model", OPTIONS)
    driver, eager = StepDriver(ScheduledInstance.open(tmp_path / "model" / "1")), Eager(*parts)
    try:
        for place, value in enumerate(hints(4)):
            eager.encode(value)
            answer = run(driver, 1, place == 0, value=value, hint=value)
            assert answer == eager.decode(value)
    finally:
        driver.close()


class Table(nn.Module):
    """Adds up all entries of its state, also those behind what it has written: none can go."""

    table: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(1, CAPACITY, WIDTH))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))

    def forward(self, value: Tensor) -> Tensor:
        self.table.index_copy_(1, self.count, value[:, None, None].expand(1, 1, WIDTH))
        self.count.add_(1)
        return self.table.sum((1, 2)).abs().to(torch.int64)


def table(**options: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "max_rows": 4,
        "outputs": ("tokens",),
        "roles": {"tokens": Role.TOKENS},
    }
    return {"write": (Table(), RowOptions(**fields | options), (torch.zeros(1),))}


def test_writes_that_are_read_again_are_no_appends(tmp_path: Path) -> None:
    calls = [Call(program="write", at_most=2)]
    captured = capture_programs(table(max_positions=CAPACITY), calls)
    assert captured.appended() == {"write": ("table",)}
    manifest: Manifest = write_engine(captured, tmp_path / "table", OPTIONS)
    assert manifest.program("write").appended == ()


def test_a_program_that_appends_says_for_how_long() -> None:
    calls = [Call(program="write")]
    with pytest.raises(BuildError, match="appends to table, which has room for 16 entries: give"):
        capture_programs(table(), calls)
    with pytest.raises(BuildError, match=r"max_positions is 17, and table, .* room for 16 entries"):
        capture_programs(table(max_positions=17), calls)
    with pytest.raises(BuildError, match=r"program write restarts \['other'\]; the programs are"):
        capture_programs(table(max_positions=16, restarts=("other",)), calls)
    module, options, inputs = table(max_positions=16)["write"]
    with pytest.raises(BuildError, match="are of programs that a schedule calls"):
        capture_exported_rows(module, options, inputs)
