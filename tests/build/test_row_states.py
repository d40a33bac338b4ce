"""States as people have them: passed in and returned, in Python attributes; and what is refused."""

import itertools
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import inplace_builder as ib
import pytest
import torch
from inplace_builder import (
    BuildOptions,
    RowOptions,
    capture_exported,
    capture_exported_rows,
    write_engine,
)
from inplace_builder.errors import BuildError
from support.row_cases import Of, Recurrent, RowCase, Streaming
from support.row_checks import check_rows
from support.value_cases import Buffers, Hooks, Objects
from torch import Tensor, nn

Pair = namedtuple("Pair", "hidden cell")


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


class Returned(nn.Module):
    """``y, new = f(x, state)``, as a cell does it."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 8)

    def forward(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.cell(x, hidden)
        return hidden * 2, hidden


class Named(nn.Module):
    """The states are a named tuple; the new ones are returned first."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(4, 4)

    def forward(self, x: Tensor, state: Pair) -> tuple[Pair, Tensor]:
        hidden, cell = self.cell(x, (state.hidden, state.cell))
        return Pair(hidden, cell), hidden * 1.5


class Lists(nn.Module):
    """A list of states for its layers; a dictionary of results."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.GRU(4, 4, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor, hidden: list[Tensor], count: Tensor) -> dict[str, Any]:
        new = []
        for layer, state in zip(self.layers, hidden, strict=True):
            x, state = layer(x, state)
            new.append(state)
        return {"y": x * count, "hidden": new, "count": count + 1}


class Swapped(nn.Module):
    """The new value of each state is the old one of the other."""

    def forward(self, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x + a, b, a + x


class Keyed(nn.Module):
    """A dictionary of states of one shape, which is returned in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(4, 4)

    def forward(self, x: Tensor, state: dict[str, Tensor]) -> dict[str, Any]:
        hidden, cell = self.cell(x, (state["hidden"], state["cell"]))
        return {"x": hidden * 1.5, "state": {"cell": cell, "hidden": hidden}}


