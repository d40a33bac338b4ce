"""Entries of an axis picked by positions: pads, flip, roll, unfold, diagonals.

Each is a gather with positions that are constants where the extents are known, and are computed
where they are not. TensorRT 10.6 was seen to read one entry too far where a concatenation of slices
of booleans was rolled; a gather has no such case.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from inplace_builder.graph.nodes import argument
from inplace_builder.lower.converters.shape import reshaped
from inplace_builder.lower.layers import AxisExtent, Extent, ITensor, Number, Size
from inplace_builder.lower.network import Network
from inplace_builder.lower.registry import converter

aten = torch.ops.aten


INT = torch.int32


class Positions:
    """Arithmetic on positions of an axis: constants if they are known, else layers.

    Args:
        ctx: the network.
        value: the positions: a tensor, or a tensor of the network.
    """

    def __init__(self, ctx: Network, value: torch.Tensor | ITensor) -> None:
        self._ctx, self.value = ctx, value

    @classmethod
    def counting(cls, ctx: Network, count: Extent) -> "Positions":
        """``[0, 1, …, count - 1]``."""
        if isinstance(count, int):
            return cls(ctx, torch.arange(count, dtype=INT))
        return cls(ctx, ctx.iota(count, INT))

    def tensor(self) -> ITensor:
        """The positions as a tensor of the network."""
        known = isinstance(self.value, torch.Tensor)
        return self._ctx.constant(self.value) if known else self.value

    def combined(
        self, operation: str, other: Extent, compute: Callable[[Any, Any], Any]
    ) -> "Positions":
        """The result of an operation with an extent.

        Args:
            operation: a member of TensorRT's ElementWiseOperation.
            other: the second operand.
            compute: the same in PyTorch.
        """
        ctx = self._ctx
        if isinstance(self.value, torch.Tensor) and isinstance(other, int):
            return Positions(ctx, compute(self.value, other))
        return Positions(ctx, ctx.elementwise(operation, self.tensor(), ctx.tensor(other, INT, 1)))

    def plus(self, other: Extent) -> "Positions":
        """Sum."""
        return self.combined("SUM", other, torch.add)

    def minus(self, other: Extent) -> "Positions":
        """Difference."""
        return self.combined("SUB", other, torch.sub)

    def at_least(self, other: Extent) -> "Positions":
        """Not below ``other``."""
        return self.combined("MAX", other, torch.clamp_min)

    def at_most(self, other: Extent) -> "Positions":
        """Not above ``other``."""
        return self.combined("MIN", other, torch.clamp_max)

    def negative(self) -> "Positions":
        """The negative of each."""
        return self.combined("PROD", -1, torch.mul)

    def magnitude(self) -> "Positions":
        """The absolute value of each."""
        if isinstance(self.value, torch.Tensor):
            return Positions(self._ctx, self.value.abs())
        return Positions(self._ctx, self._ctx.unary("ABS", self.value))

    def modulo(self, extent: Extent) -> "Positions":
        """The rest, never negative."""
        if isinstance(self.value, torch.Tensor) and isinstance(extent, int):
            return Positions(self._ctx, self.value % extent)
        ctx, by = self._ctx, self._ctx.tensor(extent, INT, 1)
        value = self.tensor()
        multiple = ctx.multiply(ctx.elementwise("FLOOR_DIV", value, by), by)
        return Positions(ctx, ctx.subtract(value, multiple))


def _reflected(source: Positions, extent: Size) -> Positions:
    last = extent - 1
    return source.magnitude().minus(last).magnitude().negative().plus(last)


def _nearest(source: Positions, extent: Size) -> Positions:
    return source.at_least(0).at_most(extent - 1)


def _circular(source: Positions, extent: Size) -> Positions:
    return source.modulo(extent)


MODES = {"reflect": _reflected, "replicate": _nearest, "circular": _circular}
"""The entry that each position beyond the ends repeats."""


def padded(
    ctx: Network,
    x: ITensor,
    axis: int,
    extent: Extent,
    before: Size,
    after: Size,
    *,
    mode: str = "constant",
    value: Number = 0,
) -> ITensor:
    """An axis with entries added at its ends; negative numbers drop entries.

    Args:
        ctx: the network.
        x: the tensor.
        axis: the axis.
        extent: its extent.
        before, after: number of entries added at the start and at the end.
        mode: ``constant``, or one of `MODES`.
        value: what is added where the mode is ``constant``.
    """
    if isinstance(before, int) and isinstance(after, int) and before == after == 0:
        return x
    if mode == "constant":
        return _padded_by_value(ctx, x, axis, extent, before, after, value)
    assert not isinstance(extent, AxisExtent)
    source = Positions.counting(ctx, extent + before + after).minus(before)
    return ctx.gather(x, MODES[mode](source, extent).tensor(), axis)


def _padded_by_value(
    ctx: Network,
    x: ITensor,
    axis: int,
    extent: Extent,
    before: Size,
    after: Size,
    value: Number,
) -> ITensor:
    dtype, rank = ctx.dtype_of(x), len(x.shape)
    if isinstance(extent, AxisExtent):  # only the end grows, by a known number
        assert before == 0 and isinstance(after, int)
        shape = list(ctx.extents.of(x))
        shape[axis] = after
        zeros = ctx.expand(ctx.scalar(value, dtype, rank), shape)
        return ctx.concatenate([x, zeros], axis)
    source = Positions.counting(ctx, extent + before + after).minus(before)
    nearest = _nearest(source, extent)
    entries = ctx.gather(x, nearest.tensor(), axis)
    if isinstance(source.value, torch.Tensor):
        inside = ctx.constant(source.value == nearest.value)
    else:
        inside = ctx.equal(source.tensor(), nearest.tensor())
    shape = [1] * rank
    shape[axis] = -1
    return ctx.select(ctx.reshape(inside, shape), entries, ctx.scalar(value, dtype, rank))


def _pads(ctx: Network, x: ITensor, amounts: Sequence[Size], **how: Any) -> ITensor:
    """Pad the last axes; ``amounts`` begin with the last axis."""
    shape = ctx.meta(ctx.node.args[0]).shape
    for place in range(len(amounts) // 2):
        axis = len(shape) - 1 - place
        before, after = amounts[2 * place : 2 * place + 2]
        x = padded(ctx, x, axis, shape[axis], before, after, **how)
    return x


@converter(aten.constant_pad_nd.default)
def constant_pad(ctx: Network, x: ITensor, amounts: Sequence[Size], value: Number = 0) -> ITensor:
    """One value beyond the ends."""
    return _pads(ctx, x, amounts, value=value)


@converter(aten.pad.default)
def pad(
    ctx: Network,
    x: ITensor,
    amounts: Sequence[Size],
    mode: str = "constant",
    value: Number | None = None,
) -> ITensor:
    """Entries beyond the ends: a value, the reflection, the last entry, or the other end's."""
    return _pads(ctx, x, amounts, mode=mode, value=value or 0)


