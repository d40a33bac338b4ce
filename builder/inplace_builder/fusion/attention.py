"""Fuse what surrounds attention: the projections, the views between them, rotary embedding.

Rotary position embeddings (arXiv:2104.09864) are matched with paired halves, as transformers
writes them. Which outputs of a linear layer make up a query, key or value is found by running the
views between the two on consecutive numbers.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from inplace_builder.fusion.patterns import flattened
from inplace_builder.fusion.rewriter import Rewriter
from inplace_builder.graph.nodes import RESHAPES as VIEWS
from inplace_builder.graph.nodes import (
    AnyNode,
    is_call,
    only_user,
    operand_orders,
)

aten, inplace = torch.ops.aten, torch.ops.inplace


SELECTIONS = (
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
"""Operators beside `VIEWS` that only select and order elements."""


TOKENS = 3
"""Tokens of the example that views are run on; any number other than 1."""


def linear_rows(node: AnyNode, after: Sequence[Node] = ()) -> tuple[Node, Tensor] | None:
    """The linear layer that a tensor is a view of, and which of its outputs each element is.

    Args:
        node: where to start.
        after: views of ``node``, in order, to follow first.

    Returns:
        The layer and int64 ``[heads, dim]``: rows of its weight. None if anything but views is
        between the two, or if the views do not give ``[tokens, heads, dim]``.
    """
    before: list[Node] = []
    while not is_call(node, inplace.linear.default):
        if not is_call(node, *VIEWS, *SELECTIONS):
            return None
        before.insert(0, node)
        node = node.args[0]
    positions = _run_views(node, [*before, *after])
    width = node.meta["val"].shape[-1]
    if positions is None:
        return None
    rows = positions[0]
    offsets = torch.arange(TOKENS)[:, None, None] * width
    return (node, rows) if torch.equal(positions, rows + offsets) else None


def keeps_heads(node: AnyNode, views: Sequence[Node]) -> bool:
    """Whether views of ``[..., tokens, dim]`` give ``[tokens, heads, dim]`` with whole heads."""
    positions = _run_views(node, views)
    dim = node.meta["val"].shape[-1]
    if positions is None or positions.shape[-1] != dim:
        return False
    return torch.equal(positions % dim, torch.arange(dim).expand_as(positions))


def _run_views(node: AnyNode, views: Sequence[Node]) -> Tensor | None:
    """Run views on the numbers 0, 1, 2, … in the shape of a tensor with `TOKENS` tokens.

    Returns:
        int64 ``[TOKENS, heads, dim]``: the position in the tensor that each element comes from.
        None if the views give another shape, or an argument of them depends on more than the
        number of tokens.
    """
    shape = node.meta["val"].shape
    symbols = {str(size) for size in shape if not isinstance(size, int)}
    if len(symbols) != 1:
        return None
    (tokens,) = symbols
    sizes = [size if isinstance(size, int) else TOKENS for size in shape]
    value: Any = torch.arange(torch.Size(sizes).numel()).view(sizes)

    def concrete(argument: Any) -> Any:
        size = argument.meta["val"] if isinstance(argument, Node) else argument
        if isinstance(size, torch.SymInt) and str(size) == tokens:
            return TOKENS
        if isinstance(size, torch.SymInt) or isinstance(argument, Node):
            raise _UnknownArgumentError
        return argument

    for view in views:
        assert callable(view.target)
        try:
            args, kwargs = torch.fx.node.map_aggregate((view.args[1:], view.kwargs), concrete)
        except _UnknownArgumentError:
            return None
        value = view.target(value, *args, **kwargs)
    fits = isinstance(value, Tensor) and value.dim() == 3 and len(value) == TOKENS
    return value if fits else None


class _UnknownArgumentError(Exception):
    """An argument of a view depends on more than the number of tokens."""


@dataclass(frozen=True)
class Rotation:
    """A rotation of heads, or of their first components.

    Attributes:
        x: the tensor that is rotated.
        cos, sin: ``[..., tokens, rotary]``.
        views: views of the rotated tensor, in order.
    """

    x: Node
    cos: Node
    sin: Node
    views: tuple[Node, ...]


def match_rotation(node: AnyNode) -> Rotation | None:
    """Match a rotation, through views of its result.

    The pattern is ``x * cos + cat(-x[..., half:], x[..., :half]) * sin``. A partial rotation
    (GPT-NeoX, Phi) applies it to ``x[..., :rotary]`` and concatenates ``x[..., rotary:]``.
    """
    views: list[Node] = []
    while is_call(node, *VIEWS):
        views.insert(0, node)
        node = node.args[0]
    match = _match_partial(node) if _is_pair(node) else _match_whole(node)
    return None if match is None else Rotation(*match, tuple(views))


def _is_pair(node: AnyNode) -> bool:
    """Whether it concatenates two tensors along their last axis."""
    return (
        is_call(node, aten.cat.default)
        and len(node.args[0]) == 2
        and node.args[1:] in ((-1,), (node.meta["val"].dim() - 1,))
    )


def _match_partial(node: AnyNode) -> tuple[Node, Node, Node] | None:
    """``x``, cos and sin of a rotation of the first components."""
    rotated, rest = node.args[0]
    match = _match_whole(rotated)
    if (
        match is None
        or not is_call(match[0], aten.slice.Tensor)
        or not is_call(rest, aten.slice.Tensor)
    ):
        return None
    part, cos, sin = match
    x: AnyNode = part.args[0]
    rotary, extent = cos.meta["val"].shape[-1], x.meta["val"].shape[-1]
    if _is_slice(part, x, 0, rotary) and _is_slice(rest, x, rotary, extent):
        return x, cos, sin
    return None


def _match_whole(node: AnyNode) -> tuple[Node, Node, Node] | None:
    """``x``, cos and sin of a rotation of all components."""
    for first, second in operand_orders(node, aten.add.Tensor):
        for x, cos in operand_orders(first, aten.mul.Tensor):
            for half_turned, sin in operand_orders(second, aten.mul.Tensor):
                if (
                    not isinstance(x, Node)
                    or not _is_half_turned(half_turned, x)
                    or only_user(first) is not node
                ):
                    continue
                cosines, sines = _table(cos, x), _table(sin, x)
                if (
                    cosines is not None
                    and sines is not None
                    and cosines.meta["val"].shape[-1] == x.meta["val"].shape[-1]
                ):
                    return x, cosines, sines
    return None


def _is_half_turned(node: AnyNode, x: AnyNode) -> bool:
    """``cat([-x[..., half:], x[..., :half]], -1)``."""
    extent = x.meta["val"].shape[-1]
    if not _is_pair(node) or extent % 2:
        return False
    negated, first = node.args[0]
    return (
        is_call(negated, aten.neg.default)
        and _is_slice(negated.args[0], x, extent // 2, extent)
        and _is_slice(first, x, 0, extent // 2)
    )


def _is_slice(node: AnyNode, x: AnyNode, start: int, end: int) -> bool:
    """``x[..., start:end]``."""
    if not is_call(node, aten.slice.Tensor) or node.args[0] is not x:
        return False
    dim, slice_start, slice_end = (*node.args[1:4], None, None)[:3]
    step = node.args[4:]
    rank, extent = x.meta["val"].dim(), x.meta["val"].shape[-1]
    bounds = (slice_start or 0, extent if slice_end is None else min(slice_end, extent))
    return (dim or 0) in (-1, rank - 1) and bounds == (start, end) and step in ((), (1,))


def _table(node: AnyNode, x: AnyNode) -> AnyNode:
    """The table ``[1, tokens, dim]`` that is broadcast over heads; None if it is not."""
    if not is_call(node, aten.unsqueeze.default) or node.args[1] not in (
        1,
        -3 + x.meta["val"].dim(),
    ):
        return None
    table = node.args[0]
    fits = isinstance(table, Node) and table.meta["val"].dim() == x.meta["val"].dim() - 1
    return table if fits else None


class AttentionRewriter(Rewriter):
    """Makes ``qkv_attention`` and ``rotary_attention`` of ``inplace::attention``."""

    def fuse_attention(self, node: AnyNode) -> None:
        """Fuse attention with the rotation of its queries and keys, and with its projections.

        The projections become one linear layer if they are of the same tokens.
        """
        if not is_call(node, inplace.attention.default):
            return
        query, key, value, key_state, value_state, *rows = node.args
        if key is None or value is None or node.kwargs.get("append") is False:
            return
        rotations = match_rotation(query), match_rotation(key)
        if any(rotations) and not self._rotates_both(node, *rotations):
            return
        rotated_query, rotated_key = rotations
        parts = [
            linear_rows(rotation.x, rotation.views) if rotation else linear_rows(part)
            for rotation, part in zip(rotations, (query, key), strict=True)
        ]
        parts.append(linear_rows(value))
        projections = [part for part in parts if part is not None]
        qkv = self._merged_projection(projections, node) if len(projections) == 3 else None
        if qkv is not None:
            self._replace_by_qkv_attention(node, qkv, rotated_query)
        elif rotated_query is not None and rotated_key is not None:
            options = {name: option for name, option in node.kwargs.items() if name != "append"}
            unrotated = [self._unrotated(each, node) for each in (rotated_query, rotated_key)]
            tables = (rotated_query.cos, rotated_query.sin)
            args = (*unrotated, value, *tables, key_state, value_state, *rows)
            with self.graph.inserting_before(node):
                new = self.graph.call_function(inplace.rotary_attention.default, args, options)
            new.meta.update(node.meta)
            self.replace(node, new)
            self.graph.erase_node(node)
            self._merge_linears([self._source_linear(part) for part in (*unrotated, value)])

    def _rotates_both(self, node: AnyNode, query: Rotation | None, key: Rotation | None) -> bool:
        """Whether query and key are rotated alike, by tables of their own type, as whole heads."""
        if query is None or key is None or query.cos is not key.cos or query.sin is not key.sin:
            return False
        dtype = node.args[0].meta["val"].dtype
        typed = all(table.meta["val"].dtype == dtype for table in (query.cos, query.sin))
        return typed and all(keeps_heads(each.x, each.views) for each in (query, key))

    def _merged_projection(
        self, parts: Sequence[tuple[Node, torch.Tensor]], before: AnyNode
    ) -> AnyNode:
        """One linear layer whose outputs are queries, keys and values.

        Args:
            parts: for each of the three the layer and the rows of its weight.
            before: where to insert it.

        Returns:
            The layer; None if the parts are not projections of the same tokens.
        """
        first = parts[0][0]
        for layer, _ in parts:
            if (
                not self.is_unfused_linear(layer)
                or layer.args[0] is not first.args[0]
                or (layer.args[2] is None) != (first.args[2] is None)
            ):
                return None
        if not self.have_scales_alike([layer for layer, _ in parts]):
            return None
        rows = [rows.flatten() for _, rows in parts]
        all_rows = torch.arange(first.meta["val"].shape[-1])
        if all(layer is first for layer, _ in parts) and torch.equal(torch.cat(rows), all_rows):
            return first
        weight, bias, options = self.select_rows([layer for layer, _ in parts], rows, before)
        args, width = (first.args[0], weight, bias), sum(map(len, rows))
        return self.insert(before, inplace.linear.default, args, options, width)

    def _replace_by_qkv_attention(
        self, node: AnyNode, qkv: AnyNode, rotation: Rotation | None
    ) -> None:
        heads, value_state = node.args[0].meta["val"].shape[1], node.args[4]
        options = {name: option for name, option in node.kwargs.items() if name != "append"}
        out_width = heads * value_state.meta["val"].shape[3]
        cos, sin = (rotation.cos, rotation.sin) if rotation is not None else (None, None)
        args, options = (qkv, cos, sin, *node.args[3:]), {"heads": heads, **options}
        new = self.insert(node, inplace.qkv_attention.default, args, options, out_width)
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

    def _unrotated(self, rotation: Rotation, before: AnyNode) -> AnyNode:
        """What was rotated, with the views of the rotated tensor applied to it."""
        result: AnyNode = rotation.x
        for view in rotation.views:
            with self.graph.inserting_before(before):
                again = self.graph.call_function(view.target, (result, *view.args[1:]), view.kwargs)  # type: ignore[arg-type]
            again.meta.update(view.meta)
            result = again
        return result

    def _source_linear(self, node: AnyNode) -> AnyNode:
        """The node before views and norms."""
        while is_call(node, *VIEWS, *SELECTIONS, inplace.rms_norm.default):
            node = node.args[0]
        return node

    def _merge_linears(self, layers: Sequence[AnyNode]) -> None:
        """Linear layers of the same tokens become slices of one layer."""
        if len(set(layers)) != len(layers) or not all(map(self.is_unfused_linear, layers)):
            return
        x, bias = layers[0].args[0], layers[0].args[2]
        if not self.have_scales_alike(layers) or any(
            layer.args[0] is not x or (layer.args[2] is None) != (bias is None) for layer in layers
        ):
            return
        first = next(node for node in self.graph.nodes if node in layers)
        widths = [layer.meta["val"].shape[-1] for layer in layers]
        weight, bias, options = self.concatenate_weights(layers, first)
        args = (x, weight, bias)
        merged = self.insert(first, inplace.linear.default, args, options, sum(widths))
        last, start = merged.meta["val"].dim() - 1, 0
        for layer, width in zip(layers, widths, strict=True):
            bounds = (last, start, start + width)
            part = self.insert(first, aten.slice.Tensor, (merged, *bounds), {}, width)
            self.replace(layer, part)
            start += width
