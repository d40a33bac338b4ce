"""Values of a graph that depend on no input."""

import operator
from collections.abc import Mapping
from typing import Any

import torch
from inplace.operators import NAMESPACE
from torch import Tensor
from torch.fx import Node

from inplace_builder.graph.nodes import insert_constant

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
