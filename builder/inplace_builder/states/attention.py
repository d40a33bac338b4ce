"""Attention behind a cache, where it provably is `inplace::attention`.

Provably means: the mask is evaluated for every position that a token can have, and the way from cached heads to attended heads on
distinct numbers. Nothing is concluded from how a model happens to spell its mask.

Attention as models spell it: one operator, or softmax(QKᵀ + mask)V written out.

What a mask lets each token see, proved by evaluating it for every position.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from inplace_builder.graph.nodes import CASTS, AnyNode, as_node, dtype, is_call, shape, value
from inplace_builder.graph.tokens import MixesTokensError, propagate_token_axes
from inplace_builder.states.indices import (
    UnknownExtentError,
    depends_on_first_entry,
    evaluate,
    example_positions,
    is_consecutive,
    shifted_source,
    source_placeholders,
)
from inplace_builder.states.state import StateTensor
from inplace_builder.states.writes import Write, WriteChain

aten = torch.ops.aten


@dataclass(frozen=True)
class AttentionPattern:
    """One attention, not yet proved to be ours.

    Attributes:
        node: its result.
        inner_nodes: what else it is made of, last first.
        query, keys, values: operands; ``[batch, heads, tokens or positions, dim]``.
        mask: what is added to the scores or says what is seen; ``hides`` where it is True for what is not seen.
        causal: the operator's own causal mask.
        scale: factor of the scores; None where it is computed.
        softcap: of the scores, 0 for none (Gemma 2, arXiv:2408.00118).
        grouped: keys and values may have fewer heads.
        dropout: its probability.
    """

    node: Node
    inner_nodes: tuple[Node, ...]
    query: Node
    keys: Node
    values: Node
    mask: Node | None
    causal: bool
    scale: float | None
    softcap: float = 0.0
    grouped: bool = False
    dropout: Any = 0.0
    mask_hides: bool = False


def match_attention(node: Node) -> AttentionPattern | None:
    """The attention whose result a node is, or None."""
    if is_call(node, aten.scaled_dot_product_attention.default):
        return _match_sdpa(node)
    if is_call(node, aten.matmul.default):
        return _match_explicit(node)
    return None


def _match_sdpa(node: Node) -> AttentionPattern:
    named: dict[str, Any] = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False} | dict(
        node.kwargs
    )
    named |= dict(zip(("attn_mask", "dropout_p", "is_causal"), node.args[3:], strict=False))
    query, keys, values = (as_node(operand) for operand in node.args[:3])
    scale = named.get("scale")
    return AttentionPattern(
        node,
        (),
        query,
        keys,
        values,
        named["attn_mask"],
        bool(named["is_causal"]),
        1.0 / math.sqrt(shape(query)[-1])
        if scale is None
        else scale
        if isinstance(scale, float)
        else None,
        grouped=bool(named.get("enable_gqa", False)),
        dropout=named["dropout_p"],
    )


_TRANSPARENT = (*CASTS, aten.clone.default, aten.contiguous.default, aten.alias.default)
"""What may stand between the parts of a written out attention."""


def _match_explicit(node: Node) -> AttentionPattern | None:
    """``softmax(cap(Q Kᵀ · scale) + mask) V``; dropout that does nothing, casts and copies may stand between."""
    inside: list[Node] = []

    def through(current: AnyNode) -> AnyNode:
        while is_call(current, *_TRANSPARENT) or (
            is_call(current, aten.dropout.default) and current.args[2] is False
        ):
            inside.append(current)
            current = current.args[0]
        return current

    weights = through(node.args[0])
    if not is_call(weights, aten.softmax.int, aten._softmax.default) or weights.args[1] not in (
        -1,
        len(shape(weights)) - 1,
    ):
        return None
    inside.append(weights)
    scores, mask, hides = _split_mask(through(weights.args[0]), inside)
    factor, steps = 1.0, []
    while is_call(
        scores := through(scores),
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.tanh.default,
        aten.mul.Scalar,
        aten.div.Scalar,
    ):
        inside.append(scores)
        if len(scores.args) > 1 and not isinstance(scores.args[1], int | float):
            return None
        steps.append(scores)
        scores = scores.args[0]
    softcap = 0.0
    for step in reversed(steps):
        if is_call(step, aten.tanh.default):
            if softcap:
                return None
            softcap, before, factor = math.nan, factor, 1.0
        else:
            by = step.args[1]
            factor = factor * by if is_call(step, aten.mul.Tensor, aten.mul.Scalar) else factor / by
    if softcap:
        softcap, factor = factor, before * factor
    if not is_call(scores, aten.matmul.default):
        return None
    inside.append(scores)
    query, turned = scores.args
    if (
        not is_call(turned, aten.transpose.int)
        or {place % 4 for place in turned.args[1:]} != {2, 3}
        or len(shape(turned)) != 4
    ):
        return None
    inside.append(turned)
    return AttentionPattern(
        node,
        tuple(inside),
        query,
        as_node(turned.args[0]),
        as_node(node.args[1]),
        mask,
        False,
        factor,
        softcap=softcap,
        mask_hides=hides,
    )


def _split_mask(scores: AnyNode, inside: list[Node]) -> tuple[AnyNode, Node | None, bool]:
    """The scores before their mask, the mask, and whether it is True for what is hidden."""
    if is_call(scores, aten.add.Tensor) and isinstance(scores.args[1], Node) and not scores.kwargs:
        inside.append(scores)
        one, other = scores.args
        behind = _is_scores(one)
        return (one, other, False) if behind else (other, one, False)
    if is_call(scores, aten.masked_fill.Scalar) and scores.args[2] <= _lowest(scores):
        inside.append(scores)
        return scores.args[0], scores.args[1], True
    if is_call(scores, aten.where.ScalarOther) and scores.args[2] <= _lowest(scores):
        inside.append(scores)
        return scores.args[1], scores.args[0], False
    return scores, None, False


def _lowest(scores: Node) -> float:
    return float(torch.finfo(scores.meta["val"].dtype).min)


def _is_scores(node: AnyNode) -> bool:
    while is_call(node, *_TRANSPARENT, aten.mul.Tensor, aten.div.Tensor, aten.tanh.default):
        node = node.args[0]
    return is_call(node, aten.matmul.default)


MAX_MASK_ELEMENTS = 2**28
"""Elements of all masks that are evaluated for one proof; 16384 positions."""


MASK_BLOCK = 256
"""Positions for which a mask is evaluated at a time."""


class UnprovableError(Exception):
    """Not an error of the build: the reason why an attention stays explicit."""


@dataclass(frozen=True)
class StartPosition:
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


def start_offset(module: GraphModule, node: Node, source: Node, tokens: Any) -> int:
    """What a start adds to its source."""
    first = evaluate(module, node, {source: example_positions(source, 0)}, {str(tokens): 4})
    return int(first.reshape(-1)[0]) if isinstance(first, Tensor) else int(first)


def follows_from_first_entry(
    module: GraphModule, node: Node, source: Node, tokens: Any, assume_consecutive: frozenset[str]
) -> bool:
    """Whether a node depends on the first entry of a source alone; others of a assume_consecutive one follow from it."""
    held = value(source)
    if source.name in assume_consecutive and isinstance(held, Tensor) and held.dim() == 1:
        return True
    try:
        return depends_on_first_entry(module, node, source, {str(tokens): 4})
    except (IndexError, RuntimeError):  # another entry is an index of something
        return False


def prove_window(
    module: GraphModule,
    one: AttentionPattern,
    start: StartPosition,
    tokens: Any,
    capacity: int,
    assume_consecutive: frozenset[str],
) -> int:
    """The window of a causal attention, 0 where it sees all positions up to its own.

    Raises:
        UnprovableError: it sees something else, or it is not proved what it sees.
    """
    return _window_of(
        *_visibility(module, one, start, tokens, capacity, assume_consecutive), capacity
    )


def _visibility(
    module: GraphModule,
    one: AttentionPattern,
    start: StartPosition,
    tokens: Any,
    capacity: int,
    assume_consecutive: frozenset[str],
) -> tuple[Callable[[int], Tensor], list[int]]:
    """What tokens may see, ``[tokens, capacity]``, by the position of the first of them; and the positions to ask for."""
    starts = (
        list(range(capacity - tokens + 1))
        if isinstance(tokens, int)
        else list(range(0, capacity, MASK_BLOCK))
    )
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
        given = _mask_inputs_by_position(module, one, start, tokens, assume_consecutive)
    else:
        found = source_placeholders(mask)
        require(
            found is not None and found <= {start.source},
            "its mask depends on more than the position it writes at",
        )
        if found and start.source is not None:
            first = follows_from_first_entry(module, mask, start.source, tokens, assume_consecutive)
            require(first, "its mask depends on more than the first of several numbers")
        given = _mask_inputs_by_start(start, tokens)
    require(
        capacity * capacity * (tokens if isinstance(tokens, int) else 1) <= MAX_MASK_ELEMENTS,
        "its mask is too large to be proved",
    )

    def visible(first: int) -> Tensor:
        count = tokens if isinstance(tokens, int) else min(MASK_BLOCK, capacity - first)
        held = evaluate(module, mask, given(first, count), {str(tokens): count})
        if held.is_floating_point():
            hidden = held <= torch.finfo(held.dtype).min
            require(bool(((held == 0) | hidden).all()), "its mask is a bias")
            held = ~hidden
        require(held.dtype == torch.bool, "its mask is neither boolean nor floating point")
        spread = torch.broadcast_to(held, (*held.shape[:-2], count, capacity)).reshape(
            -1, count, capacity
        )
        require(bool((spread == spread[:1]).all()), "its mask differs between heads")
        return ~spread[0] if one.mask_hides else spread[0]

    return visible, starts


def _mask_inputs_by_start(
    start: StartPosition, tokens: int
) -> Callable[[int, int], dict[Node, Any]]:
    """The mask's source for a step at this position."""
    source = start.source
    return lambda first, count: (
        {} if source is None else {source: example_positions(source, first - start.offset)}
    )