class Attributes(nn.Module):
    """Tensors in plain attributes, in a list and in a part of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.part = nn.GRUCell(4, 4), nn.Identity()
        self.hidden = torch.zeros(1, 4)
        self.scale = torch.full((4,), 2.0)
        self.part.window = [torch.zeros(1, 4), torch.ones(1, 4)]  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        window: Any = self.part.window
        self.hidden = self.cell(x, self.hidden)
        window[0] = window[1]
        window[1] = x * self.scale
        result: Tensor = self.hidden + window[0]
        return result


def test_states_that_are_passed_in_and_returned_are_matched_by_shape(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = RowCase("returned", Returned, (1, 4), lambda: [torch.zeros(1, 8)])
    capture = check_rows(case, tmp_path)
    assert [state.name for state in capture.states] == ["hidden"]
    assert len(capture.program.outputs) == 1, "the new state is not an output"
    assert "input hidden [1, 8] is a state, and output [1] is its new" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "example", "states", "names"),
    [
        (Named, [Pair(zeros(1, 4), zeros(1, 4))], {"state": 0}, ["state_hidden", "state_cell"]),
        (
            Lists,
            [[zeros(1, 1, 4), zeros(1, 1, 4)], torch.ones(1)],
            {"hidden": "hidden", "count": "count"},
            ["hidden_0", "hidden_1", "count"],
        ),
        (Swapped, [zeros(1, 4), zeros(1, 4)], {"a": 1, "b": 2}, ["a", "b"]),
        (
            Keyed,
            [{"hidden": zeros(1, 4), "cell": zeros(1, 4)}],
            "auto",
            ["state_hidden", "state_cell"],
        ),
    ],
    ids=["named tuple", "lists", "swapped", "keyed"],
)
def test_states_are_declared_by_their_outputs(
    make: Any, example: list[Any], states: Any, names: list[str]
) -> None:
    torch.manual_seed(0)
    module = make().eval()
    x = torch.randn(1, 2, 4) if make is Lists else torch.randn(1, 4)
    capture = capture_exported_rows(module, RowOptions(4), (x, *example), states=states)
    assert [state.name for state in capture.states] == names
    leaves = torch.utils._pytree.tree_leaves(example)
    places = torch.utils._pytree.tree_structure(example)
    requests = []
    for step in range(5):
        x = torch.randn(x.shape, generator=torch.Generator().manual_seed(step))
        requests.append({"x": x.reshape(capture.program.inputs[0].shape)})
        given = torch.utils._pytree.tree_unflatten(leaves, places)
        with torch.no_grad():
            returned = module(x, *given)
        if make is Keyed:
            new = returned["state"]
            out, leaves = returned["x"], [new["hidden"], new["cell"]]
        elif isinstance(returned, dict):
            out, leaves = returned["y"], [*returned["hidden"], returned["count"]]
        elif make is Named:
            out, leaves = returned[1], list(returned[0])
        else:
            out, leaves = returned[0], list(returned[1:])
        computed = capture.reference(requests)["output_0"]
        torch.testing.assert_close(computed.reshape(out.shape), out)


@dataclass(frozen=True)
class Memory:
    """States in an object that a step replaces."""

    hidden: Tensor
    cell: Tensor


class Replaced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.LSTMCell(4, 4) for _ in range(2))
        self.memories = [Memory(torch.zeros(1, 4), torch.zeros(1, 4)) for _ in self.layers]
        self.last = Memory(torch.zeros(1, 4), torch.ones(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        for place, layer in enumerate(self.layers):
            memory = self.memories[place]
            self.memories[place] = Memory(*layer(x, (memory.hidden, memory.cell)))
            x = x + self.memories[place].hidden
        self.last = Memory(self.last.cell, x)
        return x + self.last.hidden


def test_states_that_are_all_that_a_cell_returns_are_its_outputs_too(tmp_path: Path) -> None:
    cell = RowCase("cell", lambda: nn.GRUCell(4, 8), (1, 4), lambda: [torch.zeros(1, 8)])
    with pytest.raises(BuildError, match=r"its inputs \['input', 'hx'\], pass states="):
        check_rows(cell, tmp_path)
    own, x = cell.module(), cell.input(0, 0)
    capture = capture_exported_rows(own, RowOptions(4), (x, zeros(1, 8)), states={"hx": 0})
    requests = [{"input": x[0]}] * 3
    expected = zeros(1, 8)
    with torch.no_grad():
        for _ in requests:
            expected = own(x, expected)
    torch.testing.assert_close(capture.reference(requests)["output_0"], expected[0])
    write_engine(capture, tmp_path / "rows", BuildOptions(slots=4, max_rows=4))


class Policy(nn.Module):
    """A policy with complex running statistics, which no weight rounds."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.eye(3, dtype=torch.complex64)[None])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        value = torch.complex(x, x.flip(1))
        self.total.mul_(0.9).add_(0.1 * value[..., None] @ value.conj()[:, None])
        weights = torch.linalg.solve(self.total, value[..., None])[..., 0]
        action = torch.distributions.Normal(weights.real, weights.abs() + 0.1)
        return action.mean, action.log_prob(x)


def test_distributions_are_captured_and_complex_states_may_round(tmp_path: Path) -> None:
    check_rows(RowCase("policy", Policy, (1, 3)), tmp_path)


class SharesCell(nn.Module):
    """Writes a state in a dictionary, which another part has too."""

    def __init__(self, cells: dict[str, Tensor]) -> None:
        super().__init__()
        self.cells, self.layer = cells, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.cells["cell"].mul_(0.5).add_(self.layer(x))
        return self.cells["cell"] * 2


class SharedCells(nn.Module):
    """Two parts with one dictionary of states."""

    def __init__(self) -> None:
        super().__init__()
        cells = {"cell": torch.zeros(1, 4)}
        self.first, self.second = SharesCell(cells), SharesCell(cells)

    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x))


