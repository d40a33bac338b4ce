"""Decompositions of operators that neither TensorRT has nor PyTorch decomposes."""

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def kthvalue(x: Tensor, k: Any, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The k-th smallest value of an axis, and its position: by a sort."""
    values, places = x.sort(dim)
    kth = (each.narrow(dim, k - 1, 1) for each in (values, places))
    value, place = (each if keepdim else each.squeeze(dim) for each in kth)
    return value, place


def median(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The lower median of an axis, and its position; the first NaN if there is one."""
    value, place = kthvalue(x, (x.shape[dim] + 1) // 2, dim, keepdim)
    if not x.is_floating_point():
        return value, place
    unknown = x.isnan()
    shape = [-1 if axis == dim % x.dim() else 1 for axis in range(x.dim())]
    index = torch.arange(x.shape[dim], device=x.device).view(shape)
    first = torch.where(unknown, index, x.shape[dim]).amin(dim, keepdim)
    any_unknown = unknown.any(dim, keepdim)
    return torch.where(any_unknown, float("nan"), value), torch.where(any_unknown, first, place)


def median_of_all(x: Tensor) -> Tensor:
    """The lower median of all elements."""
    return median(x.flatten(), 0)[0]


def cummax(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The largest value so far, and its last position."""
    lowest = float("-inf") if x.is_floating_point() else torch.iinfo(x.dtype).min
    return _extreme_so_far(x, dim, torch.amax, lowest)


def cummin(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The smallest value so far, and its last position."""
    highest = float("inf") if x.is_floating_point() else torch.iinfo(x.dtype).max
    return _extreme_so_far(x, dim, torch.amin, highest)


def _extreme_so_far(x: Tensor, dim: int, extreme: Any, other: float) -> tuple[Tensor, Tensor]:
    """The extreme and the last place of it, or of a NaN; of all pairs of an axis."""
    seen = _so_far(x, dim, other)
    value = extreme(seen, -1, keepdim=True)
    matches = seen == value
    if x.is_floating_point():
        matches = matches | seen.isnan()
    place = torch.where(matches, torch.arange(x.shape[dim], device=x.device), -1).amax(-1)
    return value.squeeze(-1).movedim(-1, dim), place.movedim(-1, dim)


def logcumsumexp(x: Tensor, dim: int) -> Tensor:
    """The logarithm of the sum of exponentials so far; of all pairs of an axis."""
    return _so_far(x, dim, float("-inf")).logsumexp(-1).movedim(-1, dim)


def _so_far(x: Tensor, dim: int, other: float) -> Tensor:
    """For each element of an axis all up to it ``[..., n, n]``, and another value for the rest."""
    moved = x.movedim(dim, -1)
    extent = moved.shape[-1]
    index = torch.arange(extent, device=x.device)
    wide = moved.unsqueeze(-2).expand(*moved.shape[:-1], extent, extent)
    return torch.where(index <= index[:, None], wide, other)


def rrelu(
    x: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    generator: None = None,
) -> Tensor:
    """A leaky ReLU outside training; in training it is random, and refused before."""
    return torch.nn.functional.leaky_relu(x, (lower + upper) / 2)


OWN: dict[Any, Any] = {
    aten.kthvalue.default: kthvalue,
    aten.median.dim: median,
    aten.median.default: median_of_all,
    aten.cummax.default: cummax,
    aten.cummin.default: cummin,
    aten.logcumsumexp.default: logcumsumexp,
    aten.rrelu.default: rrelu,
}
"""The decomposition of each operator."""
