"""Modules of one sequence, stepped with a row for each of several, at their own positions."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inplace.errors import LoadError
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request
from inplace.schema.specs import Role, StateSpec, Update
from inplace_builder import RowOptions, capture_exported_rows
from inplace_builder.errors import BuildError
from inplace_builder.served.build import write_engine
from inplace_builder.served.options import BuildOptions
from support.comparing import operators
from support.corpus.attention import append, attend
from support.corpus.case import noise
from support.long import long_except
from support.manifests import edit
from support.models import open_instance
from torch import Tensor, nn

pytestmark = pytest.mark.slow

CAPACITY, HEADS, DIM = 12, 2, 4


class Recurrent(nn.Module):
    """An LSTM cell, a window of frames and a count, all in buffers of one sequence."""

    hidden: Tensor
    cellular: Tensor
    window: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.gate, self.norm = nn.LSTMCell(4, 4), nn.GRUCell(4, 4), nn.LayerNorm(4)
        self.register_buffer("hidden", torch.zeros(1, 4))
        self.register_buffer("cellular", torch.zeros(1, 4))
        self.register_buffer("window", torch.zeros(3, 4))
        self.register_buffer("count", torch.full((), 2, dtype=torch.int64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden, cell = self.cell(self.norm(x), (self.hidden, self.cellular))
        self.hidden.copy_(self.gate(x, hidden))
        self.cellular.copy_(cell)
        self.window.copy_(torch.cat([self.window[1:], x]))
        self.count += 1
        return self.window.mean(0) + hidden[0], self.count.clone()


class Attending(nn.Module):
    """Attention over caches that the caller owns, at a position that it is given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(4, 3 * HEADS * DIM)

    def forward(self, keys: Tensor, values: Tensor, x: Tensor, position: Tensor) -> Tensor:
        query, key, value = self.qkv(x).view(1, 1, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
        keys.index_copy_(2, position, key)
        values[:, :, position] = value
        visible = (torch.arange(CAPACITY) <= position)[None, None]
        return self.attend(query, keys, values, visible).reshape(1, HEADS * DIM)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=visible)


