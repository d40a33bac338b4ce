"""Attention as models write it; nothing about it is proved yet.

One operator, or ``softmax(Q Kᵀ + mask) V`` in single operations, with attention sinks or without.
"""

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from inplace_builder.graph.nodes import CASTS, AnyNode, as_node, dtype, is_call, shape

aten = torch.ops.aten


@dataclass(frozen=True)
class AttentionPattern:
    """An attention as a model writes it.

    Attributes:
        node: its result.
        inner_nodes: the other nodes that it consists of, last first.
        query, keys, values: operands ``[batch, heads, tokens or positions, dim]``.
        mask: what is added to the scores, or which scores count; None if there is none.
        causal: the operator's own causal mask.
        scale: factor of the scores; None if it is computed.
        softcap: soft-cap of the scores, 0 for none (Gemma 2, arXiv:2408.00118).
        grouped: keys and values may have fewer heads.
        dropout: its probability.
        mask_hides: a boolean mask is True for what is hidden.
        sinks: scores beside those of positions, whose weights are dropped; None if there are none.
    """

    node: Node
    inner_nodes: tuple[Node, ...]
    query: Node
    keys: Node
    values: Node
    mask: Node | None
    causal: bool
    scale: float | None
    softcap: float = 0.0
    grouped: bool = False
    dropout: Any = 0.0
    mask_hides: bool = False
    sinks: Node | None = None


def match_attention(node: Node) -> AttentionPattern | None:
    """The attention whose result a node is, or None."""
    if is_call(node, aten.scaled_dot_product_attention.default):
        return _match_sdpa(node)
    if is_call(node, aten.matmul.default):
        return _match_explicit(node)
    return None


def _match_sdpa(node: Node) -> AttentionPattern:
    named: dict[str, Any] = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False} | dict(
        node.kwargs
    )
    named |= dict(zip(("attn_mask", "dropout_p", "is_causal"), node.args[3:], strict=False))
    query, keys, values = (as_node(operand) for operand in node.args[:3])
    scale = named.get("scale")
    if scale is None:
        scale = 1.0 / math.sqrt(shape(query)[-1])
    return AttentionPattern(
        node,
        (),
        query,
        keys,
        values,
        named["attn_mask"],
        bool(named["is_causal"]),
        scale if isinstance(scale, float) else None,
        grouped=bool(named.get("enable_gqa", False)),
        dropout=named["dropout_p"],
    )


_TRANSPARENT = (*CASTS, aten.clone.default, aten.contiguous.default, aten.alias.default)
"""Operators that may stand between the parts of an explicit attention."""


def _match_explicit(node: Node) -> AttentionPattern | None:
    """Match ``softmax(cap(Q Kᵀ · scale) + mask) V``, the scores beside sinks or not.

    Casts, copies and dropout that does nothing may stand between.
    """
    inner: list[Node] = []
    weights = _skip_transparent(node.args[0], inner)
    drops_last = _drops_last(weights)
    if drops_last:
        inner.append(weights)
        weights = _skip_transparent(weights.args[0], inner)
    if not is_call(weights, aten.softmax.int, aten._softmax.default) or weights.args[1] not in (
        -1,
        len(shape(weights)) - 1,
    ):
        return None
    inner.append(weights)
    scores, sinks = _skip_transparent(weights.args[0], inner), None
    if drops_last:
        scores, sinks = _split_sinks(scores, inner)
        if sinks is None:
            return None
    scores, mask, mask_hides = _split_mask(scores, inner)
    scores, scaling = _split_scaling(scores, inner)
    if scaling is None or not is_call(scores, aten.matmul.default):
        return None
    inner.append(scores)
    query, transposed = scores.args
    if (
        not is_call(transposed, aten.transpose.int)
        or {axis % 4 for axis in transposed.args[1:]} != {2, 3}
        or len(shape(transposed)) != 4
    ):
        return None
    inner.append(transposed)
    return AttentionPattern(
        node,
        tuple(inner),
        query,
        as_node(transposed.args[0]),
        as_node(node.args[1]),
        mask,
        causal=False,
        scale=scaling[0],
        softcap=scaling[1],
        mask_hides=mask_hides,
        sinks=sinks,
    )


def _is_last_axis(axis: Any, node: Node) -> bool:
    return axis in (-1, len(shape(node)) - 1)


