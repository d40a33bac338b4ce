"""Scaled dot-product attention behind a cache, where it provably is `inplace::attention`.

Provably means: the mask is evaluated for every position at which a step can start, and the way from cached heads to attended heads on
distinct numbers. Nothing is concluded from how a model happens to spell its mask.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from inplace_builder.passes.emit import dtype, shape, value
from inplace_builder.passes.match import AnyNode, call
from inplace_builder.passes.positions import evaluate, example, leaves, shifted
from inplace_builder.passes.recognise import Write

aten = torch.ops.aten

MOST_MASK_ELEMENTS = 2**28
"""Elements of all masks that are evaluated for one proof; 16384 positions of one-token steps."""

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
        node: the call of scaled dot-product attention.
        path: what lies between the caches and it, last first.
        query: ``[1, heads, tokens, dim]``.
        keys, values: the writes of this step into the two caches ``[1, kv_heads, capacity, dim]``.
        scale: factor of the scores.
        window: 0, or how many positions up to its own a token sees.
    """

    node: Node
    path: tuple[Node, ...]
    query: Node
    keys: Write
    values: Write
    scale: float
    window: int


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


class _UnprovableError(Exception):
    """Not an error of the build: the reason why an attention stays explicit."""


def attentions(module: GraphModule, appended: Mapping[Node, Write]) -> list[Attention | Explicit]:
    """Every scaled dot-product attention over two caches.

    Args:
        module: the functional graph.
        appended: for caches written once in a step, along axis 2 of ``[1, kv_heads, capacity, dim]``: the write by the version it makes.
    """
    found: list[Attention | Explicit] = []
    masks: dict[Any, int] = {}
    for node in module.graph.nodes:
        if not call(node, aten.scaled_dot_product_attention.default):
            continue
        (keys, key_path), (values, value_path) = (_behind(operand, appended) for operand in node.args[1:3])
        if keys is None or values is None:
            continue
        try:
            found.append(_attention(module, node, appended[keys], appended[values], (*key_path, *value_path), masks))
        except _UnprovableError as reason:
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


def _attention(module: GraphModule, node: Node, keys: Write, values: Write, path: tuple[Node, ...], masks: dict[Any, int]) -> Attention:
    query, mask, dropout, causal = _operands(node)
    _, heads, tokens, dim = shape(query)
    _require(keys.node is not values.node, "keys and values are one cache")
    _require(isinstance(tokens, int), "its number of tokens is dynamic")
    _require(shape(query)[0] == 1, "its query has several rows")
    _require(dropout == 0.0, "it drops out")
    _require(keys.count == tokens and values.count == tokens, "it has another number of queries than of new keys and values")
    _require(dtype(query) == dtype(keys.node) == dtype(values.node), "its query has another type than the caches")
    _require(shape(keys.node)[1:3] == shape(values.node)[1:3], "keys and values have other heads or capacities")
    for write, operand in ((keys, node.args[1]), (values, node.args[2])):
        _require(_alone(write.node, path, node), f"the written {write.node.name} is used beside the attention")
        assert isinstance(operand, Node)
        _require(
            _repeats(module, write.node, operand, heads, gqa=bool(node.kwargs.get("enable_gqa", False))), "its heads are not those cached"
        )
    capacity = shape(keys.node)[2]
    source, offset = _start(module, keys)
    _require((source, offset) == _start(module, values), "keys and values are written at different positions")
    key = (mask, causal, source, offset, tokens, capacity)
    if key not in masks:
        masks[key] = _window(_visible(module, mask, causal=causal, source=source, offset=offset, tokens=tokens, capacity=capacity), source,
                             offset, tokens, capacity)  # fmt: skip
    scale = node.kwargs.get("scale")
    found = 1.0 / math.sqrt(dim) if scale is None else scale
    _require(isinstance(found, float), "its scale is computed")
    assert isinstance(found, float)
    return Attention(node, path, query, keys, values, found, masks[key])


def _require(holds: bool, because: str) -> None:
    if not holds:
        raise _UnprovableError(because)


