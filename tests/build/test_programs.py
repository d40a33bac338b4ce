"""Several modules as programs of one engine: captured, verified, and stepped through a schedule."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from inplace.drivers.step_driver import StepDriver
from inplace.engines import Finish
from inplace.errors import Code, LoadError, RequestError
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request
from inplace.runtime.schedules import ScheduledInstance
from inplace.schema.served import Manifest
from inplace_builder import (
    BuildError,
    BuildOptions,
    Call,
    Loop,
    Role,
    RowOptions,
    capture_programs,
    write_engine,
)
from inplace_builder.capture.programs import ProgramsCapture
from support.copying import is_poisoned
from support.transducing import GreedySearch, check_streams, chunks
from torch import Tensor, nn
from transducer import Decode, Encode, Memory, capture, modules

OPTIONS = BuildOptions(slots=4, max_rows=4)
VERIFIED = ("fixed_points", "mixed_calls", "limits", "tokens")
"""What a manifest says that verification came across."""


@pytest.fixture(scope="module")
def parts() -> tuple[Encode, Decode]:
    return modules()


@pytest.fixture(scope="module")
def captured(parts: tuple[Encode, Decode]) -> ProgramsCapture:
    return capture(*parts)


@pytest.fixture(scope="module")
def folder(captured: ProgramsCapture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("programs") / "transducer"
    write_engine(captured, path, OPTIONS)
    return path / "1"


@pytest.fixture
def instance(folder: Path) -> ScheduledInstance:
    opened = ScheduledInstance.open(folder)
    for tensor in opened.arena.tensors.values():
        tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)
    return opened


@pytest.fixture
def driver(instance: ScheduledInstance) -> Iterator[StepDriver]:
    running = StepDriver(instance)
    yield running
    running.close()


def request(sequence: int, features: Tensor, *, start: bool = False, end: bool = False) -> Request:
    return Request(sequence, start, end, {"features": features[None]})


def tokens(answer: Mapping[str, Tensor] | RequestError) -> list[int]:
    assert not isinstance(answer, RequestError), answer
    assert answer["tokens"].shape[0] == 1
    assert answer["tokens"].dtype == torch.int64
    [row] = answer["tokens"].tolist()
    return list(row)


# --- the engine ---


def test_a_shared_buffer_is_one_state(folder: Path) -> None:
    manifest = Manifest.load(folder)
    names = ["context", "memory_frames", "memory_frame", "hidden", "last", "symbols"]
    assert [state.name for state in manifest.states] == names
    encode, decode = manifest.programs
    assert encode.states == ("context", "memory_frames", "memory_frame")
    assert decode.read_only == ("memory_frames",)
    assert encode.engine.file == "engine-encode.safetensors"
    assert manifest.verified == "executed"
    notes = {name: int(manifest.built_with[f"verified_{name}"]) for name in VERIFIED}
    assert notes["fixed_points"] > 3
    assert notes["mixed_calls"] > 1
    assert notes["limits"] > 1
    assert notes["tokens"] > 5


def test_three_streams_in_one_call_get_the_tokens_of_greedy_search(
    driver: StepDriver, parts: tuple[Encode, Decode]
) -> None:
    assert len(check_streams(driver, parts, 6)) > 3


def test_a_stream_and_its_copy_get_the_tokens_of_greedy_search(
    instance: ScheduledInstance, driver: StepDriver, parts: tuple[Encode, Decode]
) -> None:
    key, streams = {"sequence_key": "mine"}, (chunks(1, 6), chunks(1, 3) + chunks(2, 3))
    addresses = instance.arena.addresses()
    searches = [GreedySearch(*parts) for _ in streams]
    expected = [
        [search.feed(chunk) for chunk in stream]
        for search, stream in zip(searches, streams, strict=True)
    ]
    got: list[list[list[int]]] = [[], []]
    for place in range(3):
        sent = replace(request(1, streams[0][place], start=place == 0), parameters=key)
        got[0].append(tokens(driver.run([sent])[0]))
    got[1] = got[0].copy()
    for place in range(3, 6):
        sent = replace(request(1, streams[0][place]), parameters=key)
        copy = replace(
            request(2, streams[1][place], start=place == 3),
            parameters=key | ({"from": 1, "position": 3} if place == 3 else {}),
        )
        for row, answer in zip((1, 0), driver.run([copy, sent]), strict=True):
            got[row].append(tokens(answer))
    assert got == expected
    assert got[0][3:] != got[1][3:]
    assert instance.arena.addresses() == addresses
    others = list({*range(4)} - {instance.table.find(name).slot for name in (1, 2)})
    assert all(is_poisoned(tensor[others]) for tensor in instance.arena.tensors.values())


def test_rows_join_at_different_loop_counts(
    instance: ScheduledInstance, parts: tuple[Encode, Decode]
) -> None:
    """The second stream begins while the first is in its loop; then both share calls."""
    first = instance.admit(request(1, chunks(1, 1)[0], start=True))
    for _ in range(3):
        instance.step([first])
    second = instance.admit(request(2, chunks(2, 1)[0], start=True))
    instance.step([second])
    counts = []
    while waiting := [each for each in (first, second) if not each.finished]:
        rows = instance.next_rows(waiting)
        counts.append([row.progress.count for row in rows if row.progress is not None])
        instance.step(rows)
    assert counts[0] == [2, 0]
    for active, stream in ((first, 1), (second, 2)):
        assert tokens(active.outputs) == GreedySearch(*parts).feed(chunks(stream, 1)[0])


def test_no_program_is_called_twice_while_rows_wait_for_another(
    instance: ScheduledInstance,
) -> None:
    decoding = instance.admit(request(1, chunks(1, 1)[0], start=True))
    instance.step([decoding])
    new = [instance.admit(request(s, chunks(s, 1)[0], start=True)) for s in (2, 3)]
    instance.max_rows["encode"] = 1
    waiting, programs = [*new, decoding], []
    for _ in range(4):
        rows = instance.next_rows(waiting)
        assert rows[0].progress is not None
        programs.append(rows[0].progress.next_call.program)
        instance.step(rows)
        waiting = [each for each in waiting if each not in rows]
        waiting += [each for each in rows if not each.finished]
    assert programs == ["decode", "encode", "decode", "encode"]


def test_a_slot_that_is_used_again_starts_anew(
    driver: StepDriver, parts: tuple[Encode, Decode]
) -> None:
    first, again = chunks(5, 2)
    driver.run([request(1, first, start=True)])
    [answer] = driver.run([request(1, again, start=True, end=True)])
    assert tokens(answer) == GreedySearch(*parts).feed(again)
    [unknown] = driver.run([request(1, again)])
    assert isinstance(unknown, RequestError)
    assert unknown.code is Code.UNKNOWN_SEQUENCE


class FailingEngine:
    """Fails in its n-th launch."""

    def __init__(self, engine: Any, launches: int) -> None:
        self.engine, self.launches = engine, launches

    def launch(self, inputs: Any, requested: Any) -> Finish:
        self.launches -= 1
        if self.launches == 0:
            raise RuntimeError("out of luck")
        finish: Finish = self.engine.launch(inputs, requested)
        return finish


def test_a_failed_call_of_several_ends_its_sequence(
    instance: ScheduledInstance, driver: StepDriver, parts: tuple[Encode, Decode]
) -> None:
    first, again = chunks(7, 2)
    driver.run([request(1, first, start=True), request(2, first, start=True)])
    failing: Any = FailingEngine(instance.engines["decode"], 2)
    instance.engines = {**instance.engines, "decode": failing}
    [error] = driver.run([request(1, again)])
    assert isinstance(error, RequestError)
    assert error.code is Code.ENGINE_FAILED
    assert "out of luck); the sequence has ended, START it again" in str(error)
    search = GreedySearch(*parts)
    search.feed(first)
    lost, kept = driver.run([request(1, again), request(2, again)])
    assert isinstance(lost, RequestError)
    assert tokens(kept) == search.feed(again)


def test_a_schedule_is_opened_with_its_own_instance(folder: Path) -> None:
    with pytest.raises(LoadError, match="has a schedule of programs"):
        ModelInstance.open(folder)


# --- verification ---


class NotFixed(Decode):
    """Counts its calls, also those of a row that is done."""

    calls: Tensor

    def __init__(self, memory: Memory) -> None:
        super().__init__(memory)
        self.register_buffer("calls", torch.zeros(1, dtype=torch.int64))

    def forward(self) -> tuple[Tensor, Tensor]:
        self.calls.add_(1)
        return super().forward()


def with_decode(kind: type[Decode]) -> ProgramsCapture:
    torch.manual_seed(0)
    memory = Memory()
    return capture(Encode(memory).eval(), kind(memory).eval())


def test_a_loop_without_a_fixed_point_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"called again for a row that is done \(done\), changes"):
        write_engine(with_decode(NotFixed), tmp_path / "model", OPTIONS)
    assert not (tmp_path / "model").exists()


class Rare(nn.Module):
    """Gives one token, except for large values."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1, dtype=torch.int64))

    def forward(self, value: Tensor) -> Tensor:
        self.calls.add_(1)
        return torch.where(value > 100, 8, 7)