def _mask_inputs_by_position(
    module: GraphModule,
    one: AttentionPattern,
    start: StartPosition,
    tokens: Any,
    assume_consecutive: frozenset[str],
) -> Callable[[int, int], dict[Node, Any]]:
    """The positions that a mask is made of, where it says for each token alone, by its position alone, what that token sees.

    Then evaluating it on every position once proves it for every start and every number of tokens.
    """
    mask, source = one.mask, start.source
    assert mask is not None
    require(source is not None, "it is written at a fixed place and has a dynamic number of tokens")
    assert source is not None
    seeds, others = find_position_tensors(module, [mask], source, tokens, assume_consecutive, {})
    require(not others, "its mask depends on more than the position it writes at")
    axes = propagate_token_axes(module.graph, [mask], tokens, dict.fromkeys(seeds, 0))
    require(axes.axis_of.get(mask) == len(shape(mask)) - 2, "its mask has no row for each token")
    return lambda first, count: {
        seed: torch.arange(first, first + count) + shift - start.offset
        for seed, shift in seeds.items()
    }


def find_position_tensors(
    module: GraphModule,
    results: Iterable[Node],
    source: Node,
    tokens: Any,
    assume_consecutive: frozenset[str],
    inside: Mapping[Node, Sequence[Node]],
) -> tuple[dict[Node, int], set[Node]]:
    """The tensors ``[tokens]`` of consecutive positions through which nodes depend on the source of positions.

    Args:
        module: the functional graph.
        results: the nodes.
        source: what the positions of a step start from.
        tokens: how many there are.
        assume_consecutive: inputs that are consecutive positions.
        inside: for some nodes, which operands to look at.

    Returns:
        Each with what it adds to the source, and the placeholders (the source among them) on which the nodes depend in another way.
    """
    pending, seen = list(results), set[Node]()
    found, others = dict[Node, int](), set[Node]()
    while pending:
        node = pending.pop()
        if node in seen or is_call(node, aten.sym_size.int):
            continue
        seen.add(node)
        if _is_position_tensor(module, node, source, tokens, assume_consecutive):
            found[node] = start_offset(module, node, source, tokens)
        elif node.op == "placeholder":
            others.add(node)
        else:
            pending.extend(inside.get(node, node.all_input_nodes))
    return found, others


