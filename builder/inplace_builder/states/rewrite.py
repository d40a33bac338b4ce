"""From a function of states to a graph that updates them in place, through the ``inplace::`` operators alone.

What became of each state of a rewritten module, and why: the words that a builder prints and a manifest keeps.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from inplace.schema.specs import Update
from torch.fx import Graph, GraphModule, Node

from inplace_builder.graph.nodes import Emitter, dtype, shape, source_line, value
from inplace_builder.states.attention import (
    AttentionMatch,
    UnfusedAttention,
    match_cache_attentions,
)
from inplace_builder.states.indices import number_as_tensor
from inplace_builder.states.state import CapturedState, StateTensor, common_rows
from inplace_builder.states.writes import (
    MatchContext,
    Write,
    WriteChain,
    covers_axis,
    find_write_chains,
)

aten = torch.ops.aten


def describe_state(
    found: StateTensor,
    chain: WriteChain,
    attended: Sequence[AttentionMatch | UnfusedAttention],
    rows: int,
) -> CapturedState:
    """What is said of a state.

    Args:
        found: the state.
        chain: the recognised writes of its new value.
        attended: the attentions of the whole module, rewritten or left explicit.
        rows: rows of a step.
    """
    return _add_attention(_describe_updates(found, chain, rows), chain, attended)


def _describe_updates(found: StateTensor, chain: WriteChain, rows: int) -> CapturedState:
    leading = found.has_slot_axis(rows)
    plain = CapturedState(
        found,
        leading,
        "replace",
        "the module computes its whole value anew in each step",
        ("update",),
        Update.REPLACE,
        None,
    )
    if chain.refusal is not None:
        refused = chain.refusal
        because = (
            f"read, computed and written back whole: {refused.reason}{source_line(refused.node)}"
        )
        return replace(plain, pattern="explicit", reason=because)
    if chain.is_window:
        because = "a window that drops its oldest entries: moved as the module moves it, for a ring would change the order that others see"
        return replace(plain, pattern="window", reason=because)
    if not chain.writes and found.unmatched_view:
        return replace(
            plain,
            pattern="explicit",
            reason=f"read, computed and written back whole: {found.unmatched_view}",
        )
    if not chain.writes:
        return plain
    patterns = tuple(dict.fromkeys(write.pattern for write in chain.writes))
    part = any(isinstance(write.value, Node) and _is_scatter(write.value) for write in chain.writes)
    what = (
        "the outermost part that the module writes into is written"
        if part
        else "only what the module writes is written"
    )
    because = f"{what}: {', '.join(patterns)}{source_line(chain.writes[0].node)}"
    axes = {write.axis - leading for write in chain.writes}
    if len(axes) > 1 or any(covers_axis(write, found) for write in chain.writes):
        return replace(
            plain,
            pattern=" + ".join(patterns),
            reason=because,
            operators=("update",) * len(chain.writes),
        )
    return CapturedState(
        found,
        leading,
        " + ".join(patterns),
        because,
        ("update",) * len(chain.writes),
        Update.APPEND,
        axes.pop(),
    )


def _add_attention(
    state: CapturedState, chain: WriteChain, attended: Sequence[AttentionMatch | UnfusedAttention]
) -> CapturedState:
    nodes = {write.node for write in chain.writes}
    for found in attended:
        if isinstance(found, AttentionMatch) and nodes & {found.keys.node, found.values.node}:
            because = f"{state.reason}; the attention behind it is causal{f' in a window of {found.window}' if found.window else ''}"
            return replace(state, reason=because, operators=("attention",))
        if isinstance(found, UnfusedAttention) and nodes & set(found.versions):
            return replace(
                state,
                reason=f"{state.reason}; the attention behind it stays explicit: {found.reason}",
            )
    return state


def _is_scatter(node: Node) -> bool:
    """Whether a written value is itself an old part with something written into it."""
    return node.target in (
        aten.slice_scatter.default,
        aten.select_scatter.default,
        aten.index_put.default,
        aten.index_copy.default,
    )


inplace = torch.ops.inplace


SLOTS = "slots"
"""The placeholder that says which slot each row is."""


@dataclass(frozen=True)
class RewrittenGraph:
    """A graph being rewritten, in the layout of its rows.

    Attributes:
        module: the graph's module.
        rows: rows of a step.
        slots: the placeholder of the rows' slots.
    """

    module: GraphModule
    rows: int
    slots: Node

    @property
    def graph(self) -> Graph:
        """The graph."""
        return self.module.graph

    def update(self, state: Node, found: StateTensor, write: Write) -> None:
        """Put `inplace::update` where the new version was computed."""
        leading = found.has_slot_axis(self.rows)
        with Emitter(self.graph, write.node).before(write.node) as emit:
            new = expanded_value(emit, write)
            if not leading:
                new = emit.call(aten.unsqueeze.default, new, 0)
            if covers_axis(write, found):
                emit.call(inplace.update.default, state, self.slots, new)
                return
            start = self.start(emit, write, found, state)
            slots = self.slots
            if write.skips_out_of_range:
                fits = emit.call(
                    aten.logical_and.default,
                    emit.call(aten.ge.Scalar, start, 0),
                    emit.call(aten.lt.Scalar, start, found.initial.shape[write.axis]),
                )
                nowhere = emit.call(aten.full.default, [self.rows], -1, dtype=torch.int32)
                slots = emit.call(aten.where.self, fits, slots, nowhere)
            emit.call(
                inplace.update.default,
                state,
                slots,
                new,
                None,
                start,
                write.axis + (not leading),
                False,
            )

    def attend(
        self,
        found: AttentionMatch,
        states: tuple[StateTensor, StateTensor],
        placeholders: tuple[Node, Node],
    ) -> None:
        """Put `inplace::attention` where the attention was computed: it writes both caches."""
        with Emitter(self.graph, found.node).before(found.node) as emit:

            def packed(node: Node) -> Node:
                return emit.call(aten.transpose.int, emit.call(aten.squeeze.dim, node, 0), 0, 1)

            out = emit.call(
                inplace.attention.default,
                packed(found.query),
                packed(expanded_value(emit, found.keys)),
                packed(expanded_value(emit, found.values)),
                *placeholders,
                self.slots,
                _one_row(emit, found.query),
                # a negative start is an error here: the masks were compared for the starts that fit
                self.start(
                    emit, replace(found.keys, wraps_negative=False), states[0], placeholders[0]
                ),
                scale=found.scale,
                window=found.window,
                softcap=found.softcap,
            )
            out = emit.call(aten.unsqueeze.default, emit.call(aten.transpose.int, out, 0, 1), 0)
        found.node.replace_all_uses_with(out)
        for node in (found.node, *found.path):
            self.graph.erase_node(node)

    def start(self, emit: Emitter, write: Write, found: StateTensor, state: Node) -> Node:
        """The write indices ``[rows]``, int32."""
        if isinstance(write.start, int):
            return emit.call(aten.full.default, [self.rows], write.start, dtype=torch.int32)
        capacity: Any = found.initial.shape[write.axis]
        if write.axis in found.dynamic_axes:
            capacity = emit.call(
                aten.sym_size.int, state, write.axis + (not found.has_slot_axis(self.rows))
            )
        start: Node | None
        if isinstance(value(write.start), torch.Tensor):
            start = emit.call(aten.reshape.default, write.start, [-1])
            if not write.per_row and not _is_exactly(shape(start)[0], 1):
                start = emit.call(aten.slice.Tensor, start, 0, 0, 1)
        else:
            start = number_as_tensor(emit, write.start)
        assert start is not None
        if write.wraps_negative:
            below = emit.call(aten.lt.Scalar, start, 0)
            start = emit.call(
                aten.where.self, below, emit.call(aten.add.Scalar, start, capacity), start
            )
        if dtype(start) != torch.int32:  # what is outside stays outside
            start = emit.call(
                aten.to.dtype, emit.call(aten.clamp.default, start, -1, capacity), torch.int32
            )
        return (
            start
            if _is_exactly(shape(start)[0], self.rows)
            else emit.call(aten.expand.default, start, [self.rows])
        )

    def read(self, emit: Emitter, state: Node, found: StateTensor) -> Node:
        """A version of the state in the module's own shape."""
        rows = emit.call(inplace.read.default, state, self.slots)
        return rows if found.has_slot_axis(self.rows) else emit.call(aten.squeeze.dim, rows, 0)

    def replace(self, state: Node, found: StateTensor, result: Node) -> None:
        """Write the whole state at the end of the graph."""
        source = result if result.op == "call_function" else state
        with Emitter(self.graph, source).before(self.graph.output_node()) as emit:
            emit.call(
                inplace.update.default,
                state,
                self.slots,
                result
                if found.has_slot_axis(self.rows)
                else emit.call(aten.unsqueeze.default, result, 0),
            )


