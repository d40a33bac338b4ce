"""What a mask lets each token see, proved by evaluating it for every position."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from inplace_builder.passes.emit import shape, value
from inplace_builder.passes.match import call
from inplace_builder.passes.positions import consecutive, evaluate, example, first_only, leaves, shifted
from inplace_builder.passes.spelled_attention import Spelled
from inplace_builder.passes.tokenwise import follow_tokens

aten = torch.ops.aten

MOST_MASK_ELEMENTS = 2**28
"""Elements of all masks that are evaluated for one proof; 16384 positions."""

BLOCK = 256
"""Positions for which a mask is evaluated at a time."""


class UnprovableError(Exception):
    """Not an error of the build: the reason why an attention stays explicit."""


@dataclass(frozen=True)
class Start:
    """Where a step begins.

    Attributes:
        source: the input or state whose (first) value it is, or None for a number.
        offset: what is added to it.
    """

    source: Node | None
    offset: int


def require(holds: bool, because: str) -> None:
    """UnprovableError with this reason unless it holds."""
    if not holds:
        raise UnprovableError(because)


def first_position(module: GraphModule, node: Node, source: Node, tokens: Any) -> int:
    """What a start adds to its source."""
    first = evaluate(module, node, {source: example(source, 0)}, {str(tokens): 4})
    return int(first.reshape(-1)[0]) if isinstance(first, Tensor) else int(first)


def depends_on_first(module: GraphModule, node: Node, source: Node, tokens: Any, promised: frozenset[str]) -> bool:
    """Whether a node depends on the first entry of a source alone; others of a promised one follow from it."""
    held = value(source)
    if source.name in promised and isinstance(held, Tensor) and held.dim() == 1:
        return True
    try:
        return first_only(module, node, source, {str(tokens): 4})
    except (IndexError, RuntimeError):  # another entry is an index of something
        return False


def window_of(module: GraphModule, one: Spelled, start: Start, tokens: Any, capacity: int, promised: frozenset[str]) -> int:
    """The window of a causal attention, 0 where it sees all positions up to its own.

    Raises:
        UnprovableError: it sees something else, or it is not proved what it sees.
    """
    return _window(*_visible(module, one, start, tokens, capacity, promised), capacity)


def _visible(
    module: GraphModule, one: Spelled, start: Start, tokens: Any, capacity: int, promised: frozenset[str]
) -> tuple[Callable[[int], Tensor], list[int]]:
    """What tokens may see, ``[tokens, capacity]``, by the position of the first of them; and the positions to ask for."""
    starts = list(range(capacity - tokens + 1)) if isinstance(tokens, int) else list(range(0, capacity, BLOCK))
    if start.source is None:
        starts = [start.offset]
    if one.mask is None:
        require(isinstance(tokens, int), "it has no mask and a dynamic number of tokens")
        everything = torch.ones(tokens, capacity, dtype=torch.bool)
        fixed = everything.tril() if one.causal else everything
        return lambda first: fixed, starts
    require(not one.causal, "it has a mask and is causal")
    mask = one.mask
    if not isinstance(tokens, int):
        given = _by_position(module, one, start, tokens, promised)
    else:
        found = leaves(mask)
        require(found is not None and found <= {start.source}, "its mask depends on more than the position it writes at")
        if found and start.source is not None:
            first = depends_on_first(module, mask, start.source, tokens, promised)
            require(first, "its mask depends on more than the first of several numbers")
        given = _by_start(start, tokens)
    require(capacity * capacity * (tokens if isinstance(tokens, int) else 1) <= MOST_MASK_ELEMENTS, "its mask is too large to be proved")

    def visible(first: int) -> Tensor:
        count = tokens if isinstance(tokens, int) else min(BLOCK, capacity - first)
        held = evaluate(module, mask, given(first, count), {str(tokens): count})
        if held.is_floating_point():
            hidden = held <= torch.finfo(held.dtype).min
            require(bool(((held == 0) | hidden).all()), "its mask is a bias")
            held = ~hidden
        require(held.dtype == torch.bool, "its mask is neither boolean nor floating point")
        spread = torch.broadcast_to(held, (*held.shape[:-2], count, capacity)).reshape(-1, count, capacity)
        require(bool((spread == spread[:1]).all()), "its mask differs between heads")
        return ~spread[0] if one.hides else spread[0]

    return visible, starts


def _by_start(start: Start, tokens: int) -> Callable[[int, int], dict[Node, Any]]:
    """The mask's source for a step at this position."""
    source = start.source
    return lambda first, count: {} if source is None else {source: example(source, first - start.offset)}


