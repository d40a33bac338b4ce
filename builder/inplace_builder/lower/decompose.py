"""Prepare a captured graph for lowering: functional operators only, and converters for all of them.

In-place operators are removed (`inplace_builder.graph.in_place`), and an operator that has no
converter is replaced by its value, if it depends on no input, or by PyTorch's own decomposition of
it, into core ATen where there is one. A decomposition may write in place, and may use operators
that have no converter either, so both are repeated until nothing changes. Constant masks become
indices before (`inplace_builder.graph.passes`), complex numbers pairs of real ones
afterwards (`inplace_builder.lower.complex_numbers`). What has a converter stays whole: a layer of
TensorRT is faster than its parts, and fusion matches whole operators.
"""

import operator
from collections.abc import Mapping
from typing import Any

import torch
from inplace.operators import NAMESPACE
from inplace.operators.state import written_arguments
from torch.fx import Graph, GraphModule, Node

from inplace_builder.errors import brief
from inplace_builder.graph.decomposition import (
    Decomposition,
    find_decomposition,
    trace_decomposition,
)
from inplace_builder.graph.in_place import remove_in_place
from inplace_builder.graph.nodes import insert_constant
from inplace_builder.graph.passes import resolve_constant_masks
from inplace_builder.graph.program import AnyProgram, GraphProgram, weights_of
from inplace_builder.lower.complex_numbers import (
    has_complex_rule,
    remove_complex,
    touches_complex,
)
from inplace_builder.lower.constants import FoldedConstants
from inplace_builder.lower.own_decompositions import OWN
from inplace_builder.lower.recurrences import EXPANSIONS
from inplace_builder.lower.registry import find_converter, unsupported_reason

ORIGIN = "decomposed_from"
"""Key of a node's metadata: the operators, outermost first, whose decomposition made it."""

FAILURE = "not_decomposed"
"""Key of a node's metadata: why PyTorch could not decompose it."""


def lowerable(program: AnyProgram, kinds: Mapping[str, str] | None = None) -> GraphProgram:
    """A copy of a program without in-place operators, decomposed where a converter is missing.

    Convolutions and recurrences become reads, products and updates, except where a plugin updates
    their state. Other operators on states, and custom operators, stay what they are.

    Args:
        program: the program.
        kinds: for each state the mechanism that updates it.

    Raises:
        BuildError: an in-place operator writes a weight.
        LoweringError: one writes something else that cannot be a value of the network.
    """
    copied = GraphProgram.copy_of(program)
    _expand_recurrences(copied, kinds or {})
    remove_in_place(copied)
    resolve_constant_masks(copied.graph, weights_of(copied))
    _decompose(copied)
    if remove_complex(copied):
        _decompose(copied)
    copied.recompile()
    return copied


def _decompose(program: GraphProgram) -> None:
    """Remove in-place operators, and decompose what has no converter, until nothing changes."""
    remove_in_place(program)
    while _decompose_once(program):
        remove_in_place(program)
    _drop_empty_parts(program)


def _drop_empty_parts(program: GraphProgram) -> None:
    """Join without parts that have no elements: TensorRT has no shapes for some of them."""
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default):
        parts = [part for part in node.args[0] if not _is_empty(part)]
        if parts:
            node.update_arg(0, parts)
    program.graph.eliminate_dead_code(
        lambda node: node.op in ("placeholder", "output") or node.is_impure()
    )


def _is_empty(node: Node) -> bool:
    """Whether a tensor certainly has no elements."""
    return any(isinstance(extent, int) and extent == 0 for extent in node.meta["val"].shape)


def _expand_recurrences(program: GraphProgram, kinds: Mapping[str, str]) -> None:
    """Write convolutions and recurrences as plain operators, where no plugin computes them."""
    for node in list(program.graph.nodes):
        if node.op != "call_function" or node.target not in EXPANSIONS:
            continue
        (state,) = written_arguments(node)
        if kinds.get(state.name) != "plugin":
            _inline(program, node, trace_decomposition(node, EXPANSIONS[node.target]))


def _decompose_once(program: GraphProgram) -> bool:
    """Decompose every operator of the graph that has no converter; whether there was one.

    What is known to be unsupported stays, so that it is refused under its own name.
    """
    changed, constants = False, FoldedConstants(program)
    for node in list(program.graph.nodes):
        target = node.target
        if (
            node.op != "call_function"
            or not isinstance(target, torch._ops.OpOverload)
            or target.namespace == NAMESPACE
            or not _holds_tensors(node.meta.get("val"))
            or _stays_whole(node)
            or constants.fold(node)
            or unsupported_reason(target) is not None
            or str(target) in node.meta.get(ORIGIN, ())
            or FAILURE in node.meta
        ):
            continue
        decomposition = OWN.get(target) or find_decomposition(target)
        traced = _trace(node, decomposition) if decomposition is not None else None
        if traced is not None:
            _inline(program, node, traced)
            changed = True
    return changed


def _stays_whole(node: Node) -> bool:
    """Whether an operator has a converter, or a form on real numbers if it is complex."""
    target: Any = node.target
    if touches_complex(node):
        return has_complex_rule(target)
    return find_converter(target) is not None


def _holds_tensors(meta: Any) -> bool:
    return isinstance(meta, torch.Tensor | list | tuple)


def _trace(node: Node, decomposition: Decomposition) -> GraphModule | None:
    """The graph of a decomposition over a node's inputs; None where it does not apply."""
    try:
        traced = trace_decomposition(node, decomposition)
    except Exception as error:  # whatever PyTorch raises
        node.meta[FAILURE] = brief(error)
        return None
    made = [each.target for each in traced.graph.nodes if each.op == "call_function"]
    return None if made == [node.target] else traced


def _inline(program: GraphProgram, node: Node, traced: GraphModule) -> None:
    """Put the graph of a decomposition in the place of a node."""
    origin = (*node.meta.get(ORIGIN, ()), str(node.target))
    placeholders = traced.graph.find_nodes(op="placeholder")
    known: dict[Node, Node] = dict(zip(placeholders, node.all_input_nodes, strict=True))
    result: Any = None
    with program.graph.inserting_before(node):
        for each in traced.graph.nodes:
            if each.op == "placeholder":
                continue
            if each.op == "output":
                result = torch.fx.node.map_arg(each.args[0], lambda source: known[source])
                continue
            if each.op == "get_attr":
                constant = getattr(traced, str(each.target))
                known[each] = insert_constant(program.graph, constant, "decomposed")
            else:
                known[each] = program.graph.node_copy(each, lambda source: known[source])
            known[each].meta = {
                "val": getattr(traced, each.target)
                if each.op == "get_attr" and "val" not in each.meta
                else each.meta.get("val"),  # None of an operator that returns nothing
                "stack_trace": node.meta.get("stack_trace"),
                ORIGIN: origin,
            }
    _replace(program.graph, node, result)


def _replace(graph: Graph, node: Node, result: Any) -> None:
    """Let every user of a node use the result of its decomposition."""
    if isinstance(result, Node):
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):
            assert user.target is operator.getitem, f"{user} uses several results as one"
            user.replace_all_uses_with(result[user.args[1]])
            graph.erase_node(user)
    graph.erase_node(node)
