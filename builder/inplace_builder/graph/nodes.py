"""Nodes of a ``torch.fx`` graph: questions, values that depend on no input, new calls, copies."""

import copy
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import torch
from inplace.operators import NAMESPACE
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch.fx import Graph, Node

aten = torch.ops.aten


AnyNode: TypeAlias = Any
"""A ``torch.fx.Node``, or any other argument of a call.

Patterns look at the arguments of one operator at a time, and torch.fx types an argument as the
union of everything that can be one.
"""


CASTS = (
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.other,
    aten.type_as.default,
    aten._to_copy.default,
)


RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.transpose.int,
    aten.permute.default,
    aten.select.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.contiguous.default,
    aten.clone.default,
)


def is_call(node: AnyNode, *targets: object) -> bool:
    """Whether a node is a call of one of these operators."""
    return (
        isinstance(node, Node)
        and node.op == "call_function"
        and any(node.target is target for target in targets)
    )


def argument(node: Node, position: int, name: str, default: Any) -> Any:
    """An argument of a call that may be passed by position, by name, or not at all."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def per_axis(values: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """One number for each axis; a single one counts for all."""
    numbers = (values,) if isinstance(values, int) else tuple(values)
    return numbers * axes if len(numbers) == 1 else numbers


def only_first_used(node: Node) -> str | None:
    """The reason, if something uses more than the first result of a node."""
    used = sorted({str(user.args[1]) for user in node.users if user.args[1] != 0})
    return f"its results {', '.join(used)} are used; only the first is lowered" if used else None


def operand_orders(node: AnyNode, target: object) -> Iterator[tuple[AnyNode, AnyNode]]:
    """The two operands of a commutative operator in both orders; nothing for another node."""
    if is_call(node, target) and len(node.args) == 2 and not node.kwargs:
        yield node.args[0], node.args[1]
        yield node.args[1], node.args[0]


def without_casts(node: AnyNode) -> AnyNode:
    """The node that a chain of casts begins with."""
    while is_call(node, *CASTS):
        node = node.args[0]
    return node


def only_user(node: AnyNode) -> AnyNode:
    """The only user of a node, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def as_node(node: AnyNode) -> Node:
    """An argument that must be a node."""
    assert isinstance(node, Node)
    return node


def value(node: Node) -> Any:
    """The fake tensor, or the symbolic number, that a node stands for."""
    return node.meta["val"]


def shape(node: Node) -> tuple[Any, ...]:
    """The extents of a node's tensor; a dynamic one is a ``torch.SymInt``."""
    return tuple(value(node).shape)


def dtype(node: Node) -> torch.dtype:
    """The element type of a node's tensor."""
    element_type = value(node).dtype
    assert isinstance(element_type, torch.dtype)
    return element_type


def is_exactly(extent: object, number: int) -> bool:
    """Whether an extent is certainly this number; a dynamic one never is."""
    return isinstance(extent, int) and extent == number


def placeholders_by_name(graph: Graph) -> dict[str, Node]:
    """The placeholders of a graph, in order."""
    return {node.name: node for node in graph.nodes if node.op == "placeholder"}


def returned_values(graph: Graph) -> tuple[AnyNode, ...]:
    """What a graph that returns a tuple returns."""
    values = graph.output_node().args[0]
    assert isinstance(values, tuple | list)
    return tuple(values)


def source_line(node: Node) -> str:
    """The model's line that made a node, as `` at file:line (code)``; empty if none is known.

    A line of PyTorch's own layers gives way to the one that called the layer.
    """
    lines = [line.strip() for line in (node.stack_trace or "").strip().splitlines()]
    frames = [
        f" at {where.removeprefix('File ')} ({code})"
        for where, code in zip(lines[-2::-1], lines[::-1], strict=False)
        if where.startswith("File ") and _TRACED not in where
    ]
    return next((line for line in frames if _PYTORCH not in line), next(iter(frames), ""))


_TRACED = '"<eval_with_key>'
"""The file that PyTorch names for code of a graph, such as a branch of ``torch.cond``."""

_PYTORCH = str(Path(torch.nn.__file__).parent)
"""The folder of PyTorch's own layers."""


def copy_graph(graph: Graph) -> Graph:
    """A copy whose nodes have the same names.

    ``copy.deepcopy`` renames nodes whose names Python uses too: ``input`` becomes ``input_1``. A
    program's signature refers to its placeholders by these names.
    """
    copied = copy.deepcopy(graph)
    for node, original in zip(copied.nodes, graph.nodes, strict=True):
        node.name = original.name
        if node.op == "placeholder":
            node.target = original.target
    return copied


