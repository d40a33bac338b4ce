"""From a function of states to a graph that updates them in place, through our operators alone.

`rewrite_updates` puts the operators in the graph and describes, for each state, how it is updated
now and why: what the builder prints and the manifest records.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from inplace.schema.specs import AliasKind, Dtype, StateSpec, Update
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from inplace_builder.graph.nodes import (
    AnyNode,
    Emitter,
    dtype,
    is_call,
    is_exactly,
    placeholders_by_name,
    returned_values,
    shape,
    source_line,
    value,
)
from inplace_builder.states.attention import (
    AttentionMatch,
    UnfusedAttention,
    match_cache_attentions,
)
from inplace_builder.states.indices import number_as_tensor, source_placeholders
from inplace_builder.states.lift import SLOTS, StateTensor, common_rows
from inplace_builder.states.writes import (
    MatchContext,
    Write,
    WriteChain,
    covers_axis,
    find_write_chains,
)

aten = torch.ops.aten
inplace = torch.ops.inplace

_SAME_PLACE = (
    aten.expand.default,
    aten.reshape.default,
    aten.view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.clone.default,
    aten.to.dtype,
    aten._to_copy.default,
)
"""What changes no value of a place."""


@dataclass(frozen=True)
class CapturedState:
    """A state of a rewritten graph, and how the graph updates it.

    Attributes:
        tensor: the module's tensor.
        has_slot_axis: the module's own first axis is the slot axis, so the tensor is bound as it
            is; else the runtime binds ``tensor.unsqueeze(0)``. Both are views of the same memory.
        pattern: the matched patterns in order (``slice_scatter``, ``index_copy``, …); ``replace``
            if the module computes the whole value anew, ``window`` if that value is the old one
            without its oldest entries and with new ones behind, ``explicit`` if the module writes
            a part in a way that no pattern covers.
        reason: why, in words, with the module's line.
        operators: the operators that write it, in order: ``update``, ``attention``, or ``user``
            for a user's own operator.
        update: how the manifest describes its updates.
        axis: the axis of a slot that an append grows along, else None.
        is_fixed: every step writes at the same places, or at a remainder (``n % capacity``): the
            state is never full.
        index_sources: the placeholders that the places are computed from; None if unknown.
    """

    tensor: StateTensor
    has_slot_axis: bool
    pattern: str
    reason: str
    operators: tuple[str, ...]
    update: Update
    axis: int | None
    is_fixed: bool = False
    index_sources: frozenset[str] | None = None

    @property
    def name(self) -> str:
        """The graph's placeholder."""
        return self.tensor.name

    @property
    def kind(self) -> AliasKind:
        """The kind of its alias in a PyTorch graph."""
        return "user" if "user" in self.operators else "operator"

    @property
    def is_matched(self) -> bool:
        """Whether a step writes only what the module writes.

        A part of a part counts as the outer part.
        """
        return self.pattern != "explicit"

    def bound(self, tensor: Tensor) -> Tensor:
        """The view of the module's tensor that a runtime binds, ``[slots, ...]``."""
        part = self.tensor.select_from(tensor)
        return part if self.has_slot_axis else part.unsqueeze(0)

    def bound_initial(self) -> Tensor:
        """The tensor that is bound, with the values at capture."""
        return self.bound(self.tensor.module_tensor.initial)

    def spec(self) -> StateSpec:
        """The manifest's description of the state.

        ``fill`` is the initial value if it is the same everywhere. If not, it is 0 and the initial
        tensor must be copied.
        """
        initial = self.tensor.initial
        slot = self.bound_initial()
        first = initial.reshape(-1)[0].item() if initial.numel() else 0.0
        uniform = bool((initial == first).all()) and (
            not isinstance(first, complex) or first.imag == 0
        )
        first = first.real if isinstance(first, complex) else first
        fill: int | float = 0.0
        if uniform:
            is_whole_number = isinstance(first, int) and not isinstance(first, bool)
            fill = int(first) if is_whole_number else float(first)
        return StateSpec(
            name=self.name,
            shape=tuple(slot.shape[1:]),
            dtype=Dtype.of(initial.dtype),
            update=self.update,
            axis=self.axis,
            fill=fill,
        )


