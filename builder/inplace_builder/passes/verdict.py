"""What became of each state of a rewritten module, and why: the words that a builder prints and a manifest keeps."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from inplace.specs import Update
from torch.fx import Node

from inplace_builder.passes.chain import Chain, is_whole
from inplace_builder.passes.recognise_attention import Attention, Explicit
from inplace_builder.passes.state_uses import source_line
from inplace_builder.passes.states import Found, State

aten = torch.ops.aten


def verdict(found: Found, chain: Chain, attended: Sequence[Attention | Explicit], rows: int) -> State:
    """What is said of a state.

    Args:
        found: the state.
        chain: the recognised writes of its new value.
        attended: the attentions of the whole module, rewritten or left explicit.
        rows: rows of a step.
    """
    return _with_attention(_of_updates(found, chain, rows), chain, attended)


def _of_updates(found: Found, chain: Chain, rows: int) -> State:
    leading = found.leading(rows)
    plain = State(found, leading, "replace", "the module computes its whole value anew in each step", ("update",), Update.REPLACE, None)
    if chain.refused is not None:
        refused = chain.refused
        because = f"read, computed and written back whole: {refused.because}{source_line(refused.node)}"
        return replace(plain, pattern="explicit", because=because)
    if chain.window:
        because = "a window that drops its oldest entries: moved as the module moves it, for a ring would change the order that others see"
        return replace(plain, pattern="window", because=because)
    if not chain.writes and found.through:
        return replace(plain, pattern="explicit", because=f"read, computed and written back whole: {found.through}")
    if not chain.writes:
        return plain
    patterns = tuple(dict.fromkeys(write.pattern for write in chain.writes))
    part = any(isinstance(write.value, Node) and _scatters(write.value) for write in chain.writes)
    what = "the outermost part that the module writes into is written" if part else "only what the module writes is written"
    because = f"{what}: {', '.join(patterns)}{source_line(chain.writes[0].node)}"
    axes = {write.axis - leading for write in chain.writes}
    if len(axes) > 1 or any(is_whole(write, found) for write in chain.writes):
        return replace(plain, pattern=" + ".join(patterns), because=because, operators=("update",) * len(chain.writes))
    return State(found, leading, " + ".join(patterns), because, ("update",) * len(chain.writes), Update.APPEND, axes.pop())


def _with_attention(state: State, chain: Chain, attended: Sequence[Attention | Explicit]) -> State:
    nodes = {write.node for write in chain.writes}
    for found in attended:
        if isinstance(found, Attention) and nodes & {found.keys.node, found.values.node}:
            because = f"{state.because}; the attention behind it is causal{f' in a window of {found.window}' if found.window else ''}"
            return replace(state, because=because, operators=("attention",))
        if isinstance(found, Explicit) and nodes & set(found.versions):
            return replace(state, because=f"{state.because}; the attention behind it stays explicit: {found.because}")
    return state


def _scatters(node: Node) -> bool:
    """Whether a written value is itself an old part with something written into it."""
    return node.target in (aten.slice_scatter.default, aten.select_scatter.default, aten.index_put.default, aten.index_copy.default)
