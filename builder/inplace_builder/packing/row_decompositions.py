"""Decompositions of operators that `torch.vmap` has no rule for and PyTorch does not decompose.

Each computes one row, with operators that have rules.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten: Any = torch.ops.aten


def trilinear(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    expand_a: Sequence[int],
    expand_b: Sequence[int],
    expand_c: Sequence[int],
    sum_dims: Sequence[int],
    unroll: int = 1,
) -> Tensor:
    """``aten::_trilinear``, that `torch.nn.Bilinear` calls."""
    for axes, place in ((expand_a, 0), (expand_b, 1), (expand_c, 2)):
        for axis in axes:
            if place == 0:
                a = a.unsqueeze(axis)
            elif place == 1:
                b = b.unsqueeze(axis)
            else:
                c = c.unsqueeze(axis)
    return (a * b * c).sum(list(sum_dims))


def masked_scatter(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """``aten::masked_scatter`` with the place of each masked element counted."""
    x, mask = torch.broadcast_tensors(x, mask)
    places = mask.reshape(-1).cumsum(0).sub(1).clamp(0, source.numel() - 1)
    return torch.where(mask, source.reshape(-1)[places].reshape(x.shape), x)


def as_strided_scatter(
    x: Tensor,
    new: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int | None = None,
) -> Tensor:
    """``aten::as_strided_scatter`` with an index, for a tensor that fills its memory in order."""
    if not x.is_contiguous() or x.storage_offset():
        raise ValueError("it writes the memory of a view")
    places = torch.arange(x.numel()).as_strided(size, stride, storage_offset or 0)
    return x.reshape(-1).index_copy(0, places.reshape(-1), new.reshape(-1)).reshape(x.shape)


def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> list[Tensor]:
    """``aten::embedding_bag``: the sum, the mean or the largest of the entries of each bag.

    Entries before the first offset are in no bag, and those behind the last one neither if it is
    included, as PyTorch documents it. (Its operator for the CPU counts the latter in means, in
    maxima and where ``padding_idx`` is given.)

    Args:
        weight: ``[embeddings, dim]``.
        indices: ``[entries]``.
        offsets: ``[bags]``, where each bag begins, and with ``include_last_offset`` where the last
            one ends.
        scale_grad_by_freq: without effect.
        mode: 0 is the sum, 1 the mean, 2 the largest; 0 for a bag without entries.
        sparse: without effect.
        per_sample_weights: ``[entries]``.
        include_last_offset: see ``offsets``.
        padding_idx: the entry that does not count.

    Returns:
        The bags ``[bags, dim]``; not what only a gradient needs.
    """
    bags = offsets.shape[0] - include_last_offset
    place = torch.arange(indices.shape[0], device=indices.device)
    bag = (offsets <= place[:, None]).sum(-1) - 1
    counted = (bag >= 0) & (bag < bags)
    if padding_idx is not None:
        counted = counted & (indices != padding_idx % weight.shape[0])
    bag = torch.where(counted, bag, bags)  # one more for what does not count

    half = weight.dtype in (torch.float16, torch.bfloat16)
    entries = aten.embedding(weight, indices).to(torch.float32 if half else weight.dtype)
    if per_sample_weights is not None:
        entries = entries * per_sample_weights[:, None]
    index = bag[:, None].expand(entries.shape)
    into = entries.new_zeros(bags + 1, entries.shape[1])
    if mode == 2:
        result = into.scatter_reduce(0, index, entries, "amax", include_self=False)
    else:
        result = into.scatter_add(0, index, entries)
    if mode == 1:
        count = bag.new_zeros(bags + 1).scatter_add(0, bag, torch.ones_like(bag))
        result = result / count.clamp(min=1)[:, None]
    return [result[:bags].to(weight.dtype)]


def searchsorted(boundaries: Tensor, value: float, **options: Any) -> Tensor:
    """``aten::searchsorted`` of a number."""
    whole = isinstance(value, int) and not boundaries.is_floating_point()
    dtype = torch.int64 if whole else torch.get_default_dtype()
    sought = torch.full((1,), value, dtype=dtype, device=boundaries.device)
    result: Tensor = aten.searchsorted.Tensor(boundaries, sought, **options)
    return result.squeeze(0)


def bucketize(value: float, boundaries: Tensor, **options: Any) -> Tensor:
    """``aten::bucketize`` of a number."""
    return searchsorted(boundaries, value, **options)


def vander(x: Tensor, N: int | None = None, increasing: bool = False) -> Tensor:  # noqa: N803
    """``aten::vander``: the powers of each of ``[values]``."""
    powers = x.shape[0] if N is None else N
    wide = torch.int64 if not (x.is_floating_point() or x.is_complex()) else x.dtype
    ones = x.new_ones(x.shape[0], min(powers, 1), dtype=wide)
    rest = x.to(wide)[:, None].expand(-1, max(powers - 1, 0)).cumprod(-1)
    columns = torch.cat([ones, rest], -1)
    return columns if increasing else columns.flip(-1)


def fake_quantize(
    x: Tensor, scale: Any, zero_point: Any, quant_min: int, quant_max: int
) -> list[Tensor]:
    """``aten::fake_quantize_per_tensor_affine_cachemask``: rounded as integers would be."""
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=torch.float32, device=x.device)
    if isinstance(zero_point, Tensor) and zero_point.is_floating_point():
        rounded = (x * (1.0 / scale) + zero_point).round()
    else:  # as PyTorch does it: halves are rounded to even numbers before it is added
        rounded = (x * (1.0 / scale)).round() + zero_point
    rounded = rounded.clamp(quant_min, quant_max)
    return [((rounded - zero_point) * scale).to(x.dtype)]


def fake_quantize_if(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    enabled: Tensor,
    quant_min: int,
    quant_max: int,
) -> list[Tensor]:
    """The same where ``enabled`` is 1, as modules in training for quantization have it."""
    (rounded,) = fake_quantize(x, scale, zero_point, quant_min, quant_max)
    return [torch.where(enabled == 1, rounded, x)]


def fake_quantize_channels(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int, quant_max: int
) -> list[Tensor]:
    """The same with a scale and a zero point for each entry of an axis."""
    shape = [-1 if each == axis % x.dim() else 1 for each in range(x.dim())]
    scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    return fake_quantize(x, scale, zero_point, quant_min, quant_max)


def rrelu_with_noise(
    x: Tensor,
    noise: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    generator: None = None,
) -> list[Tensor]:
    """``aten::rrelu_with_noise_functional`` outside training, where it is not random."""
    return [torch.nn.functional.leaky_relu(x, (lower + upper) / 2)]


def pdist(x: Tensor, p: float = 2.0) -> Tensor:
    """``aten::_pdist_forward``: the distance of each pair of ``[vectors, dim]``."""
    one, other = torch.triu_indices(x.shape[0], x.shape[0], 1, device=x.device).unbind(0)
    distances: Tensor = torch.linalg.vector_norm(x[one] - x[other], p, -1)
    return distances


def nonzero_static(x: Tensor, *, size: int, fill_value: int = -1) -> Tensor:
    """``aten::nonzero_static`` with the place of each element that counts counted."""
    shape, found = x.shape, (x != 0).reshape(-1)
    order = found.cumsum(0) - 1
    order = torch.where(found & (order < size), order, size)  # one more for the others
    flat = torch.arange(found.shape[0], device=x.device)
    flat = torch.full((size + 1,), -1, device=x.device).scatter(0, order, flat)[:size]
    axes, stride = [], 1
    for extent in reversed(shape):
        axes.append(torch.where(flat < 0, fill_value, flat // stride % extent))
        stride *= extent
    return torch.stack(axes[::-1], -1) if axes else flat.new_empty(size, 0)


def repeat_interleave(repeats: Tensor, *, output_size: int) -> Tensor:
    """``aten::repeat_interleave``: the places of entries, each as often as ``repeats`` says."""
    place = torch.arange(output_size, device=repeats.device)
    passed = (place[:, None] >= repeats.cumsum(0)).sum(-1)
    return passed.clamp(max=repeats.shape[0] - 1).to(repeats.dtype)


def histc(x: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Tensor:
    """``aten::histc``: the number of elements in each of ``bins`` parts of a range."""
    flat = x.reshape(-1)
    low, high = (torch.full((), end, dtype=x.dtype, device=x.device) for end in (min, max))
    if min == max:  # the range of the elements
        low, high = flat.amin(), flat.amax()
        low, high = torch.where(low == high, low - 1, low), torch.where(low == high, high + 1, high)
    inside = (flat >= low) & (flat <= high)
    place = ((flat - low) * bins / (high - low)).where(inside, 0).long().clamp(0, bins - 1)
    place = torch.where(inside, place, bins)  # one more for the others
    counts = flat.new_zeros(bins + 1).scatter_add(0, place, torch.ones_like(flat))
    return counts[:bins]


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten._trilinear.default: trilinear,
    aten.masked_scatter.default: masked_scatter,
    aten.as_strided_scatter.default: as_strided_scatter,
    aten.embedding_bag.default: embedding_bag,
    aten.embedding_bag.padding_idx: embedding_bag,
    aten.searchsorted.Scalar: searchsorted,
    aten.bucketize.Scalar: bucketize,
    aten.vander.default: vander,
    aten.fake_quantize_per_tensor_affine_cachemask.default: fake_quantize,
    aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams.default: fake_quantize_if,
    aten.fake_quantize_per_channel_affine_cachemask.default: fake_quantize_channels,
    aten.rrelu_with_noise_functional.default: rrelu_with_noise,
    aten._pdist_forward.default: pdist,
    aten.nonzero_static.default: nonzero_static,
    aten.repeat_interleave.Tensor: repeat_interleave,
    aten.histc.default: histc,
}
"""The decomposition of each operator."""
