"""Convolutions, plain and transposed, in one, two and three dimensions.

TensorRT has them in two and three; one in one dimension is one in two whose last extent is 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from inplace_builder.graph.nodes import per_axis
from inplace_builder.lower.converters.padding import padded
from inplace_builder.lower.layers import ITensor
from inplace_builder.lower.network import Network
from inplace_builder.lower.registry import converter

aten = torch.ops.aten


@dataclass(frozen=True)
class Window:
    """How a kernel moves over its input; one number for each spatial axis.

    Attributes:
        stride, dilation: as PyTorch has them.
        before, after: zeros added at the two ends; of a transposed convolution, entries of the
            result that are dropped there.
        extra: zeros added at the end of a transposed convolution's result.
        groups: channels are divided into so many groups that do not mix.
    """

    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    extra: tuple[int, ...]
    groups: int


def _constant_kernel(node: Node, ctx: Network) -> str | None:
    """Kernels that are parameters, or computed from parameters only."""
    return (
        None
        if ctx.parameter(node.args[1]) is not None
        else "its kernel is computed from inputs; only parameters, and what is computed from them, "
        "are lowered"
    )


@converter(
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
    validator=_constant_kernel,
)
def conv(
    ctx: Network,
    x: ITensor,
    weight: ITensor,
    bias: ITensor | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] | str = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> ITensor:
    """A convolution; ``padding`` may be ``same`` or ``valid``."""
    kernel = _kernel(ctx)
    axes = kernel.dim() - 2
    spread = per_axis(dilation, axes)
    if isinstance(padding, str):
        total = [
            rate * (size - 1) if padding == "same" else 0
            for rate, size in zip(spread, kernel.shape[2:], strict=True)
        ]
        before = tuple(each // 2 for each in total)
        after = tuple(each - half for each, half in zip(total, before, strict=True))
    else:
        before = after = per_axis(padding, axes)
    window = Window(per_axis(stride, axes), spread, before, after, (0,) * axes, groups)
    return _convolved(ctx, x, kernel, bias, window, transposed=False)


@converter(
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    validator=_constant_kernel,
)
def conv_transpose(
    ctx: Network,
    x: ITensor,
    weight: ITensor,
    bias: ITensor | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    output_padding: Sequence[int] = (0,),
    groups: int = 1,
    dilation: Sequence[int] = (1,),
) -> ITensor:
    """A transposed convolution."""
    kernel = _kernel(ctx)
    window = _transposed(kernel, stride, padding, output_padding, dilation, groups)
    return _convolved(ctx, x, kernel, bias, window, transposed=True)


@converter(aten.convolution.default, validator=_constant_kernel)
def convolution(
    ctx: Network,
    x: ITensor,
    weight: ITensor,
    bias: ITensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> ITensor:
    """A convolution of any kind, as core ATen has it."""
    kernel = _kernel(ctx)
    axes = kernel.dim() - 2
    if transposed:
        window = _transposed(kernel, stride, padding, output_padding, dilation, groups)
    else:
        ends = per_axis(padding, axes)
        window = Window(
            per_axis(stride, axes), per_axis(dilation, axes), ends, ends, (0,) * axes, groups
        )
    return _convolved(ctx, x, kernel, bias, window, transposed=transposed)


def _kernel(ctx: Network) -> torch.Tensor:
    kernel = ctx.parameter(ctx.node.args[1])
    assert kernel is not None
    return kernel


def _transposed(
    kernel: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Window:
    """The window of a transposed convolution.

    Output padding keeps entries that padding would drop at the end; beyond those it adds zeros.
    """
    axes = kernel.dim() - 2
    before, more = per_axis(padding, axes), per_axis(output_padding, axes)
    return Window(
        per_axis(stride, axes),
        per_axis(dilation, axes),
        before,
        tuple(max(end - each, 0) for end, each in zip(before, more, strict=True)),
        tuple(max(each - end, 0) for end, each in zip(before, more, strict=True)),
        groups,
    )


def _spread(kernel: torch.Tensor, window: Window) -> tuple[torch.Tensor, Window]:
    """A dilated kernel with its zeros: TensorRT has no kernel that is strided and dilated."""
    sizes = [
        rate * (size - 1) + 1 for rate, size in zip(window.dilation, kernel.shape[2:], strict=True)
    ]
    spread = kernel.new_zeros((*kernel.shape[:2], *sizes))
    places: Any = (..., *(slice(None, None, rate) for rate in window.dilation))
    spread[places] = kernel
    return spread, replace(window, dilation=(1,) * len(window.dilation))


def _convolved(
    ctx: Network,
    x: ITensor,
    kernel: torch.Tensor,
    bias: ITensor | None,
    window: Window,
    *,
    transposed: bool,
) -> ITensor:
    """Add the layer.

    Args:
        ctx: the network.
        x: ``[batch, channels, *extents]``, or without the batch.
        kernel: the parameter, in PyTorch's layout, which is TensorRT's.
        bias: one number for each output channel.
        window: how the kernel moves.
        transposed: whether it is a transposed convolution.
    """
    if transposed and any(rate > 1 for rate in window.dilation):
        kernel, window = _spread(kernel, window)
    axes, api = kernel.dim() - 2, ctx.api
    flat = axes == 1
    batched = len(x.shape) == kernel.dim()
    x = ctx.expand_rank(x, kernel.dim())
    if flat:
        x = ctx.unsqueeze(x, [3])
        kernel = kernel.unsqueeze(3)
    channels = kernel.shape[1] * window.groups if transposed else kernel.shape[0]
    empty = api.Weights(ctx.tensorrt.dtype(kernel.dtype))
    add = ctx.network.add_deconvolution_nd if transposed else ctx.network.add_convolution_nd
    key = ("kernel", ctx.node.args[1], tuple(kernel.shape))  # its dilation may be part of it
    weights = ctx.cached(key, lambda: ctx.constant(kernel))
    layer = ctx.checked(add(x, channels, tuple(kernel.shape[2:]), empty, empty))
    layer.set_input(1, weights)
    layer.stride_nd = (*window.stride, 1) if flat else window.stride
    layer.dilation_nd = (*window.dilation, 1) if flat else window.dilation
    layer.pre_padding = (*window.before, 0) if flat else window.before
    layer.post_padding = (*window.after, 0) if flat else window.after
    layer.num_groups = window.groups
    result = layer.get_output(0)
    if any(window.extra):
        extents = list(ctx.extents.of(result))
        for axis, extra in enumerate(window.extra, 2):
            result = padded(ctx, result, axis, extents[axis], 0, extra)
    if bias is not None:
        result = ctx.add(result, ctx.reshape(bias, (1, channels, *(1,) * (len(x.shape) - 2))))
    sizes = list(ctx.extents.of(result))
    sizes = sizes[:3] if flat else sizes
    if flat or not batched:
        result = ctx.reshape(result, sizes if batched else sizes[1:])
    return result