def _is_position_tensor(
    module: GraphModule, node: Node, source: Node, tokens: Any, assume_consecutive: frozenset[str]
) -> bool:
    held = value(node)
    if (
        not isinstance(held, Tensor)
        or held.dtype not in (torch.int32, torch.int64)
        or [str(e) for e in held.shape] != [str(tokens)]
    ):
        return False
    if shifted_source(node) is not source or not is_consecutive(module, node, assume_consecutive):
        return False
    return (
        node is source
        or not isinstance(tokens, int)
        or depends_on_first_entry(module, node, source, {})
    )


def _window_of(visible: Callable[[int], Tensor], starts: list[int], capacity: int) -> int:
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
            raise UnprovableError(
                f"its mask is neither causal nor a sliding window where the step starts at {start}"
            )
    return window


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


@dataclass(frozen=True)
class AttentionMatch:
    """One recognised attention.

    Attributes:
        node: its result.
        path: what it is made of, and what lies between the caches and it, last first.
        query: ``[1, heads, tokens, dim]``.
        keys, values: the writes of this step into the two caches ``[1, kv_heads, capacity, dim]``.
        start: the position of the step's first token.
        scale: factor of the scores.
        window: 0, or how many positions up to its own a token sees.
        softcap: 0, or the soft-cap of the scores.
    """

    node: Node
    path: tuple[Node, ...]
    query: Node
    keys: Write
    values: Write
    start: StartPosition
    scale: float
    window: int
    softcap: float