def _one_row(emit: Emitter, query: Node) -> Node:
    """The row offsets of a step of one row, for ``[1, heads, tokens, dim]``."""
    tokens = shape(query)[2]
    if isinstance(tokens, int):
        return emit.call(aten.arange.start_step, 0, tokens + 1, tokens, dtype=torch.int32)
    ends = emit.call(aten.arange.default, 2, dtype=torch.int32)
    return emit.call(aten.mul.Tensor, ends, emit.call(aten.sym_size.int, query, 2))


def _is_exactly(extent: object, wanted: int) -> bool:
    """Whether an extent is certainly this number; a dynamic one is not, whatever it was in the example."""
    return isinstance(extent, int) and extent == wanted


def expanded_value(emit: Emitter, write: Write) -> Node:
    """The value of a write with all axes of the module's own tensor."""
    kind = dtype(write.base)
    if not isinstance(write.value, Node) or not isinstance(value(write.value), torch.Tensor):
        extents = list(write.value_shape or ())
        new = emit.call(aten.full.default, extents, write.value, dtype=kind)
    else:
        new = write.value
        if dtype(new) != kind:
            new = emit.call(aten.to.dtype, new, kind)
        while write.value_shape is not None and len(shape(new)) > len(
            write.value_shape
        ):  # PyTorch ignores leading extents of 1
            new = emit.call(aten.squeeze.dim, new, 0)
        if (
            write.value_shape is not None
            and (sizes := _expansion(emit, write, shape(new))) is not None
        ):
            new = emit.call(aten.expand.default, new, sizes)
    return (
        new
        if write.missing_axis is None
        else emit.call(aten.unsqueeze.default, new, write.missing_axis)
    )


