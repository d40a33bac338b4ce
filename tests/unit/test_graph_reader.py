"""Reading an engine file runs nothing of it, and every damaged one is a LoadError."""

import copy
import io
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import inplace.standalone  # noqa: F401  registers inplace::execute
import pytest
import torch
from inplace.engines.graph_reader import LoadedGraph, own_constants, read_graph
from inplace.errors import LoadError
from inplace.schema.graph import DENIED_NAMESPACES, FUNCTIONS, METADATA
from inplace.schema.tensor_file import write_safetensors

WEIGHT = torch.arange(32, dtype=torch.float32)

GRAPH: dict[str, Any] = {
    "format": 1,
    "graph": {
        "inputs": [
            {"name": "x", "dtype": "float32", "shape": ["s0", 4]},
            {"name": "n", "shape": ["s1"]},
        ],
        "constants": {
            "weight": {
                "storage": "storage_0",
                "dtype": "float32",
                "shape": [4, 4],
                "stride": [4, 1],
                "offset": 16,
            },
            "tied": {
                "storage": "storage_0",
                "dtype": "float32",
                "shape": [4, 4],
                "stride": [1, 4],
                "offset": 16,
            },
        },
        "branches": {
            name: {
                "inputs": [{"name": "a"}],
                "nodes": [
                    {"name": "r", "target": "aten::mul.Tensor", "args": [{"node": "a"}, factor]}
                ],
                "outputs": [{"name": "r"}],
            }
            for name, factor in (("twice", 2.0), ("half", 0.5))
        },
        "nodes": [
            {
                "name": "y",
                "target": "aten::linear.default",
                "args": [{"node": "x"}, {"node": "weight"}],
            },
            {
                "name": "z",
                "target": "aten::linear.default",
                "args": [{"node": "y"}, {"node": "tied"}],
            },
            {"name": "more", "target": "operator.gt", "args": [{"node": "n"}, 2]},
            {
                "name": "branch",
                "target": "higher_order::cond",
                "args": [
                    {"node": "more"},
                    {"node": "twice"},
                    {"node": "half"},
                    [{"node": "z"}],
                ],
            },
            {"name": "first", "target": "operator.getitem", "args": [{"node": "branch"}, 0]},
            {
                "name": "low",
                "target": "aten::to.dtype",
                "args": [{"node": "first"}, {"dtype": "bfloat16"}],
                "kwargs": {"copy": True, "memory_format": {"memory_format": "preserve_format"}},
            },
            {
                "name": "bounded",
                "target": "aten::clamp.default",
                "args": [{"node": "low"}, {"float": "-inf"}, 9.5],
            },
        ],
        "outputs": [
            {"name": "bounded", "dtype": "bfloat16", "shape": ["s0", 4]},
            {"name": "n", "shape": ["s1"]},
            {"value": {"float": "nan"}},
        ],
    },
    "ranges": {"s0": [1, None], "s1": [0, 9]},
}


def engine_file(graph: Any = GRAPH) -> bytes:
    file = io.BytesIO()
    text = graph if isinstance(graph, str) else json.dumps(graph)
    write_safetensors(file, {"storage_0": WEIGHT.view(torch.uint8)}, {METADATA: text})
    return file.getvalue()


def results(graph: LoadedGraph) -> list[Any]:
    x = torch.linspace(-1, 1, 12).reshape(3, 4)
    return [graph.module(x, n) for n in (1, 3)]


def same(left: list[Any], right: list[Any]) -> bool:
    return all(
        torch.equal(one[0], other[0]) and one[1] == other[1] and math.isnan(one[2])
        for one, other in zip(left, right, strict=True)
    )


EXPECTED = results(read_graph(engine_file(), "engine"))


def test_a_graph_computes_what_it_says() -> None:
    weight = WEIGHT[16:].reshape(4, 4)
    x = torch.linspace(-1, 1, 12).reshape(3, 4)
    for n, factor in ((1, 0.5), (3, 2.0)):
        expected = ((x @ weight.T @ weight) * factor).to(torch.bfloat16).clamp(max=9.5)
        result, number, constant = read_graph(engine_file(), "engine").module(x, n)
        torch.testing.assert_close(result, expected)
        assert number == n and math.isnan(constant)


def test_constants_that_share_memory_still_do_in_memory_of_their_own() -> None:
    content = bytearray(engine_file())
    graph = read_graph(content, "engine")
    own_constants(graph.module)
    content[:] = bytes(len(content))
    one, other = (graph.module.get_buffer(f"constant_{index}") for index in range(2))
    assert one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    assert one.untyped_storage().nbytes() == 64 and torch.equal(one, other.T)
    assert same(results(graph), EXPECTED)


