"""Which writes into a state become `inplace::update` with an index.

A functional graph makes a new version of a state with each write: ``index_copy``, ``slice_scatter``
and the like. `match_write` matches one such write, or refuses it with a reason. `find_write_chains`
follows each state's new value back to the state itself, one write at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from inplace_builder.graph.in_place import SAME_ORDER, SELF_INVERSE
from inplace_builder.graph.nodes import (
    RESHAPES,
    AnyNode,
    argument,
    as_node,
    is_call,
    placeholders_by_name,
    returned_values,
    shape,
    value,
)
from inplace_builder.states.indices import (
    constant_tensor,
    is_consecutive,
    match_one_hot,
    repeated_positions,
)
from inplace_builder.states.lift import StateTensor

aten = torch.ops.aten


@dataclass(frozen=True)
class Write:
    """One matched write.

    Attributes:
        node: the new version of the state.
        base: the version before it.
        pattern: the name of the pattern.
        axis: the axis of the module's own tensor that is written along.
        count: entries written, an extent (a dynamic one is symbolic).
        start: where: a Python number, a symbolic one, or an integer tensor. Its first entry counts,
            or, if ``per_row``, each of its entries ``[rows]``.
        value: the tensor, or the number, that is written.
        wraps_negative: a negative start counts from the end.
        skips_out_of_range: a start outside the axis writes nothing (a mask); else it is an error.
        value_shape: what the value is expanded to before it gets its missing axis; None if it has
            that shape.
        missing_axis: the axis that the value lacks; None if it has all.
        per_row: each row has a start of its own.
    """

    node: Node
    base: Node
    pattern: str
    axis: int
    count: Any
    start: Any
    value: Any
    wraps_negative: bool = False
    skips_out_of_range: bool = False
    value_shape: tuple[Any, ...] | None = None
    missing_axis: int | None = None
    per_row: bool = False


@dataclass(frozen=True)
class WriteRefusal:
    """A write that no pattern covers.

    Attributes:
        node: the new version of the tensor.
        base: the version before it.
        reason: why, in words.
    """

    node: Node
    base: Node
    reason: str


@dataclass(frozen=True)
class MatchContext:
    """What patterns need to know beside a node.

    Attributes:
        module: the graph's module, for constants.
        rows: rows of the first axis of the states, if it counts rows; else 1.
        assume_consecutive: inputs that the caller states to be consecutive positions.
    """

    module: GraphModule
    rows: int
    assume_consecutive: frozenset[str]


def match_write(node: AnyNode, context: MatchContext) -> Write | WriteRefusal | None:
    """Match the write whose result a node is.

    Returns:
        A refusal if no pattern covers it; None if nothing is written into a part of a tensor.
    """
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    pattern = _PATTERNS.get(node.target)
    return None if pattern is None else pattern(node, context)


def _slice_scatter(node: Node, context: MatchContext) -> Write | WriteRefusal:
    base, new = as_node(node.args[0]), as_node(node.args[1])
    axis = argument(node, 2, "dim", 0) % len(shape(node))
    start, step = argument(node, 3, "start", None), argument(node, 5, "step", 1)
    if step != 1:
        return WriteRefusal(
            node, base, f"a slice of step {step}: an append writes consecutive entries"
        )
    capacity = shape(base)[axis]
    start = 0 if start is None else start
    if isinstance(start, int):
        if not isinstance(capacity, int):
            return WriteRefusal(node, base, "a slice of a state whose extent is dynamic")
        start = min(max(start + capacity if start < 0 else start, 0), capacity)
    return Write(
        node,
        base,
        "slice_scatter",
        axis,
        shape(new)[axis],
        start,
        new,
        wraps_negative=not isinstance(start, int),
    )


def _select_scatter(node: Node, context: MatchContext) -> Write | WriteRefusal:
    base, new, axis, index = as_node(node.args[0]), node.args[1], node.args[2], node.args[3]
    assert isinstance(axis, int)
    axis %= len(shape(node))
    if isinstance(index, int) and index < 0:
        if not isinstance(shape(base)[axis], int):
            return WriteRefusal(
                node, base, "an entry counted from the end of a state whose extent is dynamic"
            )
        index += shape(base)[axis]
    return Write(
        node,
        base,
        "select_scatter",
        axis,
        1,
        index,
        new,
        wraps_negative=not isinstance(index, int),
        missing_axis=axis,
    )


def _index_copy(node: Node, context: MatchContext) -> Write | WriteRefusal:
    base, axis, index, new = node.args
    assert isinstance(axis, int)
    write = _write_at_index(
        node,
        as_node(base),
        "index_copy",
        axis % len(shape(node)),
        as_node(index),
        new,
        None,
        context,
        wraps_negative=False,
    )
    # one entry of a state of one axis is written as a scalar
    if isinstance(write, Write) and not shape(as_node(new)):
        return replace(write, value_shape=(1,))
    return write


def _index_put(node: Node, context: MatchContext) -> Write | WriteRefusal:
    base, indices, new = as_node(node.args[0]), node.args[1], node.args[2]
    assert isinstance(indices, list | tuple)
    if argument(node, 3, "accumulate", False):
        return WriteRefusal(
            node, base, "index_put that accumulates: an append replaces the old entries"
        )
    given = [(axis, as_node(index)) for axis, index in enumerate(indices) if index is not None]
    if any(value(index).dtype in (torch.bool, torch.uint8) for _, index in given):
        return WriteRefusal(
            node, base, "index_put with a mask: how much it writes is known only at run time"
        )
    extents = tuple(shape(base))
    if len(given) == 1:
        axis, index = given[0]
        value_shape = (*extents[:axis], *shape(index), *extents[axis + 1 :])
        return _write_at_index(
            node, base, "index_put", axis, index, new, value_shape, context, wraps_negative=True
        )
    if len(given) == 2 and given[0][0] == 0:
        return _index_put_by_row(node, base, given, new, context)
    return WriteRefusal(
        node,
        base,
        f"index_put with {len(given)} indices on axes {[axis for axis, _ in given]}: an append "
        f"has one position a row",
    )


def _index_put_by_row(
    node: Node, base: Node, given: list[tuple[int, Node]], new: Any, context: MatchContext
) -> Write | WriteRefusal:
    """``state[arange(rows), …, position] = new``.

    The indexed axes come first in the value: it is ``[rows, …]`` without the written axis.
    """
    (_, rows), (axis, index) = given
    extents = tuple(shape(base))
    order = constant_tensor(context.module, rows)
    # one axis each: a column of rows would be broadcast with the positions to a grid
    if (
        order is None
        or order.dim() != 1
        or order.tolist() != list(range(extents[0]))
        or len(shape(index)) != 1
    ):
        return WriteRefusal(
            node,
            base,
            "index_put with several indices, of which the first is not every row once in order",
        )
    if shape(index)[0] not in (1, extents[0]):
        return WriteRefusal(
            node, base, "index_put with a number of positions that is not that of the rows"
        )
    return Write(
        node,
        base,
        "index_put",
        axis,
        1,
        index,
        new,
        wraps_negative=True,
        value_shape=(extents[0], *extents[1:axis], *extents[axis + 1 :]),
        missing_axis=axis,
        per_row=shape(index)[0] == extents[0] and extents[0] != 1,
    )


def _write_at_index(
    node: Node,
    base: Node,
    pattern: str,
    axis: int,
    index: Node,
    new: Any,
    value_shape: tuple[Any, ...] | None,
    context: MatchContext,
    *,
    wraps_negative: bool,
) -> Write | WriteRefusal:
    """A write at the entries of one index along one axis."""
    rank = len(shape(index))
    if rank > 1:
        return WriteRefusal(
            node,
            base,
            f"{pattern} with an index of rank {rank}: an append has one position a row",
        )
    if not is_consecutive(context.module, index, context.assume_consecutive):
        return WriteRefusal(
            node,
            base,
            f"{pattern} at several positions that are not provably consecutive (if an input of "
            f"positions is, name it in assume_consecutive=)",
        )
    return Write(
        node,
        base,
        pattern,
        axis,
        shape(index)[0] if rank else 1,
        index,
        new,
        wraps_negative=wraps_negative,
        value_shape=value_shape,
        missing_axis=axis if rank == 0 and value_shape is not None else None,
    )


def _scatter(node: Node, context: MatchContext) -> Write | WriteRefusal:
    base, axis, index, new = node.args[:4]
    base, index = as_node(base), as_node(index)
    assert isinstance(axis, int)
    axis %= len(shape(base))
    entry = tuple(1 if place == axis else extent for place, extent in enumerate(shape(base)))
    if shape(index) != entry:
        return WriteRefusal(
            node,
            base,
            f"scatter with an index of {tuple(shape(index))}; one position a row would be {entry}",
        )
    if isinstance(new, Node) and shape(new) != entry:
        return WriteRefusal(node, base, "scatter that takes a part of its source")
    positions, per_row = repeated_positions(context.module, index)
    if positions is None:
        return WriteRefusal(
            node,
            base,
            "scatter whose index is not one position a row, repeated over the other axes",
        )
    return Write(
        node,
        base,
        "scatter",
        axis,
        1,
        positions,
        new,
        value_shape=None if isinstance(new, Node) else entry,
        per_row=per_row and entry[0] != 1,
    )


def _where(node: Node, context: MatchContext) -> Write | WriteRefusal | None:
    mask, yes, no = node.args
    for base, new, positive in ((no, yes, True), (yes, no, False)):
        match = match_one_hot(context.module, as_node(mask), base, positive=positive)
        if match is None:
            continue
        base = as_node(base)
        axis, index, per_row = match
        entry = tuple(1 if place == axis else extent for place, extent in enumerate(shape(base)))
        own = tuple(shape(new)) if isinstance(new, Node) else ()
        if len(own) >= len(entry) - axis and own[len(own) - len(entry) + axis] != 1:
            return WriteRefusal(node, base, "where with a value that differs along the masked axis")
        return Write(
            node,
            base,
            "where",
            axis,
            1,
            index,
            new,
            skips_out_of_range=True,
            value_shape=entry,
            per_row=per_row,
        )
    return None


def _unmatched_partial_write(node: Node, context: MatchContext) -> WriteRefusal:
    name = str(node.target).split(".")[1]
    return WriteRefusal(
        node, as_node(node.args[0]), f"{name} writes a part of it in a way that no pattern covers"
    )


_PARTIAL_WRITES = (
    aten.index_add.default,
    aten.index_fill.int_Scalar,
    aten.index_fill.int_Tensor,
    aten.index_reduce.default,
    aten.masked_scatter.default,
    aten.put.default,
    aten.scatter.reduce,
    aten.scatter.value_reduce,
    aten.scatter_add.default,
    aten.scatter_reduce.two,
)
"""Operators that change a part of a tensor and are not append."""


_PATTERNS: dict[Any, Callable[[Node, MatchContext], Write | WriteRefusal | None]] = {
    **dict.fromkeys(_PARTIAL_WRITES, _unmatched_partial_write),
    aten.slice_scatter.default: _slice_scatter,
    aten.select_scatter.default: _select_scatter,
    aten.index_copy.default: _index_copy,
    aten.index_put.default: _index_put,
    aten.scatter.src: _scatter,
    aten.scatter.value: _scatter,
    aten.where.self: _where,
}


@dataclass(frozen=True)
class WriteChain:
    """The matched writes of one state, first to last; none if its whole value is computed anew.

    Attributes:
        writes: the writes.
        refusal: why the state is rewritten whole although only a part of it was written.
        is_window: the new value is the old one shifted, with new entries at the end.
        needs_rows: it would match if the first axis counted rows.
    """

    writes: tuple[Write, ...] = ()
    refusal: WriteRefusal | None = None
    is_window: bool = False
    needs_rows: bool = False


def find_write_chains(
    states: Sequence[StateTensor], num_outputs: int, context: MatchContext
) -> list[WriteChain]:
    """The write chain of each state of a functional graph.

    Args:
        states: in the order of their new values.
        num_outputs: how many outputs the graph returns before the states' new values.
        context: the graph, and what is known of it.
    """
    graph = context.module.graph
    placeholders = placeholders_by_name(graph)
    new_values = returned_values(graph)[num_outputs:]
    return [
        find_write_chain(placeholders[state.name], as_node(new), state, context)
        for state, new in zip(states, new_values, strict=True)
    ]


def find_write_chain(
    placeholder: Node, new_value: Node, state: StateTensor, context: MatchContext
) -> WriteChain:
    """Follow a state's new value back to the state itself, one write at a time."""
    writes: list[Write] = []
    current = new_value
    while current is not placeholder:
        if is_call(current, aten.clone.default):  # the same value
            current = as_node(current.args[0])
            new_value = current if not writes else new_value
            continue
        write = match_write(current, context)
        if write is None:
            return _unmatched_chain(placeholder, new_value, current, writes, context)
        if isinstance(write, WriteRefusal):
            return WriteChain(refusal=write if _depends_on(write.base, placeholder) else None)
        if (reason := _why_no_update(write, state, context.rows)) is not None:
            return WriteChain(
                refusal=WriteRefusal(write.node, write.base, reason),
                needs_rows=write.per_row and context.rows == 1,
            )
        writes.append(write)
        current = write.base
    return WriteChain(tuple(reversed(writes)))


