"""One tensor with the states of several layers, ``cache[layer]``, becomes one state for each layer.

Without mutation, a write into ``cache[3]`` makes a new ``cache`` whose layer 3 is another one: seen
from the whole, it rewrites the layer. After the division the write is matched as the module made
it. The parts are views of the tensor, so its owner keeps one tensor.
"""

import math
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from inplace_builder.graph.nodes import (
    AnyNode,
    Emitter,
    is_call,
    placeholders_by_name,
    returned_values,
    value,
)
from inplace_builder.states.lift import StateTensor
from inplace_builder.states.writes import MatchContext, match_write

aten = torch.ops.aten


@dataclass(frozen=True)
class _Division:
    """How a state is divided.

    Attributes:
        axis: every use of the state has a constant index on this axis.
        versions: the placeholder, and each new version that a write makes.
    """

    axis: int
    versions: frozenset[Node]


def divide_states(
    module: GraphModule,
    original: GraphModule,
    states: Sequence[StateTensor],
    num_outputs: int,
    alignment: int,
    whole: Collection[str] = (),
) -> tuple[StateTensor, ...]:
    """Divide each state that is only used by constant indices on one axis.

    At least one write must go into a part of what lies at an index: a state whose indices are
    rewritten whole stays as it is.

    Args:
        module: takes the inputs and then the states, returns ``num_outputs`` outputs and then the
            states' new values; rewritten.
        original: the same function as the user wrote it; takes and returns the parts from here on.
        states: in the order of the placeholders.
        num_outputs: outputs of the module.
        alignment: bytes that the address of a part must be a multiple of; a state whose parts lie
            closer stays whole.
        whole: the module's names of states that are not divided.

    Returns:
        The states of both graphs now: the parts, in order, in place of a state that was divided.
    """
    result = list(states)
    place = 0
    while place < len(result):
        state = result[place]
        division = None
        if state.module_tensor.source not in whole:
            division = _find_division(module, place + num_outputs, state, alignment)
        if division is None:
            place += 1
            continue
        names = _part_names(state, division.axis, (module.graph, original.graph))
        _use_parts(module, place + num_outputs, state, division, names)
        _take_parts(original, place + num_outputs, state, division.axis, names)
        result[place : place + 1] = [  # each may be divided again
            state.select(division.axis, index, name) for index, name in enumerate(names)
        ]
    return tuple(result)


def _find_division(
    module: GraphModule, place: int, state: StateTensor, alignment: int
) -> _Division | None:
    """How a state can be divided; its new value is the ``place``-th result of the graph."""
    if state.dynamic_axes:
        return None
    placeholder = placeholders_by_name(module.graph)[state.name]
    extents = tuple(state.initial.shape)
    versions, pending = {placeholder}, [placeholder]
    axes: set[int] = set()
    writes_into_part = False
    while pending:
        version = pending.pop()
        for user in version.users:
            if user.op == "output":
                continue
            axis = _constant_index_axis(user, version)
            if axis is None:
                return None
            axes.add(axis % len(extents))
            if is_call(user, aten.select_scatter.default):
                writes_into_part = writes_into_part or _writes_into_part(
                    user, versions, MatchContext(module, 1, frozenset())
                )
                versions.add(user)
                pending.append(user)
    new_value = returned_values(module.graph)[place]
    if not writes_into_part or len(axes) != 1 or new_value not in versions:
        return None
    (axis,) = axes
    distance = math.prod(extents[axis + 1 :]) * state.initial.itemsize
    if math.prod(extents[:axis]) != 1 or distance % alignment != 0:
        return None
    return _Division(axis, frozenset(versions))


def _constant_index_axis(user: AnyNode, version: Node) -> int | None:
    """The axis on which a use has a constant index; None for any other use."""
    axis: AnyNode = None
    if is_call(user, aten.select.int) and isinstance(user.args[2], int):
        axis = user.args[1]
    elif is_call(user, aten.unbind.int):
        axis = user.args[1] if len(user.args) > 1 else 0
    elif (
        is_call(user, aten.select_scatter.default)
        and user.args[0] is version is not user.args[1]
        and isinstance(user.args[3], int)
    ):
        axis = user.args[2]
    return axis if isinstance(axis, int) else None


