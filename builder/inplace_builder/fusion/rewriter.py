"""Tools for rewrites of a graph: new nodes, new weights, and tests for linear layers."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from inplace_builder.graph.nodes import (
    AnyNode,
    is_call,
)
from inplace_builder.graph.program import GraphProgram, weights_of

inplace = torch.ops.inplace


class Rewriter:
    """A program that is rewritten, and its weights.

    Args:
        program: the program; its graph module owns the weights made here.

    Attributes:
        graph: its graph.
        weights: the tensor behind each node that is a weight.
    """

    def __init__(self, program: GraphProgram) -> None:
        self.graph = program.graph
        self._module = program.graph_module
        self._made: dict[tuple[object, ...], str] = {}
        self.weights: dict[AnyNode, torch.Tensor] = {**weights_of(program)}

    def weight(
        self, key: tuple[object, ...], before: AnyNode, make: Callable[[], torch.Tensor]
    ) -> AnyNode:
        """A node for a new weight; the same key gives the same tensor."""
        if key not in self._made:
            name = f"fused_{len(self._made)}"
            self._module.register_buffer(name, make().detach().contiguous(), persistent=False)
            self._made[key] = name
        with self.graph.inserting_before(before):
            node = self.graph.get_attr(self._made[key])
        tensor = getattr(self._module, self._made[key])
        node.meta["val"] = tensor
        self.weights[node] = tensor
        return node

    def insert(
        self,
        before: AnyNode,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        width: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> AnyNode:
        """Insert a call whose result has the shape of its first argument.

        Args:
            before: the node that the call is inserted before.
            target, args, kwargs: the call.
            width: last extent of the result; None keeps that of the first argument.
            dtype: element type of the result; None keeps that of the first argument.
        """
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs)
        source = args[0].meta["val"]
        with source.fake_mode:
            shape = (*source.shape[:-1], width) if width is not None else source.shape
            node.meta.update(before.meta)
            node.meta["val"] = source.new_empty(shape, dtype=dtype or source.dtype)
        return node

    def replace(self, old: AnyNode, new: AnyNode) -> None:
        """Let all users of a node, except the new one, use the new one."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    def is_unfused_linear(self, node: AnyNode) -> bool:
        """Whether it is a linear layer with weights of the model that nothing was fused into."""
        return (
            isinstance(node, Node)
            and is_call(node, inplace.linear.default)
            and len(node.args) == 3
            and not node.kwargs
            and node.args[1] in self.weights
        )

    def concatenate_weights(
        self, layers: Sequence[AnyNode], before: AnyNode
    ) -> tuple[AnyNode, AnyNode]:
        """The weights of several linear layers as one, and their biases as one (or None)."""
        merged: list[AnyNode] = []
        for place in (1, 2):
            parts = [layer.args[place] for layer in layers]
            if parts[0] is None:
                merged.append(None)
                continue
            tensors = [self.weights[part] for part in parts]
            merged.append(self.weight(("merged", *parts), before, partial(torch.cat, tensors)))
        assert merged[0] is not None
        return merged[0], merged[1]