def fake_result(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What an operator returns of fake tensors, without fixing a dynamic extent of the program.

    A composite operator compares extents, and one that equals another in the example would be fixed
    to it; some operators would take the example's extents for all.
    """
    mode = detect_fake_mode([args, kwargs])
    shapes = mode and mode.shape_env
    unguarded = shapes.suppress_guards() if shapes else nullcontext()
    with torch.no_grad(), enable_python_dispatcher(), unguarded:
        return target(*args, **kwargs)


def insert_constant(graph: Graph, tensor: Tensor, name: str) -> Node:
    """Insert a constant, as a buffer of the graph's module.

    Args:
        graph: to insert into, at its place of insertion.
        tensor: the constant; it is copied.
        name: begins the name of the buffer.

    Returns:
        The node of the constant, without a fake value.
    """
    module, count = graph.owning_module, 0
    assert module is not None
    while hasattr(module, f"{name}_{count}"):
        count += 1
    module.register_buffer(f"{name}_{count}", tensor.detach().clone(), persistent=False)
    return graph.get_attr(f"{name}_{count}")


MAX_ELEMENTS = 1 << 20
"""Elements of a value that becomes a constant."""


class ConstantValues:
    """Computes nodes whose inputs are constants.

    Args:
        known: the tensors behind the nodes that are constants.
    """

    def __init__(self, known: Mapping[Node, Tensor]) -> None:
        self._values: dict[Node, Any] = dict(known)

    def value(self, node: Node) -> Any:
        """The value of a node; None if it depends on an input."""
        pending = [node]  # no recursion: a graph may be deeper than Python's stack
        while pending:
            last = pending[-1]
            if last in self._values:
                pending.pop()
            elif (source := self._unknown_source(last)) is not None:
                pending.append(source)
            else:
                self._values[last] = self._computed(last)
        return self._values[node]

    def tensor(self, node: Node) -> Tensor | None:
        """The value of a node if that is a tensor of at most `MAX_ELEMENTS`; else None."""
        if not _may_be_small(node.meta.get("val")):
            return None
        value = self.value(node)
        return value if isinstance(value, Tensor) and value.numel() <= MAX_ELEMENTS else None

    def insert(self, node: Node, value: Tensor, name: str) -> Node:
        """Insert a constant before a node, as a buffer of the graph's module.

        Args:
            node: it has the module's line.
            value: the constant.
            name: begins the name of the buffer.

        Returns:
            The node of the constant, without a fake value.
        """
        with node.graph.inserting_before(node):
            constant = insert_constant(node.graph, value, name)
        constant.meta["stack_trace"] = node.meta.get("stack_trace")
        self._values[constant] = value
        return constant

    def _unknown_source(self, node: Node) -> Node | None:
        """The first input to compute before a node; None if there is none, or if it is in vain."""
        if node.op != "call_function" or not _is_function(node.target):
            return None
        for source in node.all_input_nodes:
            if source not in self._values:
                return source
            if self._values[source] is None:
                return None
        return None

    def _computed(self, node: Node) -> Any:
        """The value of a node after those of its inputs."""
        if node.op != "call_function" or not _is_function(node.target):
            return None
        if any(self._values.get(each) is None for each in node.all_input_nodes):
            return None
        arguments, options = torch.fx.node.map_arg((node.args, node.kwargs), self._values.get)
        target: Any = node.target
        with torch.no_grad():
            return target(*arguments, **options)


def _may_be_small(meta: Any) -> bool:
    """Whether it is a tensor, and not known to be large; extents may depend on constants."""
    if not isinstance(meta, Tensor):
        return False
    count = 1
    for extent in meta.shape:
        count *= extent if isinstance(extent, int) else 1
    return count <= MAX_ELEMENTS


def _is_function(target: Any) -> bool:
    """Whether an operator gives the same value for the same arguments, and changes nothing."""
    if target in (operator.getitem, torch.ops.aten.detach_.default):
        return True
    return (
        isinstance(target, torch._ops.OpOverload)
        and target.namespace != NAMESPACE
        and not target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags
        and "empty" not in target._opname
    )


class Emitter:
    """Inserts calls at one place of a graph.

    Every call carries the fake value it would have (``meta["val"]``) and the source line of the
    node it stands for, so that later passes see no difference from a traced node.

    Args:
        graph: where to insert.
        source: the node whose line of the model the new calls inherit.
    """

    def __init__(self, graph: Graph, source: Node) -> None:
        self._graph = graph
        self._source = source

    @contextmanager
    def before(self, node: Node) -> Iterator["Emitter"]:
        """Insert before this node."""
        with self._graph.inserting_before(node):
            yield self

    def call(self, target: Any, *arguments: Any, **named: Any) -> Node:
        """Insert one call."""
        node = self._graph.call_function(target, arguments, named)
        if (trace := self._source.meta.get("stack_trace")) is not None:
            node.meta["stack_trace"] = trace
        concrete = torch.fx.node.map_arg((arguments, named), value)
        node.meta["val"] = fake_result(target, *concrete)
        return node