def test_an_answer_that_is_always_the_same_is_refused(tmp_path: Path) -> None:
    options = RowOptions(max_rows=2, outputs=("tokens",), roles={"tokens": Role.TOKENS})
    programs = {"rare": (Rare(), options, (torch.ones(1),))}
    build = BuildOptions(slots=2, max_rows=2)

    def write(**arguments: Any) -> Manifest:
        captured = capture_programs(programs, [Call(program="rare")], **arguments)
        return write_engine(captured, tmp_path / "rare", build)

    with pytest.raises(BuildError, match=r"random inputs gave the tokens \[7\] only"):
        write()
    small, large = ({"value": torch.tensor([value])} for value in (1.0, 101.0))
    with pytest.raises(BuildError, match=r"the examples gave the tokens \[7\] only"):
        write(examples=[small])
    assert write(examples=[small, large]).built_with["verified_tokens"] == "2"
    assert write(constant_tokens=True).built_with["verified_tokens"] == "1"
    with pytest.raises(BuildError, match=r"an example has the inputs \['x'\]; a request has"):
        write(examples=[{"x": torch.ones(1)}])
    with pytest.raises(BuildError, match=r"input value of shape \[2\] and torch.float32"):
        write(examples=[{"value": torch.ones(2)}])


class Left(nn.Module):
    """How many rounds are left."""

    left: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("left", torch.full((1,), 2, dtype=torch.int64))


