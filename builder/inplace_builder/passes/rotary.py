"""Recognise rotary position embeddings (arXiv:2104.09864) with paired halves, as transformers writes them."""

import torch
from torch.fx import Node

from inplace_builder.passes.match import AnyNode, call, is_view, one_user, operands

aten = torch.ops.aten


def unrotated(node: AnyNode) -> tuple[AnyNode, AnyNode, AnyNode]:
    """What stands before a rotation of the whole head, and its cos and sin ``[..., tokens, dim]``; the node and None where there is none.

    The pattern: ``x * cos + cat(-x[..., half:], x[..., :half]) * sin``, views around it.
    """
    rotated = node
    while isinstance(rotated, Node) and is_view(rotated):
        rotated = rotated.args[0]
    for first, second in operands(rotated, aten.add.Tensor):
        for x, cos in operands(first, aten.mul.Tensor):
            for turned, sin in operands(second, aten.mul.Tensor):
                if _is_turned(turned, x) and one_user(first) is rotated:
                    cosines, sines = _table(cos, x), _table(sin, x)
                    if cosines is not None and sines is not None:
                        return x, cosines, sines
    return node, None, None


def _is_turned(node: AnyNode, x: AnyNode) -> bool:
    """``cat([-x[..., half:], x[..., :half]], -1)``."""
    if not call(node, aten.cat.default):
        return False
    rank, extent = x.meta["val"].dim(), x.meta["val"].shape[-1]
    if node.args[1:] not in ((-1,), (rank - 1,)) or len(node.args[0]) != 2 or extent % 2:
        return False
    negated, first = node.args[0]
    return call(negated, aten.neg.default) and _is_half(negated.args[0], x, extent // 2, extent) and _is_half(first, x, 0, extent // 2)


def _is_half(node: AnyNode, x: AnyNode, start: int, end: int) -> bool:
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
