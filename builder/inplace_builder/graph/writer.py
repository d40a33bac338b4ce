"""Write a captured graph as the file of a PyTorch engine (`inplace.schema.graph`).

`dtype_and_shape` and `symbol_ranges` describe its values as all files of an engine do.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sympy
import torch
from inplace.engines.graph_reader import byte_span
from inplace.schema.graph import (
    BRANCHES,
    CONSTANT_DTYPES,
    FUNCTIONS,
    LAYOUTS,
    MEMORY_FORMATS,
    GraphFile,
    GraphNode,
    GraphRecord,
    GraphTensor,
    GraphValue,
    may_call,
)
from inplace.schema.specs import UNKNOWN, Dtype, extent_symbols, parse_extent
from inplace.schema.tensor_file import ALIGNMENT, write_safetensors
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod, PythonMod

from inplace_builder.errors import BuildError

_CONSTANTS: dict[str, Mapping[str, Any]] = {
    "dtype": CONSTANT_DTYPES,
    "layout": LAYOUTS,
    "memory_format": MEMORY_FORMATS,
}

_SCALED = {"inplace::linear.default": 1, "inplace::grouped_linear.default": 2}
"""Operators that may have a scale, and which of their arguments is the weight that it is of."""

MAX_POWER = 8
"""The largest power that is written as a product."""


def save_graphs(programs: Mapping[str, ExportedProgram], path: Path) -> dict[str, str]:
    """Write programs, by name, and their constants to a file; each storage is copied alone.

    Returns:
        The names of constants that are scales of weights, by the names of these.

    Raises:
        BuildError: a graph calls or holds something that an engine file cannot hold.
        OSError: the file cannot be written.
    """
    storages, records = graph_records(list(programs.values()))
    texts = [record.model_dump_json(exclude_defaults=True) for record in records]
    with path.open("wb") as file:
        write_safetensors(file, storages, dict(zip(programs, texts, strict=True)))
    return {
        call.args[_SCALED[call.target]]["node"]: call.kwargs["scale"]["node"]
        for record in records
        for call in record.graph.nodes
        if call.target in _SCALED and call.kwargs.get("scale") is not None
    }


def graph_records(
    programs: Sequence[ExportedProgram],
) -> tuple[Mapping[str, Tensor], list[GraphFile]]:
    """Describe programs as data.

    Returns:
        The memory of their constants by name, each ``[bytes]`` uint8; and the graphs.

    Raises:
        BuildError: a graph calls or holds something that an engine file cannot hold.
    """
    modules = [exported.module(check_guards=False) for exported in programs]
    graph_modules = [module for module in modules if isinstance(module, GraphModule)]
    storages = _Storages(graph_modules)
    records = []
    for exported, module in zip(programs, graph_modules, strict=True):
        names = [
            spec.arg.name
            for spec in exported.graph_signature.input_specs
            if spec.kind is InputKind.USER_INPUT
        ]
        graph = _GraphWriter(module, storages, names).record()
        ranges = symbol_ranges(exported, [value.shape for value in graph.inputs])
        records.append(GraphFile(graph=graph, ranges=ranges))
    return storages.tensors, records


class _Storages:
    """The memory of all constants of programs. Constants that share memory still do in the file.

    Attributes:
        tensors: by name, each ``[bytes]`` uint8, padded so that the next one is aligned too.
    """

    def __init__(self, modules: Sequence[GraphModule]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}  # by address
        self._spans: dict[int, tuple[int, int]] = {}  # the bytes that constants use, by address
        self._resolved: dict[int, Tensor] = {}  # kept: their addresses must stay theirs
        for tensor in (each for module in modules for each in _constants(module)):
            tensor = self._resolve(tensor)
            address, (begin, end) = tensor.untyped_storage().data_ptr(), byte_span(tensor)
            first, last = self._spans.get(address, (begin, end))
            self._spans[address] = min(first, begin), max(last, end)

    def record(self, constant: Tensor, title: str) -> GraphTensor:
        """Add a constant.

        Raises:
            BuildError: it is not a dense tensor of a type that an engine file holds.
        """
        dtype = str(constant.dtype).removeprefix("torch.")
        if constant.layout is not torch.strided or dtype not in CONSTANT_DTYPES:
            raise BuildError(
                f"the constant {title} is a {constant.layout} tensor of {constant.dtype}, which an "
                "engine file cannot hold; make it dense, of another type"
            )
        tensor = self._resolve(constant)
        address = tensor.untyped_storage().data_ptr()
        first = self._spans[address][0] // ALIGNMENT * ALIGNMENT
        if address not in self._names:
            self._names[address] = f"storage_{len(self.tensors)}"
            self.tensors[self._names[address]] = self._bytes(tensor, first)
        return GraphTensor(
            storage=self._names[address],
            dtype=dtype,
            shape=tuple(tensor.shape),
            stride=tensor.stride(),
            offset=int(tensor.storage_offset()) - first // tensor.itemsize,
        )

    def _resolve(self, constant: Tensor) -> Tensor:
        """The constant as plain memory: views may conjugate or negate it."""
        if id(constant) not in self._resolved:
            tensor = constant.detach()
            if tensor.numel() == 0:
                tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            self._resolved[id(constant)] = tensor.resolve_conj().resolve_neg()
        return self._resolved[id(constant)]

    def _bytes(self, tensor: Tensor, first: int) -> Tensor:
        """The part of a tensor's storage that constants use, from byte ``first`` on."""
        storage = tensor.untyped_storage()
        size = max(self._spans[storage.data_ptr()][1] - first, 0)
        raw = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        raw = raw.set_(storage, first if size else 0, (size,), (1,))
        padding = -size % ALIGNMENT
        return torch.nn.functional.pad(raw, (0, padding)) if padding else raw