def _writes_into_part(write: AnyNode, versions: set[Node], context: MatchContext) -> bool:
    """Whether what is put at an index is what was there, with something written into it."""
    current: AnyNode = write.args[1]
    while (step := match_write(current, context)) is not None:
        current = step.base
        if is_call(current, aten.select.int) and current.args[0] in versions:
            return tuple(current.args[1:]) == tuple(write.args[2:])
        if _is_unbound_part(current) and current.args[0].args[0] in versions:
            return bool(current.args[1] == write.args[3])
    return False


def _is_unbound_part(node: AnyNode) -> bool:
    """Whether a node is one of the results of ``unbind``."""
    return is_call(node, operator.getitem) and is_call(node.args[0], aten.unbind.int)


def _part_names(state: StateTensor, axis: int, graphs: Sequence[Graph]) -> list[str]:
    """Names for the placeholders of the parts that no graph has yet."""
    taken = {node.name for graph in graphs for node in graph.nodes}
    names = []
    for index in range(state.initial.shape[axis]):
        name = f"{state.name}_{index}"
        while name in taken:
            name += "_"
        names.append(name)
    return names


def _use_parts(
    module: GraphModule,
    place: int,
    state: StateTensor,
    division: _Division,
    names: Sequence[str],
) -> None:
    """Let every use of the tensor use its parts."""
    graph, axis = module.graph, division.axis
    whole = placeholders_by_name(graph)[state.name]
    parts: dict[AnyNode, list[Node]] = {whole: _add_placeholders(graph, whole, axis, names)}
    nodes: list[AnyNode] = list(graph.nodes)
    for node in nodes:
        if node in division.versions and node is not whole:
            base, new, _, index = node.args
            parts[node] = list(parts[base])
            parts[node][index] = new
        elif is_call(node, aten.select.int) and node.args[0] in parts:
            node.replace_all_uses_with(parts[node.args[0]][node.args[2]])
        elif _is_unbound_part(node) and node.args[0].args[0] in parts:
            node.replace_all_uses_with(parts[node.args[0].args[0]][node.args[1]])
    returned = returned_values(graph)
    last = graph.output_node()
    with Emitter(graph, last).before(last) as emit:
        # a version that is returned as an output too is a value of its own
        plain = [
            emit.call(aten.stack.default, parts[node], axis) if node in parts else node
            for node in returned
        ]
    last.args = ((*plain[:place], *parts[returned[place]], *plain[place + 1 :]),)
    graph.eliminate_dead_code()
    graph.erase_node(whole)


def _take_parts(
    original: GraphModule, place: int, state: StateTensor, axis: int, names: Sequence[str]
) -> None:
    """Let a function take the parts of a tensor and return the parts of its new value."""
    graph = original.graph
    whole = placeholders_by_name(graph)[state.name]
    parts = _add_placeholders(graph, whole, axis, names)
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with Emitter(graph, whole).before(first) as emit:
        whole.replace_all_uses_with(emit.call(aten.stack.default, parts, axis))
    graph.erase_node(whole)
    returned, last = returned_values(graph), graph.output_node()
    with Emitter(graph, last).before(last) as emit:
        new = [
            emit.call(aten.select.int, returned[place], axis, index) for index in range(len(parts))
        ]
    last.args = ((*returned[:place], *new, *returned[place + 1 :]),)
    original.recompile()


def _add_placeholders(graph: Graph, whole: Node, axis: int, names: Sequence[str]) -> list[Node]:
    """A placeholder for each part, where that of the whole is."""
    parts = []
    for index, name in enumerate(names):
        with graph.inserting_before(whole):
            part = graph.placeholder(name)
        part.name = part.target = name
        with value(whole).fake_mode:
            selected = value(whole).select(axis, index)
            part.meta["val"] = selected.clone(memory_format=torch.contiguous_format)
        parts.append(part)
    return parts
