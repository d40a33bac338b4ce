"""Which writes into a state are `inplace::update` with an index.

A state's new value as a chain of recognised writes into the state.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from inplace_builder.graph.nodes import AnyNode, as_node, is_call, shape, value
from inplace_builder.states.indices import (
    constant_tensor,
    is_consecutive,
    match_one_hot,
    repeated_positions,
)
from inplace_builder.states.state import StateTensor

aten = torch.ops.aten


@dataclass(frozen=True)
class Write:
    """One recognised write.

    Attributes:
        node: the new version of the state.
        base: the version before it.
        pattern: which pattern it is.
        axis: the axis of the module's own tensor that is written along.
        count: entries written, an extent (dynamic ones are symbolic).
        start: where: a Python number, a symbolic one, or an integer tensor whose first entry it is (``per_row``: entries ``[rows]``).
        wraps_negative: a negative start counts from the end.
        skips_out_of_range: a start outside the axis writes nothing (a mask); otherwise it is an error.
        value: the tensor, or the number, that is written.
        value_shape: what the value is expanded to before ``unsqueeze``; None where it is as wanted.
        missing_axis: the axis that the value lacks; None where it has it.
        per_row: the start differs between rows.
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
    """A write that no pattern covers."""

    node: Node
    base: Node
    reason: str


@dataclass(frozen=True)
class MatchContext:
    """What a pattern is asked about a node.

    Attributes:
        module: the graph's module, for constants.
        rows: rows of the state's first axis, if it counts them.
        assume_consecutive: inputs that the caller promises to be consecutive positions.
    """

    module: GraphModule
    rows: int
    assume_consecutive: frozenset[str]


def match_write(node: AnyNode, question: MatchContext) -> Write | WriteRefusal | None:
    """The write that makes this version of a state, a refusal with its reason, or None where nothing is written into a part of a tensor."""
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    pattern = _PATTERNS.get(node.target)
    return None if pattern is None else pattern(node, question)


def _argument(node: Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _slice_scatter(node: Node, question: MatchContext) -> Write | WriteRefusal:
    base, new = node.args[0], node.args[1]
    assert isinstance(base, Node)
    axis = _argument(node, 2, "dim", 0) % len(shape(node))
    start, step = _argument(node, 3, "start", None), _argument(node, 5, "step", 1)
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
        shape(as_node(new))[axis],
        start,
        new,
        wraps_negative=not isinstance(start, int),
    )


def _select_scatter(node: Node, question: MatchContext) -> Write | WriteRefusal:
    base, new, axis, index = node.args[0], node.args[1], node.args[2], node.args[3]
    assert isinstance(base, Node) and isinstance(axis, int)
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


def _index_copy(node: Node, question: MatchContext) -> Write | WriteRefusal:
    base, axis, index, new = node.args
    assert isinstance(base, Node) and isinstance(axis, int)
    axis %= len(shape(node))
    found = _indexed(
        node, base, "index_copy", axis, as_node(index), new, None, question, wraps=False
    )
    if isinstance(found, Write) and not shape(as_node(new)):  # one entry of a state of one axis
        return replace(found, value_shape=(1,))
    return found


def _index_put(node: Node, question: MatchContext) -> Write | WriteRefusal:
    base, indices, new = node.args[:3]
    assert isinstance(base, Node) and isinstance(indices, list | tuple)
    if _argument(node, 3, "accumulate", False):
        return WriteRefusal(
            node, base, "index_put that accumulates: an append replaces what was there"
        )
    given = [(axis, as_node(index)) for axis, index in enumerate(indices) if index is not None]
    if any(value(index).dtype in (torch.bool, torch.uint8) for _, index in given):
        return WriteRefusal(
            node, base, "index_put with a mask: how much it writes is known only at run time"
        )
    extents = tuple(shape(base))
    if len(given) == 1:
        axis, index = given[0]
        found = (*extents[:axis], *shape(index), *extents[axis + 1 :])
        return _indexed(node, base, "index_put", axis, index, new, found, question, wraps=True)
    if len(given) == 2 and given[0][0] == 0:
        return _put_in_rows(node, base, given, new, question)
    return WriteRefusal(
        node,
        base,
        f"index_put with {len(given)} indices on axes {[axis for axis, _ in given]}: an append has one position a row",
    )