def _constants(module: GraphModule) -> Iterator[Tensor]:
    for node in module.graph.find_nodes(op="get_attr"):
        if not node.users:
            continue
        value = _attribute(module, node.target)
        if isinstance(value, GraphModule):
            yield from _constants(value)
        elif isinstance(value, Tensor) and value.layout is torch.strided:
            yield value


class _GraphWriter:
    """Describes one graph, a program or a branch of it.

    Args:
        module: the graph.
        storages: where its constants are added.
        names: of the inputs of a program; None for a branch.
    """

    def __init__(
        self, module: GraphModule, storages: _Storages, names: list[str] | None = None
    ) -> None:
        self._module, self._storages = module, storages
        self._is_program = names is not None
        placeholders = module.graph.find_nodes(op="placeholder")
        inputs = names if names is not None else [node.name for node in placeholders]
        self._names: dict[Node, str] = dict(zip(placeholders, inputs, strict=True))
        taken = set(inputs)
        for node in module.graph.nodes:
            if node.op != "placeholder":
                name = node.name
                while name in taken:
                    name += "_"
                taken.add(name)
                self._names[node] = name

    def record(self) -> GraphRecord:
        """The graph.

        Raises:
            BuildError: it calls or holds something that an engine file cannot hold.
        """
        inputs, nodes = [], []
        constants: dict[str, GraphTensor] = {}
        branches: dict[str, GraphRecord] = {}
        for node in self._module.graph.nodes:
            if node.op == "placeholder":
                inputs.append(self._value(node))
            elif node.op == "get_attr" and node.users:
                value = _attribute(self._module, node.target)
                if isinstance(value, GraphModule):
                    branches[self._names[node]] = _GraphWriter(value, self._storages).record()
                elif isinstance(value, Tensor):
                    constants[self._names[node]] = self._storages.record(value, node.target)
                else:
                    raise BuildError(
                        f"the graph holds {node.target}, a {type(value).__name__}, which an engine "
                        "file cannot hold"
                    )
            elif node.op == "call_function":
                nodes.append(self._call(node))
            elif node.op not in ("get_attr", "output"):
                raise BuildError(f"the graph has a {node.op} of {node.target}: export it anew")
        (returned,) = self._module.graph.output_node().args
        is_value = not self._is_program and isinstance(returned, Node)
        return GraphRecord(
            inputs=tuple(inputs),
            constants=constants,
            branches=branches,
            nodes=tuple(nodes),
            outputs=tuple(self._value(leaf) for leaf in pytree.tree_leaves(returned)),
            returns="value" if is_value else "tuple",
        )

    def _value(self, node: Any) -> GraphValue:
        if not isinstance(node, Node):
            return GraphValue(value=self._encode(node))
        if not self._is_program:
            return GraphValue(name=self._names[node])
        dtype, shape = dtype_and_shape(node.meta["val"])
        try:
            return GraphValue(
                name=self._names[node],
                dtype=None if dtype is None else Dtype.of(dtype),
                shape=shape,
            )
        except ValueError as error:
            raise BuildError(f"{node.name} is {dtype}, which no engine takes or returns") from error

    def _call(self, node: Node) -> GraphNode:
        return GraphNode(
            name=self._names[node],
            target=_target(node.target),
            args=tuple(self._encode(argument) for argument in node.args),
            kwargs={name: self._encode(value) for name, value in node.kwargs.items()},
        )

    def _encode(self, value: Any) -> Any:
        """An argument, as `GraphNode` describes it."""
        if isinstance(value, Node):
            return {"node": self._names[value]}
        if isinstance(value, list | tuple):
            return [self._encode(item) for item in value]
        if isinstance(value, slice):
            return {"slice": [self._encode(x) for x in (value.start, value.stop, value.step)]}
        return _encode_constant(value)


