"""Positions that a graph repeats over the other axes of a tensor: proved by evaluating the repetition on small distinct numbers."""

from typing import Any

import torch
from torch.fx import GraphModule, Node

from inplace_builder.passes.emit import shape, value
from inplace_builder.passes.match import AnyNode, as_node, call
from inplace_builder.passes.positions import constant

aten = torch.ops.aten

_SPREADS = (
    aten.unsqueeze.default,
    aten.view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.alias.default,
    aten.logical_not.default,
    aten.bitwise_not.default,
)


def evaluated(node: Node, known: dict[Node, Any]) -> Any:
    """What a node is, given what those are that it is made from; what was computed on the way is added to ``known``."""
    if node not in known:
        assert callable(node.target)
        arguments, named = torch.fx.node.map_arg((node.args, node.kwargs), lambda source: evaluated(source, known))
        known[node] = node.target(*arguments, **named)
    return known[node]


def position_a_row(index: Node) -> tuple[Node | None, bool]:
    """The tensor that an index repeats: one entry, or one for each entry of the first axis only."""
    current = index
    while call(current, aten.expand.default, aten.unsqueeze.default, aten.view.default, aten.reshape.default, aten.alias.default):
        extents = shape(current)
        if any(not isinstance(extent, int) for extent in extents):
            return None, False
        if value(current).numel() == 1:
            return current, False
        before = as_node(current.args[0])
        varying = [extent for extent in shape(before) if extent != 1]
        if call(current, aten.view.default, aten.reshape.default) and varying != [extent for extent in extents if extent != 1]:
            return None, False
        current = before
        if value(current).numel() == 1:
            return current, False
        if len(shape(current)) == 1:
            break
    stays = len(shape(current)) == 1 and shape(current)[0] == shape(index)[0] and _stays_first(index, current)
    return (current, True) if stays else (None, False)


def _stays_first(index: Node, source: Node) -> bool:
    """Evaluate the repetition on distinct numbers: entry [r, …] must be the r-th."""
    rows = shape(source)[0]
    found = evaluated(index, {source: torch.arange(rows)})
    return bool((found == torch.arange(rows).reshape(-1, *[1] * (found.dim() - 1))).all())


def one_hot(mask: Node, base: AnyNode, module: GraphModule, *, positive: bool) -> tuple[int, Node, bool] | None:
    """The axis and the position of a mask that is ``arange(extent) == position``, spread over the other axes."""
    if not isinstance(base, Node) or any(not isinstance(extent, int) for extent in (*shape(base), *shape(mask))):
        return None
    compared = mask
    while call(compared, *_SPREADS):
        compared = as_node(compared.args[0])
    if not call(compared, aten.eq.Tensor, aten.ne.Tensor):
        return None
    for entries, position in ((compared.args[0], compared.args[1]), (compared.args[1], compared.args[0])):
        order, where = constant(module, entries), as_node(position)
        if order is None or value(where).is_floating_point() or value(where).numel() not in (1, shape(base)[0]):
            continue
        rows = value(where).numel()
        for axis, extent in enumerate(shape(base)):
            if order.reshape(-1).tolist() == list(range(extent)) and _spreads(
                mask, compared, base, entries, where, axis, positive=positive
            ):
                return axis, where, rows > 1
    return None


def _spreads(mask: Node, compared: Node, base: Node, entries: AnyNode, position: Node, axis: int, *, positive: bool) -> bool:
    """Evaluate the mask for some positions: along ``axis`` exactly the row's own position must differ from the rest."""
    extent, rows = shape(base)[axis], value(position).numel()
    for first in range(extent):
        places = (torch.arange(rows) * (1 if rows > 1 else 0) + first) % extent
        known: dict[Node, Any] = {position: places.reshape(shape(position))}
        known[as_node(entries)] = torch.arange(extent).reshape(shape(as_node(entries)))
        selected = evaluated(mask, known)
        selected = selected if positive else ~selected
        try:
            selected = torch.broadcast_to(selected, tuple(shape(base)))
        except RuntimeError:
            return False
        view = [1] * len(shape(base))
        view[axis] = extent
        at = places.reshape(-1, *[1] * (len(shape(base)) - 1)) if rows > 1 else places
        wanted = torch.broadcast_to(torch.arange(extent).reshape(view) == at, tuple(shape(base)))
        if not torch.equal(selected, wanted):
            return False
    return True
