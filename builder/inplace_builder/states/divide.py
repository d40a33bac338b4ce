"""One tensor that holds the states of several layers, each under an index of its own (``cache[layer]``), becomes a state for each.

Without mutation a write into ``cache[3]`` makes a new ``cache`` of which layer 3 is another one: followed back from the whole, it rewrites
the layer. Divided, it is what the module wrote. The parts are views of the tensor, so whoever owns it keeps one tensor.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from inplace_builder.graph.nodes import AnyNode, Emitter, is_call, value
from inplace_builder.states.state import StateTensor
from inplace_builder.states.writes import MatchContext, match_write

aten = torch.ops.aten


@dataclass(frozen=True)
class _Division:
    """How a state is divided.

    Attributes:
        axis: every use of it has a constant index on this axis.
        versions: the placeholder, and what is written into it one after another.
    """

    axis: int
    versions: frozenset[Node]


def divide_states(
    module: GraphModule,
    original: GraphModule,
    states: Sequence[StateTensor],
    outputs: int,
    alignment: int,
) -> tuple[StateTensor, ...]:
    """Divide each state that is used by constant indices on one axis only, where something is written into a part of such a part.

    Args:
        module: takes the inputs and then the states, returns ``outputs`` outputs and then the states' new values; rewritten.
        original: the same function as the user wrote it; from here on it takes and returns the parts too.
        states: in the order of the placeholders.
        outputs: outputs of the module.
        alignment: bytes that the address of a part must be a multiple of; a state whose parts lie closer stays whole.

    Returns:
        The states of both graphs now: parts, in order, in place of what was divided.
    """
    made = list(states)
    place = 0
    while place < len(made):
        state = made[place]
        found = _division(module, place + outputs, state, alignment)
        if found is None:
            place += 1
            continue
        names = _part_names(state, found.axis, (module.graph, original.graph))
        _use_parts(module, place + outputs, state, found, names)
        _take_parts(original, place + outputs, state, found.axis, names)
        made[place : place + 1] = [
            state.select(found.axis, index, name) for index, name in enumerate(names)
        ]  # each may be divided again
    return tuple(made)


def _division(
    module: GraphModule, place: int, state: StateTensor, alignment: int
) -> _Division | None:
    if state.dynamic_axes:
        return None
    placeholder, result = _placeholder(module.graph, state.name), _returned(module.graph)[place]
    extents = tuple(state.initial.shape)
    versions, pending = {placeholder}, [placeholder]
    axes: set[int] = set()
    nested = False
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
                nested = nested or _writes_into_part(
                    user, versions, MatchContext(module, 1, frozenset())
                )
                versions.add(user)
                pending.append(user)
    if not nested or len(axes) != 1 or result not in versions:
        return None
    (axis,) = axes
    apart = math.prod(extents[axis + 1 :]) * state.initial.itemsize
    return (
        _Division(axis, frozenset(versions))
        if math.prod(extents[:axis]) == 1 and apart % alignment == 0
        else None
    )


def _constant_index_axis(user: AnyNode, version: Node) -> int | None:
    """The axis of a use that has a constant index there; None for any other use."""
    found: AnyNode = None
    if is_call(user, aten.select.int) and isinstance(user.args[2], int):
        found = user.args[1]
    elif is_call(user, aten.unbind.int):
        found = user.args[1] if len(user.args) > 1 else 0
    elif (
        is_call(user, aten.select_scatter.default)
        and user.args[0] is version is not user.args[1]
        and isinstance(user.args[3], int)
    ):
        found = user.args[2]
    return found if isinstance(found, int) else None


def _writes_into_part(write: AnyNode, versions: set[Node], question: MatchContext) -> bool:
    """Whether what is put under an index is what was there, with something written into it."""
    current: AnyNode = write.args[1]
    while (step := match_write(current, question)) is not None:
        current = step.base
        if is_call(current, aten.select.int) and current.args[0] in versions:
            return tuple(current.args[1:]) == tuple(write.args[2:])
        if (
            is_call(current, operator.getitem)
            and is_call(current.args[0], aten.unbind.int)
            and current.args[0].args[0] in versions
        ):
            return bool(current.args[1] == write.args[3])
    return False


def _part_names(state: StateTensor, axis: int, graphs: Sequence[Graph]) -> list[str]:
    """Names for the placeholders of the parts, free in every graph."""
    taken = {node.name for graph in graphs for node in graph.nodes}
    found = []
    for index in range(state.initial.shape[axis]):
        name = f"{state.name}_{index}"
        while name in taken:
            name += "_"
        found.append(name)
    return found


def _use_parts(
    module: GraphModule, place: int, state: StateTensor, found: _Division, names: Sequence[str]
) -> None:
    """Let every use of the tensor use its parts."""
    graph = module.graph
    placeholder = _placeholder(graph, state.name)
    parts: dict[AnyNode, list[Node]] = {
        placeholder: _placeholders(graph, placeholder, found.axis, names)
    }
    nodes: list[AnyNode] = list(graph.nodes)
    for node in nodes:
        if node in found.versions and node is not placeholder:
            base, new, _, index = node.args
            parts[node] = list(parts[base])
            parts[node][index] = new
        elif is_call(node, aten.select.int) and node.args[0] in parts:
            node.replace_all_uses_with(parts[node.args[0]][node.args[2]])
        elif (
            is_call(node, operator.getitem)
            and is_call(node.args[0], aten.unbind.int)
            and node.args[0].args[0] in parts
        ):
            node.replace_all_uses_with(parts[node.args[0].args[0]][node.args[1]])
    returned = _returned(graph)
    last = graph.output_node()
    with Emitter(graph, last).before(
        last
    ) as emit:  # a version that is returned as well is a value of its own
        plain = [
            emit.call(aten.stack.default, parts[leaf], found.axis) if leaf in parts else leaf
            for leaf in returned
        ]
    last.args = ((*plain[:place], *parts[returned[place]], *plain[place + 1 :]),)
    graph.eliminate_dead_code()
    graph.erase_node(placeholder)


def _take_parts(
    original: GraphModule, place: int, state: StateTensor, axis: int, names: Sequence[str]
) -> None:
    """Let a function take the parts of a tensor, put it together, and return the parts of its new value."""
    graph = original.graph
    placeholder = _placeholder(graph, state.name)
    parts = _placeholders(graph, placeholder, axis, names)
    first, last = (
        next(node for node in graph.nodes if node.op != "placeholder"),
        graph.output_node(),
    )
    with Emitter(graph, placeholder).before(first) as emit:
        placeholder.replace_all_uses_with(emit.call(aten.stack.default, parts, axis))
    graph.erase_node(placeholder)
    returned = _returned(graph)
    with Emitter(graph, last).before(last) as emit:
        new = [
            emit.call(aten.select.int, returned[place], axis, index) for index in range(len(parts))
        ]
    last.args = ((*returned[:place], *new, *returned[place + 1 :]),)
    original.recompile()


def _placeholders(graph: Graph, whole: Node, axis: int, names: Sequence[str]) -> list[Node]:
    """A placeholder for each part, where that of the whole is."""
    found = []
    for index, name in enumerate(names):
        with graph.inserting_before(whole):
            part = graph.placeholder(name)
        part.name = part.target = name
        with value(whole).fake_mode:
            part.meta["val"] = (
                value(whole).select(axis, index).clone(memory_format=torch.contiguous_format)
            )
        found.append(part)
    return found


def _placeholder(graph: Graph, name: str) -> Node:
    found: dict[str, Node] = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    return found[name]


def _returned(graph: Graph) -> tuple[AnyNode, ...]:
    returned = graph.output_node().args[0]
    assert isinstance(returned, tuple)
    return returned
