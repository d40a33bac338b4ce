"""A state's new value as a chain of recognised writes into the state."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from inplace_builder.passes.match import as_node, call
from inplace_builder.passes.recognise import Question, Refusal, Write, is_window, recognise
from inplace_builder.passes.states import Found

aten = torch.ops.aten


@dataclass(frozen=True)
class Chain:
    """The recognised writes of one state, first to last; none where its whole value is computed anew.

    Attributes:
        writes: the writes.
        refused: why the state is rewritten whole although only a part of it was written.
        window: the whole value is the state shifted by what is new.
        needs_rows: it would be recognised if the first axis counted rows.
    """

    writes: tuple[Write, ...] = ()
    refused: Refusal | None = None
    window: bool = False
    needs_rows: bool = False


def chain_of(placeholder: Node, result: Node, found: Found, question: Question) -> Chain:
    """Follow a state's new value back to the state itself, one write at a time."""
    writes: list[Write] = []
    current = result
    while current is not placeholder:
        if call(current, aten.clone.default):  # the same value
            current = as_node(current.args[0])
            result = current if not writes else result
            continue
        step = recognise(current, question)
        if step is None:
            partial = next((write for write in writes if _reaches(write.base, placeholder)), None)
            if partial is None and (turned := _turned(current, question)) is not None and _reaches(turned.base, placeholder):
                because = "a part is written through a transposed view, where an update writes along an axis as it lies in memory"
                return Chain(refused=Refusal(turned.node, turned.base, because))
            if partial is None:
                return Chain(window=is_window(result, placeholder))
            because = f"what {partial.pattern} writes into is not the state itself but computed from it"
            return Chain(refused=Refusal(partial.node, partial.base, because))
        if isinstance(step, Refusal):
            return Chain(refused=step) if _reaches(step.base, placeholder) else Chain()
        if (misfit := _misfit(step, found, question.rows)) is not None:
            return Chain(refused=Refusal(step.node, step.base, misfit), needs_rows=step.per_row and question.rows == 1)
        writes.append(step)
        current = step.base
    return Chain(tuple(reversed(writes)))


def chains_of(states: Sequence[Found], outputs: int, question: Question) -> list[Chain]:
    """The chain of each state of a functional graph, which returns its outputs and then the states' new values."""
    graph = question.module.graph
    placeholders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    returned = graph.output_node().args[0]
    assert isinstance(returned, tuple)
    return [
        chain_of(placeholders[state.name], as_node(result), state, question)
        for state, result in zip(states, returned[outputs:], strict=True)
    ]


def _turned(node: Node, question: Question) -> Write | Refusal | None:
    """The write whose result this is, with its axes in another order."""
    source = node
    while call(source, aten.permute.default, aten.transpose.int, aten.t.default):
        source = as_node(source.args[0])
    return None if source is node else recognise(source, question)


def _reaches(node: Node, placeholder: Node) -> bool:
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if current is placeholder:
            return True
        pending.extend(source for source in current.all_input_nodes if source not in seen)
        seen.update(current.all_input_nodes)
    return False


def _misfit(write: Write, found: Found, rows: int) -> str | None:
    """Why an update cannot say this write, although a pattern recognised it."""
    if found.varies - {write.axis}:
        return f"{write.pattern} into a tensor of which another extent varies than the one that is written along"
    if write.per_row and rows == 1:
        return f"{write.pattern} at a position of its own for each entry of the first axis, which is not the axis of rows"
    if write.axis == 0 and found.leading(rows) and not is_whole(write, found):
        return f"{write.pattern} along the first axis, which counts rows"
    return None


def is_whole(write: Write, found: Found) -> bool:
    """Whether a write covers its axis from end to end."""
    return (
        write.axis not in found.varies
        and isinstance(write.start, int)
        and write.start == 0
        and isinstance(write.count, int)
        and write.count == found.initial.shape[write.axis]
    )