@dataclass(frozen=True)
class UnfusedAttention:
    """An attention over caches that stays as it is.

    Attributes:
        node: the call.
        versions: the caches' versions that it reads.
        reason: why.
    """

    node: Node
    versions: tuple[Node, ...]
    reason: str


def match_cache_attentions(
    module: GraphModule,
    states: Sequence[StateTensor],
    chains: Sequence[WriteChain],
    assume_consecutive: frozenset[str],
) -> list[AttentionMatch | UnfusedAttention]:
    """Every attention of a graph of one row whose keys and values are states that it appends to, each once in a step."""
    appended = {
        chain.writes[0].node: chain.writes[0]
        for state, chain in zip(states, chains, strict=True)
        if len(chain.writes) == 1
        and appends_to_cache(chain.writes[0], state.slot_shape(1), leading=state.has_slot_axis(1))
    }
    return match_attentions(module, appended, assume_consecutive) if appended else []


def match_attentions(
    module: GraphModule, appended: Mapping[Node, Write], assume_consecutive: frozenset[str]
) -> list[AttentionMatch | UnfusedAttention]:
    """Every attention over two caches.

    Args:
        module: the functional graph.
        appended: for caches written once in a step, along axis 2 of ``[1, kv_heads, capacity, dim]``: the write by the version it makes.
        assume_consecutive: inputs that are consecutive positions.
    """
    found: list[AttentionMatch | UnfusedAttention] = []
    masks: dict[Any, int] = {}
    for node in module.graph.nodes:
        one = match_attention(node)
        if one is None:
            continue
        (keys, key_path), (values, value_path) = (
            _find_cache(one.keys, appended),
            _find_cache(one.values, appended),
        )
        if keys is None or values is None:
            continue
        path = (*one.inner_nodes, *key_path, *value_path)
        try:
            found.append(
                _prove_attention(
                    module, one, appended[keys], appended[values], path, masks, assume_consecutive
                )
            )
        except (UnprovableError, MixesTokensError, UnknownExtentError) as reason:
            found.append(UnfusedAttention(node, (keys, values), str(reason)))
    return found


def _find_cache(
    operand: AnyNode, appended: Mapping[Node, Write]
) -> tuple[Node | None, tuple[Node, ...]]:
    path: list[Node] = []
    while isinstance(operand, Node) and operand not in appended:
        if not is_call(operand, *_HEAD_VIEWS):
            return None, ()
        path.append(operand)
        operand = operand.args[0]
    return (operand, tuple(path)) if isinstance(operand, Node) else (None, ())