class Doubles(nn.Module):
    """Doubles a value in each round; if it is careless, also when no round is left."""

    total: Tensor

    def __init__(self, shared: Left, careless: bool) -> None:
        super().__init__()
        self.shared, self.careless = shared, careless
        self.register_buffer("total", torch.ones(1))

    def forward(self, value: Tensor) -> Tensor:
        doubled = 2 * self.total + value
        self.total.copy_(torch.where(self.shared.left + self.careless > 0, doubled, self.total))
        return self.total * 1


class CountsDown(nn.Module):
    """One round less is left."""

    def __init__(self, shared: Left) -> None:
        super().__init__()
        self.shared = shared

    def forward(self) -> Tensor:
        self.shared.left.copy_((self.shared.left - 1).clamp(min=0))
        return self.shared.left == 0


@pytest.mark.parametrize("careless", [False, True])
def test_a_loop_that_is_done_is_run_again(careless: bool, tmp_path: Path) -> None:
    shared = Left()
    counts = RowOptions(max_rows=2, outputs=("done",), roles={"done": Role.DONE})
    programs = {
        "double": (
            Doubles(shared, careless),
            RowOptions(max_rows=2, outputs=("total_so_far",)),
            (torch.ones(1),),
        ),
        "count": (CountsDown(shared), counts, ()),
    }
    loop = Loop(calls=(Call(program="double"), Call(program="count")), until="done", at_most=5)
    captured = capture_programs(programs, [loop])
    folder = tmp_path / "loop"
    if careless:
        expected = r"the loop of double, count, called again for a row .* changes state total"
        with pytest.raises(BuildError, match=expected):
            write_engine(captured, folder, BuildOptions(slots=2, max_rows=2))
        return
    manifest = write_engine(captured, folder, BuildOptions(slots=2, max_rows=2))
    assert int(manifest.built_with["verified_fixed_points"]) > 3
    assert int(manifest.built_with["verified_limits"]) > 0
    driver = StepDriver(ScheduledInstance.open(folder / "1"))
    try:
        [answer] = driver.run([Request(1, True, True, {"value": torch.ones(1, 1)})])
        assert not isinstance(answer, RequestError)
        assert answer["total_so_far"].tolist() == [[7.0]]  # 1, 3, 7
    finally:
        driver.close()