@converter(
    aten.reflection_pad1d.default, aten.reflection_pad2d.default, aten.reflection_pad3d.default
)
def reflection_pad(ctx: Network, x: ITensor, amounts: Sequence[Size]) -> ITensor:
    """The entries before the ends, in reverse order."""
    return _pads(ctx, x, amounts, mode="reflect")


@converter(
    aten.replication_pad1d.default, aten.replication_pad2d.default, aten.replication_pad3d.default
)
def replication_pad(ctx: Network, x: ITensor, amounts: Sequence[Size]) -> ITensor:
    """The first and the last entry again."""
    return _pads(ctx, x, amounts, mode="replicate")


@converter(aten.flip.default)
def flip(ctx: Network, x: ITensor, dims: Sequence[int]) -> ITensor:
    """Axes in reverse order."""
    shape = ctx.meta(ctx.node.args[0]).shape
    for dim in dims:
        axis = dim % len(shape)
        counted = Positions.counting(ctx, shape[axis])
        x = ctx.gather(x, counted.negative().plus(shape[axis] - 1).tensor(), axis)
    return x


@converter(aten.roll.default)
def roll(ctx: Network, x: ITensor, shifts: Sequence[Size], dims: Sequence[int] = ()) -> ITensor:
    """Move entries along an axis; those that pass the end continue at the start.

    Without axes the tensor is rolled as one vector.
    """
    shape = ctx.meta(ctx.node.args[0]).shape
    if not dims:
        count: Size = math.prod(shape)
        flat = _rolled(ctx, ctx.reshape(x, [-1]), count, shifts[0], 0)
        return reshaped(ctx, flat, (count,), shape)
    for shift, dim in zip(shifts, dims, strict=True):
        axis = dim % len(shape)
        x = _rolled(ctx, x, shape[axis], shift, axis)
    return x


def _rolled(ctx: Network, x: ITensor, extent: Size, shift: Size, axis: int) -> ITensor:
    source = Positions.counting(ctx, extent).minus(shift).modulo(extent)
    return ctx.gather(x, source.tensor(), axis)