def _prove_attention(
    module: GraphModule,
    one: AttentionPattern,
    keys: Write,
    values: Write,
    path: tuple[Node, ...],
    masks: dict[Any, int],
    assume_consecutive: frozenset[str],
) -> AttentionMatch:
    require(len(shape(one.query)) == 4, "its query is not [1, heads, tokens, dim]")
    rows, heads, tokens, _ = shape(one.query)
    require(keys.node is not values.node, "keys and values are one cache")
    require(rows == 1, "its query has several rows")
    require(
        isinstance(shape(keys.node)[2], int),
        "the length of its caches varies, so its mask cannot be evaluated for every position",
    )
    require(one.dropout == 0.0, "it drops out")
    require(
        str(keys.count) == str(values.count) == str(tokens),
        "it has another number of queries than of new keys and values",
    )
    require(
        dtype(one.query) == dtype(keys.node) == dtype(values.node),
        "its query has another type than the caches",
    )
    require(
        shape(keys.node)[1:3] == shape(values.node)[1:3],
        "keys and values have other heads or capacities",
    )
    for write, operand in ((keys, one.keys), (values, one.values)):
        require(
            _has_no_other_user(write.node, path, one.node),
            f"the written {write.node.name} is used beside the attention",
        )
        require(
            _repeats_heads(module, write.node, operand, heads, grouped=one.grouped),
            "its heads are not those cached",
        )
    capacity = shape(keys.node)[2]
    start = _start_position(module, keys, tokens, assume_consecutive)
    require(
        start == _start_position(module, values, tokens, assume_consecutive),
        "keys and values are written at different positions",
    )
    key = (one.mask, one.causal, one.mask_hides, start, str(tokens), capacity)
    if key not in masks:
        masks[key] = prove_window(module, one, start, tokens, capacity, assume_consecutive)
    require(one.scale is not None, "its scale is computed")
    assert one.scale is not None
    return AttentionMatch(
        one.node, path, one.query, keys, values, start, one.scale, masks[key], one.softcap
    )


def _has_no_other_user(version: Node, path: tuple[Node, ...], node: Node) -> bool:
    inside = {*path, node}
    return all(user in inside or user.op == "output" for user in version.users) and all(
        user in inside for part in path for user in part.users
    )


def _repeats_heads(
    module: GraphModule, version: Node, operand: Node, heads: int, *, grouped: bool
) -> bool:
    """Whether attended head h is cached head ``h // (heads / kv_heads)``, on numbers that differ everywhere."""
    _, kv_heads, capacity, dim = shape(version)
    cached = torch.arange(kv_heads * capacity * dim).reshape(1, kv_heads, capacity, dim)
    found = evaluate(module, operand, {version: cached})
    group = heads // kv_heads
    wanted = cached if grouped or group == 1 else cached.repeat_interleave(group, 1)
    return heads == group * kv_heads and torch.equal(found, wanted)


def _start_position(
    module: GraphModule, write: Write, tokens: Any, assume_consecutive: frozenset[str]
) -> StartPosition:
    """Where a write starts, as a placeholder plus a number (or a number alone)."""
    if isinstance(write.start, int):
        return StartPosition(None, write.start)
    source = shifted_source(write.start)
    if source is None:
        raise UnprovableError("where it writes is more than a position plus a constant")
    require(
        follows_from_first_entry(module, write.start, source, tokens, assume_consecutive),
        "where it writes depends on more than the first of several numbers",
    )
    return StartPosition(source, start_offset(module, write.start, source, tokens))


def appends_to_cache(write: Write, slot: tuple[int, ...], *, leading: bool) -> bool:
    """Whether a write appends to a cache ``[1, kv_heads, capacity, dim]`` as `inplace::attention` has it."""
    return (
        leading
        and len(slot) == 3
        and write.axis == 2
        and not write.skips_out_of_range
        and not write.per_row
        and isinstance(value(write.node), Tensor)
    )
