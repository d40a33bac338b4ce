"""Batching rules for `torch.vmap`: of the operators on states, and of what torch has no rule for.

A batch of calls of one row each becomes one call of many rows. States are never batched: every call
has the whole arena, and its rows are slots of it.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from inplace.operators.library import LIBRARY, NAMESPACE
from torch import Tensor

inplace = torch.ops.inplace


Dims = tuple[int | None, ...]


def _fold_calls(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """The entries of all calls on one axis: ``[calls, n, …]`` as ``[calls * n, …]``."""
    each = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return each.reshape(-1, *each.shape[2:])


def _check_states_shared(name: str, dims: tuple[int | None, ...]) -> None:
    if any(dim is not None for dim in dims):
        raise RuntimeError(
            f"{NAMESPACE}::{name} of a state that differs between calls: only its slots may"
        )


def _read(info: Any, dims: Dims, state: Tensor, slots: Tensor) -> tuple[Tensor, int]:
    _check_states_shared("read", dims[:1])
    rows = inplace.read(state, _fold_calls(slots, dims[1], info.batch_size))
    return rows.unflatten(0, (info.batch_size, -1)), 0


def _update(
    info: Any,
    dims: Dims,
    state: Tensor,
    slots: Tensor,
    value: Tensor,
    row_offsets: Tensor | None = None,
    write_indices: Tensor | None = None,
    axis: int = 0,
    ring: bool = False,
) -> tuple[None, None]:
    _check_states_shared("update", dims[:1])
    if row_offsets is not None:
        raise RuntimeError(
            f"{NAMESPACE}::update of packed rows has no batching rule: it takes rows of different "
            f"lengths already"
        )
    size = info.batch_size
    starts = None if write_indices is None else _fold_calls(write_indices, dims[4], size)
    inplace.update(
        state,
        _fold_calls(slots, dims[1], size),
        _fold_calls(value, dims[2], size),
        None,
        starts,
        axis,
        ring,
    )
    return None, None


def _attention(
    info: Any,
    dims: Dims,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    key_state: Tensor,
    value_state: Tensor,
    slots: Tensor,
    row_offsets: Tensor,
    write_indices: Tensor,
    **options: Any,
) -> tuple[Tensor, int]:
    _check_states_shared("attention", dims[3:5])
    if dims[6] is not None or slots.dim() - (dims[5] is not None) != 1:
        raise RuntimeError(
            f"{NAMESPACE}::attention over calls whose rows have different lengths has no batching "
            f"rule"
        )
    size = info.batch_size
    tokens = [
        given if given is None else _fold_calls(given, dim, size)
        for given, dim in zip((query, key, value), dims[:3], strict=True)
    ]
    assert tokens[0] is not None
    each = query.shape[0] if dims[0] is None else query.movedim(dims[0], 0).shape[1]
    offsets = torch.arange(size + 1, dtype=row_offsets.dtype, device=row_offsets.device) * each
    rows = (_fold_calls(slots, dims[5], size), offsets, _fold_calls(write_indices, dims[7], size))
    out = inplace.attention(*tokens, key_state, value_state, *rows, **options)
    return out.unflatten(0, (size, -1)), 0


def _grouped_linear(
    info: Any,
    dims: Dims,
    x: Tensor,
    expert_ids: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
) -> tuple[Tensor, int]:
    if any(dim is not None for dim in dims[2:]):
        raise RuntimeError(f"{NAMESPACE}::grouped_linear of weights that differ between calls")
    size = info.batch_size
    tokens, ids = (
        _fold_calls(part, dim, size) for part, dim in ((x, dims[0]), (expert_ids, dims[1]))
    )
    out = inplace.grouped_linear(tokens, ids, weight, bias, transposed=transposed)
    return out.unflatten(0, (size, -1)), 0


for _name, _rule in (
    ("read", _read),
    ("update", _update),
    ("attention", _attention),
    ("grouped_linear", _grouped_linear),
):
    torch.library.register_vmap(f"{NAMESPACE}::{_name}", _rule, lib=LIBRARY)


Pair = Sequence[Tensor]


def _lstm_cell(
    x: Tensor,
    state: Pair,
    w_x: Tensor,
    w_h: Tensor,
    b_x: Tensor | None = None,
    b_h: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `torch.nn.LSTMCell` documents it."""
    hidden, cell = state
    i, f, g, o = (F.linear(x, w_x, b_x) + F.linear(hidden, w_h, b_h)).chunk(4, -1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def _gru_cell(
    x: Tensor,
    hidden: Tensor,
    w_x: Tensor,
    w_h: Tensor,
    b_x: Tensor | None = None,
    b_h: Tensor | None = None,
) -> Tensor:
    """As `torch.nn.GRUCell` documents it."""
    (r_x, z_x, n_x), (r_h, z_h, n_h) = (
        F.linear(x, w_x, b_x).chunk(3, -1),
        F.linear(hidden, w_h, b_h).chunk(3, -1),
    )
    z = (z_x + z_h).sigmoid()
    n = (n_x + (r_x + r_h).sigmoid() * n_h).tanh()
    return (1 - z) * n + z * hidden


def _layer_norm(
    x: Tensor,
    extents: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    _: bool = True,
) -> Tensor:
    """As `torch.nn.LayerNorm` documents it."""
    axes = list(range(-len(extents), 0))
    centred = x - x.mean(axes, keepdim=True)
    scaled = centred * torch.rsqrt((centred * centred).mean(axes, keepdim=True) + eps)
    scaled = scaled if weight is None else scaled * weight
    return scaled if bias is None else scaled + bias


def _matmul(one: Tensor, other: Tensor) -> Tensor:
    """As `torch.matmul` documents it, by one batched product.

    torch's own rule compares extents that vary here.
    """
    a, b = one if one.dim() > 1 else one[None], other if other.dim() > 1 else other[:, None]
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    flat = [x.expand(*batch, *x.shape[-2:]).reshape(-1, *x.shape[-2:]) for x in (a, b)]
    product = torch.bmm(*flat).reshape(*batch, a.shape[-2], b.shape[-1])
    product = product if one.dim() > 1 else product.squeeze(-2)
    return product if other.dim() > 1 else product.squeeze(-1)


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As `torch.nn.functional.scaled_dot_product_attention` documents it.

    A query that sees nothing returns 0.
    """
    if dropout:
        raise RuntimeError("attention with dropout is random: call eval() on the module first")
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = _matmul(query, key.transpose(-2, -1)) * (
        query.shape[-1] ** -0.5 if scale is None else scale
    )
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        )
    blind = (scores == float("-inf")).all(-1, keepdim=True)
    return _matmul(scores.softmax(-1).masked_fill(blind, 0.0), value)


DECOMPOSITIONS: dict[Any, Any] = {
    torch.ops.aten.matmul.default: _matmul,
    torch.ops.aten.scaled_dot_product_attention.default: _sdpa,
    torch.ops.aten.lstm_cell.default: _lstm_cell,
    torch.ops.aten.gru_cell.default: _gru_cell,
    torch.ops.aten.layer_norm.default: _layer_norm,
}
"""What replaces operators that torch has no batching rule for, or one that fixes the batch size."""
