"""Attention over a cache, where it provably is `inplace::attention`.

Three steps. `match_attention` matches attention as models write it. The mask is then evaluated for
every position a token can have: it must be causal, or a sliding window. And the way from cached to
attended heads is evaluated on distinct numbers. Nothing is concluded from how a model computes its
mask.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from inplace_builder.graph.nodes import CASTS, AnyNode, as_node, dtype, is_call, shape, value
from inplace_builder.graph.tokens import MixesTokensError, propagate_token_axes
from inplace_builder.states.attention_pattern import AttentionPattern, match_attention
from inplace_builder.states.indices import (
    UnknownExtentError,
    depends_on_first_entry,
    evaluate,
    example_positions,
    is_consecutive,
    shifted_source,
    source_placeholders,
)
from inplace_builder.states.lift import StateTensor
from inplace_builder.states.writes import MatchContext, Write, WriteChain

aten = torch.ops.aten


MAX_MASK_ELEMENTS = 2**28
"""Elements of all masks that are evaluated for one proof: enough for 16384 positions."""


MASK_BLOCK = 256
"""Positions for which a mask is evaluated at a time."""


class UnprovableError(Exception):
    """The reason why an attention stays explicit; the build goes on."""


def require(holds: bool, reason: str) -> None:
    """UnprovableError with this reason unless the condition holds."""
    if not holds:
        raise UnprovableError(reason)


@dataclass(frozen=True)
class StartPosition:
    """The position of a step's first token: the first entry of ``source`` plus ``offset``.

    Attributes:
        source: an input or a state; None for a constant position.
        offset: what is added.
    """

    source: Node | None
    offset: int


def start_offset(module: GraphModule, node: Node, source: Node, num_tokens: Any) -> int:
    """How much more a node's first entry is than that of its source."""
    first = evaluate(module, node, {source: example_positions(source, 0)}, {str(num_tokens): 4})
    return int(first.reshape(-1)[0]) if isinstance(first, Tensor) else int(first)


def follows_from_first_entry(
    context: MatchContext, node: Node, source: Node, num_tokens: Any
) -> bool:
    """Whether the first entry of a source determines a node.

    It does if the node depends on no other entry, or if the others are known to follow.
    """
    example = value(source)
    assumed = source.name in context.assume_consecutive
    if assumed and isinstance(example, Tensor) and example.dim() == 1:
        return True
    try:
        return depends_on_first_entry(context.module, node, source, {str(num_tokens): 4})
    except (IndexError, RuntimeError):  # another entry is used as an index
        return False


def _start_position(context: MatchContext, write: Write, num_tokens: Any) -> StartPosition:
    """Where a write starts."""
    if isinstance(write.start, int):
        return StartPosition(None, write.start)
    source = shifted_source(write.start)
    if source is None:
        raise UnprovableError("it writes at more than a position plus a constant")
    require(
        follows_from_first_entry(context, write.start, source, num_tokens),
        "where it writes depends on more than the first of several numbers",
    )
    return StartPosition(source, start_offset(context.module, write.start, source, num_tokens))


Visibility = Callable[[int], Tensor]
"""From the position of a step's first token to what its tokens see, bool ``[tokens, capacity]``."""


def _prove_window(
    context: MatchContext,
    pattern: AttentionPattern,
    start: StartPosition,
    num_tokens: Any,
    capacity: int,
) -> int:
    """The window of a causal attention; 0 if each token sees all positions up to its own.

    Raises:
        UnprovableError: it sees something else, or what it sees cannot be proved.
    """
    if start.source is None:
        starts = [start.offset]
    elif isinstance(num_tokens, int):
        starts = list(range(capacity - num_tokens + 1))
    else:
        starts = list(range(0, capacity, MASK_BLOCK))
    visible = _visibility(context, pattern, start, num_tokens, capacity)
    last = visible(starts[-1])
    widest = int(last[-1].sum())
    window = 0 if widest == starts[-1] + len(last) else widest
    columns = torch.arange(capacity)
    for first in starts:
        seen = visible(first)
        rows = torch.arange(first, first + len(seen)).unsqueeze(1)
        expected = (columns <= rows) & (columns > rows - (window or capacity))
        if not torch.equal(seen, expected):
            raise UnprovableError(
                f"its mask is neither causal nor a sliding window if the step starts at {first}"
            )
    return window