def _unmatched_chain(
    placeholder: Node,
    new_value: Node,
    current: Node,
    writes: Sequence[Write],
    context: MatchContext,
) -> WriteChain:
    """The chain of a state at whose version ``current`` no write is matched."""
    partial = next((write for write in writes if _depends_on(write.base, placeholder)), None)
    if partial is not None:
        reason = f"{partial.pattern} writes into a tensor computed from it, not into the state"
        return WriteChain(refusal=WriteRefusal(partial.node, partial.base, reason))
    transposed = _transposed_write(current, context)
    if transposed is not None and _depends_on(transposed.base, placeholder):
        reason = (
            "a part is written through a transposed view, and an update writes along an axis as "
            "it lies in memory"
        )
        return WriteChain(refusal=WriteRefusal(transposed.node, transposed.base, reason))
    through_view = _write_through_view(current, placeholder)
    if through_view is not None:
        name = str(through_view.target).split(".")[1]
        reason = f"{name} writes a part of it through a view of another shape or type"
        return WriteChain(refusal=WriteRefusal(through_view, placeholder, reason))
    return WriteChain(is_window=is_rolling_window(new_value, placeholder))


def _write_through_view(node: Node, placeholder: Node) -> Node | None:
    """The first partial write on the way back to the state through views; None if there is none.

    Functionalisation writes through a view as: view the state, write into the view, and view the
    result in the state's shape again.
    """
    written = None
    while node is not placeholder:
        if node.target in _SCATTERS_INTO_VIEWS or (
            node.target in _PATTERNS and node.target is not aten.where.self
        ):
            written = node
        elif not is_call(node, *_VIEWS):
            return None
        node = as_node(node.args[0])
    return written


