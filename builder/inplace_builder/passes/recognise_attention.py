"""Attention behind a cache, where it provably is `inplace::attention`.

Provably means: the mask is evaluated for every position that a token can have, and the way from cached heads to attended heads on
distinct numbers. Nothing is concluded from how a model happens to spell its mask.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from inplace_builder.passes.attention_mask import Start, UnprovableError, depends_on_first, first_position, require, window_of
from inplace_builder.passes.chain import Chain
from inplace_builder.passes.emit import dtype, shape, value
from inplace_builder.passes.match import AnyNode, call
from inplace_builder.passes.positions import UnknownExtentError, evaluate, shifted
from inplace_builder.passes.recognise import Write
from inplace_builder.passes.spelled_attention import Spelled, spelled
from inplace_builder.passes.states import Found
from inplace_builder.passes.token_axes import MixesTokensError

aten = torch.ops.aten

_HEADS = (
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
class Attention:
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
    start: Start
    scale: float
    window: int
    softcap: float


@dataclass(frozen=True)
class Explicit:
    """An attention over caches that stays as it is.

    Attributes:
        node: the call.
        versions: the caches' versions that it reads.
        because: why.
    """

    node: Node
    versions: tuple[Node, ...]
    because: str


def attentions_behind(
    module: GraphModule, states: Sequence[Found], chains: Sequence[Chain], promised: frozenset[str]
) -> list[Attention | Explicit]:
    """Every attention of a graph of one row whose keys and values are states that it appends to, each once in a step."""
    appended = {
        chain.writes[0].node: chain.writes[0]
        for state, chain in zip(states, chains, strict=True)
        if len(chain.writes) == 1 and is_cache(chain.writes[0], state.slot_shape(1), leading=state.leading(1))
    }
    return attentions(module, appended, promised) if appended else []


def attentions(module: GraphModule, appended: Mapping[Node, Write], promised: frozenset[str]) -> list[Attention | Explicit]:
    """Every attention over two caches.

    Args:
        module: the functional graph.
        appended: for caches written once in a step, along axis 2 of ``[1, kv_heads, capacity, dim]``: the write by the version it makes.
        promised: inputs that are consecutive positions.
    """
    found: list[Attention | Explicit] = []
    masks: dict[Any, int] = {}
    for node in module.graph.nodes:
        one = spelled(node)
        if one is None:
            continue
        (keys, key_path), (values, value_path) = _behind(one.keys, appended), _behind(one.values, appended)
        if keys is None or values is None:
            continue
        path = (*one.inside, *key_path, *value_path)
        try:
            found.append(_attention(module, one, appended[keys], appended[values], path, masks, promised))
        except (UnprovableError, MixesTokensError, UnknownExtentError) as reason:
            found.append(Explicit(node, (keys, values), str(reason)))
    return found


def _behind(operand: AnyNode, appended: Mapping[Node, Write]) -> tuple[Node | None, tuple[Node, ...]]:
    path: list[Node] = []
    while isinstance(operand, Node) and operand not in appended:
        if not call(operand, *_HEADS):
            return None, ()
        path.append(operand)
        operand = operand.args[0]
    return (operand, tuple(path)) if isinstance(operand, Node) else (None, ())


def _attention(
    module: GraphModule,
    one: Spelled,
    keys: Write,
    values: Write,
    path: tuple[Node, ...],
    masks: dict[Any, int],
    promised: frozenset[str],
) -> Attention:
    require(len(shape(one.query)) == 4, "its query is not [1, heads, tokens, dim]")
    rows, heads, tokens, _ = shape(one.query)
    require(keys.node is not values.node, "keys and values are one cache")
    require(rows == 1, "its query has several rows")
    require(isinstance(shape(keys.node)[2], int), "the length of its caches varies, so its mask cannot be evaluated for every position")
    require(one.dropout == 0.0, "it drops out")
    require(str(keys.count) == str(values.count) == str(tokens), "it has another number of queries than of new keys and values")
    require(dtype(one.query) == dtype(keys.node) == dtype(values.node), "its query has another type than the caches")
    require(shape(keys.node)[1:3] == shape(values.node)[1:3], "keys and values have other heads or capacities")
    for write, operand in ((keys, one.keys), (values, one.values)):
        require(_alone(write.node, path, one.node), f"the written {write.node.name} is used beside the attention")
        require(_repeats(module, write.node, operand, heads, grouped=one.grouped), "its heads are not those cached")
    capacity = shape(keys.node)[2]
    start = _start(module, keys, tokens, promised)
    require(start == _start(module, values, tokens, promised), "keys and values are written at different positions")
    key = (one.mask, one.causal, one.hides, start, str(tokens), capacity)
    if key not in masks:
        masks[key] = window_of(module, one, start, tokens, capacity, promised)
    require(one.scale is not None, "its scale is computed")
    assert one.scale is not None
    return Attention(one.node, path, one.query, keys, values, start, one.scale, masks[key], one.softcap)


def _alone(version: Node, path: tuple[Node, ...], node: Node) -> bool:
    inside = {*path, node}
    return all(user in inside or user.op == "output" for user in version.users) and all(
        user in inside for part in path for user in part.users
    )


def _repeats(module: GraphModule, version: Node, operand: Node, heads: int, *, grouped: bool) -> bool:
    """Whether attended head h is cached head ``h // (heads / kv_heads)``, on numbers that differ everywhere."""
    _, kv_heads, capacity, dim = shape(version)
    cached = torch.arange(kv_heads * capacity * dim).reshape(1, kv_heads, capacity, dim)
    found = evaluate(module, operand, {version: cached})
    group = heads // kv_heads
    wanted = cached if grouped or group == 1 else cached.repeat_interleave(group, 1)
    return heads == group * kv_heads and torch.equal(found, wanted)


def _start(module: GraphModule, write: Write, tokens: Any, promised: frozenset[str]) -> Start:
    """Where a write starts, as a placeholder plus a number (or a number alone)."""
    if isinstance(write.start, int):
        return Start(None, write.start)
    source = shifted(write.start)
    if source is None:
        raise UnprovableError("where it writes is more than a position plus a constant")
    require(
        depends_on_first(module, write.start, source, tokens, promised), "where it writes depends on more than the first of several numbers"
    )
    return Start(source, first_position(module, write.start, source, tokens))


def is_cache(write: Write, slot: tuple[int, ...], *, leading: bool) -> bool:
    """Whether a write appends to a cache ``[1, kv_heads, capacity, dim]`` as `inplace::attention` has it."""
    return (
        leading and len(slot) == 3 and write.axis == 2 and not write.ignores and not write.per_row and isinstance(value(write.node), Tensor)
    )