def _visibility(
    context: MatchContext,
    pattern: AttentionPattern,
    start: StartPosition,
    num_tokens: Any,
    capacity: int,
) -> Visibility:
    """What the tokens of a step see, from an attention's mask."""
    mask = pattern.mask
    static = isinstance(num_tokens, int)
    if mask is None:
        require(static, "it has no mask and a dynamic number of tokens")
        everything = torch.ones(num_tokens, capacity, dtype=torch.bool)
        fixed = everything.tril() if pattern.causal else everything
        return lambda first: fixed
    require(not pattern.causal, "it has a mask and is causal")
    inputs = (
        _mask_inputs_by_start(context, mask, start, num_tokens)
        if static
        else _mask_inputs_by_position(context, mask, start, num_tokens)
    )
    require(
        capacity * capacity * (num_tokens if static else 1) <= MAX_MASK_ELEMENTS,
        "its mask is too large to be proved",
    )

    def visible(first: int) -> Tensor:
        count = num_tokens if static else min(MASK_BLOCK, capacity - first)
        seen = evaluate(context.module, mask, inputs(first, count), {str(num_tokens): count})
        if seen.is_floating_point():
            hidden = seen <= torch.finfo(seen.dtype).min
            require(bool(((seen == 0) | hidden).all()), "its mask is a bias")
            seen = ~hidden
        require(seen.dtype == torch.bool, "its mask is neither boolean nor floating point")
        by_head = torch.broadcast_to(seen, (*seen.shape[:-2], count, capacity)).reshape(
            -1, count, capacity
        )
        require(bool((by_head == by_head[:1]).all()), "its mask differs between heads")
        return ~by_head[0] if pattern.mask_hides else by_head[0]

    return visible


MaskInputs = Callable[[int, int], dict[Node, Any]]
"""From the first position and the number of tokens to values of what a mask is computed from."""


def _mask_inputs_by_start(
    context: MatchContext, mask: Node, start: StartPosition, num_tokens: int
) -> MaskInputs:
    """The inputs of a mask for a fixed number of tokens: the source of its start position."""
    sources, source = source_placeholders(mask), start.source
    require(
        sources is not None and sources <= {source},
        "its mask depends on more than the position it writes at",
    )
    if source is None:
        return lambda first, count: {}
    if sources:
        require(
            follows_from_first_entry(context, mask, source, num_tokens),
            "its mask depends on more than the first of several numbers",
        )
    return lambda first, count: {source: example_positions(source, first - start.offset)}


def _mask_inputs_by_position(
    context: MatchContext, mask: Node, start: StartPosition, num_tokens: Any
) -> MaskInputs:
    """The inputs of a mask for any number of tokens: the positions of the tokens.

    It is required that each token's row of the mask depends on that token's position alone. Then
    evaluating it on every position once proves it for every start and every number of tokens.
    """
    source = start.source
    if source is None:
        raise UnprovableError("it is written at a fixed place and has a dynamic number of tokens")
    positions, others = find_position_tensors(context, [mask], source, num_tokens, {})
    require(not others, "its mask depends on more than the position it writes at")
    axes = propagate_token_axes(
        context.module.graph, [mask], num_tokens, dict.fromkeys(positions, 0)
    )
    require(axes.axis_of.get(mask) == len(shape(mask)) - 2, "its mask has no row for each token")
    return lambda first, count: {
        node: torch.arange(first, first + count) + shift - start.offset
        for node, shift in positions.items()
    }


def find_position_tensors(
    context: MatchContext,
    results: Iterable[Node],
    source: Node,
    num_tokens: Any,
    followed_operands: Mapping[Node, Sequence[Node]],
) -> tuple[dict[Node, int], set[Node]]:
    """The tensors ``[tokens]`` of consecutive positions through which nodes depend on a source.

    Args:
        context: the functional graph, and what is known of it.
        results: the nodes.
        source: what the positions of a step start from.
        num_tokens: tokens of a step.
        followed_operands: the operands to follow of nodes of which not all are.

    Returns:
        Each tensor with what it adds to the source; and the placeholders (the source may be one)
        on which the nodes depend in another way.
    """
    pending, seen = list(results), set[Node]()
    positions, others = dict[Node, int](), set[Node]()
    while pending:
        node = pending.pop()
        if node in seen or is_call(node, aten.sym_size.int):
            continue
        seen.add(node)
        if _is_position_tensor(context, node, source, num_tokens):
            positions[node] = start_offset(context.module, node, source, num_tokens)
        elif node.op == "placeholder":
            others.add(node)
        else:
            pending.extend(followed_operands.get(node, node.all_input_nodes))
    return positions, others