_SCATTERS_INTO_VIEWS = frozenset({aten.as_strided_scatter.default, aten.diagonal_scatter.default})
"""Operators that write a part, and for which there is no pattern at all."""


_VIEWS = (
    *RESHAPES,
    *SAME_ORDER,
    *SELF_INVERSE,
    aten._reshape_alias.default,
    aten.alias.default,
    aten.as_strided.default,
    aten.detach.default,
    aten.diagonal.default,
    aten.expand.default,
    aten.slice.Tensor,
    aten.unfold.default,
    aten.unfold_backward.default,
    aten.view.dtype,
    aten.view_as_complex.default,
    aten.view_as_real.default,
)
"""Operators whose result has the elements of their first argument, or some of them."""


def is_rolling_window(new_value: Node, placeholder: Node) -> bool:
    """Whether a new value is ``cat([state[n:], new])``: the oldest entries go, new ones follow."""
    if (
        not is_call(new_value, aten.cat.default)
        or not isinstance(new_value.args[0], list | tuple)
        or len(new_value.args[0]) != 2
    ):
        return False
    axis = argument(new_value, 1, "dim", 0)
    kept = new_value.args[0][0]
    if (
        not isinstance(kept, Node)
        or not is_call(kept, aten.slice.Tensor)
        or kept.args[0] is not placeholder
        or not isinstance(axis, int)
    ):
        return False
    extent = shape(placeholder)[axis]
    end = argument(kept, 3, "end", None)
    to_the_end = end is None or (isinstance(end, int) and end >= extent)
    return (
        argument(kept, 1, "dim", 0) == axis % len(shape(placeholder))
        and argument(kept, 4, "step", 1) == 1
        and to_the_end
    )


