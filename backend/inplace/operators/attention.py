"""``inplace::attention``: append this step's keys and values to their slots, and attend."""

import torch
import torch.nn.functional as F
from torch import Tensor

from inplace.operators.float8 import FLOAT8, quantize_heads
from inplace.operators.library import LIBRARY, define
from inplace.operators.state import check_contiguous, indexable, write

define(
    "attention",
    "(Tensor query, Tensor? key, Tensor? value, Tensor(a!) key_state, Tensor(b!)? value_state, "
    "Tensor slots, Tensor row_offsets, Tensor write_indices, Tensor? sinks=None, "
    "Tensor? bias=None, Tensor? key_scale=None, Tensor? value_scale=None, *, float scale, "
    "bool append=True, bool causal=True, int window=0, int attention_chunk=0, bool ring=False, "
    "float softcap=0.0, int latent_dim=0) -> Tensor",
)


@torch.library.impl(LIBRARY, "attention", "CompositeExplicitAutograd")
def _attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    key_state: Tensor,
    value_state: Tensor | None,
    slots: Tensor,
    row_offsets: Tensor,
    write_indices: Tensor,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    *,
    scale: float,
    append: bool = True,
    causal: bool = True,
    window: int = 0,
    attention_chunk: int = 0,
    ring: bool = False,
    softcap: float = 0.0,
    latent_dim: int = 0,
) -> Tensor:
    _check_shapes(
        query, key, value, key_state, value_state, sinks, bias, append=append, ring=ring,
        latent_dim=latent_dim,
    )  # fmt: skip
    _check_scales(key_state, value_state, key_scale, value_scale)
    if key_scale is not None and value_scale is not None:
        key, value = (
            None if new is None else quantize_heads(new, of_heads)
            for new, of_heads in ((key, key_scale), (value, value_scale))
        )
    offsets, slot_list, starts = row_offsets.tolist(), slots.tolist(), write_indices.tolist()
    # One token a row and no ring wraps: one call appends all rows. Calls are what a small step
    # costs.
    one_token_each = (
        offsets == list(range(len(query) + 1))
        and min(slot_list, default=-1) >= 0
        and 0 <= min(starts) <= max(starts) < key_state.shape[2]
    )
    if one_token_each and append:
        assert key is not None
        indexable(key_state)[slots, :, write_indices] = indexable(key)
        if value_state is not None and value is not None:
            indexable(value_state)[slots, :, write_indices] = indexable(value)
    out = query.new_empty((*query.shape[:2], _value_dim(value_state, latent_dim)))
    for row, (slot, start) in enumerate(zip(slot_list, starts, strict=True)):
        first, end = offsets[row], offsets[row + 1]
        if slot < 0:
            out[first:end] = 0
            continue
        keys = key_state[slot]
        values = keys[..., :latent_dim] if value_state is None else value_state[slot]
        cached = start + (end - first if append else 0)
        if append and not one_token_each:
            assert key is not None
            write(keys, key[first:end].transpose(0, 1), start, 1, ring=ring)
            if value is not None:
                write(values, value[first:end].transpose(0, 1), start, 1, ring=ring)
        keys, values, offset, mask = _visible(
            keys,
            values,
            start,
            end - first,
            cached,
            causal=causal,
            window=window,
            attention_chunk=attention_chunk,
            ring=ring,
        )
        given = query[first:end]
        if key_scale is not None and value_scale is not None:
            given = given.float()
            keys, values = (
                part.float() * of_heads[:, None, None]
                for part, of_heads in ((keys, key_scale), (values, value_scale))
            )
        out[first:end] = _attend(
            given,
            keys,
            values,
            mask,
            sinks,
            None if bias is None else bias[first:end, :, offset : offset + keys.shape[1]],
            scale,
            softcap,
            square=causal and not window and not attention_chunk and offset == start == 0,
        )
    return out


def _value_dim(value_state: Tensor | None, latent_dim: int) -> int:
    """Elements of a value."""
    return latent_dim if value_state is None else value_state.shape[3]


