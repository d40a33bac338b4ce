"""Mixed steps: rows with any number of tokens. One kernel appends all keys and values, the next attends (flash attention).

The grid is fixed for a token and row count (CUDA graphs); each program finds its row, and its tokens of that row, on the device.
"""

import triton
import triton.language as tl

from inplace.kernels.softmax import absorb, entries, rotated


@triton.jit(do_not_specialize=["rows", "tokens"])
def append_kernel(
    key, value, cos, sin, key_state, value_state, slots, row_offsets, write_indices,
    key_stride, value_stride, capacity, rows, tokens,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, ROTARY: tl.constexpr, RING: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (block of tokens, kv head): rotate the keys and write keys and values to their slots."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    kv = tl.program_id(1)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_R)
    ends = tl.load(row_offsets + r + 1, mask=r < rows, other=2147483647)
    row = tl.sum((ends[None, :] <= t[:, None]).to(tl.int32), 1)
    present = (t < tokens) & (row < rows)
    slot = tl.load(slots + row, mask=present, other=-1)
    position = (
        tl.load(write_indices + row, mask=present, other=0)
        + t
        - tl.load(row_offsets + row, mask=present, other=0)
    )
    entry = position % capacity if RING else position
    present &= (slot >= 0) & (entry < capacity)

    d = tl.arange(0, BLOCK_D)[None, :]
    e = tl.arange(0, BLOCK_V)[None, :]
    token = t.to(tl.int64)[:, None]
    to = ((slot.to(tl.int64) * KV_HEADS + kv) * capacity + entry)[:, None]
    mask = present[:, None]
    k = rotated(
        key + token * key_stride + kv * DIM,
        d,
        mask,
        cos + token * ROTARY,
        sin + token * ROTARY,
        mask,
        DIM,
        ROTARY,
    )
    tl.store(key_state + to * DIM + d, k.to(key_state.dtype.element_ty), mask=mask & (d < DIM))
    v = tl.load(
        value + token * value_stride + kv * VALUE_DIM + e, mask=mask & (e < VALUE_DIM), other=0.0
    )
    tl.store(
        value_state + to * VALUE_DIM + e,
        v.to(value_state.dtype.element_ty),
        mask=mask & (e < VALUE_DIM),
    )


@triton.jit(do_not_specialize=["rows"])
def prefill_kernel(
    query, cos, sin, key_state, value_state, slots, row_offsets, write_indices, out, query_stride, capacity, scale, rows,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, ROTARY: tl.constexpr,
    APPEND: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, RING: tl.constexpr, SOFTCAP: tl.constexpr,
    PACK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (block of one row's tokens, kv head and pack of ``PACK`` of its query heads).

    The block's ``BLOCK_M`` queries are ``BLOCK_M // PACK`` tokens times ``PACK`` heads: they share the keys and values that are loaded.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    span: tl.constexpr = BLOCK_M // PACK
    packs: tl.constexpr = (GROUP + PACK - 1) // PACK
    block = (
        tl.num_programs(0) - 1 - tl.program_id(0)
    )  # the last tokens of a row see most and are begun first
    kv, pack = tl.program_id(1) // packs, tl.program_id(1) % packs
    r = tl.arange(0, BLOCK_R)
    sizes = tl.load(row_offsets + r + 1, mask=r < rows, other=0) - tl.load(
        row_offsets + r, mask=r < rows, other=0
    )
    blocks = tl.cdiv(sizes, span)
    row = tl.sum((tl.cumsum(blocks, 0) <= block).to(tl.int32), 0)
    if row >= rows:
        return
    first = tl.load(row_offsets + row)
    count = tl.load(row_offsets + row + 1) - first
    begin = (block - tl.sum(tl.where(r < row, blocks, 0), 0)) * span  # of the block, in the row
    slot = tl.load(slots + row).to(tl.int64)
    start = tl.load(write_indices + row)

    i = tl.arange(0, BLOCK_M)
    token = begin + i // PACK
    g = pack * PACK + i % PACK
    present = ((i < span * PACK) & (token < count) & (g < GROUP))[:, None]
    packed = (first + token).to(tl.int64)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    e = tl.arange(0, BLOCK_V)[None, :]
    out_at = out + (packed * (KV_HEADS * GROUP) + (kv * GROUP + g)[:, None]) * VALUE_DIM + e
    if slot < 0:
        tl.store(
            out_at,
            tl.zeros((BLOCK_M, BLOCK_V), out.dtype.element_ty),
            mask=present & (e < VALUE_DIM),
        )
        return

    cached = start + count if APPEND else start
    upper = cached
    if CAUSAL:
        upper = tl.minimum(upper, start + tl.minimum(begin + span, count))
    lower = start * 0
    if WINDOW > 0:
        lower = tl.maximum(start + begin - WINDOW + 1, 0)
    if RING:
        lower = tl.maximum(lower, cached - capacity)
    else:
        upper = tl.minimum(upper, capacity)
    ring_first = lower % capacity if RING else lower
    keys = key_state + (slot * KV_HEADS + kv) * capacity * DIM
    values = value_state + (slot * KV_HEADS + kv) * capacity * VALUE_DIM
    q_at = query + packed * query_stride + (kv * GROUP + g)[:, None] * DIM
    q = rotated(
        q_at, d, present, cos + packed * ROTARY, sin + packed * ROTARY, present, DIM, ROTARY
    )
    most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    positions = start + token
    masked_from = lower
    if WINDOW == 0:  # what every token of the block sees needs no mask
        seen_by_all = tl.minimum(upper, start + begin + 1) if CAUSAL else upper
        masked_from = lower + tl.maximum(seen_by_all - lower, 0) // BLOCK_N * BLOCK_N
        for first_j in tl.range(lower, masked_from, BLOCK_N, num_stages=STAGES):
            j = first_j + tl.arange(0, BLOCK_N)
            k = entries(keys, j, lower, upper, ring_first, capacity, False, RING, DIM, BLOCK_D)
            v = entries(
                values, j, lower, upper, ring_first, capacity, False, RING, VALUE_DIM, BLOCK_V
            )
            most, total, acc = absorb(
                q,
                k,
                v,
                positions,
                j,
                upper,
                scale,
                most,
                total,
                acc,
                False,
                False,
                0,
                False,
                SOFTCAP,
            )
    may_see_nothing: tl.constexpr = CAUSAL or WINDOW > 0
    for first_j in tl.range(masked_from, upper, BLOCK_N, num_stages=STAGES):
        j = first_j + tl.arange(0, BLOCK_N)
        k = entries(keys, j, lower, upper, ring_first, capacity, True, RING, DIM, BLOCK_D)
        v = entries(values, j, lower, upper, ring_first, capacity, True, RING, VALUE_DIM, BLOCK_V)
        most, total, acc = absorb(
            q,
            k,
            v,
            positions,
            j,
            upper,
            scale,
            most,
            total,
            acc,
            True,
            CAUSAL,
            WINDOW,
            may_see_nothing,
            SOFTCAP,
        )
    total = tl.where(total == 0, 1.0, total)  # a token that sees nothing: 0
    tl.store(
        out_at, (acc / total[:, None]).to(out.dtype.element_ty), mask=present & (e < VALUE_DIM)
    )