def rewrite_updates(
    module: GraphModule,
    states: Sequence[StateTensor],
    num_outputs: int,
    *,
    rows: int,
    assume_consecutive: frozenset[str],
) -> tuple[CapturedState, ...] | None:
    """Rewrite a functional graph, in place, to one that updates its states.

    Args:
        module: takes the inputs and then the states, returns ``num_outputs`` outputs and then the
            states' new values.
        states: in the order of the placeholders.
        num_outputs: outputs of the module.
        rows: 1, or the extent of the first axis of every state.
        assume_consecutive: inputs that the caller states to be consecutive positions.

    Returns:
        How each state is updated; None, with the graph untouched, if ``rows`` is 1 and the writes
        of some state would only match with more rows.
    """
    graph = module.graph
    context = MatchContext(module, rows, assume_consecutive)
    chains = find_write_chains(states, num_outputs, context)
    if rows == 1 and any(chain.needs_rows for chain in chains) and common_rows(states) is not None:
        return None
    attentions = match_cache_attentions(context, states, chains) if rows == 1 else []
    placeholders = placeholders_by_name(graph)
    for state in states:
        _add_slot_axis(placeholders[state.name], state, rows)
    slots = _add_slots_input(graph, placeholders[states[0].name], rows)
    rewritten = RewrittenGraph(module, rows, slots)
    written_by_attention = _emit_attentions(rewritten, states, chains, attentions)
    for state, chain in zip(states, chains, strict=True):
        for write in chain.writes:
            if write.node not in written_by_attention:
                rewritten.emit_update(placeholders[state.name], state, write)
    _drop_new_values(rewritten, states, chains, num_outputs, written_by_attention)
    for state in states:
        _read_old_value(rewritten, placeholders[state.name], state)
    described = tuple(
        describe_state(state, chain, attentions, rows)
        for state, chain in zip(states, chains, strict=True)
    )
    graph.eliminate_dead_code()
    return described


def _emit_attentions(
    rewritten: "RewrittenGraph",
    states: Sequence[StateTensor],
    chains: Sequence[WriteChain],
    attentions: Sequence[AttentionMatch | UnfusedAttention],
) -> set[Node]:
    """Put the attention operators in the graph; the versions of states that they write."""
    placeholders = placeholders_by_name(rewritten.graph)
    owners = {
        chain.writes[-1].node: state
        for state, chain in zip(states, chains, strict=True)
        if chain.writes
    }
    written: set[Node] = set()
    for match in attentions:
        if isinstance(match, AttentionMatch):
            keys, values = owners[match.keys.node], owners[match.values.node]
            rewritten.emit_attention(
                match, keys, placeholders[keys.name], placeholders[values.name]
            )
            written |= {match.keys.node, match.values.node}
    return written


def _drop_new_values(
    rewritten: "RewrittenGraph",
    states: Sequence[StateTensor],
    chains: Sequence[WriteChain],
    num_outputs: int,
    written_by_attention: Collection[Node],
) -> None:
    """Let the graph return its outputs alone, and write whole states at its end.

    A version that an update writes is no longer a result. A whole value stays one until all
    versions of all states are gone: it may be computed from them.
    """
    graph, last = rewritten.graph, rewritten.graph.output_node()
    placeholders = placeholders_by_name(graph)
    returned = returned_values(graph)
    whole_values = (
        None if chain.writes else new
        for chain, new in zip(chains, returned[num_outputs:], strict=True)
    )
    last.args = ((*returned[:num_outputs], *whole_values),)
    for state, chain in zip(states, chains, strict=True):
        _read_versions(rewritten, placeholders[state.name], state, chain, written_by_attention)
    returned = returned_values(graph)
    last.args = (returned[:num_outputs],)
    for state, new in zip(states, returned[num_outputs:], strict=True):
        if isinstance(new, Node) and not state.only_read:
            rewritten.emit_replacement(placeholders[state.name], state, new)


def _add_slots_input(graph: Graph, before: Node, rows: int) -> Node:
    with graph.inserting_before(before):
        slots = graph.placeholder(SLOTS)
    with value(before).fake_mode:
        slots.meta["val"] = torch.empty(rows, dtype=torch.int32)
    return slots


def _add_slot_axis(placeholder: Node, state: StateTensor, rows: int) -> None:
    """Let the placeholder stand for the state in several slots."""
    extents = shape(placeholder)  # symbolic where they vary
    with value(placeholder).fake_mode:
        slot = extents[1:] if state.has_slot_axis(rows) else extents
        placeholder.meta["val"] = torch.empty((rows + 1, *slot), dtype=state.initial.dtype)


