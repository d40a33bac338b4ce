"""Small questions that pattern matching asks of graph nodes.

Remove what tracing leaves behind and nothing needs: each node costs a PyTorch engine some microseconds a step.

Copies of graphs.

Put new calls into a graph, with the metadata that later passes ask for.

The rule of the narrow waist: a graph touches state through the ``inplace::`` operators, and through nothing else.
"""

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from inplace.operators import NAMESPACE
from inplace.operators.library import VIEWS, written_arguments
from torch.fx import Graph, Node

from inplace_builder.errors import BuildError

aten = torch.ops.aten


AnyNode: TypeAlias = Any
"""A ``torch.fx.Node``, or whatever else an argument may be: patterns ask for one operator's arguments at a time, and torch.fx types
arguments as the union of everything."""


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
    """Whether it is a call of one of these operators."""
    return (
        isinstance(node, Node)
        and node.op == "call_function"
        and any(node.target is target for target in targets)
    )


def operand_orders(node: AnyNode, target: object) -> Iterator[tuple[AnyNode, AnyNode]]:
    """The two operands of a commutative operator, in both orders; none for another node."""
    if is_call(node, target) and len(node.args) == 2 and not node.kwargs:
        yield node.args[0], node.args[1]
        yield node.args[1], node.args[0]


def without_casts(node: AnyNode) -> AnyNode:
    """What stands before casts."""
    while is_call(node, *CASTS):
        node = node.args[0]
    return node


def only_user(node: AnyNode) -> AnyNode:
    """The only user, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def as_node(node: AnyNode) -> Node:
    """An argument that must be a node."""
    assert isinstance(node, Node)
    return node


def remove_no_ops(exported: torch.export.ExportedProgram) -> int:
    """Drop metadata assertions and casts to the type a tensor already has, in place; the number dropped."""
    graph = exported.graph_module.graph
    dropped = 0
    for node in list(graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
            dropped += 1
        elif node.target in (aten.to.dtype, aten.to.device) and _changes_nothing(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            dropped += 1
    graph.lint()
    exported.graph_module.recompile()
    return dropped


def _changes_nothing(node: torch.fx.Node) -> bool:
    if any(user.op == "output" for user in node.users):
        return False  # the program's signature names its outputs
    source = node.args[0]
    assert isinstance(source, torch.fx.Node)
    before, after = source.meta["val"], node.meta["val"]
    copies = len(node.args) > 3 and node.args[3]
    return bool(before.dtype == after.dtype and before.device == after.device and not copies)


def copy_graph(graph: torch.fx.Graph) -> torch.fx.Graph:
    """A copy whose nodes have the same names.

    ``copy.deepcopy`` makes ``input_1`` of ``input``, ``id_1`` of ``id``: names of Python's own, and of many a module's arguments, by which
    a program's signature knows its placeholders.
    """
    copied = copy.deepcopy(graph)
    for node, original in zip(copied.nodes, graph.nodes, strict=True):
        node.name = original.name
        if node.op == "placeholder":
            node.target = original.target
    return copied


class Emitter:
    """Inserts calls at one place of a graph.

    Every call carries the fake value it would have (``meta["val"]``) and the source line of the node it stands for, so that a pass after
    this one sees no difference from a traced node.

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

    @contextmanager
    def after(self, node: Node) -> Iterator["Emitter"]:
        """Insert after this node."""
        with self._graph.inserting_after(node):
            yield self

    def call(self, target: Any, *arguments: Any, **named: Any) -> Node:
        """Insert one call."""
        node = self._graph.call_function(target, arguments, named)
        if (trace := self._source.meta.get("stack_trace")) is not None:
            node.meta["stack_trace"] = trace
        concrete = torch.fx.node.map_arg((arguments, named), value)
        node.meta["val"] = target(*concrete[0], **concrete[1])
        return node


def value(node: Node) -> Any:
    """The fake tensor, or the symbolic number, that a node stands for."""
    return node.meta["val"]


def shape(node: Node) -> tuple[Any, ...]:
    """The extents of a node's tensor; a dynamic one is a ``torch.SymInt``."""
    return tuple(value(node).shape)


def dtype(node: Node) -> torch.dtype:
    """The element type of a node's tensor."""
    found = value(node).dtype
    assert isinstance(found, torch.dtype)
    return found


def check_state_uses(graph: torch.fx.Graph, states: Collection[str]) -> None:
    """Refuse a graph in which something other than an ``inplace::`` operator reads or writes a state.

    Raises:
        BuildError: names the state, the operator and the line of the model that called it.
    """
    for node in graph.nodes:
        if node.op != "placeholder" or node.name not in states:
            continue
        for user in node.users:
            if not (
                isinstance(user.target, torch._ops.OpOverload)
                and user.target.namespace == NAMESPACE
            ) and not _for_writers(user):
                what = "returned by the model" if user.op == "output" else f"used by {user.target}"
                raise BuildError(
                    f"state {node.name} is {what}{source_line(user)}: a state may only be used by inplace.operators.state, update and "
                    f"attention; read it first, and write it back with update"
                )


def _for_writers(node: torch.fx.Node) -> bool:
    """Whether a node is the part of a state that operators of the user's own write, and nothing else."""
    return (
        node.target in VIEWS
        and bool(node.users)
        and all(node in written_arguments(user) for user in node.users)
    )


def source_line(node: torch.fx.Node) -> str:
    """The model's own line that made this node, as `` at file:line (code)``; empty where tracing kept none."""
    lines = [line.strip() for line in (node.stack_trace or "").strip().splitlines()]
    for where, code in zip(lines[-2::-1], lines[::-1], strict=False):
        if where.startswith("File "):
            return f" at {where.removeprefix('File ')} ({code})"
    return ""