def _is_position_tensor(context: MatchContext, node: Node, source: Node, num_tokens: Any) -> bool:
    tensor = value(node)
    if (
        not isinstance(tensor, Tensor)
        or tensor.dtype not in (torch.int32, torch.int64)
        or [str(extent) for extent in tensor.shape] != [str(num_tokens)]
    ):
        return False
    if shifted_source(node) is not source or not is_consecutive(
        context.module, node, context.assume_consecutive
    ):
        return False
    return (
        node is source
        or not isinstance(num_tokens, int)
        or depends_on_first_entry(context.module, node, source, {})
    )


@dataclass(frozen=True)
class AttentionMatch:
    """An attention that is proved to be `inplace::attention`.

    Attributes:
        node: its result.
        inner_nodes: the other nodes that it consists of, and those between the caches and it, last
            first.
        query: ``[1, heads, tokens, dim]``.
        keys, values: this step's writes into the two caches ``[1, kv_heads, capacity, dim]``.
        start: the position of the step's first token.
        scale: factor of the scores.
        window: how many positions up to its own a token sees; 0 for all.
        softcap: soft-cap of the scores; 0 for none.
        sinks: a score of each head that has no value, ``[1, heads, 1, 1]`` or reshaped so; None if
            there are none.
    """

    node: Node
    inner_nodes: tuple[Node, ...]
    query: Node
    keys: Write
    values: Write
    start: StartPosition
    scale: float
    window: int
    softcap: float
    sinks: Node | None


@dataclass(frozen=True)
class UnfusedAttention:
    """An attention over caches that stays explicit.

    Attributes:
        node: its result.
        versions: the versions of the caches that it reads.
        reason: why, in words.
    """

    node: Node
    versions: tuple[Node, ...]
    reason: str


def match_cache_attentions(
    context: MatchContext, states: Sequence[StateTensor], chains: Sequence[WriteChain]
) -> list[AttentionMatch | UnfusedAttention]:
    """Every attention of a graph of one row over two states that a step appends to once.

    Args:
        context: the functional graph, and what is known of it.
        states, chains: the states and their writes.
    """
    appended = {
        chain.writes[0].node: chain.writes[0]
        for state, chain in zip(states, chains, strict=True)
        if len(chain.writes) == 1 and _appends_to_cache(chain.writes[0], state)
    }
    if not appended:
        return []
    attentions: list[AttentionMatch | UnfusedAttention] = []
    windows: dict[Any, int] = {}
    for node in context.module.graph.nodes:
        pattern = match_attention(node)
        if pattern is None:
            continue
        keys, key_views = _find_cache(pattern.keys, appended)
        values, value_views = _find_cache(pattern.values, appended)
        if keys is None or values is None:
            continue
        inner = (*pattern.inner_nodes, *key_views, *value_views)
        try:
            attentions.append(
                _prove_attention(context, pattern, appended[keys], appended[values], inner, windows)
            )
        except (UnprovableError, MixesTokensError, UnknownExtentError) as reason:
            attentions.append(UnfusedAttention(node, (keys, values), str(reason)))
    return attentions


def _appends_to_cache(write: Write, state: StateTensor) -> bool:
    """Whether a write appends to a cache ``[1, kv_heads, capacity, dim]``."""
    return (
        state.has_slot_axis(1)
        and len(state.slot_shape(1)) == 3
        and write.axis == 2
        and not write.skips_out_of_range
        and not write.per_row
        and isinstance(value(write.node), Tensor)
    )


_HEAD_VIEWS = (
    aten.unsqueeze.default,
    aten.expand.default,
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.slice.Tensor,
    aten.repeat_interleave.self_int,
    aten.alias.default,
)
"""Operators that may stand between a cache and the keys or values of an attention."""


def _find_cache(
    operand: AnyNode, appended: Mapping[Node, Write]
) -> tuple[Node | None, tuple[Node, ...]]:
    """The version of a cache that an operand is made of, and the nodes between, last first."""
    views: list[Node] = []
    while isinstance(operand, Node) and operand not in appended:
        if not is_call(operand, *_HEAD_VIEWS):
            return None, ()
        views.append(operand)
        operand = operand.args[0]
    return (operand, tuple(views)) if isinstance(operand, Node) else (None, ())


