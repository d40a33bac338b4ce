"""Values of a graph that depend on no input, for operators that TensorRT does not have."""

import operator
from typing import Any

import torch
from inplace.operators import NAMESPACE
from torch.export.graph_signature import InputKind
from torch.fx import Node

from inplace_builder.graph.program import GraphProgram, weights_of

MAX_ELEMENTS = 1 << 20
"""Elements of a value that becomes a constant."""


class ConstantValues:
    """Computes nodes of a program whose inputs are constants.

    Parameters and buffers are none: a plan may take them as inputs.
    """

    def __init__(self, program: GraphProgram) -> None:
        constants = {
            spec.arg.name
            for spec in program.graph_signature.input_specs
            if spec.kind is InputKind.CONSTANT_TENSOR
        }
        self._program = program
        self._values: dict[Node, Any] = {
            node: tensor
            for node, tensor in weights_of(program).items()
            if node.op == "get_attr" or node.name in constants
        }

    def fold(self, node: Node) -> bool:
        """Replace a tensor by a constant of its value; whether it depends on no input."""
        meta = node.meta.get("val")
        if not isinstance(meta, torch.Tensor) or meta.is_complex():
            return False
        value = self._value(node)
        if value is None or value.numel() > MAX_ELEMENTS:
            return False
        module, count = self._program.graph_module, 0
        while hasattr(module, f"folded_{count}"):
            count += 1
        module.register_buffer(f"folded_{count}", value.detach().clone(), persistent=False)
        with self._program.graph.inserting_before(node):
            constant = self._program.graph.get_attr(f"folded_{count}")
        constant.meta = {"val": meta, "stack_trace": node.meta.get("stack_trace")}
        node.replace_all_uses_with(constant)
        self._program.graph.erase_node(node)
        self._values[constant] = value
        return True

    def _value(self, node: Node) -> Any:
        """The value of a node; None if it depends on an input."""
        if node not in self._values:
            self._values[node] = self._computed(node)
        return self._values[node]

    def _computed(self, node: Node) -> Any:
        if node.op != "call_function" or not _is_function(node.target):
            return None
        if any(self._value(each) is None for each in node.all_input_nodes):
            return None
        arguments, options = torch.fx.node.map_arg((node.args, node.kwargs), self._value)
        target: Any = node.target
        with torch.no_grad():
            return target(*arguments, **options)


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