def test_every_function_of_numbers_can_be_called() -> None:
    values = {"sym_not": (True,), "not_": (True,), "sym_ite": (True, 1, 2)}
    unary = {"neg", "pos", "sym_float", "sym_int", "_sym_sqrt", "ceil", "floor", "trunc", "round"}
    for name, (function, _) in FUNCTIONS.items():
        if name == "operator.getitem":
            continue  # of what an operator returns, as above
        short = name.partition(".")[2]
        args: Any = values.get(short, ([2, 3],) if short == "sym_sum" else (7, 2))
        args = args[:1] if short in unary else args
        record = {
            "format": 1,
            "graph": {
                "inputs": [],
                "nodes": [
                    {
                        "name": "r",
                        "target": name,
                        "args": [list(arg) if isinstance(arg, list) else arg for arg in args],
                    }
                ],
                "outputs": [{"name": "r"}],
            },
        }
        assert read_graph(engine_file(record), "engine").module() == (function(*args),), name


CODE = "open('MARKER','w')"


def at(*path: str | int) -> Callable[[Any, Any], None]:
    """Sets what lies at a path of the graph."""

    def change(graph: Any, value: Any) -> None:
        for step in path[:-1]:
            graph = graph[step]
        graph[path[-1]] = value

    return change


NODE = ("graph", "nodes", 0)
CONSTANT = ("graph", "constants", "weight")

DAMAGE: list[tuple[Callable[[Any, Any], None], Any]] = [
    *((at("format"), value) for value in (0, 2, "1", None)),
    *((at(*NODE, "name"), name) for name in (f"x):{CODE}#", "a b", "", "x", "é", "y\n", "1a", 3)),
    *((at("graph", "inputs", 0, "name"), name) for name in (f"x={CODE}", "x\n", "n", "")),
    *(
        (at(*NODE, "target"), target)
        for target in (
            f"aten::linear.default;{CODE}",
            "aten::linear.__class__",
            "aten::linear",
            "aten::__class__.default",
            "__class__::linear.default",
            "aten::save.default",
            "aten::from_file.default",
            "aten::no_such_operator.default",
            "aten::linear.no_such_overload",
            "builtins.eval",
            "builtins.exec",
            "builtins.open",
            "os.system",
            "operator.attrgetter",
            "operator.methodcaller",
            "higher_order::triton_kernel_wrapper_mutation",
            "higher_order::call_torchbind",
            "higher_order::cond",
            "load_library::x.default",
            "inplace::execute.default",
            *(f"{namespace}::read_file.default" for namespace in sorted(DENIED_NAMESPACES)),
            "",
            None,
            7,
        )
    ),
    *(
        (at(*NODE, "args"), args)
        for args in (
            [],
            [{"node": "x"}],
            [{"node": "x"}, {"node": "weight"}, None, 1],
            [{"node": "x"}, {"node": "twice"}],
            [{"node": "x"}, [{"node": "twice"}]],
            [{"node": "x"}, {"node": "y"}],
            [{"node": "x"}, {"node": "z"}],
            [{"node": "x"}, {"node": "no"}],
            [{"node": ["x"]}, {"node": "weight"}],
            [{"node": "x"}, {"node": "weight"}, "bias"],
            [{"node": "x"}, {"node": "weight"}, {"code": CODE}],
            [{"node": "x"}, {"node": "weight"}, {"device": f"cpu');{CODE}"}],
            [{"node": "x"}, {"node": "weight"}, {"dtype": "load"}],
            [{"node": "x"}, {"node": "weight"}, {"layout": "classes"}],
            [{"node": "x"}, {"node": "weight"}, {"slice": [1, 2]}],
            [{"node": "x"}, {"node": "weight"}, {"complex": ["1", 2]}],
            [{"node": "x"}, {"node": "weight"}, {"float": "1e5"}],
            [{"node": "x"}, {"node": "weight"}, {}],
            [{"node": "x"}, {"node": "weight"}, 1 << 80],
            [{"node": "x"}, {"node": "weight"}, json.loads("[" * 40 + "]" * 40)],
            "x",
        )
    ),
    *(
        (at(*NODE, "kwargs"), kwargs)
        for kwargs in (
            {f"bias={CODE}, x": None},
            {"no": 1},
            {"weight": None},
            {"bias": "text"},
            {"bias": {"node": "half"}},
        )
    ),
    (at(*NODE, "kwargs"), []),
    (at("graph", "nodes", 2, "kwargs"), {"b": 1}),
    (at("graph", "nodes", 2, "args"), [{"node": "n"}]),
    (at("graph", "nodes", 2, "args"), [{"node": "n"}, "text"]),
    (at("graph", "nodes", 3, "kwargs"), {"operands": []}),
    (at("graph", "nodes", 3, "args"), [{"node": "more"}]),
    (at("graph", "nodes", 3, "args"), [{"node": "more"}, {"node": "z"}, {"node": "half"}, []]),
    (at("graph", "nodes", 4, "args"), [{"node": "twice"}, 0]),
    *(
        (at(*CONSTANT, field), value)
        for field, value in (
            ("storage", "storage_1"),
            ("storage", "../storage_0"),
            ("dtype", "no"),
            ("dtype", "load"),
            ("dtype", "float64"),
            ("shape", [4, 5]),
            ("shape", [4]),
            ("shape", [4, -1]),
            ("shape", [1 << 40, 1 << 40]),
            ("shape", [1 << 70, 4]),
            ("stride", [1 << 62, 1]),
            ("stride", [-4, 1]),
            ("offset", 17),
            ("offset", -1),
            ("offset", 1 << 62),
            ("offset", 1 << 70),
            ("offset", 1.5),
        )
    ),
    (at("graph", "inputs", 0, "shape"), [f"__import__('os').system({CODE!r})"]),
    (at("graph", "inputs", 0, "shape"), ["(" * 500 + "s0" + ")" * 500]),
    (at("graph", "inputs", 0, "shape"), ["s0 +"]),
    (at("graph", "inputs", 0, "dtype"), "object"),
    (at("graph", "outputs", 0, "name"), "no"),
    (at("graph", "outputs", 0, "name"), "twice"),
    (at("graph", "outputs", 2, "value"), {"code": CODE}),
    (at("graph", "branches", "twice", "nodes", 0, "args"), [{"node": "x"}, 2.0]),
    (at("graph", "branches", "twice", "returns"), "code"),
    (at("graph", "branches", "twice", "outputs"), [{"name": "no"}]),
    (at("ranges"), {"s0": ["1", 2]}),
    (at("code"), CODE),
    (at("graph"), None),
]


