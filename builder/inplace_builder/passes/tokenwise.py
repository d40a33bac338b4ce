"""The proof that no operator of a graph mixes the tokens of a step.

A graph of which every operator treats tokens alone says the same of tokens of several sequences behind one another as of each sequence by
itself. Every operator has a rule; one without a rule, or one that mixes tokens, ends the proof with the operator's name.
"""

import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from inplace_builder.passes.emit import value
from inplace_builder.passes.match import call
from inplace_builder.passes.token_axes import MixesTokensError, TokenAxes
from inplace_builder.passes.token_rules import RULES, first, of_the_step, pointwise

aten = torch.ops.aten


def follow_tokens(
    graph: Graph,
    results: Collection[Node],
    tokens: Any,
    seeds: Mapping[Node, int],
    opaque: Mapping[Node, tuple[Sequence[Node], int]] | None = None,
) -> TokenAxes:
    """Find the token axes of everything that some nodes are computed from.

    Args:
        graph: their graph.
        results: the nodes.
        tokens, seeds, opaque: as for `TokenAxes`.

    Raises:
        MixesTokensError: an operator on the way mixes tokens.
    """
    work = TokenAxes(tokens, seeds, opaque)
    needed = set(results)
    pending = list(results)
    while pending:
        node = pending.pop()
        kept_apart = work.opaque(node)
        operands = () if node in work.seeds else kept_apart[0] if kept_apart is not None else node.all_input_nodes
        for operand in operands:
            if operand not in needed:
                needed.add(operand)
                pending.append(operand)
    for node in graph.nodes:
        if node in needed and node not in work.axes and node.op == "call_function":
            axis = _axis(work, node)
            if axis is not None:
                work.axes[node] = axis
    return work


def _axis(work: TokenAxes, node: Node) -> int | None:
    if (kept_apart := work.opaque(node)) is not None:
        operands, axis = kept_apart
        for operand in operands:
            work.move(node, operand, axis)
        return axis
    if call(node, operator.getitem):
        return work.axes.get(first(node))
    if call(node, aten.sym_size.int) or not isinstance(value(node), Tensor | tuple | list):
        return None
    if not any(operand in work.axes for operand in node.all_input_nodes):
        return of_the_step(work, node)
    rule = RULES.get(node.target)
    if rule is None and isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
        rule = pointwise
    if rule is None:
        raise MixesTokensError(node, "is not known to treat tokens alone")
    return rule(work, node)