def test_a_dictionary_that_two_parts_share_is_one_state(tmp_path: Path) -> None:
    capture = check_rows(RowCase("shared", SharedCells, (1, 4)), tmp_path)
    assert [state.name for state in capture.states] == ["first_cells_0"]


def test_attributes_that_change_become_states(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capture = check_rows(RowCase("attributes", Attributes, (1, 4)), tmp_path)
    assert [state.name for state in capture.states] == ["hidden", "part_window_0", "part_window_1"]
    error = capsys.readouterr().err
    assert "attribute hidden is a state" in error
    assert "attribute part.window is a state" in error
    assert "scale" not in error, "what does not change is a constant"


def test_an_engine_keeps_states_that_are_returned_in_the_callers_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, own, theirs = Returned(), torch.zeros(1, 8), torch.zeros(1, 8)
    engine = ib.build(module, (torch.zeros(1, 4), theirs.clone()), path=tmp_path / "engine")
    for _ in range(4):
        x = torch.randn(1, 4)
        with torch.no_grad():
            out, own = module(x, own)
        torch.testing.assert_close(engine(x, theirs), out)
        torch.testing.assert_close(theirs, own)


@pytest.mark.parametrize("make", [Attributes, Objects, Buffers, Hooks, Replaced])
def test_an_engine_of_its_own_keeps_what_attributes_and_hooks_keep(
    make: type[nn.Module], tmp_path: Path
) -> None:
    """The module is as it was afterwards: its first steps are those of the engine."""
    torch.manual_seed(0)
    module = make().eval()
    engine = ib.build(module, (torch.ones(1, 4),), path=tmp_path / "engine")
    for _ in range(4):
        x = torch.randn(1, 4)
        with torch.no_grad():
            expected = module(x)
        torch.testing.assert_close(engine(x), expected)


def test_a_capture_leaves_what_functions_of_a_module_write() -> None:
    module = looking_back()
    capture_exported_rows(module, RowOptions(2), (torch.ones(1, 4),))
    assert int(module.get_buffer("n")) == 0


def test_states_have_the_names_of_the_modules_buffers() -> None:
    module = nn.Sequential()
    module.add_module("encoder", Recurrent(nn.LSTM(4, 4, batch_first=True)))
    module.add_module("cat", Streaming(nn.Identity(), (1, 1, 4), 1))
    capture = capture_exported_rows(module, RowOptions(2), (torch.zeros(1, 2, 4),))
    names = ["encoder_hidden", "encoder_cell", "cat_context"]
    assert sorted(state.name for state in capture.states) == sorted(names)


class Grows(nn.Module):
    keys: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(1, 2, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.keys = torch.cat([self.keys, x[:, None]], 1)
        return self.keys.sum(1)


class Learns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.add_(x)
        return self.weight * 2


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.register_buffer("total", torch.zeros(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.get_buffer("total").add_(x)
        return self.get_buffer("total") / self.steps


class Late(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = x if self.hidden is None else self.hidden + x
        return self.hidden * 2


class Given(nn.Module):
    """A buffer with a first value, and what a step does with it."""

    def __init__(self, state: Tensor | None, step: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.register_buffer("state", state)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        self.step(self, x)
        return x * 2


def moves(self: Any, x: Tensor) -> None:
    self.state.data = self.state + x


def begins(self: Any, x: Tensor) -> None:
    self.state = x if self.state is None else self.state + x


def keeps_nothing(self: Any, x: Tensor) -> None:
    self.state.copy_(torch.cat([self.state, x[:, None]], 1)[:, 1:])


def streaming(layer: nn.Module) -> nn.Module:
    return Streaming(layer, (1, 1, 4), 1)


def both_ways() -> nn.Module:
    lstm = nn.LSTM(4, 3, bidirectional=True, batch_first=True)
    return streaming(Of(lambda x: lstm(x)[0]))


class Sparse(nn.Module):
    weights: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weights", torch.eye(4).to_sparse())
        self.register_buffer("total", torch.zeros(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(torch.sparse.mm(self.weights, x.mT))
        return self.total * 1


def branching_on_an_index(x: Tensor, **limits: int) -> Any:
    place = (x.sum() * 9).long().reshape(1)
    return torch.cond(
        place[0] < 2,
        lambda x, place: x.index_select(1, place.clamp(**limits) if limits else place),
        lambda x, place: x[:, :1] * 2,
        (x, place),
    )


def sizes_of_bags(x: Tensor) -> Any:
    ids = (x.abs() * 9).long().clamp(max=3).flatten()
    return torch.embedding_bag(torch.eye(4), ids, torch.tensor([0, 2]), mode=1)[2]


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Grows, r"state keys of \(1, 2, 4\) becomes \(1, 3, 4\) at .*test_row_states.py.*mask"),
        (Learns, r"writes its parameter weight at .*test_row_states.py.*register_buffer"),
        (Counts, r"attribute steps is a Python number that a step changes, from 0 to 1"),
        (Late, r"attribute hidden is None before the first step .*register_buffer"),
        (
            lambda: streaming(nn.Dropout(0.5)),
            r"dropout.* at .*row_cases.py.* is random: .*eval\(\)",
        ),
        (
            lambda: streaming(nn.LSTM(4, 4, 2, dropout=0.5, batch_first=True)),
            r"lstm.* at .*row_cases.py.* is random",
        ),
        (lambda: streaming(Of(lambda x: x + torch.randn(4))), r"randn.* at .*row_cases.py.*random"),
        (lambda: Given(zeros(1, 4), moves), r"state of the module gets other mem.*state\.copy_"),
        (lambda: Given(None, begins), r"attribute state is None before the first step and .*1, 4"),
        (lambda: Given(zeros(1, 0, 4), keeps_nothing), r"state of \(1, 0, 4\) has no elements"),
        (both_ways, r"lstm.* at .*row_cases.py.* it is bidirectional: .*use one direction"),
        (
            lambda: streaming(Of(lambda x: x[:, int(x.argmax().clamp(max=0))])),
            r"data-dependent.* at .*test_row_states.py.*depends on a tensor's value; index and",
        ),
        (
            lambda: streaming(Of(lambda x: x[:, : x.argmax()])),
            r"how long a slice is depends on .*torch.arange.* at .*test_row_states.py",
        ),
        (
            lambda: streaming(Of(lambda x: torch.full((1, 2), x.sum().item()))),
            r"item.* at .*row_cases.py.*asks for a tensor's value, which every row has another of",
        ),
        (
            lambda: streaming(Of(branching_on_an_index)),
            r"torch.cond at .*row_cases.py.*index_select.*may index outside .*clamp the index",
        ),
        (
            lambda: streaming(Of(partial(branching_on_an_index, min=0))),
            r"torch.cond at .*index_select.*may index outside .*clamp the index",
        ),
        (lambda: streaming(nn.LazyLinear(4)), r"lazy parameters.*: call it once before"),
        (Sparse, r"weights of the module is torch.sparse_coo: .*keep weights.to_dense\(\)"),
        (lambda: streaming(Of(lambda x: (x * 2, 3))), r"output 1 of the module is 3, .*tensors"),
        (lambda: streaming(Of(lambda x: None)), r"returns no tensor: .*return at least one"),
        (
            lambda: streaming(Of(lambda x: x.unique().sum()[None])),
            r"_unique2.* at .*row_cases.py.*how many elements its result has depends on values",
        ),
        (
            lambda: streaming(Of(lambda x: x[x > 0].sum()[None])),
            r"index.Tensor.* at .*row_cases.py.*how many elements its result has depends on values",
        ),
        (
            lambda: streaming(Of(sizes_of_bags)),
            r"embedding_bag.* at .*row_cases.py.*its result 2 is used",
        ),
        (
            lambda: streaming(Of(lambda x: torch.rrelu(x, training=True))),
            r"rrelu.* at .*row_cases.py.* is random",
        ),
    ],
)
def test_what_no_engine_can_keep_is_refused_by_name_and_line(module: Any, message: str) -> None:
    made = module()
    shape = (1, 2, 4) if isinstance(made, Streaming) else (1, 4)
    with pytest.raises(BuildError, match=message):
        capture_exported_rows(made, RowOptions(4, max_requests=9), (torch.zeros(shape),))


class Outside(nn.Module):
    """Changes what is not part of it: no export sees that."""

    total: Tensor

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.change = change
        self.register_buffer("total", torch.zeros(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(x)
        result: Tensor = self.total * self.change(x)
        return result


def counting() -> nn.Module:
    numbers = itertools.count(1)
    return Outside(lambda x: next(numbers))


def closed_over() -> nn.Module:
    kept = {"x": torch.ones(1, 4)}

    def change(x: Tensor) -> Tensor:
        kept["x"] = kept["x"] + x
        return kept["x"]

    return Outside(change)


def looking_back() -> nn.Module:
    def change(x: Tensor) -> Tensor:
        n = module.get_buffer("n")
        n.add_(1)
        return module.get_buffer("past")[n - 3 : n - 1].sum()

    module = Outside(change)
    module.register_buffer("n", torch.zeros((), dtype=torch.int64))
    module.register_buffer("past", torch.arange(1.0, 9.0))
    return module


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (counting, r"differs from the model by .*Python object .* changes is held fast: .*buffer"),
        (
            closed_over,
            r"keeps a tensor outside itself, in a closure or a global variable: .*buffer",
        ),
        (looking_back, r"differs from the model by"),
    ],
)
def test_an_engine_is_compared_with_the_module_itself(
    make: Callable[[], nn.Module], message: str, tmp_path: Path
) -> None:
    """Not with its export, which has lost what the module does outside of tensors."""
    capture = capture_exported_rows(make(), RowOptions(2), (torch.ones(1, 4),))
    with pytest.raises(BuildError, match=message):
        write_engine(capture, tmp_path / "engine", BuildOptions(slots=3, max_rows=2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (counting, r"differs from the module by"),
        (closed_over, r"keeps a tensor outside itself, in a closure or a global variable"),
    ],
)
def test_an_engine_of_its_own_is_compared_with_the_module_itself(
    make: Callable[[], nn.Module], message: str, tmp_path: Path
) -> None:
    with pytest.raises(BuildError, match=message):
        ib.build(make(), (torch.ones(1, 4),), path=tmp_path / "engine")


class Table(nn.Module):
    """Writes where a client says."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(6, 2))

    def forward(self, place: Tensor) -> Tensor:
        self.table[place] = place + 1.0
        return self.table.sum(0)


def test_a_state_that_clients_index_within_limits_is_never_full(tmp_path: Path) -> None:
    example = (torch.tensor([3]),)
    with pytest.raises(BuildError, match=r"or the limits of the inputs that it indexes by"):
        capture_exported_rows(Table(), RowOptions(2), example)
    capture = capture_exported_rows(Table(), RowOptions(2, limits={"place": (0, 5)}), example)
    assert capture.capacity is None
    write_engine(capture, tmp_path / "engine", BuildOptions(slots=3, max_rows=2))


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ({"other": 1}, r"other is not an input; the inputs are \['x', 'hidden'\]"),
        ({"hidden": 2}, "there is no output 2"),
        ({"hidden": "new"}, "the module returns nothing named 'new'"),
        ({"x": 1}, r"state x of \[1, 4\] torch.float32 becomes output 1 of \[1, 8\] torch.float32"),
    ],
)
def test_declarations_that_do_not_fit_are_refused(states: Any, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        capture_exported(Returned(), (torch.zeros(1, 4), torch.zeros(1, 8)), states=states)
