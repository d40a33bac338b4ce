"""Tools for rewrites of a graph: new nodes, new weights, and tests for linear layers."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from inplace.operators.float8 import FLOAT8
from torch.fx import Node

from inplace_builder.graph.nodes import (
    AnyNode,
    is_call,
)
from inplace_builder.graph.program import GraphProgram, weights_of

inplace = torch.ops.inplace


GROUPS = ("scale_group", "activation_rows")
SCALES = frozenset({"scale", *GROUPS})
"""Options of a linear layer that belong to its weight."""


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
            and node.kwargs.keys() <= SCALES
            and node.args[1] in self.weights
        )

    def have_scales_alike(self, layers: Sequence[AnyNode]) -> bool:
        """Whether weights of linear layers could be parts of one: all with such scales, or none."""
        kinds = {
            (layer.kwargs.get("scale") is None, *(layer.kwargs.get(name) for name in GROUPS))
            for layer in layers
        }
        return len(kinds) == 1

    def concatenate_weights(
        self, layers: Sequence[AnyNode], before: AnyNode
    ) -> tuple[AnyNode, AnyNode, dict[str, Any]]:
        """The weights of several linear layers as one.

        Returns:
            The weight, the bias (or None), and the options of a layer that say how it is scaled.
        """
        rows = [torch.arange(layer.meta["val"].shape[-1]) for layer in layers]
        return self.select_rows(layers, rows, before)

    def select_rows(
        self, layers: Sequence[AnyNode], rows: Sequence[torch.Tensor], before: AnyNode
    ) -> tuple[AnyNode, AnyNode, dict[str, Any]]:
        """The given rows of the weights of linear layers as one, as `concatenate_weights`."""
        weight = self._selected([layer.args[1] for layer in layers], rows, before)
        bias = self._selected([layer.args[2] for layer in layers], rows, before)
        scale = self._selected([layer.kwargs.get("scale") for layer in layers], rows, before)
        options = {name: value for name, value in layers[0].kwargs.items() if name in SCALES}
        return weight, bias, options if scale is None else {**options, "scale": scale}

    def _selected(
        self, parts: Sequence[AnyNode], rows: Sequence[torch.Tensor], before: AnyNode
    ) -> AnyNode:
        if parts[0] is None:
            return None
        key = ("rows", *parts, *(each.numpy().tobytes() for each in rows))
        tensors = [self.weights[part] for part in parts]
        return self.weight(key, before, partial(_concatenated_rows, tensors, rows))


def _concatenated_rows(
    tensors: Sequence[torch.Tensor], rows: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The given rows of each tensor, concatenated."""
    dtype = tensors[0].dtype
    if dtype == FLOAT8:  # PyTorch does not index them
        tensors = [tensor.view(torch.uint8) for tensor in tensors]
    found = torch.cat([tensor[each] for tensor, each in zip(tensors, rows, strict=True)])
    return found.view(dtype)