class Rounds(nn.Module):
    """What the programs of a chain of loops share: the rounds that are left, and a total."""

    left: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("left", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("total", torch.zeros(1))


class OfRounds(nn.Module):
    """A program of a chain of loops."""

    def __init__(self, shared: Rounds) -> None:
        super().__init__()
        self.shared = shared


class Begins(OfRounds):
    """So many rounds, and a total of 0."""

    def forward(self, rounds: Tensor) -> None:
        self.shared.left.copy_(rounds)
        self.shared.total.zero_()


class AddsOne(OfRounds):
    """One more, while rounds are left."""

    def forward(self) -> None:
        self.shared.total.add_((self.shared.left > 0).float())


class GoesOn(OfRounds):
    """Two rounds more."""

    def forward(self) -> None:
        self.shared.left.fill_(2)


class Triples(OfRounds):
    """Three times as much, while rounds are left."""

    def forward(self) -> Tensor:
        total = self.shared.total
        total.copy_(torch.where(self.shared.left > 0, 3 * total, total))
        return total * 1


class Counts(OfRounds):
    """One round less."""

    def forward(self) -> Tensor:
        self.shared.left.copy_((self.shared.left - 1).clamp(min=0))
        return self.shared.left == 0


def test_loops_may_follow_each_other_and_call_the_same_program(tmp_path: Path) -> None:
    """Three sequences, each in a loop of its own for some time; all are begun anew."""
    shared = Rounds()
    plain = RowOptions(max_rows=4, outputs=())
    begins = RowOptions(max_rows=4, outputs=(), limits={"rounds": (1, 5)})
    triples = RowOptions(max_rows=4, outputs=("total_so_far",))
    counts = RowOptions(max_rows=4, outputs=("done",), roles={"done": Role.DONE})
    count = Call(program="count")
    schedule: list[Call | Loop] = [
        Call(program="begin"),
        Loop(calls=(Call(program="add"), count), until="done", at_most=4),
        Call(program="go_on"),
        Loop(calls=(Call(program="triple"), count), until="done", at_most=5),
    ]
    captured = capture_programs(
        {
            "begin": (Begins(shared), begins, (torch.ones(1, dtype=torch.int64),)),
            "add": (AddsOne(shared), plain, ()),
            "go_on": (GoesOn(shared), plain, ()),
            "triple": (Triples(shared), triples, ()),
            "count": (Counts(shared), counts, ()),
        },
        schedule,
    )
    manifest = write_engine(captured, tmp_path / "chain", BuildOptions(slots=4, max_rows=4))
    assert int(manifest.built_with["verified_limits"]) > 0
    driver = StepDriver(ScheduledInstance.open(tmp_path / "chain" / "1"))
    try:
        for first in (1, 5):
            requests = [
                Request(name, True, False, {"rounds": torch.tensor([[rounds]])})
                for name, rounds in ((1, first), (2, 2), (3, 3))
            ]
            answers = driver.run(requests)
            totals = [
                answer["total_so_far"].item() if not isinstance(answer, RequestError) else answer
                for answer in answers
            ]
            # four rounds are the limit of the first loop
            assert totals == [9.0 * min(first, 4), 18.0, 27.0]
    finally:
        driver.close()


def test_a_loop_in_a_loop_is_refused_with_what_to_do() -> None:
    inner = Loop(calls=(Call(program="add"),), at_most=2)
    with pytest.raises(ValueError, match=r"loops are not nested, .* with at_most"):
        Loop(calls=(inner, Call(program="count")), at_most=3)  # type: ignore[arg-type]


# --- captures ---


class Adds(nn.Module):
    """Adds to a total that it may share with others."""

    total: Tensor

    def __init__(self, total: Tensor) -> None:
        super().__init__()
        self.register_buffer("total", total)

    def forward(self, value: Tensor) -> Tensor:
        self.total.add_(value)
        return self.total * 1


class Reads(nn.Module):
    """Only reads the total, under a longer name, and doubles it."""

    def __init__(self, total: Tensor) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.register_buffer("total_of_all", total)

    def forward(self) -> Tensor:
        total: Any = self.inner.total_of_all
        return torch.mul(total, 2)


def adds(total: Tensor, **options: Any) -> tuple[nn.Module, RowOptions, tuple[Tensor, ...]]:
    fields: dict[str, Any] = {"max_rows": 2, "outputs": ("sum",)}
    return Adds(total), RowOptions(**fields | options), (torch.ones(1, 3),)


def reads(total: Tensor) -> tuple[nn.Module, RowOptions, tuple[Tensor, ...]]:
    return Reads(total), RowOptions(max_rows=2, outputs=("double",)), ()


def test_a_program_may_only_read_and_the_shortest_name_is_the_state_s(tmp_path: Path) -> None:
    total = torch.zeros(1, 3)
    programs = {"read": reads(total), "add": adds(total)}
    result = capture_programs(programs, [Call(program="add"), Call(program="read")])
    manifest = write_engine(result, tmp_path / "sum", BuildOptions(slots=2, max_rows=2))
    assert [state.name for state in manifest.states] == ["total"]
    assert manifest.program("read").read_only == ("total",)
    driver = StepDriver(ScheduledInstance.open(tmp_path / "sum" / "1"))
    try:
        value = torch.tensor([[1.0, 2.0, 3.0]])
        for count in (1, 2):
            [answer] = driver.run([Request(9, count == 1, False, {"value": value})])
            assert not isinstance(answer, RequestError)
            assert answer["sum"].tolist() == (count * value).tolist()
            assert answer["double"].tolist() == (2 * count * value).tolist()
    finally:
        driver.close()


def test_buffers_of_one_name_are_two_states_if_they_are_two_tensors() -> None:
    programs = {
        "a": adds(torch.zeros(1, 3)),
        "b": adds(torch.zeros(1, 3), outputs=("other",)),
    }
    result = capture_programs(programs, [Call(program="a"), Call(program="b")])
    assert [capture.states[0].name for capture in result.captures] == ["total", "b_total"]


class AddsToTwo(Adds):
    """Has a total of its own beside one that is named as those of others are made to differ."""

    b_total: Tensor

    def __init__(self) -> None:
        super().__init__(torch.zeros(1, 3))
        self.register_buffer("b_total", torch.zeros(1, 3))

    def forward(self, value: Tensor) -> Tensor:
        self.b_total.sub_(value)
        return super().forward(value) + self.b_total


def test_a_name_that_tells_states_apart_may_be_taken_too() -> None:
    options = RowOptions(max_rows=2, outputs=("both",))
    programs = {
        "a": (AddsToTwo(), options, (torch.ones(1, 3),)),
        "b": adds(torch.zeros(1, 3)),
    }
    result = capture_programs(programs, [Call(program="a"), Call(program="b")])
    names = [[state.name for state in capture.states] for capture in result.captures]
    assert sorted(names[0]) == ["b_total", "total"]
    assert names[1] == ["b_b_total"]


def test_a_loop_repeats_its_calls(tmp_path: Path) -> None:
    total = torch.zeros(1, 3)
    loop = Loop(calls=(Call(program="add", at_most=2), Call(program="read")), at_most=3)
    result = capture_programs({"add": adds(total), "read": reads(total)}, [loop])
    write_engine(result, tmp_path / "sum", BuildOptions(slots=2, max_rows=2))
    instance = ScheduledInstance.open(tmp_path / "sum" / "1")
    active = instance.admit(Request(1, True, True, {"value": torch.ones(1, 3)}))
    calls: Counter[str] = Counter()
    while not active.finished:
        assert active.progress is not None
        calls[active.progress.next_call.program] += 1
        instance.step([active])
    assert calls == {"add": 6, "read": 3}
    assert active.outputs["double"].tolist() == [[12.0] * 3]


def refusal(programs: dict[str, Any], *calls: Call | Loop) -> str:
    with pytest.raises(BuildError) as error:
        capture_programs(programs, calls)
    return str(error.value)


def test_what_does_not_fit_together_is_refused_with_the_reason() -> None:
    total = torch.zeros(1, 3)
    both = {"add": adds(total), "read": reads(total)}
    add, read = Call(program="add"), Call(program="read")
    assert "the schedule calls ['other']; the programs are ['add', 'read']" in refusal(
        both, add, Call(program="other")
    )
    assert "the schedule does not call the programs ['read']" in refusal(both, add)
    until = Call(program="add", until="sum", at_most=3)
    assert "runs add until 'sum'; its outputs of the role done are []" in refusal(both, until, read)
    endless = Call(program="add", until="sum")
    assert "needs an at_most, so that every request ends" in refusal(both, endless, read)
    assert "names that are not ASCII identifiers" in refusal({"a b": adds(total)}, add)
    counted = {"add": adds(total, positions="value"), "read": reads(total)}
    assert "counts its own calls in a buffer" in refusal(counted, add, read)


def test_inputs_of_one_name_must_be_the_same() -> None:
    total = torch.zeros(1, 3)
    _, options, _ = adds(total, outputs=("other",))
    calls = Call(program="a"), Call(program="b")
    for example in (torch.ones(1, 1), torch.ones(1, 3, dtype=torch.int64)):
        programs = {"a": adds(total), "b": (Adds(total), options, (example,))}
        assert "input value differs between programs" in refusal(programs, *calls)
    programs = {"a": adds(total), "b": adds(total)}
    assert "outputs ['sum'] are of more than one program" in refusal(programs, *calls)


def test_outputs_that_no_manifest_may_have_are_refused() -> None:
    programs = {"add": adds(torch.zeros(1, 3), outputs=("value",))}
    assert "program add: tensor names must differ" in refusal(programs, Call(program="add"))
    programs = {"add": adds(torch.zeros(1, 3), roles={"sum": Role.DONE})}
    assert "of the role done must be bool" in refusal(programs, Call(program="add"))


def test_an_exported_program_is_refused() -> None:
    module, options, inputs = adds(torch.zeros(1, 3))
    exported = torch.export.export(module, inputs)
    programs: dict[str, Any] = {"add": (exported, options, inputs)}
    message = refusal(programs, Call(program="add"))
    assert "program add is an exported program" in message
    assert "give the module that was exported" in message


def test_example_inputs_are_a_tuple() -> None:
    module, options, (example,) = adds(torch.zeros(1, 3))
    message = refusal({"add": (module, options, example)}, Call(program="add"))
    assert "program add: example_inputs is one tensor, not a tuple of arguments" in message


def test_a_state_that_no_program_writes_is_refused() -> None:
    message = refusal({"read": reads(torch.zeros(1, 3))}, Call(program="read"))
    assert "program read: the module mutates none of its inputs and buffers" in message


def test_memory_that_is_shared_in_part_is_refused() -> None:
    total = torch.zeros(2, 3)
    programs = {"add": adds(total[:1]), "read": reads(total)}
    message = refusal(programs, Call(program="add"), Call(program="read"))
    assert "share memory, but are not the same tensor: share one buffer" in message


def test_roles_are_given_to_outputs_that_exist() -> None:
    programs = {"add": adds(torch.zeros(1, 3), roles={"done": Role.DONE})}
    message = refusal(programs, Call(program="add"))
    assert "roles were given for ['done']; the outputs are ['sum']" in message