def _read_versions(
    rewritten: "RewrittenGraph",
    placeholder: Node,
    state: StateTensor,
    chain: WriteChain,
    written_by_attention: Collection[Node],
) -> None:
    """Let users of a version read the state right after its write, and erase the version.

    The update stands where the version was computed, so the read comes before the next write. An
    attention writes further down; what still uses its version then is a result of the graph.
    """
    for write in reversed(chain.writes):
        node = write.node
        if node.users:
            place = rewritten.graph.output_node() if node in written_by_attention else node
            with Emitter(rewritten.graph, node).before(place) as emit:
                node.replace_all_uses_with(rewritten.emit_read(emit, placeholder, state))
        rewritten.graph.erase_node(node)


def _read_old_value(rewritten: "RewrittenGraph", placeholder: Node, state: StateTensor) -> None:
    """Let users of the state as it was before the step read it before anything is written."""
    users = [user for user in placeholder.users if placeholder in _plain_arguments(user)]
    if not users:
        return
    first = next(node for node in rewritten.graph.nodes if node.op != "placeholder")
    with Emitter(rewritten.graph, users[0]).before(first) as emit:
        old = rewritten.emit_read(emit, placeholder, state)
    for user in users:
        states = _STATE_ARGUMENTS.get(user.target)
        if states is None:
            user.replace_input_with(placeholder, old)
        else:
            user.args = tuple(
                old if given is placeholder and place not in states else given
                for place, given in enumerate(user.args)
            )


_STATE_ARGUMENTS: dict[object, tuple[int, ...]] = {
    inplace.read.default: (0,),
    inplace.update.default: (0,),
    inplace.attention.default: (3, 4),
}
"""The positions of the arguments of our operators that are states ``[slots, ...]``."""


def _plain_arguments(node: Node) -> list[object]:
    """The arguments of a node that are not states ``[slots, ...]``."""
    states = _STATE_ARGUMENTS.get(node.target)
    if states is None:
        return list(node.all_input_nodes)
    return [given for place, given in enumerate(node.args) if place not in states]


