"""Attention as models spell it: one operator, or softmax(QKᵀ + mask)V written out."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from inplace_builder.passes.emit import shape
from inplace_builder.passes.match import CASTS, AnyNode, as_node, call

aten = torch.ops.aten


@dataclass(frozen=True)
class Spelled:
    """One attention, not yet proved to be ours.

    Attributes:
        node: its result.
        inside: what else it is made of, last first.
        query, keys, values: operands; ``[batch, heads, tokens or positions, dim]``.
        mask: what is added to the scores or says what is seen; ``hides`` where it is True for what is not seen.
        causal: the operator's own causal mask.
        scale: factor of the scores; None where it is computed.
        softcap: of the scores, 0 for none (Gemma 2, arXiv:2408.00118).
        grouped: keys and values may have fewer heads.
        dropout: its probability.
    """

    node: Node
    inside: tuple[Node, ...]
    query: Node
    keys: Node
    values: Node
    mask: Node | None
    causal: bool
    scale: float | None
    softcap: float = 0.0
    grouped: bool = False
    dropout: Any = 0.0
    hides: bool = False


def spelled(node: Node) -> Spelled | None:
    """The attention whose result a node is, or None."""
    if call(node, aten.scaled_dot_product_attention.default):
        return _operator(node)
    if call(node, aten.matmul.default):
        return _written_out(node)
    return None


def _operator(node: Node) -> Spelled:
    named: dict[str, Any] = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False} | dict(node.kwargs)
    named |= dict(zip(("attn_mask", "dropout_p", "is_causal"), node.args[3:], strict=False))
    query, keys, values = (as_node(operand) for operand in node.args[:3])
    scale = named.get("scale")
    return Spelled(
        node,
        (),
        query,
        keys,
        values,
        named["attn_mask"],
        bool(named["is_causal"]),
        1.0 / math.sqrt(shape(query)[-1]) if scale is None else scale if isinstance(scale, float) else None,
        grouped=bool(named.get("enable_gqa", False)),
        dropout=named["dropout_p"],
    )


_QUIET = (*CASTS, aten.clone.default, aten.contiguous.default, aten.alias.default)
"""What may stand between the parts of a written out attention."""


def _written_out(node: Node) -> Spelled | None:
    """``softmax(cap(Q Kᵀ · scale) + mask) V``; dropout that does nothing, casts and copies may stand between."""
    inside: list[Node] = []

    def through(current: AnyNode) -> AnyNode:
        while call(current, *_QUIET) or (call(current, aten.dropout.default) and current.args[2] is False):
            inside.append(current)
            current = current.args[0]
        return current

    weights = through(node.args[0])
    if not call(weights, aten.softmax.int, aten._softmax.default) or weights.args[1] not in (-1, len(shape(weights)) - 1):
        return None
    inside.append(weights)
    scores, mask, hides = _masked(through(weights.args[0]), inside)
    factor, steps = 1.0, []
    while call(scores := through(scores), aten.mul.Tensor, aten.div.Tensor, aten.tanh.default, aten.mul.Scalar, aten.div.Scalar):
        inside.append(scores)
        if len(scores.args) > 1 and not isinstance(scores.args[1], int | float):
            return None
        steps.append(scores)
        scores = scores.args[0]
    softcap = 0.0
    for step in reversed(steps):
        if call(step, aten.tanh.default):
            if softcap:
                return None
            softcap, before, factor = math.nan, factor, 1.0
        else:
            by = step.args[1]
            factor = factor * by if call(step, aten.mul.Tensor, aten.mul.Scalar) else factor / by
    if softcap:
        softcap, factor = factor, before * factor
    if not call(scores, aten.matmul.default):
        return None
    inside.append(scores)
    query, turned = scores.args
    if not call(turned, aten.transpose.int) or {place % 4 for place in turned.args[1:]} != {2, 3} or len(shape(turned)) != 4:
        return None
    inside.append(turned)
    return Spelled(
        node, tuple(inside), query, as_node(turned.args[0]), as_node(node.args[1]), mask, False, factor, softcap=softcap, hides=hides
    )


def _masked(scores: AnyNode, inside: list[Node]) -> tuple[AnyNode, Node | None, bool]:
    """The scores before their mask, the mask, and whether it is True for what is hidden."""
    if call(scores, aten.add.Tensor) and isinstance(scores.args[1], Node) and not scores.kwargs:
        inside.append(scores)
        one, other = scores.args
        behind = _is_scores(one)
        return (one, other, False) if behind else (other, one, False)
    if call(scores, aten.masked_fill.Scalar) and scores.args[2] <= _hidden(scores):
        inside.append(scores)
        return scores.args[0], scores.args[1], True
    if call(scores, aten.where.ScalarOther) and scores.args[2] <= _hidden(scores):
        inside.append(scores)
        return scores.args[1], scores.args[0], False
    return scores, None, False


def _hidden(scores: Node) -> float:
    return float(torch.finfo(scores.meta["val"].dtype).min)


def _is_scores(node: AnyNode) -> bool:
    while call(node, *_QUIET, aten.mul.Tensor, aten.div.Tensor, aten.tanh.default):
        node = node.args[0]
    return call(node, aten.matmul.default)