def _put_in_rows(
    node: Node, base: Node, given: list[tuple[int, Node]], new: Any, question: MatchContext
) -> Write | WriteRefusal:
    """``state[arange(rows), …, position] = new``: the indexed axes come first in what is written, so ``[rows, …]`` without the axis."""
    (_, rows), (axis, index) = given
    extents = tuple(shape(base))
    order = constant_tensor(question.module, rows)
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
    found = (extents[0], *extents[1:axis], *extents[axis + 1 :])
    per_row = shape(index)[0] == extents[0] and extents[0] != 1
    return Write(
        node,
        base,
        "index_put",
        axis,
        1,
        index,
        new,
        wraps_negative=True,
        value_shape=found,
        missing_axis=axis,
        per_row=per_row,
    )


def _indexed(
    node: Node,
    base: Node,
    pattern: str,
    axis: int,
    index: Node,
    new: Any,
    extents: tuple[Any, ...] | None,
    question: MatchContext,
    *,
    wraps: bool,
) -> Write | WriteRefusal:
    """A write at the entries of one index along one axis."""
    if len(shape(index)) > 1:
        return WriteRefusal(
            node,
            base,
            f"{pattern} with an index of rank {len(shape(index))}: an append has one position a row",
        )
    if not is_consecutive(question.module, index, question.assume_consecutive):
        return WriteRefusal(
            node,
            base,
            f"{pattern} at several positions that are not provably consecutive (name an input of positions in assume_consecutive=)",
        )
    scalar = not shape(index)
    missing = axis if scalar and extents is not None else None
    count = 1 if scalar else shape(index)[0]
    return Write(
        node,
        base,
        pattern,
        axis,
        count,
        index,
        new,
        wraps_negative=wraps,
        value_shape=extents,
        missing_axis=missing,
    )


def _scatter(node: Node, question: MatchContext) -> Write | WriteRefusal:
    base, axis, index, new = node.args[:4]
    assert isinstance(base, Node) and isinstance(axis, int)
    axis %= len(shape(base))
    index = as_node(index)
    wanted = tuple(1 if place == axis else extent for place, extent in enumerate(shape(base)))
    if shape(index) != wanted:
        return WriteRefusal(
            node,
            base,
            f"scatter with an index of {tuple(shape(index))}, where one position a row would be {wanted}",
        )
    if isinstance(new, Node) and shape(new) != wanted:
        return WriteRefusal(node, base, "scatter that takes a part of its source")
    source, per_row = repeated_positions(index)
    if source is None:
        return WriteRefusal(
            node,
            base,
            "scatter whose index is not one position a row, repeated over the other axes",
        )
    per_row = per_row and wanted[0] != 1
    extents = None if isinstance(new, Node) else wanted
    return Write(node, base, "scatter", axis, 1, source, new, value_shape=extents, per_row=per_row)


def _where(node: Node, question: MatchContext) -> Write | WriteRefusal | None:
    mask, yes, no = node.args
    assert isinstance(mask, Node)
    for base, new, positive in ((no, yes, True), (yes, no, False)):
        found = match_one_hot(mask, base, question.module, positive=positive)
        if found is None:
            continue
        axis, index, per_row = found
        extents = tuple(
            1 if place == axis else extent for place, extent in enumerate(shape(as_node(base)))
        )
        own = tuple(shape(new)) if isinstance(new, Node) else ()
        if len(own) >= len(extents) - axis and own[len(own) - len(extents) + axis] != 1:
            return WriteRefusal(
                node, as_node(base), "where with a value that differs along the masked axis"
            )
        return Write(
            node,
            as_node(base),
            "where",
            axis,
            1,
            index,
            new,
            skips_out_of_range=True,
            value_shape=extents,
            per_row=per_row,
        )
    return None


def is_rolling_window(result: Node, placeholder: Node) -> bool:
    """Whether a state's new value is the state without its oldest entries, and new ones behind: ``cat([state[n:], new])``."""
    if (
        not is_call(result, aten.cat.default)
        or not isinstance(result.args[0], list | tuple)
        or len(result.args[0]) != 2
    ):
        return False
    axis = _argument(result, 1, "dim", 0)
    kept = result.args[0][0]
    if (
        not isinstance(kept, Node)
        or not is_call(kept, aten.slice.Tensor)
        or kept.args[0] is not placeholder
        or not isinstance(axis, int)
    ):
        return False
    extent = shape(placeholder)[axis]
    end = _argument(kept, 3, "end", None)
    whole = end is None or (isinstance(end, int) and end >= extent)
    return (
        _argument(kept, 1, "dim", 0) == axis % len(shape(placeholder))
        and _argument(kept, 4, "step", 1) == 1
        and whole
    )