def _drops_last(weights: AnyNode) -> bool:
    """Whether a node is another without the last entry of its last axis."""
    if not is_call(weights, aten.slice.Tensor) or len(weights.args) != 4 or weights.kwargs:
        return False
    whole, axis, start, end = weights.args
    return _is_last_axis(axis, whole) and start == 0 and end in (-1, shape(whole)[-1] - 1)


def _split_sinks(scores: AnyNode, inner: list[Node]) -> tuple[AnyNode, Node | None]:
    """The scores of positions, and those beside them; None if these are not one more.

    The largest of all may have been subtracted from them, which a softmax ignores.
    """
    if is_call(scores, aten.sub.Tensor) and not scores.kwargs:
        whole, largest = scores.args
        parts = [scores, largest]
        if is_call(largest, operator.getitem) and largest.args[1] == 0:
            largest = largest.args[0]
            parts.append(largest)
        if not is_call(largest, aten.max.dim, aten.amax.default) or largest.args[0] is not whole:
            return scores, None
        axes, keeps = largest.args[1], len(largest.args) > 2 and largest.args[2] is True
        if not keeps or not _is_last_axis(axes[0] if isinstance(axes, list) else axes, whole):
            return scores, None
        inner.extend(parts)
        scores = whole
    if not is_call(scores, aten.cat.default) or len(scores.args) != 2:
        return scores, None
    parts, axis = scores.args
    if len(parts) != 2 or not _is_last_axis(axis, scores) or shape(parts[1])[-1] != 1:
        return scores, None
    inner.append(scores)
    return _skip_transparent(parts[0], inner), parts[1]


def _skip_transparent(node: AnyNode, inner: list[Node]) -> AnyNode:
    while is_call(node, *_TRANSPARENT) or (
        is_call(node, aten.dropout.default) and node.args[2] is False
    ):
        inner.append(node)
        node = node.args[0]
    return node


_SCALING = (
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.tanh.default,
    aten.mul.Scalar,
    aten.div.Scalar,
)


def _split_scaling(
    scores: AnyNode, inner: list[Node]
) -> tuple[AnyNode, tuple[float, float] | None]:
    """The scores before they are scaled and capped; the scale and the soft-cap.

    ``tanh(scores · a) · b`` is a soft-cap of ``b`` on scores scaled by ``a · b``. The second
    result is None if the scores are multiplied by a tensor, or pass through two tanh.
    """
    steps: list[AnyNode] = []
    while is_call(scores := _skip_transparent(scores, inner), *_SCALING):
        inner.append(scores)
        steps.append(scores)
        scores = scores.args[0]
    factor, before_tanh = 1.0, None
    for step in reversed(steps):
        if is_call(step, aten.tanh.default):
            if before_tanh is not None:
                return scores, None
            before_tanh, factor = factor, 1.0
        elif not isinstance(step.args[1], int | float):
            return scores, None
        elif is_call(step, aten.mul.Tensor, aten.mul.Scalar):
            factor *= step.args[1]
        else:
            factor /= step.args[1]
    if before_tanh is None:
        return scores, (factor, 0.0)
    return scores, (before_tanh * factor, factor)


def _split_mask(scores: AnyNode, inner: list[Node]) -> tuple[AnyNode, Node | None, bool]:
    """The scores before their mask, the mask, and whether it is True for what is hidden."""
    if is_call(scores, aten.add.Tensor) and isinstance(scores.args[1], Node) and not scores.kwargs:
        inner.append(scores)
        one, other = scores.args
        return (one, other, False) if _is_scores(one) else (other, one, False)
    if is_call(scores, aten.masked_fill.Scalar) and scores.args[2] <= _lowest(scores):
        inner.append(scores)
        return scores.args[0], scores.args[1], True
    if is_call(scores, aten.where.ScalarOther) and scores.args[2] <= _lowest(scores):
        inner.append(scores)
        return scores.args[1], scores.args[0], False
    return scores, None, False


def _lowest(scores: Node) -> float:
    """The most negative finite number of a type: a score from there down gets no weight."""
    return float(torch.finfo(dtype(scores)).min)


def _is_scores(node: AnyNode) -> bool:
    while is_call(node, *_TRANSPARENT, aten.mul.Tensor, aten.div.Tensor, aten.tanh.default):
        node = node.args[0]
    return is_call(node, aten.matmul.default)