class Sinking(Attending):
    """The same with attention sinks, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.linspace(-1.0, 2.0, HEADS))

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
        scores = (query @ keys.mT / DIM**0.5).masked_fill(~visible, float("-inf"))
        weights = torch.cat([scores, self.sinks.view(1, -1, 1, 1)], -1).softmax(-1)
        return weights[..., :-1] @ values


class Counting(Attending):
    """The same, but it counts for itself; what attends is not SDPA."""

    keys: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(1, CAPACITY, 4))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        self.keys.index_copy_(1, self.count, x[:, None])
        self.count.add_(1)
        return self.keys.cumsum(1)[:, -1]


def caches() -> list[Tensor]:
    return [torch.zeros(1, HEADS, CAPACITY, DIM) for _ in range(2)]


CASES: dict[str, tuple[Any, list[Tensor], RowOptions, dict[str, int]]] = {
    "recurrent": (
        Recurrent,
        [],
        RowOptions(4, outputs=("mixed", "count")),
        {"read": 4, "update": 4},
    ),
    "attending": (Attending, caches(), RowOptions(4, positions="position"), {"attention": 1}),
    "sinking": (Sinking, caches(), RowOptions(4, positions="position"), {"attention": 1}),
    "counting": (Counting, [], RowOptions(4, max_requests=CAPACITY), {"read": 2, "update": 2}),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_at_their_own_positions_say_what_the_module_says_of_each_alone(
    name: str, tmp_path: Path
) -> None:
    make, states, options, expected = CASES[name]
    examples = (
        *states,
        torch.zeros(1, 4),
        *([torch.zeros(1, dtype=torch.int64)] if options.positions else []),
    )
    capture = capture_exported_rows(make(), options, examples)
    assert operators(capture) == expected, "each once, for all rows"
    assert capture.program.row_layout == "rectangular"
    assert [spec.role for spec in capture.program.inputs] == [
        Role.ROW,
        *([Role.WRITE_INDICES] if options.positions else []),
        Role.SLOTS,
    ]
    assert {state.update for state in capture.states} == {
        Update.APPEND if options.positions else Update.REPLACE
    }
    write_engine(capture, tmp_path / name, BuildOptions(slots=5, max_rows=4, capacity=CAPACITY))
    instance = open_instance(tmp_path / name)
    alone, seen = [(make(), deepcopy(states)) for _ in range(4)], [0] * 4
    with torch.no_grad():
        for step in range(10):
            rows = [row for row in range(4) if step >= 2 * row and (step + row) % 3]
            given = {row: torch.randn(1, 4) for row in rows}
            first = capture.program.inputs[0].name
            admitted = {
                row: instance.admit(Request(row + 1, not seen[row], False, {first: given[row]}))
                for row in rows
            }
            if admitted:
                instance.step(list(admitted.values()))
            for row, active in admitted.items():
                assert active.error is None, active.error
                module, own = alone[row]
                reference = module(
                    *own, given[row], *([torch.tensor([seen[row]])] if options.positions else [])
                )
                for spec, tensor in zip(
                    capture.program.outputs,
                    reference if isinstance(reference, tuple) else (reference,),
                    strict=True,
                ):
                    torch.testing.assert_close(
                        active.outputs[spec.name].reshape(tensor.shape), tensor
                    )
                instance.finish(active)
                seen[row] += 1


class Uneven(nn.Module):
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.arange(4.0))

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(x)
        return self.total * 2


def test_each_sequence_begins_with_the_values_of_the_modules_buffer(tmp_path: Path) -> None:
    """The values are a tensor of a file; a reset copies them into the slot and moves nothing."""
    capture = capture_exported_rows(Uneven(), RowOptions(2), (torch.zeros(4),))
    manifest = write_engine(capture, tmp_path / "uneven", BuildOptions(slots=3, max_rows=2))
    [state] = manifest.states
    assert (state.initial, manifest.has_file("initial.safetensors")) == (state.name, True)
    instance = ModelInstance.open(tmp_path / "uneven" / "1")
    [total] = instance.arena.tensors.values()
    addresses = instance.arena.addresses()
    assert torch.equal(total, torch.arange(4.0).repeat(3, 1))
    total.fill_(float("nan"))
    instance.arena.reset(1)
    assert torch.equal(total[1], torch.arange(4.0))
    assert total[[0, 2]].isnan().all()
    for sequence in (1, 2, 1):  # the third begins again
        request = Request(sequence, start=True, end=False, inputs={"x": torch.ones(1, 4)})
        active = instance.admit(request)
        instance.step([active])
        instance.finish(active)
        [output] = active.outputs.values()
        assert torch.equal(output, 2 * torch.arange(1.0, 5.0)[None])
    assert instance.arena.addresses() == addresses


def test_a_changed_initial_value_is_refused(tmp_path: Path) -> None:
    capture = capture_exported_rows(Uneven(), RowOptions(2), (torch.zeros(4),))
    write_engine(capture, tmp_path / "uneven", BuildOptions(slots=3, max_rows=2))
    folder = tmp_path / "uneven" / "1"
    file = folder / "initial.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"\1")
    with pytest.raises(LoadError, match=r"initial.safetensors has the checksum"):
        ModelInstance.open(folder)
    file.write_bytes(content)
    edit(folder, lambda fields: fields["states"][0].update(initial="other"))
    with pytest.raises(LoadError, match=r"begins with the tensor 'other', and initial.safetensors"):
        ModelInstance.open(folder)
    edit(folder, lambda fields: fields["states"][0].update(initial="total", dtype="float64"))
    with pytest.raises(LoadError, match=r"that it begins with is \[4\] torch.float32"):
        ModelInstance.open(folder)


def test_what_cannot_be_rows_is_refused() -> None:
    with pytest.raises(
        BuildError,
        match=r"holds the position \(positions\), or the maximum number of requests",
    ):
        capture_exported_rows(Counting(), RowOptions(4), (torch.zeros(1, 4),))
    examples = (*caches(), torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(BuildError, match="the module returns 1 outputs, 2 names were given"):
        capture_exported_rows(
            Attending(), RowOptions(4, positions="position", outputs=("a", "b")), examples
        )
    with pytest.raises(BuildError, match=r"input x \(1, 4\) of torch.float32 is not a position"):
        capture_exported_rows(Attending(), RowOptions(4, positions="x"), examples)


class Scaled(nn.Module):
    """An argument that is not a tensor."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(1, 4))

    def forward(self, x: Tensor, step: int) -> Tensor:
        self.total.add_(x * step)
        return self.total * 1