def _unmatched_partial_write(node: Node, question: MatchContext) -> WriteRefusal:
    base = node.args[0]
    assert isinstance(base, Node)
    return WriteRefusal(
        node,
        base,
        f"{str(node.target).split('.')[1]} writes a part of it in a way that no pattern follows",
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
"""Operators that change a part of a tensor in a way that an append does not."""


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
    """The recognised writes of one state, first to last; none where its whole value is computed anew.

    Attributes:
        writes: the writes.
        refusal: why the state is rewritten whole although only a part of it was written.
        is_window: the whole value is the state shifted by what is new.
        needs_rows: it would be recognised if the first axis counted rows.
    """

    writes: tuple[Write, ...] = ()
    refusal: WriteRefusal | None = None
    is_window: bool = False
    needs_rows: bool = False


def find_write_chain(
    placeholder: Node, result: Node, found: StateTensor, question: MatchContext
) -> WriteChain:
    """Follow a state's new value back to the state itself, one write at a time."""
    writes: list[Write] = []
    current = result
    while current is not placeholder:
        if is_call(current, aten.clone.default):  # the same value
            current = as_node(current.args[0])
            result = current if not writes else result
            continue
        step = match_write(current, question)
        if step is None:
            partial = next(
                (write for write in writes if _depends_on(write.base, placeholder)), None
            )
            if (
                partial is None
                and (turned := _transposed_write(current, question)) is not None
                and _depends_on(turned.base, placeholder)
            ):
                because = "a part is written through a transposed view, where an update writes along an axis as it lies in memory"
                return WriteChain(refusal=WriteRefusal(turned.node, turned.base, because))
            if partial is None:
                return WriteChain(is_window=is_rolling_window(result, placeholder))
            because = (
                f"what {partial.pattern} writes into is not the state itself but computed from it"
            )
            return WriteChain(refusal=WriteRefusal(partial.node, partial.base, because))
        if isinstance(step, WriteRefusal):
            return WriteChain(refusal=step) if _depends_on(step.base, placeholder) else WriteChain()
        if (misfit := _why_no_update(step, found, question.rows)) is not None:
            return WriteChain(
                refusal=WriteRefusal(step.node, step.base, misfit),
                needs_rows=step.per_row and question.rows == 1,
            )
        writes.append(step)
        current = step.base
    return WriteChain(tuple(reversed(writes)))


def find_write_chains(
    states: Sequence[StateTensor], outputs: int, question: MatchContext
) -> list[WriteChain]:
    """The chain of each state of a functional graph, which returns its outputs and then the states' new values."""
    graph = question.module.graph
    placeholders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    returned = graph.output_node().args[0]
    assert isinstance(returned, tuple)
    return [
        find_write_chain(placeholders[state.name], as_node(result), state, question)
        for state, result in zip(states, returned[outputs:], strict=True)
    ]


def _transposed_write(node: Node, question: MatchContext) -> Write | WriteRefusal | None:
    """The write whose result this is, with its axes in another order."""
    source = node
    while is_call(source, aten.permute.default, aten.transpose.int, aten.t.default):
        source = as_node(source.args[0])
    return None if source is node else match_write(source, question)


def _depends_on(node: Node, placeholder: Node) -> bool:
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if current is placeholder:
            return True
        pending.extend(source for source in current.all_input_nodes if source not in seen)
        seen.update(current.all_input_nodes)
    return False


def _why_no_update(write: Write, found: StateTensor, rows: int) -> str | None:
    """Why an update cannot say this write, although a pattern recognised it."""
    if found.dynamic_axes - {write.axis}:
        return f"{write.pattern} into a tensor of which another extent varies than the one that is written along"
    if write.per_row and rows == 1:
        return f"{write.pattern} at a position of its own for each entry of the first axis, which is not the axis of rows"
    if write.axis == 0 and found.has_slot_axis(rows) and not covers_axis(write, found):
        return f"{write.pattern} along the first axis, which counts rows"
    return None


def covers_axis(write: Write, found: StateTensor) -> bool:
    """Whether a write covers its axis from end to end."""
    return (
        write.axis not in found.dynamic_axes
        and isinstance(write.start, int)
        and write.start == 0
        and isinstance(write.count, int)
        and write.count == found.initial.shape[write.axis]
    )