@dataclass(frozen=True)
class RewrittenGraph:
    """A graph being rewritten, and the layout of its rows.

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

    def emit_update(self, placeholder: Node, state: StateTensor, write: Write) -> None:
        """Put `inplace::update` where the new version was computed."""
        has_slot_axis = state.has_slot_axis(self.rows)
        with Emitter(self.graph, write.node).before(write.node) as emit:
            new = expanded_value(emit, write)
            if not has_slot_axis:
                new = emit.call(aten.unsqueeze.default, new, 0)
            if covers_axis(write, state):
                emit.call(inplace.update.default, placeholder, self.slots, new)
                return
            start = self.emit_start(emit, placeholder, state, write)
            slots = self.slots
            if write.skips_out_of_range:
                fits = emit.call(
                    aten.logical_and.default,
                    emit.call(aten.ge.Scalar, start, 0),
                    emit.call(aten.lt.Scalar, start, state.initial.shape[write.axis]),
                )
                nowhere = emit.call(aten.full.default, [self.rows], -1, dtype=torch.int32)
                slots = emit.call(aten.where.self, fits, slots, nowhere)
            axis = write.axis + (not has_slot_axis)
            emit.call(inplace.update.default, placeholder, slots, new, None, start, axis, False)

    def emit_attention(
        self, match: AttentionMatch, keys: StateTensor, key_states: Node, value_states: Node
    ) -> None:
        """Put `inplace::attention`, which writes both caches, where the attention was computed.

        Args:
            match: the attention.
            keys: the cache of keys; where a step starts in it holds for both.
            key_states, value_states: the placeholders of the caches.
        """
        with Emitter(self.graph, match.node).before(match.node) as emit:

            def packed(node: Node) -> Node:
                return emit.call(aten.transpose.int, emit.call(aten.squeeze.dim, node, 0), 0, 1)

            sinks = (
                [] if match.sinks is None else [emit.call(aten.reshape.default, match.sinks, [-1])]
            )
            out = emit.call(
                inplace.attention.default,
                packed(match.query),
                packed(expanded_value(emit, match.keys)),
                packed(expanded_value(emit, match.values)),
                key_states,
                value_states,
                self.slots,
                _row_offsets(emit, match.query),
                # a negative start is an error: masks were compared for starts that fit
                self.emit_start(emit, key_states, keys, replace(match.keys, wraps_negative=False)),
                *sinks,
                scale=match.scale,
                window=match.window,
                softcap=match.softcap,
            )
            out = emit.call(aten.unsqueeze.default, emit.call(aten.transpose.int, out, 0, 1), 0)
        match.node.replace_all_uses_with(out)
        for node in (match.node, *match.inner_nodes):
            self.graph.erase_node(node)

    def emit_start(
        self, emit: Emitter, placeholder: Node, state: StateTensor, write: Write
    ) -> Node:
        """The write indices of the rows, int32 ``[rows]``."""
        if isinstance(write.start, int):
            return emit.call(aten.full.default, [self.rows], write.start, dtype=torch.int32)
        capacity: Any = state.initial.shape[write.axis]
        if write.axis in state.dynamic_axes:
            axis = write.axis + (not state.has_slot_axis(self.rows))
            capacity = emit.call(aten.sym_size.int, placeholder, axis)
        start: Node | None
        if isinstance(value(write.start), torch.Tensor):
            start = emit.call(aten.reshape.default, write.start, [-1])
            if not write.per_row and not is_exactly(shape(start)[0], 1):
                start = emit.call(aten.slice.Tensor, start, 0, 0, 1)
        else:
            start = number_as_tensor(emit, write.start)
        assert start is not None
        if write.wraps_negative:
            below = emit.call(aten.lt.Scalar, start, 0)
            from_end = emit.call(aten.add.Scalar, start, capacity)
            start = emit.call(aten.where.self, below, from_end, start)
        if dtype(start) != torch.int32:  # what is out of range stays out of range
            clamped = emit.call(aten.clamp.default, start, -1, capacity)
            start = emit.call(aten.to.dtype, clamped, torch.int32)
        if is_exactly(shape(start)[0], self.rows):
            return start
        return emit.call(aten.expand.default, start, [self.rows])

    def emit_read(self, emit: Emitter, placeholder: Node, state: StateTensor) -> Node:
        """Read the state in the module's own shape."""
        rows = emit.call(inplace.read.default, placeholder, self.slots)
        return rows if state.has_slot_axis(self.rows) else emit.call(aten.squeeze.dim, rows, 0)

    def emit_replacement(self, placeholder: Node, state: StateTensor, new: Node) -> None:
        """Write the whole state at the end of the graph."""
        source = new if new.op == "call_function" else placeholder
        with Emitter(self.graph, source).before(self.graph.output_node()) as emit:
            rows = (
                new if state.has_slot_axis(self.rows) else emit.call(aten.unsqueeze.default, new, 0)
            )
            emit.call(inplace.update.default, placeholder, self.slots, rows)


def _row_offsets(emit: Emitter, query: Node) -> Node:
    """The row offsets ``[2]`` of a step of one row, for a query ``[1, heads, tokens, dim]``."""
    tokens = shape(query)[2]
    if isinstance(tokens, int):
        return emit.call(aten.arange.start_step, 0, tokens + 1, tokens, dtype=torch.int32)
    ends = emit.call(aten.arange.default, 2, dtype=torch.int32)
    return emit.call(aten.mul.Tensor, ends, emit.call(aten.sym_size.int, query, 2))


def expanded_value(emit: Emitter, write: Write) -> Node:
    """The value of a write with all axes, and the type, of the module's own tensor."""
    kind = dtype(write.base)
    if not isinstance(write.value, Node) or not isinstance(value(write.value), torch.Tensor):
        extents = list(write.value_shape or ())
        new = emit.call(aten.full.default, extents, write.value, dtype=kind)
    else:
        new = write.value
        if dtype(new) != kind:
            new = emit.call(aten.to.dtype, new, kind)
        if write.value_shape is not None:
            while len(shape(new)) > len(write.value_shape):  # PyTorch ignores leading 1s
                new = emit.call(aten.squeeze.dim, new, 0)
            if (sizes := _expansion(emit, write, shape(new))) is not None:
                new = emit.call(aten.expand.default, new, sizes)
    if write.missing_axis is None:
        return new
    return emit.call(aten.unsqueeze.default, new, write.missing_axis)


