"""Select by constant masks through constant indices: then no extent depends on a value.

torch.export gives ``x[mask]`` an unknown extent, also where the mask is a buffer that nothing
writes. Its entries are known, so the mask becomes the indices of what it selects.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx import Graph, Node

from inplace_builder.graph.constants import ConstantValues
from inplace_builder.graph.nodes import Emitter, fake_result, value

aten = torch.ops.aten


_INDEXED = frozenset(
    {aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default}
)


def resolve_constant_masks(graph: Graph, constants: Mapping[Node, Tensor]) -> None:
    """Replace constant masks by indices, in place.

    Args:
        graph: without operators that write a constant; its module gets the indices as buffers.
        constants: the tensors behind the nodes that never change.
    """
    walk = _Walk(graph, constants)
    for node in list(graph.nodes):
        if node.op == "call_function":
            walk.visit(node)
    if walk.changed:
        graph.eliminate_dead_code(
            lambda node: node.op in ("placeholder", "output") or node.is_impure()
        )


class _Walk:
    """One walk over a graph.

    Attributes:
        changed: the nodes whose value has other extents than before.
    """

    def __init__(self, graph: Graph, constants: Mapping[Node, Tensor]) -> None:
        self.changed: set[Node] = set()
        self._values = ConstantValues(constants)
        self._fake: Any = detect_fake_mode([node.meta.get("val") for node in graph.nodes])

    def visit(self, node: Node) -> None:
        """Resolve what a node selects by, and give it its extents."""
        if node.target in _INDEXED:
            self._resolve_indices(node)
        elif node.target is aten.masked_select.default:
            self._resolve_selection(node)
        elif (
            node.target is aten.nonzero.default
            and (places := self._values.tensor(node)) is not None
        ):
            self._replace(node, self._constant(places, node))
        if not self.changed.isdisjoint(node.all_input_nodes):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), value)
            node.meta["val"] = fake_result(node.target, args, kwargs)
            self.changed.add(node)

    def _resolve_indices(self, node: Node) -> None:
        indices: Any = node.args[1]
        resolved: list[Any] = []
        for index in indices:
            mask = self._values.tensor(index) if _is_mask(index) else None
            if mask is None:
                resolved.append(index)
                continue
            resolved += self._indices(mask, node)
            if not mask.any() and node.target is aten.index_put.default:
                self._replace(node, node.args[0])
                return
        if resolved != list(indices):
            node.update_arg(1, resolved)
            self.changed |= {each for each in resolved if isinstance(each, Node)}

    def _resolve_selection(self, node: Node) -> None:
        source, selector = node.args
        assert isinstance(source, Node) and isinstance(selector, Node)
        mask, extents = self._values.tensor(selector), value(source).shape
        if mask is None or not all(isinstance(extent, int) for extent in extents):
            return
        whole = torch.broadcast_shapes(mask.shape, extents)
        places = self._indices(mask.expand(whole), node)
        with Emitter(node.graph, node).before(node) as emit:
            wide = emit.call(aten.expand.default, source, list(whole))
            self._replace(node, emit.call(aten.index.Tensor, wide, places))

    def _replace(self, node: Node, new: Any) -> None:
        node.replace_all_uses_with(new)
        self.changed.add(new)

    def _indices(self, mask: Tensor, node: Node) -> list[Node]:
        """The indices of what a mask selects, one constant for each of its axes."""
        return [self._constant(places, node) for places in mask.nonzero().unbind(1)]

    def _constant(self, tensor: Tensor, node: Node) -> Node:
        constant = self._values.insert(node, tensor, "selected")
        constant.meta["val"] = self._fake.from_tensor(tensor, static_shapes=True)
        return constant


def _is_mask(index: Any) -> bool:
    return isinstance(index, Node) and value(index).dtype in (torch.bool, torch.uint8)
