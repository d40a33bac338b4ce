"""Pools: the largest value or the mean of windows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from inplace_builder.graph.nodes import argument, only_first_used, per_axis
from inplace_builder.lower.layers import HALF, ITensor, Size
from inplace_builder.lower.network import Network
from inplace_builder.lower.registry import converter

aten = torch.ops.aten


@dataclass(frozen=True)
class _Windows:
    """Windows of a pool; one number for each axis that is pooled.

    Attributes:
        size: entries of a window.
        stride: distance of windows.
        padding: entries added at both ends.
        inputs: extents of the axes.
        outputs: number of windows.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    inputs: tuple[Size, ...]
    outputs: tuple[Size, ...]

    @classmethod
    def of(
        cls, ctx: Network, kernel: Sequence[int], stride: Sequence[int], padding: Any, axes: int
    ) -> "_Windows":
        """The windows of the current node's arguments."""
        size = per_axis(kernel, axes)
        values = ctx.node.meta["val"]
        result = values[0] if isinstance(values, list | tuple) else values
        return cls(
            size,
            per_axis(stride, axes) if stride else size,
            per_axis(padding, axes),
            tuple(ctx.meta(ctx.node.args[0]).shape[-axes:]),
            tuple(result.shape[-axes:]),
        )

    def rounded_up(self) -> tuple[int, ...]:
        """Entries to add at the end so that the last window, which ceil_mode adds, is whole."""
        return tuple(
            max((count - 1) * step + size - extent - 2 * pad, 0)
            if isinstance(extent, int) and isinstance(count, int)
            else 0
            for size, step, pad, extent, count in zip(
                self.size, self.stride, self.padding, self.inputs, self.outputs, strict=True
            )
        )


def _pooled(
    ctx: Network, kind: str, x: ITensor, windows: _Windows, *, count_padding: bool = True
) -> ITensor:
    """Add TensorRT's pooling layer, which has two or three axes.

    Args:
        ctx: the network.
        kind: a member of TensorRT's PoolingType.
        x: ``[batch, channels, *extents]``, or without the batch.
        windows: the windows.
        count_padding: whether entries that were added count for a mean.
    """
    axes = len(windows.size)
    flat, batched = axes == 1, len(x.shape) == axes + 2
    x = ctx.expand_rank(x, axes + 2)
    if flat:
        x = ctx.unsqueeze(x, [3])

    def numbers(values: Sequence[int], more: int) -> tuple[int, ...]:
        return (*values, more) if flat else tuple(values)

    layer = ctx.checked(
        ctx.network.add_pooling_nd(x, getattr(ctx.api.PoolingType, kind), numbers(windows.size, 1))
    )
    after = tuple(a + b for a, b in zip(windows.padding, windows.rounded_up(), strict=True))
    layer.stride_nd = numbers(windows.stride, 1)
    layer.pre_padding, layer.post_padding = numbers(windows.padding, 0), numbers(after, 0)
    if kind == "AVERAGE":
        layer.average_count_excludes_padding = not count_padding
    result = layer.get_output(0)
    sizes = list(ctx.extents.of(result))
    sizes = sizes[:3] if flat else sizes
    if flat or not batched:
        result = ctx.reshape(result, sizes if batched else sizes[1:])
    return result


def _pooled_axes(node: Node) -> int:
    """How many axes an operator pools: the number in its name."""
    name = node.target._schema.name  # type: ignore[union-attr]
    return next(count for count in (1, 2, 3) if f"pool{count}d" in name)


def _plain_max(node: Node, ctx: Network) -> str | None:
    """Floating-point numbers, dilation 1; the positions of the maxima must not be used."""
    dilation: Any = argument(node, 4, "dilation", (1,))
    if any(each != 1 for each in per_axis(dilation, 1)):
        return "its windows are dilated"
    if not ctx.meta(node.args[0]).dtype.is_floating_point:
        return "TensorRT pools no integers"
    return only_first_used(node) if isinstance(node.meta["val"], tuple | list) else None