@pytest.mark.parametrize(("change", "value"), DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_graph_is_refused_and_runs_nothing(
    change: Callable[[Any, Any], None],
    value: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    graph = copy.deepcopy(GRAPH)
    change(graph, value)
    with pytest.raises(LoadError, match=r"engine .*; build the model again"):
        read_graph(engine_file(graph), "engine")
    assert not list(tmp_path.iterdir())


def test_graphs_nested_too_deep_are_refused() -> None:
    for depth in (20, 5000):
        inner = '{"inputs":[],"nodes":[],"outputs":[],"branches":{"b":' * depth
        text = (
            f'{{"format":1,"graph":{inner}{{"inputs":[],"nodes":[],"outputs":[]}}{"}}" * depth}}}'
        )
        with pytest.raises(LoadError):
            read_graph(engine_file(text), "engine")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\3\4" + bytes(100),
        (1 << 63).to_bytes(8, "little") + bytes(100),
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{}",
        (12).to_bytes(8, "little") + b'{"a":"1234"}',
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
        engine_file()[:-1],
        engine_file("[" * 100_000),
        engine_file("nothing"),
        engine_file('{"format": 1' + "0" * 10_000 + "}"),
    ],
    ids=range(11),
)
def test_what_is_no_engine_file_is_refused(content: bytes) -> None:
    with pytest.raises(LoadError, match="engine"):
        read_graph(content, "engine")


@pytest.mark.parametrize("seed", range(2))
def test_changed_bytes_are_refused_or_change_no_result(seed: int) -> None:
    """Any bytes of header and graph; what still reads as the same graph gives the same results."""
    rng, whole = random.Random(seed), engine_file()
    header = len(whole) - WEIGHT.nbytes
    original = read_graph(whole, "engine").record
    refused = 0
    for _ in range(250):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 5))):
            content[rng.randrange(header)] = rng.choice((rng.randrange(256), *b'{}[]",:09-ax '))
        refused += not equal_if_read(bytes(content), original)
    assert refused > 100


VALUES: list[Any] = [
    None, True, 0, 1, -1, 1 << 31, 1 << 63, -(1 << 70), 0.5, 1e300, "", "x", "y", "s0", "aten", "?",
    "operator.add", "aten::add.Tensor", "float32", "nan", [], [0], [[]], {}, {"node": "x"},
    {"node": "twice"}, {"float": "inf"}, {"dtype": "int8"}, {"slice": [None, None, None]},
]  # fmt: skip


def mutate(graph: Any, rng: random.Random) -> None:
    """Change one place of a tree: another value, a copy of another place, one less or twice."""
    places = list(places_of(graph))
    owner, key = rng.choice(places)
    match rng.randrange(4):
        case 0:
            owner[key] = copy.deepcopy(rng.choice(VALUES))
        case 1:
            other, name = rng.choice(places)
            owner[key] = copy.deepcopy(other[name])
        case 2:
            del owner[key]
        case 3 if isinstance(owner, list):
            owner.insert(key, copy.deepcopy(owner[key]))
        case _:
            owner[f"{key}_"] = copy.deepcopy(owner[key])


def places_of(tree: Any) -> Any:
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key
        yield from places_of(tree[key])


@pytest.mark.parametrize("seed", range(2))
def test_changed_graphs_are_refused_or_change_no_result(seed: int) -> None:
    rng, original = random.Random(seed), read_graph(engine_file(), "engine").record
    refused = 0
    for _ in range(250):
        graph = copy.deepcopy(GRAPH)
        for _ in range(rng.choice((1, 1, 2, 4))):
            mutate(graph, rng)
        refused += not equal_if_read(engine_file(graph), original)
    assert refused > 100


def equal_if_read(content: bytes, original: object) -> bool:
    """Whether a file can be read; if its graph is the original's, so must be its results."""
    try:
        graph = read_graph(content, "engine")
    except LoadError:
        return False
    if graph.record == original:
        assert same(results(graph), EXPECTED)
    return True
