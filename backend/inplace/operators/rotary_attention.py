"""Attention with the rotary embedding of queries and keys. Only lowering emits these operators.

``inplace::qkv_attention`` takes one merged projection, ``inplace::rotary_attention`` separate ones.
"""

from typing import Any

import torch
from torch import Tensor

from inplace.operators.library import LIBRARY, define

define(
    "qkv_attention",
    "(Tensor qkv, Tensor? cos, Tensor? sin, Tensor(a!) key_state, Tensor(b!) value_state, "
    "Tensor slots, Tensor row_offsets, Tensor write_indices, Tensor? sinks=None, "
    "Tensor? bias=None, Tensor? key_scale=None, Tensor? value_scale=None, *, int heads, "
    "float scale, bool causal=True, int window=0, int attention_chunk=0, bool ring=False, "
    "float softcap=0.0) -> Tensor",
)


define(
    "rotary_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor(a!) key_state, "
    "Tensor(b!) value_state, Tensor slots, Tensor row_offsets, Tensor write_indices, "
    "Tensor? sinks=None, Tensor? bias=None, Tensor? key_scale=None, Tensor? value_scale=None, *, "
    "float scale, bool causal=True, int window=0, int attention_chunk=0, bool ring=False, "
    "float softcap=0.0) -> Tensor",
)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, component i paired with i + half (arXiv:2104.09864).

    As transformers' ``apply_rotary_pos_emb``.

    Args:
        x: ``[tokens, heads, dim]``.
        cos, sin: ``[tokens, rotary]``; the first ``rotary`` components are rotated.
    """
    rotary = cos.shape[-1]
    first, second = x[..., :rotary].chunk(2, -1)
    swapped = torch.cat([-second, first], -1)
    rotated = x[..., :rotary] * cos.unsqueeze(1) + swapped * sin.unsqueeze(1)
    return torch.cat([rotated, x[..., rotary:]], -1)


@torch.library.impl(LIBRARY, "qkv_attention", "CompositeExplicitAutograd")
def _qkv_attention(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    key_state: Tensor,
    value_state: Tensor,
    *others: Tensor,
    heads: int,
    **options: Any,
) -> Tensor:
    """`attention` on one merged projection, with the rotary embedding of queries and keys.

    Args:
        qkv: ``[..., heads * dim + kv_heads * dim + kv_heads * value_dim]``: queries, keys, values.
        cos, sin: ``[..., rotary]``, for the first ``rotary`` components of each head; None for no
            rotation.
        key_state, value_state, others: states, slots, row_offsets, write_indices, sinks, bias and
            scales of `attention`.
        heads: query heads.
        options: scale, causal, window, attention_chunk, ring and softcap of `attention`.

    Returns:
        ``[..., heads * value_dim]``.
    """
    kv_heads, dim, value_dim = key_state.shape[1], key_state.shape[3], value_state.shape[3]
    parts = qkv.flatten(0, -2).split([heads * dim, kv_heads * dim, kv_heads * value_dim], -1)
    query, key = parts[0].unflatten(1, (heads, dim)), parts[1].unflatten(1, (kv_heads, dim))
    value = parts[2].unflatten(1, (kv_heads, value_dim))
    if cos is not None and sin is not None:
        query, key = (rotate(x, cos.flatten(0, -2), sin.flatten(0, -2)) for x in (query, key))
    out = torch.ops.inplace.attention(query, key, value, key_state, value_state, *others, **options)
    assert isinstance(out, Tensor)
    return out.reshape(*qkv.shape[:-1], heads * value_dim)


@torch.library.impl(LIBRARY, "rotary_attention", "CompositeExplicitAutograd")
def _rotary_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    *others: Tensor,
    **options: Any,
) -> Tensor:
    """`attention` with the rotary embedding of queries and keys; cos and sin ``[..., rotary]``."""
    query, key = (rotate(x, cos.flatten(0, -2), sin.flatten(0, -2)) for x in (query, key))
    out = torch.ops.inplace.attention(query, key, value, *others, **options)
    assert isinstance(out, Tensor)
    return out


def _check_rotary(cos: Tensor, dim: int) -> None:
    rotary = cos.shape[-1]
    torch._check(
        rotary % 2 == 0 and rotary <= dim,
        lambda: f"cos must be [..., rotary], rotary even and at most {dim}: {tuple(cos.shape)}",
    )


@torch.library.register_fake("inplace::rotary_attention", lib=LIBRARY)
def _rotary_attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_state: Tensor,
    value_state: Tensor,
    *rows: Tensor,
    **options: Any,
) -> Tensor:
    _check_rotary(cos, query.shape[-1])
    return query.new_empty((*query.shape[:-1], value_state.shape[3]))


@torch.library.register_fake("inplace::qkv_attention", lib=LIBRARY)
def _qkv_attention_fake(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    key_state: Tensor,
    value_state: Tensor,
    *rows: Tensor,
    heads: int,
    **options: Any,
) -> Tensor:
    kv_heads, dim, value_dim = key_state.shape[1], key_state.shape[3], value_state.shape[3]
    width = heads * dim + kv_heads * (dim + value_dim)
    torch._check(
        qkv.shape[-1] == width, lambda: f"qkv must be [..., {width}], got {tuple(qkv.shape)}"
    )
    torch._check(
        (cos is None) == (sin is None), lambda: "cos and sin must both be given, or neither"
    )
    if cos is not None:
        _check_rotary(cos, dim)
    return qkv.new_empty((*qkv.shape[:-1], heads * value_dim))