@converter(
    aten.max_pool1d.default,
    aten.max_pool2d.default,
    aten.max_pool3d.default,
    validator=_plain_max,
)
def max_pool(
    ctx: Network,
    x: ITensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> ITensor:
    """Largest value of each window."""
    windows = _Windows.of(ctx, kernel, stride, padding, _pooled_axes(ctx.node))
    return _pooled(ctx, "MAX", x, windows)


@converter(
    aten.max_pool1d_with_indices.default,
    aten.max_pool2d_with_indices.default,
    aten.max_pool3d_with_indices.default,
    validator=_plain_max,
)
def max_pool_with_indices(ctx: Network, *arguments: Any, **options: Any) -> list[ITensor | None]:
    """Largest value of each window; their positions are not lowered."""
    return [max_pool(ctx, *arguments, **options), None]


def _known_counts(node: Node, ctx: Network) -> str | None:
    """With ``ceil_mode``: extents that are known."""
    x, ceil = ctx.meta(node.args[0]), argument(node, 4, "ceil_mode", False)
    known = all(isinstance(extent, int) for extent in x.shape[1:])
    return None if known or not ceil else "it rounds up, and the input has a dynamic extent"


@converter(
    aten.avg_pool1d.default,
    aten.avg_pool2d.default,
    aten.avg_pool3d.default,
    validator=_known_counts,
)
def avg_pool(
    ctx: Network,
    x: ITensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> ITensor:
    """Mean of each window."""
    windows = _Windows.of(ctx, kernel, stride, padding, _pooled_axes(ctx.node))
    rounds_up = any(windows.rounded_up())
    whole = torch.Size(windows.size).numel()
    include = count_include_pad or divisor_override is not None or rounds_up
    dtype = ctx.dtype_of(x)
    compute = torch.float32 if dtype in HALF else dtype
    result = _pooled(ctx, "AVERAGE", ctx.cast(x, compute), windows, count_padding=include)
    if divisor_override is not None:
        result = ctx.multiply(result, ctx.scalar(whole / divisor_override, compute))
    elif rounds_up:
        factor = whole / _counts(windows, with_padding=count_include_pad).to(compute)
        result = ctx.multiply(result, ctx.constant(factor))
    return ctx.cast(result, dtype)


def _counts(windows: _Windows, *, with_padding: bool) -> torch.Tensor:
    """How many entries of each window count for its mean; extents are known."""
    total = torch.ones(())
    for size, step, pad, extent, count in zip(
        windows.size,
        windows.stride,
        windows.padding,
        windows.inputs,
        windows.outputs,
        strict=True,
    ):
        starts = torch.arange(int(count)) * step - pad
        ends = torch.minimum(starts + size, torch.tensor(extent + pad))
        if not with_padding:
            starts, ends = starts.clamp_min(0), ends.clamp_max(int(extent))
        total = total[..., None] * (ends - starts)
    return total


def _adaptive_axes(node: Node, ctx: Network) -> str | None:
    """Extents that are known, where the result has more than one entry; no positions."""
    target: Any = node.args[1]
    x = ctx.meta(node.args[0])
    extents = x.shape[-len(target) :]
    if any(
        not isinstance(extent, int) and count not in (1, None)
        for extent, count in zip(extents, target, strict=True)
    ):
        return "the input has a dynamic extent"
    return only_first_used(node) if isinstance(node.meta["val"], tuple | list) else None


def _bounds(extent: int, count: int) -> list[tuple[int, int]]:
    """Start and end of each window of an adaptive pool."""
    return [(place * extent // count, -(-(place + 1) * extent // count)) for place in range(count)]


@converter(
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
    aten._adaptive_avg_pool2d.default,
    aten._adaptive_avg_pool3d.default,
    validator=_adaptive_axes,
)
def adaptive_avg_pool(ctx: Network, x: ITensor, target: Sequence[int | None]) -> ITensor:
    """Mean of as many windows as the result has entries: a product with a constant matrix."""
    dtype = ctx.dtype_of(x)
    compute = torch.float32 if dtype in HALF else dtype
    x, rank = ctx.cast(x, compute), len(x.shape)
    shape = ctx.meta(ctx.node.args[0]).shape
    for place, count in enumerate(target):
        axis = rank - len(target) + place
        if count is None or (isinstance(shape[axis], int) and shape[axis] == count):
            continue
        if count == 1:
            x = ctx.reduce("AVG", x, [axis], keep=True)
            continue
        weights = torch.zeros(shape[axis], count, dtype=compute)
        for column, (start, end) in enumerate(_bounds(shape[axis], count)):
            weights[start:end, column] = 1 / (end - start)
        x = _multiplied_along(ctx, x, weights, axis)
    return ctx.cast(x, dtype)


def _multiplied_along(ctx: Network, x: ITensor, weights: torch.Tensor, axis: int) -> ITensor:
    """The product of an axis with a constant matrix."""
    rank = len(x.shape)
    order = [*(each for each in range(rank) if each != axis), axis]
    product = ctx.matmul(ctx.permute(x, order), ctx.constant(weights))
    return ctx.permute(product, [order.index(each) for each in range(rank)])


@converter(
    aten.adaptive_max_pool1d.default,
    aten.adaptive_max_pool2d.default,
    aten.adaptive_max_pool3d.default,
    validator=_adaptive_axes,
)
def adaptive_max_pool(
    ctx: Network, x: ITensor, target: Sequence[int]
) -> tuple[ITensor, ITensor | None]:
    """Largest value of as many windows as the result has entries."""
    rank, shape = len(x.shape), ctx.meta(ctx.node.args[0]).shape
    for place, count in enumerate(target):
        axis = rank - len(target) + place
        if count == 1:
            x = ctx.reduce("MAX", x, [axis], keep=True)
            continue
        bounds = _bounds(shape[axis], count)
        width = max(end - start for start, end in bounds)
        entries = torch.tensor(
            [[min(start + step, end - 1) for step in range(width)] for start, end in bounds]
        )
        windows = ctx.gather(x, ctx.constant(entries.int()), axis)
        x = ctx.reduce("MAX", windows, [axis + 1], keep=False)
    return x, None
