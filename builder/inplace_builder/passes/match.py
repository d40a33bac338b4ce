"""Small questions that pattern matching asks of graph nodes."""

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch.fx import Node

aten = torch.ops.aten

AnyNode: TypeAlias = Any
"""A ``torch.fx.Node``, or whatever else an argument may be: patterns ask for one operator's arguments at a time, and torch.fx types
arguments as the union of everything."""

CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.other, aten.type_as.default, aten._to_copy.default)
VIEWS = (
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


def call(node: AnyNode, *targets: object) -> bool:
    """Whether it is a call of one of these operators."""
    return isinstance(node, Node) and node.op == "call_function" and any(node.target is target for target in targets)


def operands(node: AnyNode, target: object) -> Iterator[tuple[AnyNode, AnyNode]]:
    """The two operands of a commutative operator, in both orders; none for another node."""
    if call(node, target) and len(node.args) == 2 and not node.kwargs:
        yield node.args[0], node.args[1]
        yield node.args[1], node.args[0]


def skip(node: AnyNode) -> AnyNode:
    """What stands before casts."""
    while call(node, *CASTS):
        node = node.args[0]
    return node


def one_user(node: AnyNode) -> AnyNode:
    """The only user, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def as_node(node: AnyNode) -> Node:
    """An argument that must be a node."""
    assert isinstance(node, Node)
    return node
