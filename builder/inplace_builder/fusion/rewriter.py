"""What rewrites of a captured graph are made with: new nodes, new weights, and the questions they ask of linear layers."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from inplace_builder.graph.nodes import AnyNode, is_call

inplace = torch.ops.inplace


class Rewriter:
    """A graph that is rewritten, and its weights.

    Args:
        exported: the program it is a copy of.
        module: owns the graph, and the weights made here.

    Attributes:
        weights: the tensor behind each node that is a weight.
    """

    def __init__(self, exported: ExportedProgram, module: torch.fx.GraphModule) -> None:
        self.module, self.graph = module, module.graph
        self.made: dict[tuple[object, ...], str] = {}
        named = {node.name: node for node in self.graph.nodes if node.op == "placeholder"}
        self.weights: dict[AnyNode, torch.Tensor] = {}
        for spec in exported.graph_signature.input_specs:
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                assert spec.target is not None
                found = exported.state_dict.get(spec.target)
                self.weights[named[spec.arg.name]] = (
                    exported.constants[spec.target] if found is None else found
                )

    def weight(
        self, key: tuple[object, ...], before: AnyNode, make: Callable[[], torch.Tensor]
    ) -> AnyNode:
        """A weight of our own; the same key gives the same tensor."""
        if key not in self.made:
            name = f"fused_{len(self.made)}"
            self.module.register_buffer(name, make().detach().contiguous(), persistent=False)
            self.made[key] = name
        with self.graph.inserting_before(before):
            node = self.graph.get_attr(self.made[key])
        tensor = getattr(self.module, self.made[key])
        node.meta["val"] = tensor
        self.weights[node] = tensor
        return node

    def insert(
        self,
        at: AnyNode,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        width: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> AnyNode:
        """A call before ``at`` whose result has the extents of its first argument but for the last."""
        with self.graph.inserting_before(at):
            node = self.graph.call_function(target, args, kwargs)
        source = args[0].meta["val"]
        with source.fake_mode:
            shape = (*source.shape[:-1], width) if width is not None else source.shape
            node.meta.update(at.meta)
            node.meta["val"] = source.new_empty(shape, dtype=dtype or source.dtype)
        return node

    def replace(self, old: AnyNode, new: AnyNode) -> None:
        """Let everything that uses a node, but for the new one, use the new one."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    def plain(self, node: AnyNode) -> bool:
        """A linear layer that nothing was fused into yet, with weights of ours."""
        return (
            isinstance(node, Node)
            and is_call(node, inplace.linear.default)
            and len(node.args) == 3
            and not node.kwargs
            and node.args[1] in self.weights
        )

    def merged(self, layers: Sequence[AnyNode], before: AnyNode) -> tuple[AnyNode, AnyNode]:
        """The weights of several layers behind one another, and their biases."""
        found: list[AnyNode] = []
        for place in (1, 2):
            parts = [layer.args[place] for layer in layers]
            if parts[0] is None:
                found.append(None)
                continue
            tensors = [self.weights[part] for part in parts]
            found.append(self.weight(("merged", *parts), before, partial(torch.cat, tensors)))
        assert found[0] is not None
        return found[0], found[1]