def _operands(node: Node) -> tuple[Node, Node | None, Any, bool]:
    named: dict[str, Any] = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False} | dict(node.kwargs)
    for name, given in zip(("attn_mask", "dropout_p", "is_causal"), node.args[3:], strict=False):
        named[name] = given
    query = node.args[0]
    assert isinstance(query, Node)
    return query, named["attn_mask"], named["dropout_p"], bool(named["is_causal"])


def _alone(version: Node, path: tuple[Node, ...], node: Node) -> bool:
    inside = {*path, node}
    return all(user in inside or user.op == "output" for part in (version, *path) for user in part.users)


def _repeats(module: GraphModule, version: Node, operand: Node, heads: int, *, gqa: bool) -> bool:
    """Whether attended head h is cached head ``h // (heads / kv_heads)``, on numbers that differ everywhere."""
    _, kv_heads, capacity, dim = shape(version)
    cached = torch.arange(kv_heads * capacity * dim).reshape(1, kv_heads, capacity, dim)
    found = evaluate(module, operand, {version: cached})
    group = heads // kv_heads
    wanted = cached if gqa or group == 1 else cached.repeat_interleave(group, 1)
    return heads == group * kv_heads and torch.equal(found, wanted)


def _start(module: GraphModule, write: Write) -> tuple[Node | None, int]:
    """Where a write starts, as a placeholder plus a number (or a number alone)."""
    if isinstance(write.start, int):
        return None, write.start
    source = shifted(write.start)
    if source is None:
        raise _UnprovableError("where it writes is more than a position plus a constant")
    first = evaluate(module, write.start, {source: example(source, 0)})
    return source, int(first.reshape(-1)[0]) if isinstance(first, Tensor) else int(first)


def _visible(
    module: GraphModule, mask: Node | None, *, causal: bool, source: Node | None, offset: int, tokens: int, capacity: int
) -> Callable[[int], Tensor]:
    """What each token may see, ``[tokens, capacity]``, by where the step starts."""
    if mask is None:
        everything = torch.ones(tokens, capacity, dtype=torch.bool)
        fixed = everything.tril() if causal else everything
        return lambda start: fixed
    _require(not causal, "it has a mask and is causal")
    found = leaves(mask)
    _require(found is not None and found <= {source}, "its mask depends on more than the position it writes at")
    _require(capacity * capacity * tokens <= MOST_MASK_ELEMENTS, "its mask is too large to be proved")

    def visible(start: int) -> Tensor:
        given = {} if source is None else {source: example(source, start - offset)}
        held = evaluate(module, mask, given)
        if held.is_floating_point():
            hidden = held <= torch.finfo(held.dtype).min
            _require(bool(((held == 0) | hidden).all()), "its mask is a bias")
            held = ~hidden
        _require(held.dtype == torch.bool, "its mask is neither boolean nor floating point")
        spread = torch.broadcast_to(held, (*held.shape[:-2], tokens, capacity)).reshape(-1, tokens, capacity)
        _require(bool((spread == spread[:1]).all()), "its mask differs between heads")
        return spread[0]

    return visible


def _window(visible: Callable[[int], Tensor], source: Node | None, offset: int, tokens: int, capacity: int) -> int:
    """0 for causal attention, else the window; every start at which the step fits is looked at."""
    starts = range(capacity - tokens + 1) if source is not None else range(offset, offset + 1)
    widest = int(visible(starts[-1])[-1].sum())
    window = 0 if widest == starts[-1] + tokens else widest
    columns = torch.arange(capacity)
    for start in starts:
        rows = torch.arange(start, start + tokens).unsqueeze(1)
        wanted = (columns <= rows) & (columns > rows - (window or capacity))
        if not torch.equal(visible(start), wanted):
            raise _UnprovableError(f"its mask is neither causal nor a sliding window where the step starts at {start}")
    return window


def is_cache(write: Write, slot: tuple[int, ...], *, leading: bool) -> bool:
    """Whether a write appends to a cache ``[1, kv_heads, capacity, dim]`` as `inplace::attention` has it."""
    return (
        leading and len(slot) == 3 and write.axis == 2 and not write.ignores and not write.per_row and isinstance(value(write.node), Tensor)
    )