def _expansion(emit: Emitter, write: Write, own: tuple[Any, ...]) -> list[Any] | None:
    """What a value of these extents is expanded to; None where it has them. A dynamic extent is the number of positions."""
    assert write.value_shape is not None
    before = [1] * (len(write.value_shape) - len(own)) + list(own)
    sizes: list[Any] = []
    for wanted, extent in zip(write.value_shape, before, strict=True):
        if isinstance(wanted, int):
            sizes.append(wanted)
        elif isinstance(extent, int):
            sizes.append(emit.call(aten.sym_size.int, write.start, 0))
        else:
            sizes.append(-1)  # functionalisation has broadcast them once: they are equal
    same = len(own) == len(write.value_shape) and all(
        size == -1 or _is_exactly(extent, size) for size, extent in zip(sizes, own, strict=True)
    )
    return None if same else sizes


def rewrite_updates(
    module: GraphModule,
    states: Sequence[StateTensor],
    outputs: int,
    *,
    rows: int,
    assume_consecutive: frozenset[str],
) -> tuple[CapturedState, ...] | None:
    """Rewrite the graph, in place.

    Args:
        module: takes the inputs and then the states, returns ``outputs`` outputs and then the states' new values.
        states: in the order of the placeholders.
        outputs: outputs of the module.
        rows: 1, or the extent of the first axis of every state.
        assume_consecutive: inputs that are consecutive positions.

    Returns:
        What became of each state; None, with the graph untouched, where ``rows`` is 1 and some state would be recognised with more.
    """
    graph = module.graph
    placeholders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    last = graph.output_node()
    chains = find_write_chains(states, outputs, MatchContext(module, rows, assume_consecutive))
    if rows == 1 and any(chain.needs_rows for chain in chains) and common_rows(states) is not None:
        return None
    attended = (
        match_cache_attentions(module, states, chains, assume_consecutive) if rows == 1 else []
    )
    for state in states:
        _add_slot_axis(placeholders[state.name], state, rows)
    work = RewrittenGraph(module, rows, _add_slots_input(graph, placeholders[states[0].name], rows))
    owners = {
        chain.writes[-1].node: state
        for state, chain in zip(states, chains, strict=True)
        if chain.writes
    }
    for attention in attended:
        if isinstance(attention, AttentionMatch):
            pair = owners[attention.keys.node], owners[attention.values.node]
            work.attend(attention, pair, (placeholders[pair[0].name], placeholders[pair[1].name]))
    into_attention = {
        write.node
        for found in attended
        if isinstance(found, AttentionMatch)
        for write in (found.keys, found.values)
    }
    for state, chain in zip(states, chains, strict=True):
        for write in chain.writes:
            if write.node not in into_attention:
                work.update(placeholders[state.name], state, write)
    # a version that an update writes is no result any more; a whole value stays one until all versions of all states are in place
    returned = last.args[0]  # again: an attention that the module returns is another node now
    assert isinstance(returned, tuple)
    kept = (
        None if chain.writes else result
        for chain, result in zip(chains, returned[outputs:], strict=True)
    )
    last.args = ((*returned[:outputs], *kept),)
    for state, chain in zip(states, chains, strict=True):
        _read_versions(work, placeholders[state.name], state, chain, into_attention)
    returned = last.args[0]
    assert isinstance(returned, tuple)
    last.args = (returned[:outputs],)
    for state, result in zip(states, returned[outputs:], strict=True):
        if isinstance(result, Node):
            work.replace(placeholders[state.name], state, result)
    for state in states:
        _read_old_value(work, placeholders[state.name], state)
    made = tuple(
        describe_state(state, chain, attended, rows)
        for state, chain in zip(states, chains, strict=True)
    )
    graph.eliminate_dead_code()
    return made


