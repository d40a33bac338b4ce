"""Values of a graph that depend on no input."""

import operator
from collections.abc import Mapping
from typing import Any

import torch
from inplace.operators import NAMESPACE
from torch import Tensor
from torch.fx import Node

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
        if node not in self._values:
            self._values[node] = self._computed(node)
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
        module, count = node.graph.owning_module, 0
        assert module is not None
        while hasattr(module, f"{name}_{count}"):
            count += 1
        module.register_buffer(f"{name}_{count}", value.detach().clone(), persistent=False)
        with node.graph.inserting_before(node):
            constant = node.graph.get_attr(f"{name}_{count}")
        constant.meta["stack_trace"] = node.meta.get("stack_trace")
        self._values[constant] = value
        return constant

    def _computed(self, node: Node) -> Any:
        if node.op != "call_function" or not _is_function(node.target):
            return None
        if any(self.value(each) is None for each in node.all_input_nodes):
            return None
        arguments, options = torch.fx.node.map_arg((node.args, node.kwargs), self.value)
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