@converter(aten.unfold.default)
def unfold(ctx: Network, x: ITensor, dim: int, size: int, step: int) -> ITensor:
    """Windows of ``size`` entries, every ``step``-th one; they become the last axis."""
    rank = len(ctx.meta(ctx.node.args[0]).shape)
    if not rank:
        return ctx.reshape(x, [1])
    axis = dim % rank
    first = Positions.counting(ctx, ctx.result().shape[axis]).combined("PROD", step, torch.mul)
    within = torch.arange(size, dtype=INT)
    if isinstance(first.value, torch.Tensor):
        source = ctx.constant(first.value[:, None] + within)
    else:
        source = ctx.add(ctx.unsqueeze(first.value, [1]), ctx.constant(within[None]))
    windows = ctx.gather(x, source, axis)
    order = [*range(axis + 1), *range(axis + 2, rank + 1), axis + 1]
    return ctx.permute(windows, order)


def _known_extents(node: Node, ctx: Network) -> str | None:
    """Two axes of known extents; others may vary."""
    shape = ctx.meta(node.args[0]).shape
    first = 2 if node.target is aten.diagonal_scatter.default else 1
    dims = (argument(node, first + 1, "dim1", 0), argument(node, first + 2, "dim2", 1))
    known = all(isinstance(shape[dim], int) for dim in dims)
    return None if known else "an axis of the diagonal has a dynamic extent"


def _diagonal_source(shape: Sequence[int], offset: int, dims: tuple[int, int]) -> torch.Tensor:
    """Places of a diagonal in the two axes, flattened."""
    rows, columns = (shape[dim] for dim in dims)
    first, start = max(-offset, 0), max(offset, 0)
    count = max(min(rows - first, columns - start), 0)
    along = torch.arange(count, dtype=INT)
    return (along + first) * columns + along + start


@converter(aten.diagonal.default, validator=_known_extents)
def diagonal(ctx: Network, x: ITensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> ITensor:
    """A diagonal of two axes, as the last axis."""
    shape = ctx.meta(ctx.node.args[0]).shape
    dims = (dim1 % len(shape), dim2 % len(shape))
    others = [axis for axis in range(len(shape)) if axis not in dims]
    count = shape[dims[0]] * shape[dims[1]]
    flat = ctx.reshape(ctx.permute(x, [*others, *dims]), (*(shape[axis] for axis in others), count))
    return ctx.gather(flat, ctx.constant(_diagonal_source(shape, offset, dims)), len(others))


@converter(aten.diagonal_scatter.default, validator=_known_extents)
def diagonal_scatter(
    ctx: Network, base: ITensor, new: ITensor, offset: int = 0, dim1: int = 0, dim2: int = 1
) -> ITensor:
    """Another diagonal in two axes."""
    shape = ctx.meta(ctx.node.args[0]).shape
    dims = (dim1 % len(shape), dim2 % len(shape))
    others = [axis for axis in range(len(shape)) if axis not in dims]
    order, count = [*others, *dims], shape[dims[0]] * shape[dims[1]]
    places = _diagonal_source(shape, offset, dims).long()
    source = torch.full((count,), -1, dtype=INT)
    source[places] = torch.arange(len(places), dtype=INT)
    flat = ctx.reshape(ctx.permute(base, order), (*(shape[axis] for axis in others), count))
    entries = ctx.gather(new, ctx.constant(source.clamp_min(0)), len(others))
    mask = ctx.constant((source >= 0).reshape(*(1,) * len(others), count))
    flat = ctx.select(mask, entries, flat)
    inverse = [order.index(axis) for axis in range(len(shape))]
    return ctx.permute(ctx.reshape(flat, [shape[axis] for axis in order]), inverse)


def _contiguous(node: Node, ctx: Network) -> str | None:
    """Contiguous tensors whose extents are known, at their own place in memory."""
    x = ctx.meta(node.args[0])
    sizes: Any = (*node.args[1], *node.args[2])  # type: ignore[misc]
    offset = node.args[3] if len(node.args) > 3 else None
    if not all(isinstance(extent, int) for extent in (*x.shape, *sizes)):
        return "the input has a dynamic extent"
    if not x.is_contiguous() or (offset is not None and x.storage_offset() != 0):
        return "it reads the memory of a view"
    return None


@converter(aten.as_strided.default, validator=_contiguous)
def as_strided(
    ctx: Network,
    x: ITensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int | None = None,
) -> ITensor:
    """Elements at a distance of ``stride`` from each other."""
    count = ctx.meta(ctx.node.args[0]).numel()
    places = torch.arange(count, dtype=INT).as_strided(size, stride, storage_offset or 0)
    return ctx.gather(ctx.reshape(x, [-1]), ctx.constant(places.contiguous()), 0)