def _add_slots_input(graph: Graph, before: Node, rows: int) -> Node:
    with graph.inserting_before(before):
        slots = graph.placeholder(SLOTS)
    mode = before.meta["val"].fake_mode
    with mode:
        slots.meta["val"] = torch.empty(rows, dtype=torch.int32)
    return slots


def _add_slot_axis(placeholder: Node, state: StateTensor, rows: int) -> None:
    """From here on the placeholder is the state in some slots."""
    extents = shape(placeholder)  # symbolic where they vary
    with value(placeholder).fake_mode:
        slot = extents[1:] if state.has_slot_axis(rows) else extents
        placeholder.meta["val"] = torch.empty((rows + 1, *slot), dtype=state.initial.dtype)


def _read_versions(
    work: RewrittenGraph,
    placeholder: Node,
    state: StateTensor,
    chain: WriteChain,
    into_attention: Collection[Node],
) -> None:
    """Let what uses a version of the state read it right after its write, so before the next one; the version itself goes."""
    for write in reversed(chain.writes):
        node = write.node
        if node.users:
            # behind the update, which was put there first; or behind the attention, which writes further down: only a result asks then
            behind = work.graph.output_node() if node in into_attention else node
            with Emitter(work.graph, node).before(behind) as emit:
                node.replace_all_uses_with(work.read(emit, placeholder, state))
        work.graph.erase_node(node)


def _read_old_value(work: RewrittenGraph, placeholder: Node, state: StateTensor) -> None:
    """Let what uses the state as it was before the step read it before anything is written."""
    users = [user for user in placeholder.users if placeholder in _plain_arguments(user)]
    if not users:
        return
    first = next(node for node in work.graph.nodes if node.op != "placeholder")
    with Emitter(work.graph, users[0]).before(first) as emit:
        old = work.read(emit, placeholder, state)
    for user in users:
        if _STATE_ARGUMENTS.get(user.target) is None:
            user.replace_input_with(placeholder, old)
        else:
            states = _STATE_ARGUMENTS[user.target]
            user.args = tuple(
                old if given is placeholder and place not in states else given
                for place, given in enumerate(user.args)
            )


_STATE_ARGUMENTS: dict[object, tuple[int, ...]] = {
    inplace.read.default: (0,),
    inplace.update.default: (0,),
    inplace.attention.default: (3, 4),
}
"""The arguments of our operators that are states in slots."""


def _plain_arguments(node: Node) -> list[object]:
    """The arguments of a node that are not states in slots."""
    states = _STATE_ARGUMENTS.get(node.target)
    return (
        list(node.all_input_nodes)
        if states is None
        else [given for place, given in enumerate(node.args) if place not in states]
    )