def _prove_attention(
    context: MatchContext,
    pattern: AttentionPattern,
    keys: Write,
    values: Write,
    inner_nodes: tuple[Node, ...],
    windows: dict[Any, int],
) -> AttentionMatch:
    """Prove that an attention is `inplace::attention`.

    Args:
        context: the functional graph, and what is known of it.
        pattern: the attention.
        keys, values: this step's writes into its caches.
        inner_nodes: as `AttentionMatch` has them.
        windows: windows proved so far: layers share their mask.

    Raises:
        UnprovableError, MixesTokensError, UnknownExtentError: it is not, or that is not proved.
    """
    _check_operands(pattern, keys, values)
    num_tokens, capacity = shape(pattern.query)[2], shape(keys.node)[2]
    for write, operand in ((keys, pattern.keys), (values, pattern.values)):
        require(
            _has_no_other_user(write.node, inner_nodes, pattern.node),
            f"the written {write.node.name} is used beside the attention",
        )
        require(
            _repeats_heads(context.module, write.node, operand, pattern),
            "its heads are not those cached",
        )
    start = _start_position(context, keys, num_tokens)
    require(
        start == _start_position(context, values, num_tokens),
        "keys and values are written at different positions",
    )
    key = (pattern.mask, pattern.causal, pattern.mask_hides, start, str(num_tokens), capacity)
    if key not in windows:
        windows[key] = _prove_window(context, pattern, start, num_tokens, capacity)
    if pattern.scale is None:
        raise UnprovableError("its scale is computed")
    return AttentionMatch(
        pattern.node,
        inner_nodes,
        pattern.query,
        keys,
        values,
        start,
        pattern.scale,
        windows[key],
        pattern.softcap,
        None if pattern.sinks is None else _sinks_of_heads(pattern.sinks, shape(pattern.query)[1]),
    )


def _sinks_of_heads(sinks: Node, heads: int) -> Node:
    """The constant scores ``[1, heads, 1, 1]`` that sinks ``[1, heads, tokens, 1]`` repeat.

    Raises:
        UnprovableError: they are not constant, or not one for each head.
    """
    source = sinks
    while is_call(source, aten.expand.default, *CASTS):
        source = as_node(source.args[0])
    require(source_placeholders(source) == set(), "its sinks are computed from inputs or states")
    extents = (1, 1, 1, 1, *shape(source))[-4:]
    require(extents == (1, heads, 1, 1), "its sinks are not one for each head")
    return source


def _check_operands(pattern: AttentionPattern, keys: Write, values: Write) -> None:
    """UnprovableError unless shapes and types are those of `inplace::attention`."""
    query = pattern.query
    require(len(shape(query)) == 4, "its query is not [1, heads, tokens, dim]")
    require(keys.node is not values.node, "keys and values are one cache")
    require(shape(query)[0] == 1, "its query has several rows")
    require(
        isinstance(shape(keys.node)[2], int),
        "the length of its caches varies, so its mask cannot be evaluated for every position",
    )
    require(pattern.dropout == 0.0, "it drops out")
    require(
        str(keys.count) == str(values.count) == str(shape(query)[2]),
        "it has another number of queries than of new keys and values",
    )
    require(
        dtype(query) == dtype(keys.node) == dtype(values.node),
        "its query has another type than the caches",
    )
    require(
        shape(keys.node)[1:3] == shape(values.node)[1:3],
        "keys and values have other heads or capacities",
    )


def _has_no_other_user(version: Node, inner_nodes: tuple[Node, ...], node: Node) -> bool:
    """Whether only an attention uses a cache's version and the nodes between."""
    inside = {*inner_nodes, node}
    return all(user in inside or user.op == "output" for user in version.users) and all(
        user in inside for part in inner_nodes for user in part.users
    )


def _repeats_heads(
    module: GraphModule, version: Node, operand: Node, pattern: AttentionPattern
) -> bool:
    """Whether attended head h is cached head ``h // (heads / kv_heads)``.

    Evaluated on numbers that differ everywhere.
    """
    _, kv_heads, capacity, dim = shape(version)
    heads = shape(pattern.query)[1]
    cached = torch.arange(kv_heads * capacity * dim).reshape(1, kv_heads, capacity, dim)
    attended = evaluate(module, operand, {version: cached})
    group = heads // kv_heads
    expected = cached if pattern.grouped or group == 1 else cached.repeat_interleave(group, 1)
    return heads == group * kv_heads and torch.equal(attended, expected)
