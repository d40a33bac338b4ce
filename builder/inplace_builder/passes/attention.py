"""Fuse what surrounds attention: projections, their views, and rotary embedding."""

from collections.abc import Sequence
from functools import partial

import torch
from torch.fx import Node

from inplace_builder.passes.layout import PICKS, keeps_heads, linear_rows
from inplace_builder.passes.match import VIEWS, AnyNode, call
from inplace_builder.passes.patterns import flattened
from inplace_builder.passes.rewriter import Rewriter
from inplace_builder.passes.rotary import Rotation, rotation

aten, inplace = torch.ops.aten, torch.ops.inplace


class AttentionRewriter(Rewriter):
    """Makes ``qkv_attention`` and ``rotary_attention`` of ``inplace::attention``."""

    def attention(self, node: AnyNode) -> None:
        """Attention whose queries and keys are rotated, or whose queries, keys and values are projections of the same tokens."""
        if not call(node, inplace.attention.default):
            return
        query, key, value, key_state, value_state, *rows = node.args
        if key is None or node.kwargs.get("append") is False:
            return
        turned = [rotation(part) for part in (query, key)]
        one, other = turned
        if one is not None or other is not None:
            if one is None or other is None or one.cos is not other.cos or one.sin is not other.sin:
                return
            typed = all(part.meta["val"].dtype == node.args[0].meta["val"].dtype for part in (one.cos, one.sin))
            if not typed or not all(keeps_heads(each.x, each.views) for each in (one, other)):
                return
        parts = [linear_rows(each.x, each.views) if each else linear_rows(part) for each, part in zip(turned, (query, key), strict=True)]
        parts.append(linear_rows(value))
        qkv = self._projected([part for part in parts if part is not None], node) if all(parts) else None
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
            if not self.plain(layer) or layer.args[0] is not first.args[0] or (layer.args[2] is None) != (first.args[2] is None):
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
            found.append(self.weight(key, before, partial(_picked, [self.weights[source] for source in sources], picks)))
        return self.insert(before, inplace.linear.default, (first.args[0], *found), {}, sum(map(len, picks)))

    def _qkv(self, node: AnyNode, qkv: AnyNode, turned: Rotation | None) -> None:
        heads, value_state = node.args[0].meta["val"].shape[1], node.args[4]
        options = {name: option for name, option in node.kwargs.items() if name != "append"}
        out_width = heads * value_state.meta["val"].shape[3]
        cos, sin = (turned.cos, turned.sin) if turned is not None else (None, None)
        args = (qkv, cos, sin, *node.args[3:])
        new = self.insert(node, inplace.qkv_attention.default, args, {"heads": heads, **options}, out_width)
        for user in list(node.users):
            end = flattened(user, out_width)
            if end is not None and end.meta["val"].dim() == new.meta["val"].dim():
                self.replace(end, new)
        if node.users:
            with self.graph.inserting_before(node):
                shaped = self.graph.call_function(aten.view.default, (new, [-1, heads, out_width // heads]))
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
        while call(node, *VIEWS, *PICKS, inplace.rms_norm.default):
            node = node.args[0]
        return node

    def _merge(self, layers: Sequence[AnyNode]) -> None:
        """Linear layers of the same tokens become one and slices of it."""
        if len(set(layers)) != len(layers) or not all(self.plain(layer) for layer in layers):
            return
        x, bias = layers[0].args[0], layers[0].args[2]
        if any(layer.args[0] is not x or (layer.args[2] is None) != (bias is None) for layer in layers):
            return
        first = next(node for node in self.graph.nodes if node in layers)
        widths = [layer.meta["val"].shape[-1] for layer in layers]
        merged = self.insert(first, inplace.linear.default, (x, *self.merged(layers, first)), {}, sum(widths))
        last, start = merged.meta["val"].dim() - 1, 0
        for layer, width in zip(layers, widths, strict=True):
            part = self.insert(first, aten.slice.Tensor, (merged, last, start, start + width), {}, width)
            self.replace(layer, part)
            start += width


def _picked(tensors: Sequence[torch.Tensor], picks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows of several tensors behind one another."""
    return torch.cat([tensor[pick] for tensor, pick in zip(tensors, picks, strict=True)])
