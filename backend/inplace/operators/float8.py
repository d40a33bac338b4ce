"""8-bit floats (e4m3, arXiv:2209.05433) with scales: weights, activations of a step, caches.

A number is its 8-bit float times its scale, in float32. A scale belongs to a group of neighbours
along the inputs of one output, or of one token: to `group` of them, the last group may have fewer,
or to all where ``group`` is 0. In caches each kv head has one.
"""

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of `FLOAT8`."""
MIN_SCALE = 2.0**-100
"""The smallest scale: products with it are no subnormal numbers, which a GPU may take for 0."""


def num_groups(inputs: int, group: int) -> int:
    """How many scales ``inputs`` neighbours have."""
    return -(-inputs // group) if group else 1


def quantize(x: Tensor, group: int = 0) -> tuple[Tensor, Tensor]:
    """Round to 8-bit floats, so that the largest of a group is the largest 8-bit float.

    Args:
        x: ``[..., inputs]`` of any floating type.
        group: neighbours with one scale; 0 for all.

    Returns:
        ``[..., inputs]`` `FLOAT8`, and their scales ``[..., groups]`` float32: ``max |x| / 448``,
        and 1 where that is 0. An element is ``x / scale``, rounded to the nearest, ties to even.
    """
    wide = x.float()
    inputs = wide.shape[-1]
    groups = num_groups(inputs, group)
    padding = groups * group - inputs if group else 0
    padded = torch.nn.functional.pad(wide, (0, padding))
    largest = padded.unflatten(-1, (groups, -1)).abs().amax(-1)
    scale = largest / LARGEST
    scale = torch.where(scale == 0, 1.0, scale)  # also where that is below all numbers
    return (wide / spread(scale, inputs, group)).clamp(-LARGEST, LARGEST).to(FLOAT8), scale


def power_of_two(largest: Tensor) -> Tensor:
    """The smallest powers of two with which numbers up to these are no larger than `LARGEST`.

    Args:
        largest: of any floating type.

    Returns:
        float32, at least `MIN_SCALE`, and 1 for 0.
    """
    exponents = torch.ceil(torch.log2(largest.double() / LARGEST))
    return torch.where(largest == 0, 1.0, exponents.exp2()).clamp(min=MIN_SCALE).float()


def spread(scale: Tensor, inputs: int, group: int) -> Tensor:
    """The scale of each element: ``[..., groups]`` as ``[..., inputs]``, or ``[..., 1]``."""
    return scale.repeat_interleave(group, -1)[..., :inputs] if group else scale


def dequantize(values: Tensor, scale: Tensor, group: int = 0) -> Tensor:
    """The numbers ``[..., inputs]`` in float32.

    Args:
        values: ``[..., inputs]`` `FLOAT8`.
        scale: ``[..., groups]`` float32.
        group: neighbours with one scale; 0 for all.
    """
    return values.float() * spread(scale, values.shape[-1], group)


def quantize_heads(x: Tensor, scale: Tensor) -> Tensor:
    """Round keys or values to what a cache of 8-bit floats stores.

    Args:
        x: ``[tokens, heads, dim]`` of any floating type.
        scale: ``[heads]`` float32.

    Returns:
        ``[tokens, heads, dim]`` `FLOAT8`: ``x / scale`` in float32, rounded to the nearest, ties to
        even. What is larger than the largest 8-bit float becomes that; only NaN becomes NaN.
    """
    return (x.float() / scale[:, None]).clamp(-LARGEST, LARGEST).to(FLOAT8)