def _attend_one(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """One token ``[heads, dim]`` over all of keys and values ``[kv_heads, length, dim]``."""
    return F.scaled_dot_product_attention(
        query[None, :, None], keys[None], values[None], scale=scale, enable_gqa=True
    )[0, :, 0]


@torch.library.impl(LIBRARY, "attention", "CUDA")
def _attention_on_gpu(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    key_state: Tensor,
    value_state: Tensor | None,
    slots: Tensor,
    row_offsets: Tensor,
    write_indices: Tensor,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    *,
    scale: float,
    append: bool = True,
    causal: bool = True,
    window: int = 0,
    attention_chunk: int = 0,
    ring: bool = False,
    softcap: float = 0.0,
    latent_dim: int = 0,
) -> Tensor:
    """`attention` in Triton-language kernels, without a synchronisation with the host.

    Entries that do not fit a slot are therefore dropped, not refused.
    """
    from inplace.kernels import attention as kernels  # imports Triton

    _check_shapes(
        query, key, value, key_state, value_state, sinks, bias, append=append, ring=ring,
        latent_dim=latent_dim,
    )  # fmt: skip
    _check_scales(key_state, value_state, key_scale, value_scale)
    tokens, heads, dim = query.shape
    _, kv_heads, capacity, _ = key_state.shape
    value_dim = _value_dim(value_state, latent_dim)
    spec = kernels.AttentionSpec(
        heads,
        kv_heads,
        dim,
        value_dim,
        scale,
        append,
        causal,
        window,
        ring,
        softcap,
        sinks=sinks is not None,
        attention_chunk=attention_chunk,
        bias_heads=0 if bias is None else bias.shape[1],
        latent=value_state is None,
        quantized=key_scale is not None,
    )
    same = (("value_state", value_state), ("query", None if spec.quantized else query))
    for name, tensor in same:
        if tensor is not None and tensor.dtype != key_state.dtype:
            raise TypeError(
                f"{name} is {tensor.dtype}, key_state is {key_state.dtype}; they must be the same"
            )
    check_contiguous(key_state, "key_state")
    if value_state is not None:
        check_contiguous(value_state, "value_state")
    query = _token_strided(query)
    new_key, new_value = (x if x is None else _token_strided(x) for x in (key, value))
    rows = slots.shape[0]
    out = query.new_empty((tokens, heads, value_dim))
    scratch = kernels.attention_workspace(spec, rows, rows, capacity) // 4 if tokens == rows else 0
    locks = (
        query.new_zeros(kernels.attention_locks(spec, rows), dtype=torch.int32) if scratch else None
    )
    kernels.attention(
        spec,
        query=query,
        key=new_key,
        value=new_value,
        query_stride=query.stride(0),
        key_stride=0 if new_key is None else new_key.stride(0),
        value_stride=0 if new_value is None else new_value.stride(0),
        cos=None,
        sin=None,
        key_state=key_state,
        value_state=value_state,
        capacity=capacity,
        slots=slots.int(),
        row_offsets=row_offsets.int(),
        write_indices=write_indices.int(),
        sinks=None if sinks is None else sinks.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        key_scale=key_scale,
        value_scale=value_scale,
        out=out,
        workspace=query.new_empty(scratch, dtype=torch.float32) if scratch else None,
        locks=locks,
        tokens=tokens,
        rows=rows,
    )
    return out


def _token_strided(x: Tensor) -> Tensor:
    """``[tokens, heads, dim]`` with any stride from token to token, the rest contiguous."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _visible(
    keys: Tensor,
    values: Tensor,
    start: int,
    tokens: int,
    cached: int,
    *,
    causal: bool,
    window: int,
    attention_chunk: int,
    ring: bool,
) -> tuple[Tensor, Tensor, int, Tensor | None]:
    """The part of a slot that some token of the row may see.

    The views alias the slot: cached keys are never gathered.

    Returns:
        Keys and values ``[kv_heads, length, dim]``, the position that they start at, and a mask
        ``[tokens, length]``, True where attended; None where all tokens see all.
    """
    capacity = keys.shape[1]
    if ring and cached > capacity:
        # Wrapped: entry c holds the newest position that is c modulo the capacity.
        entries = torch.arange(capacity, device=keys.device)
        positions = cached - 1 - (cached - 1 - entries) % capacity
        offset = 0
    else:
        offset = max(0, start - window + 1) if window else 0
        if attention_chunk:
            offset = max(offset, start // attention_chunk * attention_chunk)
        keys, values = keys[:, offset:cached], values[:, offset:cached]
        if tokens == 1 and causal:
            return keys, values, offset, None
        positions = torch.arange(offset, cached, device=keys.device)
    if not causal and not window and not attention_chunk:
        return keys, values, offset, None
    rows = torch.arange(start, start + tokens, device=keys.device).unsqueeze(1)
    mask = (
        positions <= rows
        if causal
        else torch.ones((tokens, len(positions)), dtype=torch.bool, device=keys.device)
    )
    if window:
        mask &= positions > rows - window
    if attention_chunk:
        mask &= positions >= rows // attention_chunk * attention_chunk
    return keys, values, offset, mask


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    scale: float,
    softcap: float,
    *,
    square: bool,
) -> Tensor:
    """Softmax attention of one row.

    Query ``[tokens, heads, dim]``; keys and values ``[kv_heads, length, dim]``; sinks ``[heads]``;
    bias ``[tokens, heads or 1, length]``. ``square``: the mask is the causal mask of as many
    positions as tokens.
    """
    tokens, heads, dim = query.shape
    if tokens == 1 and mask is None and not softcap and sinks is None and bias is None:
        return _attend_one(query[0], keys, values, scale)[None]
    kv_heads, group = keys.shape[0], heads // keys.shape[0]
    grouped = (
        query.view(tokens, kv_heads, group, dim)
        .permute(1, 2, 0, 3)
        .reshape(kv_heads, group * tokens, dim)
    )
    if mask is not None:
        mask = mask.repeat(group, 1)
    if tokens == 1 or softcap or sinks is not None or bias is not None:
        scores = torch.matmul(grouped, keys.transpose(1, 2)).float() * scale
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        if bias is not None:
            of_head = bias.float().expand(-1, heads, -1).unflatten(1, (kv_heads, group))
            scores = scores + of_head.permute(1, 2, 0, 3).reshape(scores.shape)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        if sinks is not None:
            of_query = sinks.float().view(kv_heads, group, 1).expand(-1, -1, tokens)
            scores = torch.cat([scores, of_query.reshape(kv_heads, -1, 1)], -1)
        weights = scores.softmax(-1)[..., : values.shape[1]].to(values.dtype)
        if bias is not None:  # it may hide everything
            weights = weights.masked_fill((scores == float("-inf")).all(-1, keepdim=True), 0)
        out = torch.matmul(weights, values)
    elif square and group == 1 and mask is not None and bool(mask.shape[0] == mask.shape[1]):
        out = F.scaled_dot_product_attention(
            grouped[None], keys[None], values[None], is_causal=True, scale=scale
        )[0]
    else:
        out = F.scaled_dot_product_attention(
            grouped[None], keys[None], values[None], attn_mask=mask, scale=scale
        )[0]
    return (
        out.view(kv_heads, group, tokens, values.shape[2])
        .permute(2, 0, 1, 3)
        .reshape(tokens, heads, values.shape[2])
    )


def _check_shapes(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    key_state: Tensor,
    value_state: Tensor | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    *,
    append: bool,
    ring: bool,
    latent_dim: int,
) -> None:
    """Raise if tensors do not fit each other, before a kernel is handed their addresses.

    Raises:
        RuntimeError: the number of axes, the heads, a head's elements or a type differ.
    """
    if any(x is not None and x.dim() != 4 for x in (key_state, value_state)) or query.dim() != 3:
        raise RuntimeError(
            "query must be [tokens, heads, dim], states [slots, kv_heads, capacity, dim]"
        )
    if append != (key is not None) or (append and value_state is not None) != (value is not None):
        raise RuntimeError(
            "key and value must be given exactly when append is True; value only if value_state is"
        )
    (tokens, heads, dim), (_, kv_heads, capacity, key_dim) = query.shape, key_state.shape
    _check_sinks(sinks, heads)
    _check_bias(bias, tokens, heads, capacity)
    if bias is not None and ring:
        raise RuntimeError("a bias has a number for each position, so its states must not be rings")
    if heads % kv_heads:
        raise RuntimeError(f"{heads} query heads are not a multiple of {kv_heads} kv heads")
    if dim != key_dim:
        raise RuntimeError(f"queries have {dim} elements a head, key_state has {key_dim}")
    fits = latent_dim == 0 if value_state is not None else 0 < latent_dim < key_dim
    if not fits:
        raise RuntimeError(
            f"latent_dim is {latent_dim}; it must be 0 with a value state, and from 1 to "
            f"{key_dim - 1} without one, where values are the first elements of keys"
        )
    if value_state is not None and value_state.shape[1] != kv_heads:
        raise RuntimeError(
            f"key_state has {kv_heads} kv heads, value_state has {value_state.shape[1]}"
        )
    for name, new, state in (("key", key, key_state), ("value", value, value_state)):
        if new is None or state is None:
            continue
        if new.dtype != (query.dtype if state.dtype == FLOAT8 else state.dtype):
            raise RuntimeError(
                "keys and values must have their state's dtype, or the query's where that is "
                "8-bit floats"
            )
        if new.shape[1:] != (kv_heads, state.shape[3]):
            raise RuntimeError(
                f"{name} is [tokens, {', '.join(map(str, new.shape[1:]))}], but its state holds "
                f"{kv_heads} heads of {state.shape[3]} elements"
            )


def _check_scales(
    key_state: Tensor,
    value_state: Tensor | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
) -> None:
    """RuntimeError if states are 8-bit floats without a scale of each head, or others with one."""
    scales = {"key_scale": key_scale, "value_scale": value_scale}
    if key_state.dtype != FLOAT8:
        if any(each is not None for each in scales.values()):
            raise RuntimeError(
                f"there are scales, and the states are {key_state.dtype}, not {FLOAT8}"
            )
        return
    if value_state is None or value_state.dtype != FLOAT8:
        raise RuntimeError(
            f"key_state is {FLOAT8}; that needs a value_state of the same type, and "
            + ("there is none" if value_state is None else f"it is {value_state.dtype}")
        )
    for name, of_heads in scales.items():
        if of_heads is None or (of_heads.shape, of_heads.dtype) != (
            key_state.shape[1:2],
            torch.float32,
        ):
            raise RuntimeError(
                f"{name} must be [{key_state.shape[1]}] of torch.float32, a scale of each kv head "
                f"of states of {FLOAT8}, not "
                + ("None" if of_heads is None else f"{list(of_heads.shape)} of {of_heads.dtype}")
            )


def _check_sinks(sinks: Tensor | None, heads: int) -> None:
    """RuntimeError if there are sinks but not one floating-point number for each query head."""
    if sinks is None:
        return
    if tuple(sinks.shape) != (heads,) or not sinks.is_floating_point():
        raise RuntimeError(
            f"sinks must be [{heads}], a floating-point number for each query head, not "
            f"{list(sinks.shape)} of {sinks.dtype}"
        )


def _check_bias(bias: Tensor | None, tokens: int, heads: int, capacity: int) -> None:
    """RuntimeError if a bias has not one floating-point number for each token, head and entry."""
    if bias is None:
        return
    fits = bias.dim() == 3 and bias.shape[1] in (1, heads) and bias.is_floating_point()
    if not fits or bias.shape[0] != tokens or bias.shape[2] != capacity:
        raise RuntimeError(
            f"bias must be [{tokens}, {heads} or 1, {capacity}], floating-point numbers for each "
            f"token, query head and entry of a slot, not {list(bias.shape)} of {bias.dtype}"
        )


@torch.library.register_fake("inplace::attention", lib=LIBRARY)
def _attention_fake(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    key_state: Tensor,
    value_state: Tensor | None,
    slots: Tensor,
    row_offsets: Tensor,
    write_indices: Tensor,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    *,
    scale: float,
    append: bool = True,
    causal: bool = True,
    window: int = 0,
    attention_chunk: int = 0,
    ring: bool = False,
    softcap: float = 0.0,
    latent_dim: int = 0,
) -> Tensor:
    _check_shapes(
        query, key, value, key_state, value_state, sinks, bias, append=append, ring=ring,
        latent_dim=latent_dim,
    )  # fmt: skip
    _check_scales(key_state, value_state, key_scale, value_scale)
    return query.new_empty((*query.shape[:2], _value_dim(value_state, latent_dim)))


def attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    key_state: Tensor,
    value_state: Tensor | None,
    slots: Tensor,
    row_offsets: Tensor,
    write_indices: Tensor,
    *,
    scale: float,
    append: bool = True,
    causal: bool = True,
    window: int = 0,
    attention_chunk: int = 0,
    ring: bool = False,
    softcap: float = 0.0,
    latent_dim: int = 0,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> Tensor:
    """Append keys and values, then scaled dot-product attention over each row's own cached length.

    Row r owns the packed tokens ``row_offsets[r]:row_offsets[r + 1]``; one step may decode one row
    and prefill another. The cost of a row follows its cached length, not the capacity.
    Grouped-query attention: head h reads kv head ``h // (heads / kv_heads)``.

    Args:
        query: ``[tokens, heads, dim]``.
        key: ``[tokens, kv_heads, dim]``; None exactly when ``append`` is False (cross-attention).
        value: as ``key``; None also if ``value_state`` is.
        key_state: ``[slots, kv_heads, capacity, dim]``, mutated when ``append``.
        value_state: as ``key_state``; None if values are a part of keys, see ``latent_dim``.
        slots: ``[rows]``, int32 or int64; a row with slot -1 writes nothing and its output is 0.
        row_offsets: ``[rows + 1]``.
        write_indices: ``[rows]``: cached length of each row before the step, where its append
            starts.
        scale: factor of ``query @ key``, before softmax.
        append: write ``key`` and ``value`` first.
        causal: token i of a row sees positions up to its own. If False it also sees the later
            tokens that its row has in this step (lookahead): the result depends on which tokens
            are fed together.
        window: if not 0, a token at position p sees positions ``p - window + 1`` to ``p``.
        attention_chunk: if not 0, a token at position p sees positions from
            ``p // attention_chunk * attention_chunk`` on (chunked attention, as Llama 4 has it).
        ring: the states hold position p at ``p % capacity``; needs
            ``capacity >= window + tokens of a row - 1``.
        softcap: if not 0, scores become ``softcap * tanh(scores / softcap)`` (Gemma 2,
            arXiv:2408.00118, section 2).
        latent_dim: without a value state, the elements of a value: a value is the first elements
            of its key, which has more (latent attention, DeepSeek V2, arXiv:2405.04434, section
            2.1).
        sinks: ``[heads]``, any floating dtype: a logit of each query head that takes part in the
            softmax and has no value (attention sinks, as gpt-oss has them). It is neither scaled
            nor soft-capped. A head's weights then sum to less than 1.
        bias: ``[tokens, heads or 1, capacity]``, any floating dtype: added to the score of each
            entry of the token's slot after scale and soft-cap; ``-inf`` hides an entry. What is
            not visible anyway may hold anything. The states must not be rings.
        key_scale, value_scale: ``[kv_heads]`` float32, exactly where both states are
            float8_e4m3fn: what is stored is `inplace.operators.float8.quantize_heads` of keys and
            values, and what is attended to is the stored number times its head's scale.

    Returns:
        ``[tokens, heads, value_dim]``, the query's dtype.

    Raises:
        IndexError: a row does not fit its slot. Only on the CPU: on a GPU, where the host does not
            read the indices, entries beyond the slot are dropped.
    """
    out = torch.ops.inplace.attention(
        query,
        key,
        value,
        key_state,
        value_state,
        slots,
        row_offsets,
        write_indices,
        sinks,
        bias,
        key_scale,
        value_scale,
        scale=scale,
        append=append,
        causal=causal,
        window=window,
        attention_chunk=attention_chunk,
        ring=ring,
        softcap=softcap,
        latent_dim=latent_dim,
    )
    assert isinstance(out, Tensor)
    return out
