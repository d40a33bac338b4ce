"""Recognise rotary position embeddings (arXiv:2104.09864) with paired halves, as transformers writes them."""

from dataclasses import dataclass

import torch
from torch.fx import Node

from inplace_builder.passes.match import VIEWS, AnyNode, call, one_user, operands

aten = torch.ops.aten


@dataclass(frozen=True)
class Rotation:
    """A rotation of heads, or of their first components.

    Attributes:
        x: what is rotated.
        cos, sin: ``[..., tokens, rotary]``.
        views: what looks at the result until the node that was asked about, in order.
    """

    x: Node
    cos: Node
    sin: Node
    views: tuple[Node, ...]


def rotation(node: AnyNode) -> Rotation | None:
    """The rotation behind a node, through views; None if there is none.

    The pattern is ``x * cos + cat(-x[..., half:], x[..., :half]) * sin``. A partial rotation (GPT-NeoX, Phi) does so with
    ``x[..., :rotary]`` and puts ``x[..., rotary:]`` behind it.
    """
    views: list[Node] = []
    while call(node, *VIEWS):
        views.insert(0, node)
        node = node.args[0]
    if call(node, aten.cat.default) and len(node.args[0]) == 2 and node.args[1:] in ((-1,), (node.meta["val"].dim() - 1,)):
        turned, rest = node.args[0]
        found = _whole(turned)
        if found is None or not call(found[0], aten.slice.Tensor) or not call(rest, aten.slice.Tensor):
            return None
        x: AnyNode = found[0].args[0]
        rotary = found[1].meta["val"].shape[-1]
        extent = x.meta["val"].shape[-1]
        if _is_part(found[0], x, 0, rotary) and _is_part(rest, x, rotary, extent):
            return Rotation(x, found[1], found[2], tuple(views))
        return None
    found = _whole(node)
    return None if found is None else Rotation(*found, tuple(views))


def _whole(node: AnyNode) -> tuple[Node, Node, Node] | None:
    """``x``, cos and sin of a rotation of all components."""
    for first, second in operands(node, aten.add.Tensor):
        for x, cos in operands(first, aten.mul.Tensor):
            for turned, sin in operands(second, aten.mul.Tensor):
                if isinstance(x, Node) and _is_turned(turned, x) and one_user(first) is node:
                    cosines, sines = _table(cos, x), _table(sin, x)
                    if cosines is not None and sines is not None and cosines.meta["val"].shape[-1] == x.meta["val"].shape[-1]:
                        return x, cosines, sines
    return None


def _is_turned(node: AnyNode, x: AnyNode) -> bool:
    """``cat([-x[..., half:], x[..., :half]], -1)``."""
    if not call(node, aten.cat.default):
        return False
    rank, extent = x.meta["val"].dim(), x.meta["val"].shape[-1]
    if node.args[1:] not in ((-1,), (rank - 1,)) or len(node.args[0]) != 2 or extent % 2:
        return False
    negated, first = node.args[0]
    return call(negated, aten.neg.default) and _is_part(negated.args[0], x, extent // 2, extent) and _is_part(first, x, 0, extent // 2)


def _is_part(node: AnyNode, x: AnyNode, start: int, end: int) -> bool:
    if not call(node, aten.slice.Tensor) or node.args[0] is not x:
        return False
    dim, found_start, found_end = (*node.args[1:4], None, None)[:3]
    step = node.args[4:]
    rank, extent = x.meta["val"].dim(), x.meta["val"].shape[-1]
    bounds = (found_start or 0, extent if found_end is None else min(found_end, extent))
    return (dim or 0) in (-1, rank - 1) and bounds == (start, end) and step in ((), (1,))


def _table(node: AnyNode, x: AnyNode) -> AnyNode:
    """The table ``[1, tokens, dim]`` behind its broadcast over heads; None if it does not broadcast so."""
    if not call(node, aten.unsqueeze.default) or node.args[1] not in (1, -3 + x.meta["val"].dim()):
        return None
    table = node.args[0]
    return table if isinstance(table, Node) and table.meta["val"].dim() == x.meta["val"].dim() - 1 else None