def _encode_constant(value: Any) -> Any:
    """A constant argument.

    Raises:
        BuildError: an engine file cannot hold it.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, complex):
        return {"complex": [_encode_constant(value.real), _encode_constant(value.imag)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    kind, name = type(value).__name__, str(value).removeprefix("torch.")
    if name in _CONSTANTS.get(kind, {}):
        return {kind: name}
    raise BuildError(
        f"the graph passes {value} ({type(value).__name__}) to an operator, which an engine file "
        "cannot hold"
    )


def _target(target: Any) -> str:
    """The name of what a node calls.

    Raises:
        BuildError: an engine may not call it.
    """
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.partition("::")[2]
        if may_call(target.namespace, name):
            return f"{target.namespace}::{name}.{target._overloadname}"
    elif isinstance(target, torch._ops.HigherOrderOperator):
        if target.name() in BRANCHES:
            return f"higher_order::{target.name()}"
    else:
        for name, (function, _) in FUNCTIONS.items():
            if function is target:
                return name
    raise BuildError(
        f"the graph calls {target}, which the engine file of a PyTorch engine cannot hold: files, "
        "other programs and functions that are not operators"
    )


def _attribute(module: torch.nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def extent_text(extent: Any) -> int | str:
    """A number of a graph: an integer, or the text of its expression (`inplace.schema.specs`).

    Numbers that the expressions do not cover, floating-point ones for example, are `UNKNOWN`.
    """
    if isinstance(extent, int):
        return int(extent)
    if not isinstance(extent, torch.SymInt):
        return UNKNOWN
    expression = extent.node.expr
    if isinstance(expression, sympy.Integer):
        return int(expression)
    try:
        text = _text(expression, nested=False)
        parse_extent(text)
    except ValueError:
        return UNKNOWN
    return text


def _text(expression: sympy.Expr, *, nested: bool = True) -> str:
    """The text of an expression, in parentheses where it is an operand."""
    if isinstance(expression, sympy.Symbol):
        return str(expression)
    if isinstance(expression, sympy.Integer):
        return str(expression)
    if isinstance(expression, Max | Min | sympy.Max | sympy.Min):
        name = "max" if isinstance(expression, Max | sympy.Max) else "min"
        return f"{name}({', '.join(_text(part, nested=False) for part in expression.args)})"
    text = f" {_sign(expression)} ".join(map(_text, _operands(expression)))
    return f"({text})" if nested else text


def _sign(expression: sympy.Expr) -> str:
    match expression:
        case FloorDiv():
            return "//"
        case Mod() | PythonMod():
            return "%"
        case sympy.Add() | sympy.Mul() if expression.as_numer_denom()[1] != 1:
            return "//"  # the quotient of an extent is whole
        case sympy.Add():
            return "+"
        case sympy.Mul() | sympy.Pow():
            return "*"
    raise ValueError(f"{expression} is not an expression of a file")


def _operands(expression: sympy.Expr) -> list[sympy.Expr]:
    match expression:
        case sympy.Pow():
            base, power = expression.args
            if not isinstance(power, sympy.Integer) or not 1 <= power <= MAX_POWER:
                raise ValueError(f"{expression} is not an expression of a file")
            return [base] * int(power)
        case sympy.Add() | sympy.Mul() if expression.as_numer_denom()[1] != 1:
            return list(expression.as_numer_denom())
        case sympy.Add():
            return list(expression.as_ordered_terms())
    return list(expression.args)


def dtype_and_shape(value: Any) -> tuple[torch.dtype | None, tuple[int | str, ...]]:
    """The dtype and the shape of a graph's value, as files record them.

    A number has no dtype, and itself as the one extent.
    """
    if isinstance(value, Tensor):
        return value.dtype, tuple(extent_text(extent) for extent in value.shape)
    return None, (extent_text(value),)


def symbol_ranges(
    exported: ExportedProgram, shapes: Iterable[tuple[int | str, ...]]
) -> dict[str, tuple[int | None, int | None]]:
    """The smallest and largest value of each symbol in these shapes; None is no limit."""
    texts = {
        symbol
        for shape in shapes
        for extent in shape
        if isinstance(extent, str)
        for symbol in extent_symbols(extent)
    }
    return {
        str(symbol): _limits(limits)
        for symbol, limits in exported.range_constraints.items()
        if str(symbol) in texts
    }


def _limits(limits: Any) -> tuple[int | None, int | None]:
    low, high = (
        int(limit) if -(2**62) < limit < 2**62 else None for limit in (limits.lower, limits.upper)
    )
    return low, high
