"""Fuse what surrounds attention: projections, their views, and rotary embedding.

Which outputs of a linear layer a query, key or value is made of: found by running the views between them on numbers.

Recognise rotary position embeddings (arXiv:2104.09864) with paired halves, as transformers writes them.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from inplace_builder.fusion.patterns import flattened
from inplace_builder.fusion.rewriter import Rewriter
from inplace_builder.graph.nodes import RESHAPES as VIEWS
from inplace_builder.graph.nodes import AnyNode, is_call, only_user, operand_orders

aten, inplace = torch.ops.aten, torch.ops.inplace


PICKS = (
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.slice.Tensor,
    aten.narrow.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    operator.getitem,
)
"""Operators beside `VIEWS` that only choose and order what is there."""


TOKENS = 3
"""Tokens of the example that is run; any number other than 1."""


def linear_rows(node: AnyNode, after: Sequence[Node] = ()) -> tuple[Node, Tensor] | None:
    """The linear layer that a tensor is a view of, and which of its outputs each element is.

    Args:
        node: where to start.
        after: views of ``node``, in order, to follow first.

    Returns:
        The layer and int64 ``[heads, dim]``: rows of its weight; None if something else than views stands between, or if what they give is
        not ``[tokens, heads, dim]``.
    """
    before: list[Node] = []
    while not is_call(node, inplace.linear.default):
        if not is_call(node, *VIEWS, *PICKS):
            return None
        before.insert(0, node)
        node = node.args[0]
    numbers = _numbers(node)
    found = None if numbers is None else _run([*before, *after], numbers, _tokens(node))
    width = node.meta["val"].shape[-1]
    if found is None or found.dim() != 3 or len(found) != TOKENS:
        return None
    rows = found[0]
    every_token_alike = torch.equal(found, rows + torch.arange(TOKENS)[:, None, None] * width)
    return (node, rows) if every_token_alike else None


def keeps_heads(node: AnyNode, views: Sequence[Node]) -> bool:
    """Whether these views of ``[..., tokens, dim]`` give ``[tokens, heads, dim]`` with every head whole."""
    numbers = _numbers(node)
    found = None if numbers is None else _run(views, numbers, _tokens(node))
    dim = node.meta["val"].shape[-1]
    if found is None or found.dim() != 3 or len(found) != TOKENS or found.shape[-1] != dim:
        return False
    return torch.equal(found % dim, torch.arange(dim).expand_as(found))


def _tokens(node: AnyNode) -> str | None:
    """The one unknown extent of a tensor, as it is written."""
    unknown = {str(size) for size in node.meta["val"].shape if not isinstance(size, int)}
    return unknown.pop() if len(unknown) == 1 else None


def _numbers(node: AnyNode) -> Tensor | None:
    """0, 1, 2, … in the shape of the tensor, with `TOKENS` tokens."""
    if _tokens(node) is None:
        return None
    shape = [size if isinstance(size, int) else TOKENS for size in node.meta["val"].shape]
    return torch.arange(torch.Size(shape).numel()).view(shape)


def _run(views: Sequence[Node], value: Any, tokens: str | None) -> Tensor | None:
    """Apply views to a value; None where one has an argument that depends on more than the number of tokens."""

    def known(argument: Any) -> Any:
        size = argument.meta["val"] if isinstance(argument, Node) else argument
        if isinstance(size, torch.SymInt):
            if str(size) != tokens:
                raise _UnknownError
            return TOKENS
        if isinstance(argument, Node):
            raise _UnknownError
        return argument

    for view in views:
        assert callable(view.target)
        try:
            args, kwargs = torch.fx.node.map_aggregate((view.args[1:], view.kwargs), known)
        except _UnknownError:
            return None
        value = view.target(value, *args, **kwargs)
    return value if isinstance(value, Tensor) else None


class _UnknownError(Exception):
    """An argument is not known."""


@dataclass(frozen=True)
class Rotation:
    """A rotation of heads, or of their first components.

    Attributes:
        x: what is rotated.
        cos, sin: ``[..., tokens, rotary]``.
        views: what looks at the result until the node that was asked about, in order.
    """

    x: Node
    cos: Node
    sin: Node
    views: tuple[Node, ...]


def rotation(node: AnyNode) -> Rotation | None:
    """The rotation behind a node, through views; None if there is none.

    The pattern is ``x * cos + cat(-x[..., half:], x[..., :half]) * sin``. A partial rotation (GPT-NeoX, Phi) does so with
    ``x[..., :rotary]`` and puts ``x[..., rotary:]`` behind it.
    """
    views: list[Node] = []
    while is_call(node, *VIEWS):
        views.insert(0, node)
        node = node.args[0]
    if (
        is_call(node, aten.cat.default)
        and len(node.args[0]) == 2
        and node.args[1:] in ((-1,), (node.meta["val"].dim() - 1,))
    ):
        turned, rest = node.args[0]
        found = _whole(turned)
        if (
            found is None
            or not is_call(found[0], aten.slice.Tensor)
            or not is_call(rest, aten.slice.Tensor)
        ):
            return None
        x: AnyNode = found[0].args[0]
        rotary = found[1].meta["val"].shape[-1]
        extent = x.meta["val"].shape[-1]
        if _is_part(found[0], x, 0, rotary) and _is_part(rest, x, rotary, extent):
            return Rotation(x, found[1], found[2], tuple(views))
        return None
    found = _whole(node)
    return None if found is None else Rotation(*found, tuple(views))


def _whole(node: AnyNode) -> tuple[Node, Node, Node] | None:
    """``x``, cos and sin of a rotation of all components."""
    for first, second in operand_orders(node, aten.add.Tensor):
        for x, cos in operand_orders(first, aten.mul.Tensor):
            for turned, sin in operand_orders(second, aten.mul.Tensor):
                if isinstance(x, Node) and _is_turned(turned, x) and only_user(first) is node:
                    cosines, sines = _table(cos, x), _table(sin, x)
                    if (
                        cosines is not None
                        and sines is not None
                        and cosines.meta["val"].shape[-1] == x.meta["val"].shape[-1]
                    ):
                        return x, cosines, sines
    return None


def _is_turned(node: AnyNode, x: AnyNode) -> bool:
    """``cat([-x[..., half:], x[..., :half]], -1)``."""
    if not is_call(node, aten.cat.default):
        return False
    rank, extent = x.meta["val"].dim(), x.meta["val"].shape[-1]
    if node.args[1:] not in ((-1,), (rank - 1,)) or len(node.args[0]) != 2 or extent % 2:
        return False
    negated, first = node.args[0]
    return (
        is_call(negated, aten.neg.default)
        and _is_part(negated.args[0], x, extent // 2, extent)
        and _is_part(first, x, 0, extent // 2)
    )


def _is_part(node: AnyNode, x: AnyNode, start: int, end: int) -> bool:
    if not is_call(node, aten.slice.Tensor) or node.args[0] is not x:
        return False
    dim, found_start, found_end = (*node.args[1:4], None, None)[:3]
    step = node.args[4:]
    rank, extent = x.meta["val"].dim(), x.meta["val"].shape[-1]
    bounds = (found_start or 0, extent if found_end is None else min(found_end, extent))
    return (dim or 0) in (-1, rank - 1) and bounds == (start, end) and step in ((), (1,))


def _table(node: AnyNode, x: AnyNode) -> AnyNode:
    """The table ``[1, tokens, dim]`` behind its broadcast over heads; None if it does not broadcast so."""
    if not is_call(node, aten.unsqueeze.default) or node.args[1] not in (
        1,
        -3 + x.meta["val"].dim(),
    ):
        return None
    table = node.args[0]
    return (
        table
        if isinstance(table, Node) and table.meta["val"].dim() == x.meta["val"].dim() - 1
        else None
    )


class AttentionRewriter(Rewriter):
    """Makes ``qkv_attention`` and ``rotary_attention`` of ``inplace::attention``."""

    def attention(self, node: AnyNode) -> None:
        """Attention whose queries and keys are rotated, or whose queries, keys and values are projections of the same tokens."""
        if not is_call(node, inplace.attention.default):
            return
        query, key, value, key_state, value_state, *rows = node.args
        if key is None or node.kwargs.get("append") is False:
            return
        turned = [rotation(part) for part in (query, key)]
        one, other = turned
        if one is not None or other is not None:
            if one is None or other is None or one.cos is not other.cos or one.sin is not other.sin:
                return
            typed = all(
                part.meta["val"].dtype == node.args[0].meta["val"].dtype
                for part in (one.cos, one.sin)
            )
            if not typed or not all(keeps_heads(each.x, each.views) for each in (one, other)):
                return
        parts = [
            linear_rows(each.x, each.views) if each else linear_rows(part)
            for each, part in zip(turned, (query, key), strict=True)
        ]
        parts.append(linear_rows(value))
        qkv = (
            self._projected([part for part in parts if part is not None], node)
            if all(parts)
            else None
        )
        if qkv is not None:
            self._qkv(node, qkv, one)
        elif one is not None and other is not None:
            options = {name: option for name, option in node.kwargs.items() if name != "append"}
            before = [self._replayed(each, node) for each in (one, other)]
            args = (*before, value, one.cos, one.sin, key_state, value_state, *rows)
            with self.graph.inserting_before(node):
                new = self.graph.call_function(inplace.rotary_attention.default, args, options)
            new.meta.update(node.meta)
            self.replace(node, new)
            self.graph.erase_node(node)
            self._merge([self._behind(part) for part in (*before, value)])

    def _projected(self, parts: Sequence[tuple[Node, torch.Tensor]], before: AnyNode) -> AnyNode:
        """One linear layer that gives queries, keys and values behind one another; None if they are not of the same tokens."""
        first = parts[0][0]
        for layer, _ in parts:
            if (
                not self.plain(layer)
                or layer.args[0] is not first.args[0]
                or (layer.args[2] is None) != (first.args[2] is None)
            ):
                return None
        picks = [rows.flatten() for _, rows in parts]
        whole = torch.arange(first.meta["val"].shape[-1])
        if all(layer is first for layer, _ in parts) and torch.equal(torch.cat(picks), whole):
            return first
        found: list[AnyNode] = []
        for place in (1, 2):
            sources = [layer.args[place] for layer, _ in parts]
            if sources[0] is None:
                found.append(None)
                continue
            key = ("rows", *sources, *(pick.numpy().tobytes() for pick in picks))
            found.append(
                self.weight(
                    key,
                    before,
                    partial(_picked, [self.weights[source] for source in sources], picks),
                )
            )
        return self.insert(
            before, inplace.linear.default, (first.args[0], *found), {}, sum(map(len, picks))
        )

    def _qkv(self, node: AnyNode, qkv: AnyNode, turned: Rotation | None) -> None:
        heads, value_state = node.args[0].meta["val"].shape[1], node.args[4]
        options = {name: option for name, option in node.kwargs.items() if name != "append"}
        out_width = heads * value_state.meta["val"].shape[3]
        cos, sin = (turned.cos, turned.sin) if turned is not None else (None, None)
        args = (qkv, cos, sin, *node.args[3:])
        new = self.insert(
            node, inplace.qkv_attention.default, args, {"heads": heads, **options}, out_width
        )
        for user in list(node.users):
            end = flattened(user, out_width)
            if end is not None and end.meta["val"].dim() == new.meta["val"].dim():
                self.replace(end, new)
        if node.users:
            with self.graph.inserting_before(node):
                shaped = self.graph.call_function(
                    aten.view.default, (new, [-1, heads, out_width // heads])
                )
            shaped.meta["val"] = node.meta["val"]
            self.replace(node, shaped)
        self.graph.erase_node(node)

    def _replayed(self, turned: Rotation, before: AnyNode) -> AnyNode:
        """What was rotated, seen through the views of the rotated."""
        found: AnyNode = turned.x
        for view in turned.views:
            with self.graph.inserting_before(before):
                again = self.graph.call_function(view.target, (found, *view.args[1:]), view.kwargs)  # type: ignore[arg-type]
            again.meta.update(view.meta)
            found = again
        return found

    def _behind(self, node: AnyNode) -> AnyNode:
        """The linear layer behind views and norms of single use."""
        while is_call(node, *VIEWS, *PICKS, inplace.rms_norm.default):
            node = node.args[0]
        return node

    def _merge(self, layers: Sequence[AnyNode]) -> None:
        """Linear layers of the same tokens become one and slices of it."""
        if len(set(layers)) != len(layers) or not all(self.plain(layer) for layer in layers):
            return
        x, bias = layers[0].args[0], layers[0].args[2]
        if any(
            layer.args[0] is not x or (layer.args[2] is None) != (bias is None) for layer in layers
        ):
            return
        first = next(node for node in self.graph.nodes if node in layers)
        widths = [layer.meta["val"].shape[-1] for layer in layers]
        merged = self.insert(
            first, inplace.linear.default, (x, *self.merged(layers, first)), {}, sum(widths)
        )
        last, start = merged.meta["val"].dim() - 1, 0
        for layer, width in zip(layers, widths, strict=True):
            part = self.insert(
                first, aten.slice.Tensor, (merged, last, start, start + width), {}, width
            )
            self.replace(layer, part)
            start += width


def _picked(tensors: Sequence[torch.Tensor], picks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows of several tensors behind one another."""
    return torch.cat([tensor[pick] for tensor, pick in zip(tensors, picks, strict=True)])
