"""Indexing with tensors, as ``x[a, :, b]`` reads and writes it: index and index_put.

The indexed axes are moved to the front and merged, and the index tensors become one tensor of
positions in them. A mask of booleans has a result of unknown shape, so it is lowered only where it
says what to replace.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from inplace_builder.lower.converters.accumulate import accumulated
from inplace_builder.lower.converters.scatter import index_source, placed
from inplace_builder.lower.converters.shape import expanded
from inplace_builder.lower.layers import ITensor, Size, expression
from inplace_builder.lower.network import Network
from inplace_builder.lower.registry import converter

aten = torch.ops.aten


INT = torch.int32
INTEGERS = (torch.int32, torch.int64)


def _index_types(node: Node, ctx: Network) -> set[torch.dtype]:
    indices: Any = node.args[1]
    return {ctx.meta(index).dtype for index in indices if index is not None}


def _integers(node: Node, ctx: Network) -> str | None:
    """Integers; the result of a mask has no known shape."""
    if _index_types(node, ctx) <= set(INTEGERS):
        return None
    dtype = next(iter(_index_types(node, ctx) - set(INTEGERS)))
    return f"it indexes with {dtype}, so its result has no known shape; use where"


def _integers_or_one_value(node: Node, ctx: Network) -> str | None:
    """Integers, or one mask with one value for all its places."""
    types = _index_types(node, ctx)
    if types <= set(INTEGERS):
        return None
    indices: Any = node.args[1]
    if len(indices) > 1 or types != {torch.bool}:
        return f"it indexes with {' and '.join(sorted(map(str, types)))} together"
    mask, new = ctx.meta(indices[0]), ctx.meta(node.args[2])
    rest = len(ctx.meta(node.args[0]).shape) - len(mask.shape)
    one = new.dim() <= rest or (new.dim() == rest + 1 and expression(new.shape[0]) == 1)
    return None if one else "a mask says where it writes several values; use where"


@dataclass(frozen=True)
class IndexedPositions:
    """Positions in the indexed axes of a tensor.

    Attributes:
        axes: the indexed axes.
        others: the axes that are not.
        positions: int32, in the indexed axes as one.
        shape: extents of the positions.
        lead: how many of ``others`` are in front of the positions in what is read or written.
    """

    axes: tuple[int, ...]
    others: tuple[int, ...]
    positions: ITensor
    shape: tuple[Size, ...]
    lead: int


def _places(
    ctx: Network, shape: Sequence[Size], indices: Sequence[ITensor | None]
) -> IndexedPositions:
    given: Any = ctx.node.args[1]
    axes = tuple(axis for axis, index in enumerate(indices) if index is not None)
    shapes = [tuple(ctx.meta(given[axis]).shape) for axis in axes]
    common = _broadcast(shapes)
    total: ITensor = None
    for axis in axes:
        extent = ctx.tensor(shape[axis], INT)
        index = ctx.cast(indices[axis], INT)
        negative = ctx.less(index, ctx.scalar(0, INT))
        index = ctx.select(negative, ctx.add(index, extent), index)
        total = index if total is None else ctx.add(ctx.multiply(total, extent), index)
    total = ctx.expand_rank(total, len(common))
    adjacent = axes == tuple(range(axes[0], axes[-1] + 1))
    others = tuple(axis for axis in range(len(shape)) if axis not in axes)
    return IndexedPositions(axes, others, total, common, axes[0] if adjacent else 0)


def _broadcast(shapes: Sequence[tuple[Size, ...]]) -> tuple[Size, ...]:
    """The extents of tensors together; those that vary are not compared."""
    rank = max(map(len, shapes))
    result: list[Size] = [1] * rank
    for shape in shapes:
        for axis, extent in enumerate(shape, rank - len(shape)):
            if expression(extent) != 1:
                result[axis] = extent
    return tuple(result)


def _merged(ctx: Network, x: ITensor, shape: Sequence[Size], places: IndexedPositions) -> ITensor:
    """The indexed axes in front, as one."""
    order = [*places.axes, *places.others]
    rest = [shape[axis] for axis in places.others]
    if len(places.axes) == 1:
        return ctx.permute(x, order)
    merged = math.prod(shape[axis] for axis in places.axes)
    return ctx.reshape(ctx.permute(x, order), [merged, *rest])


@converter(aten.index.Tensor, aten._unsafe_index.Tensor, validator=_integers)
def index(ctx: Network, x: ITensor, indices: Sequence[ITensor | None]) -> ITensor:
    """``x[a, :, b]``; negative indices count from the end."""
    shape = list(ctx.meta(ctx.node.args[0]).shape)
    places = _places(ctx, shape, indices)
    if len(places.axes) == 1:
        return ctx.gather(x, places.positions, places.axes[0])
    result = ctx.gather(_merged(ctx, x, shape, places), places.positions, 0)
    return ctx.permute(result, _moved_back(places))


def _moved_back(places: IndexedPositions) -> list[int]:
    """The order that puts the positions' axes behind the first ``lead`` other axes."""
    count, lead = len(places.shape), places.lead
    rest = range(count + lead, count + len(places.others))
    return [*range(count, count + lead), *range(count), *rest]


@converter(aten.index_put.default, aten._unsafe_index_put.default, validator=_integers_or_one_value)
def index_put(
    ctx: Network,
    base: ITensor,
    indices: Sequence[ITensor | None],
    new: ITensor,
    accumulate: bool = False,
) -> ITensor:
    """``base[a, :, b] = new``, or ``+=``; of equal indices the last one counts, or all."""
    shape = list(ctx.meta(ctx.node.args[0]).shape)
    if _index_types(ctx.node, ctx) == {torch.bool}:
        return _masked(ctx, base, shape, indices[0], new, accumulate=accumulate)
    places = _places(ctx, shape, indices)
    rest = [shape[axis] for axis in places.others]
    written = (*rest[: places.lead], *places.shape, *rest[places.lead :])
    new = expanded(ctx, new, ctx.meta(ctx.node.args[2]).shape, written)
    order, count = _moved_back(places), math.prod(places.shape)
    new = ctx.permute(new, [order.index(axis) for axis in range(len(order))])
    new = ctx.reshape(new, [count, *rest])
    positions = ctx.expand(places.positions, places.shape)
    positions = ctx.reshape(positions, [count])
    merged = _merged(ctx, base, shape, places)
    extent = math.prod(shape[axis] for axis in places.axes)
    if accumulate:
        index = ctx.reshape(positions, (-1, *(1,) * len(rest)))
        merged = accumulated(ctx, "SUM", merged, 0, extent, index, new)
    else:
        merged = placed(ctx, merged, new, 0, index_source(ctx, extent, positions, count))
    back = [*places.axes, *places.others]
    if len(places.axes) > 1:
        merged = ctx.reshape(merged, [shape[axis] for axis in back])
    return ctx.permute(merged, [back.index(axis) for axis in range(len(shape))])


def _masked(
    ctx: Network,
    base: ITensor,
    shape: Sequence[Size],
    mask: ITensor,
    new: ITensor,
    *,
    accumulate: bool,
) -> ITensor:
    """One value where the mask holds."""
    rest = len(shape) - len(mask.shape)
    if len(new.shape) > rest:
        new = ctx.reshape(new, list(ctx.extents.of(new))[1:])
    if accumulate:
        new = ctx.add(base, new)
    sizes = [*ctx.meta(ctx.node.args[1][0]).shape, *(1,) * rest]  # type: ignore[index]
    return ctx.select(ctx.reshape(mask, sizes), new, base)