def _expansion(emit: Emitter, write: Write, own: tuple[Any, ...]) -> list[Any] | None:
    """What a value of these extents is expanded to; None if it has them already.

    A dynamic extent is the number of positions.
    """
    assert write.value_shape is not None
    aligned = [1] * (len(write.value_shape) - len(own)) + list(own)
    sizes: list[Any] = []
    for target, extent in zip(write.value_shape, aligned, strict=True):
        if isinstance(target, int):
            sizes.append(target)
        elif isinstance(extent, int):
            sizes.append(emit.call(aten.sym_size.int, write.start, 0))
        else:
            sizes.append(-1)  # functionalisation has broadcast them once: they are equal
    same = len(own) == len(write.value_shape) and all(
        size == -1 or is_exactly(extent, size) for size, extent in zip(sizes, own, strict=True)
    )
    return None if same else sizes


def describe_state(
    state: StateTensor,
    chain: WriteChain,
    attentions: Sequence[AttentionMatch | UnfusedAttention],
    rows: int,
) -> CapturedState:
    """How a state is updated, and why.

    Args:
        state: the state.
        chain: the matched writes of its new value.
        attentions: the attentions of the whole module, rewritten or left explicit.
        rows: rows of a step.
    """
    return _add_attention(_describe_updates(state, chain, rows), chain, attentions)


def _describe_updates(state: StateTensor, chain: WriteChain, rows: int) -> CapturedState:
    has_slot_axis = state.has_slot_axis(rows)
    plain = CapturedState(
        state,
        has_slot_axis,
        "replace",
        "the module computes its whole value anew in each step",
        ("update",),
        Update.REPLACE,
        None,
    )
    unmatched = state.unmatched_view if not chain.writes else ""
    if chain.refusal is not None:
        unmatched = f"{chain.refusal.reason}{source_line(chain.refusal.node)}"
    elif chain.is_window:
        reason = (
            "a window that drops its oldest entries: shifted as the module shifts it, because a "
            "ring would change the order of its entries"
        )
        return replace(plain, pattern="window", reason=reason)
    if unmatched:
        reason = f"read, computed and written back whole: {unmatched}"
        return replace(plain, pattern="explicit", reason=reason)
    if not chain.writes:
        return plain
    patterns = tuple(dict.fromkeys(write.pattern for write in chain.writes))
    nested = any(_is_scatter(write.value) for write in chain.writes)
    what = (
        "the outermost part that the module writes into is written"
        if nested
        else "only what the module writes is written"
    )
    axes = {write.axis - has_slot_axis for write in chain.writes}
    appends = len(axes) == 1 and not any(covers_axis(write, state) for write in chain.writes)
    return replace(
        plain,
        pattern=" + ".join(patterns),
        reason=f"{what}: {', '.join(patterns)}{source_line(chain.writes[0].node)}",
        operators=("update",) * len(chain.writes),
        update=Update.APPEND if appends else Update.REPLACE,
        axis=axes.pop() if appends else None,
        is_fixed=all(
            isinstance(write.start, int) or _starts_over(write.start) for write in chain.writes
        ),
        index_sources=_sources([write.start for write in chain.writes]),
    )


def _sources(starts: Sequence[Any]) -> frozenset[str] | None:
    """The placeholders that places are computed from; None if one is not understood."""
    sources: set[str] = set()
    for start in starts:
        if isinstance(start, Node):
            placeholders = source_placeholders(start)
            if placeholders is None:
                return None
            sources |= {placeholder.name for placeholder in placeholders}
    return frozenset(sources)


def _starts_over(start: Any) -> bool:
    """Whether a place is a remainder, which does not grow with the number of steps."""
    while isinstance(start, torch.fx.Node) and start.target in _SAME_PLACE:
        start = start.args[0]
    return is_call(start, aten.remainder.Scalar) and isinstance(start.args[1], int)


def _add_attention(
    state: CapturedState,
    chain: WriteChain,
    attentions: Sequence[AttentionMatch | UnfusedAttention],
) -> CapturedState:
    nodes = {write.node for write in chain.writes}
    for match in attentions:
        if isinstance(match, AttentionMatch) and nodes & {match.keys.node, match.values.node}:
            window = f" in a window of {match.window}" if match.window else ""
            reason = f"{state.reason}; the attention over it is causal{window}"
            return replace(state, reason=reason, operators=("attention",))
        if isinstance(match, UnfusedAttention) and nodes & set(match.versions):
            reason = f"{state.reason}; the attention over it stays explicit: {match.reason}"
            return replace(state, reason=reason)
    return state


def _is_scatter(node: AnyNode) -> bool:
    """Whether a written value is itself a part with something written into it."""
    return is_call(
        node,
        aten.slice_scatter.default,
        aten.select_scatter.default,
        aten.index_put.default,
        aten.index_copy.default,
    )