def _transposed_write(node: Node, context: MatchContext) -> Write | WriteRefusal | None:
    """The write whose result a node is, with its axes in another order."""
    source = node
    while is_call(source, aten.permute.default, aten.transpose.int, aten.t.default):
        source = as_node(source.args[0])
    return None if source is node else match_write(source, context)


def _depends_on(node: Node, placeholder: Node) -> bool:
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if current is placeholder:
            return True
        pending.extend(source for source in current.all_input_nodes if source not in seen)
        seen.update(current.all_input_nodes)
    return False


def _why_no_update(write: Write, state: StateTensor, rows: int) -> str | None:
    """Why an update cannot do a matched write; None if it can."""
    if state.dynamic_axes - {write.axis}:
        return f"{write.pattern} into a tensor with a dynamic extent on another axis"
    if write.per_row and rows == 1:
        return (
            f"{write.pattern} at a position of its own for each entry of the first axis, which "
            f"is not the axis of rows"
        )
    if write.axis == 0 and state.has_slot_axis(rows) and not covers_axis(write, state):
        return f"{write.pattern} along the first axis, which counts rows"
    return None


def covers_axis(write: Write, state: StateTensor) -> bool:
    """Whether a write covers its axis from end to end."""
    return (
        write.axis not in state.dynamic_axes
        and isinstance(write.start, int)
        and write.start == 0
        and isinstance(write.count, int)
        and write.count == state.initial.shape[write.axis]
    )