def test_arguments_that_are_no_tensors_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (torch.zeros(1, 4), 3)
    capture = capture_exported_rows(Scaled(), RowOptions(4), arguments)
    assert [spec.name for spec in capture.program.inputs] == ["x", "slots"]
    assert "argument step is 3 in every request: it is not a tensor" in capsys.readouterr().err
    with pytest.raises(BuildError, match=r"positions names 'step'; .* are \['x'\]: give it an in"):
        capture_exported_rows(Scaled(), RowOptions(4, positions="step"), arguments)


class Hash(nn.Module):
    """Numbers that stand for something else while rows are traced."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.count.copy_((self.count * 31 + x * 19946) % 9973 + x % 9967)
        return self.count.clone()


def test_any_number_may_stand_in_a_module_of_rows(tmp_path: Path) -> None:
    capture = capture_exported_rows(
        Hash(), RowOptions(3, max_requests=CAPACITY), (torch.zeros(1, dtype=torch.int64),)
    )
    write_engine(capture, tmp_path / "hash", BuildOptions(slots=3, max_rows=3, capacity=CAPACITY))
    instance = open_instance(tmp_path / "hash")
    own = [Hash() for _ in range(3)]
    for step in range(6):
        given = [torch.tensor([100 * step + row]) for row in range(3)]
        admitted = [
            instance.admit(Request(row + 1, step == 0, False, {"x": x[None]}))
            for row, x in enumerate(given)
        ]
        instance.step(admitted)
        for active, x, module in zip(admitted, given, own, strict=True):
            assert int(active.outputs["output_0"]) == int(module(x))
            instance.finish(active)


class Sees(nn.Module):
    """Attention over a cache; what is not causal sees positions that were never written."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(
        self, keys: Tensor, values: Tensor, x: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        append(keys, values, x, position)
        match self.how:
            case "causal":
                return attend(x, keys, values, position >= torch.arange(CAPACITY)), keys
            case "blind at first":
                return attend(x, keys, values, position > torch.arange(CAPACITY)), keys
            case "biased":
                return attend(
                    x, keys, values, -0.1 * (torch.arange(CAPACITY) - position).abs()
                ), keys
            case "everything":
                return F.scaled_dot_product_attention(x, keys, values), keys
        scores = x @ keys.transpose(2, 3)
        return (scores * torch.sigmoid(scores)) @ values, keys


@pytest.mark.parametrize(
    "how",
    long_except(
        ["causal", "no softmax"],
        ["causal", "blind at first", "biased", "everything", "no softmax"],
    ),
)
def test_rows_return_their_caches_and_attend_in_any_way(how: str, tmp_path: Path) -> None:
    example = (*caches(), noise(0, 1, HEADS, 1, DIM), torch.tensor([0]))
    capture = capture_exported_rows(Sees(how), RowOptions(4, positions="position"), example)
    write_engine(capture, tmp_path / "rows", BuildOptions(slots=5, max_rows=4, capacity=CAPACITY))
    instance = open_instance(tmp_path / "rows")
    own = [(Sees(how), caches()) for _ in range(3)]
    for step in range(6):
        inputs = [noise(7 * step + row, 1, HEADS, 1, DIM) for row in range(3)]
        admitted = [
            instance.admit(Request(row + 1, step == 0, False, {"x": x}))
            for row, x in enumerate(inputs)
        ]
        instance.step(admitted)
        for active, x, (module, owned) in zip(admitted, inputs, own, strict=True):
            out, keys = module(*owned, x, torch.tensor([step]))
            torch.testing.assert_close(active.outputs["output_0"].reshape(out.shape), out)
            torch.testing.assert_close(active.outputs["output_1"].reshape(keys.shape), keys)
            instance.finish(active)


class Clock(nn.Module):
    """Counts from a number that no float64 holds."""

    ticks: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ticks", torch.full((2,), 2**53 + 1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.ticks += x
        return self.ticks - 2**53


def test_a_whole_number_that_a_state_begins_with_is_kept_to_the_last_bit() -> None:
    capture = capture_exported_rows(Clock(), RowOptions(2), (torch.ones(2, dtype=torch.int64),))
    [state] = capture.states
    assert state.fill == 2**53 + 1
    assert StateSpec.model_validate_json(state.model_dump_json()) == state
