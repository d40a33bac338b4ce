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


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten._trilinear.default: trilinear,
    aten.masked_scatter.default: masked_scatter,
    aten.as_strided_scatter.default: as_strided_scatter,
    aten.embedding_bag.default: embedding_bag,
    aten.embedding_bag.padding_idx: embedding_bag,
}
"""The decomposition of each operator."""