def _by_position(
    module: GraphModule, one: Spelled, start: Start, tokens: Any, promised: frozenset[str]
) -> Callable[[int, int], dict[Node, Any]]:
    """The positions that a mask is made of, where it says for each token alone, by its position alone, what that token sees.

    Then evaluating it on every position once proves it for every start and every number of tokens.
    """
    mask, source = one.mask, start.source
    assert mask is not None
    require(source is not None, "it is written at a fixed place and has a dynamic number of tokens")
    assert source is not None
    seeds, others = positions_of(module, [mask], source, tokens, promised, {})
    require(not others, "its mask depends on more than the position it writes at")
    axes = follow_tokens(module.graph, [mask], tokens, dict.fromkeys(seeds, 0))
    require(axes.axes.get(mask) == len(shape(mask)) - 2, "its mask has no row for each token")
    return lambda first, count: {seed: torch.arange(first, first + count) + shift - start.offset for seed, shift in seeds.items()}


def positions_of(
    module: GraphModule, results: Iterable[Node], source: Node, tokens: Any, promised: frozenset[str], inside: Mapping[Node, Sequence[Node]]
) -> tuple[dict[Node, int], set[Node]]:
    """The tensors ``[tokens]`` of consecutive positions through which nodes depend on the source of positions.

    Args:
        module: the functional graph.
        results: the nodes.
        source: what the positions of a step start from.
        tokens: how many there are.
        promised: inputs that are consecutive positions.
        inside: for some nodes, which operands to look at.

    Returns:
        Each with what it adds to the source, and the placeholders (the source among them) on which the nodes depend in another way.
    """
    pending, seen = list(results), set[Node]()
    found, others = dict[Node, int](), set[Node]()
    while pending:
        node = pending.pop()
        if node in seen or call(node, aten.sym_size.int):
            continue
        seen.add(node)
        if _counts_from(module, node, source, tokens, promised):
            found[node] = first_position(module, node, source, tokens)
        elif node.op == "placeholder":
            others.add(node)
        else:
            pending.extend(inside.get(node, node.all_input_nodes))
    return found, others


def _counts_from(module: GraphModule, node: Node, source: Node, tokens: Any, promised: frozenset[str]) -> bool:
    held = value(node)
    if not isinstance(held, Tensor) or held.dtype not in (torch.int32, torch.int64) or [str(e) for e in held.shape] != [str(tokens)]:
        return False
    if shifted(node) is not source or not consecutive(module, node, promised):
        return False
    return node is source or not isinstance(tokens, int) or first_only(module, node, source, {})


def _window(visible: Callable[[int], Tensor], starts: list[int], capacity: int) -> int:
    """0 for causal attention, else the window; every position is looked at."""
    last = visible(starts[-1])
    widest = int(last[-1].sum())
    window = 0 if widest == starts[-1] + len(last) else widest
    columns = torch.arange(capacity)
    for start in starts:
        found = visible(start)
        rows = torch.arange(start, start + len(found)).unsqueeze(1)
        wanted = (columns <= rows) & (columns > rows - (window or capacity))
        if not torch.equal(found, wanted):
            raise UnprovableError(f"its mask is neither causal nor a sliding window where the step starts at {start}")
    return window
