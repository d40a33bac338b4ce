"""A program as lowering takes it: a graph with its signature and its weights."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, TensorArgument
from torch.export.passes import move_to_device_pass
from torch.fx import Node

from inplace_builder.graph.nodes import copy_graph


@dataclass(frozen=True)
class GraphProgram:
    """A copy of an exported program that may be rewritten.

    It is not an ``ExportedProgram``, because those may not hold ``get_attr`` nodes.

    Attributes:
        graph: its placeholders are those of the program it was made from.
        graph_module: owns the graph, and the weights that a rewrite makes.
        graph_signature: the kind of each placeholder, and the names of the outputs.
        state_dict, constants: the weights of the exported program, not copied.
    """

    graph: torch.fx.Graph
    graph_module: torch.fx.GraphModule
    graph_signature: ExportGraphSignature
    state_dict: Mapping[str, torch.Tensor]
    constants: Mapping[str, Any]

    @classmethod
    def copy_of(cls, exported: "AnyProgram") -> Self:
        """A copy of the graph and its signature."""
        graph = copy_graph(exported.graph)
        return cls(
            graph,
            torch.fx.GraphModule(exported.graph_module, graph),
            copy.deepcopy(exported.graph_signature),
            exported.state_dict,
            exported.constants,
        )

    def recompile(self) -> None:
        """Check the rewritten graph, and give the signature the names that its outputs have now."""
        self.graph.lint()
        self.graph_module.recompile()
        (output,) = self.graph.find_nodes(op="output")
        for spec, node in zip(self.graph_signature.output_specs, output.args[0], strict=True):
            if isinstance(node, Node):  # a module may return None too
                spec.arg = TensorArgument(name=node.name)


AnyProgram: TypeAlias = ExportedProgram | GraphProgram


def move_to_device(exported: ExportedProgram, device: str) -> ExportedProgram:
    """Move a program's tensors to a device, and have its calls make theirs there.

    PyTorch's pass writes the device as text and only into some arguments; an engine file holds
    devices where an operator's schema has them.
    """
    moved = move_to_device_pass(exported, device)
    for module in moved.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                if isinstance(node.target, torch._ops.OpOverload):
                    _make_on(node, torch.device(device))
            module.recompile()
    return moved


def _make_on(node: Node, device: torch.device) -> None:
    """Replace the devices among the arguments of a call."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for place, argument in enumerate(node.target._schema.arguments):
        if str(argument.type) not in ("Device", "Optional[Device]"):
            continue
        if place < len(node.args) and node.args[place] is not None:
            node.update_arg(place, device)
        elif node.kwargs.get(argument.name) is not None:
            node.update_kwarg(argument.name, device)


def weights_of(program: AnyProgram) -> dict[Node, torch.Tensor]:
    """The tensor behind each node that is a parameter, a buffer or a constant."""
    weights = {
        node: tensor
        for node in program.graph.find_nodes(op="get_attr")
        if isinstance(tensor := getattr(program.graph_module, node.target), torch.Tensor)
    }
    placeholders = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    for spec in program.graph_signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            assert spec.target is not None
            tensor = program.state_dict.get(spec.target)
            weights[placeholders[spec.arg.name]] = (
                program.constants[spec.target] if tensor is None else tensor
            )
    return weights
