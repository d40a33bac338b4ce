"""Decode: every row has one token. One kernel appends it and attends, a row's cached positions split over several programs.

The grid is fixed (CUDA graphs), the lengths are known on the device only: a program beyond its row's length ends at once. The
program that arrives last at a row and head combines the parts (flash decoding with a counter in place of a second kernel).

What memory latency a step pays follows from the order of the loads. Where the caller says that they are `settled`, slots, write indices
and the first block of keys and values are asked for before the wait for the kernel that makes the query (programmatic dependent
launch), so they travel while that kernel ends. That is right only for what no earlier kernel of the step writes: cached positions were
written by earlier steps, which have ended before a step begins, the row descriptions were uploaded before its first kernel, and no
kernel starts before the one ahead of it has started. The query, the new key and value, cosines and sines are made inside the step and
are always read after the wait.
"""

import triton
import triton.language as tl

from inplace.kernels.softmax import absorb, entries, held, rotated, scaled


@triton.jit(do_not_specialize=["splits"])
def decode_kernel(
    query, key, value, cos, sin, key_state, value_state, slots, write_indices, out, workspace, locks,
    query_stride, key_stride, value_stride, capacity, splits, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, ROTARY: tl.constexpr,
    APPEND: tl.constexpr, WINDOW: tl.constexpr, RING: tl.constexpr, SOFTCAP: tl.constexpr,
    SHARED: tl.constexpr, SPLIT: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (row, kv head and block of its query heads, split).

    ``SHARED``: whether there are several splits; ``SPLIT``: fewest positions of one; ``BLOCK_G``: query heads of a program, padded for
    `tl.dot`; ``BLOCK_H``: the same, not padded; ``BLOCK_C``: splits combined at a time;
    ``EARLY``: what is `settled` is read before the wait. Nothing is ever written before it.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if not EARLY:
            tl.extra.cuda.gdc_wait()
    row, pair, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    blocks: tl.constexpr = (GROUP + BLOCK_G - 1) // BLOCK_G
    heads: tl.constexpr = KV_HEADS * GROUP
    kv, block = pair // blocks, pair % blocks
    slot = tl.load(slots + row).to(tl.int64)
    start = tl.load(write_indices + row)
    g = block * BLOCK_G + tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    first_head = row.to(tl.int64) * heads + kv * GROUP  # of [rows, heads]
    out_at = out + first_head * VALUE_DIM + g[:, None] * VALUE_DIM + e[None, :]
    out_mask = (g < GROUP)[:, None] & (e < VALUE_DIM)[None, :]
    live = slot >= 0
    start = tl.where(
        live, start, 0
    )  # a null row has nothing cached and appends nothing: 0, without a branch between the two loads

    lower = start * 0
    if WINDOW > 0:
        lower = tl.maximum(start - WINDOW + 1, 0)
    if RING:
        lower = tl.maximum(lower, start + (1 if APPEND else 0) - capacity)
    length = SPLIT
    if SHARED:
        length = tl.maximum(SPLIT, tl.cdiv(tl.cdiv(start - lower, splits), BLOCK_N) * BLOCK_N)
    active = 1
    if SHARED:
        active = tl.maximum(1, tl.cdiv(start - lower, length))
    if (
        split >= active
    ):  # split 0 never is: every row has a program that waits, so the kernel ends after the one ahead of it
        return
    upper = start if RING else tl.minimum(start, capacity)
    begin = lower
    if SHARED:
        begin = lower + split * length
        upper = tl.minimum(upper, begin + length)
    ring_first = lower % capacity if RING else lower

    keys = key_state + (slot * KV_HEADS + kv) * capacity * DIM
    values = value_state + (slot * KV_HEADS + kv) * capacity * VALUE_DIM
    j = begin + tl.arange(0, BLOCK_N)
    old_k = entries(keys, j, lower, upper, ring_first, capacity, True, RING, DIM, BLOCK_D)
    old_v = entries(values, j, lower, upper, ring_first, capacity, True, RING, VALUE_DIM, BLOCK_V)
    if EARLY:
        tl.extra.cuda.gdc_wait()

    turn = row.to(tl.int64) * ROTARY
    one = tl.full((1, 1), 1, tl.int1)
    zero = tl.zeros((1, 1), tl.int32)
    q_at = query + row.to(tl.int64) * query_stride + kv * GROUP * DIM + g[:, None] * DIM
    q = rotated(
        q_at,
        d[None, :],
        (g < GROUP)[:, None],
        cos + turn + zero,
        sin + turn + zero,
        one,
        DIM,
        ROTARY,
    )
    most = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_V), tl.float32)
    if APPEND:  # the last split takes the new token, from registers: what another program appends cannot be seen here
        mine = live & (split == active - 1)
        k_at = key + row.to(tl.int64) * key_stride + kv * DIM + zero
        k = rotated(
            k_at,
            d[None, :],
            one & mine,
            cos + turn + zero,
            sin + turn + zero,
            one & mine,
            DIM,
            ROTARY,
        )
        k = k.to(key_state.dtype.element_ty)
        v_at = value + row.to(tl.int64) * value_stride + kv * VALUE_DIM + e[None, :]
        v = tl.load(v_at, mask=mine & (e < VALUE_DIM)[None, :], other=0.0)
        entry = start % capacity if RING else start
        write = mine & (block == 0) & (entry < capacity)
        tl.store(keys + entry * DIM + d[None, :], k, mask=write & (d < DIM)[None, :])
        tl.store(
            values + entry * VALUE_DIM + e[None, :],
            v.to(value_state.dtype.element_ty),
            mask=write & (e < VALUE_DIM)[None, :],
        )
        score = scaled(tl.sum(q.to(tl.float32) * k.to(tl.float32), 1), scale, SOFTCAP)
        most = tl.where(mine, score, most)
        total = tl.where(mine, 1.0, total)
        acc += v.to(tl.float32)

    hold: tl.constexpr = (
        PDL and key_state.dtype.element_ty.primitive_bitwidth == 16
    )  # registers do not suffice for wider ones
    if hold:
        old_k, old_v = held(old_k), held(old_v)
    most, total, acc = absorb(
        q, old_k, old_v, g, j, upper, scale, most, total, acc, True, False, 0, True, SOFTCAP
    )
    for following in tl.range(begin + BLOCK_N, upper, BLOCK_N, num_stages=STAGES):
        j = following + tl.arange(0, BLOCK_N)
        old_k = entries(keys, j, lower, upper, ring_first, capacity, True, RING, DIM, BLOCK_D)
        old_v = entries(
            values, j, lower, upper, ring_first, capacity, True, RING, VALUE_DIM, BLOCK_V
        )
        if hold and STAGES == 1:
            old_k, old_v = held(old_k), held(old_v)
        most, total, acc = absorb(
            q, old_k, old_v, g, j, upper, scale, most, total, acc, True, False, 0, True, SOFTCAP
        )

    if active == 1:
        total = tl.where(total == 0, 1.0, total)  # nothing cached and nothing appended: 0
        tl.store(out_at, (acc / total[:, None]).to(out.dtype.element_ty), mask=out_mask)
    elif SHARED:
        combine(
            most, total, acc, g, e, first_head, split, splits, active, out, workspace, locks + row * tl.num_programs(1) + pair,
            tl.num_programs(0) * heads, block * BLOCK_G,
            GROUP, VALUE_DIM, BLOCK_H, BLOCK_V, BLOCK_C,
        )  # fmt: skip


@triton.jit
def combine(
    most, total, acc, g, e, first_head, split, splits, active, out, workspace, lock, all_heads, first_g,
    GROUP: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Leave this split's part in the workspace; the last of ``active`` programs to arrive adds them up and leaves the lock at 0.

    The workspace: float32 results ``[rows, heads, splits, value_dim]``, each a finished softmax over its split, then the logarithm
    (base 2) of what each was divided by, ``[rows, heads, splits]``.
    """
    logs = workspace + all_heads.to(tl.int64) * splits * VALUE_DIM
    part = (first_head + g) * splits + split
    divisor = tl.where(total == 0, 1.0, total)
    result_at = workspace + part[:, None] * VALUE_DIM + e[None, :]
    tl.store(
        result_at, acc / divisor[:, None], mask=(g < GROUP)[:, None] & (e < VALUE_DIM)[None, :]
    )
    tl.store(
        logs + part, tl.where(total == 0, float("-inf"), most + tl.log2(divisor)), mask=g < GROUP
    )
    tl.debug_barrier()  # the stores of every thread come before the one thread's release
    if tl.atomic_add(lock, 1, sem="acq_rel") == active - 1:
        tl.store(lock, 0)
        h = first_g + tl.arange(0, BLOCK_H)
        ours = (h < GROUP) & (h < first_g + BLOCK_H)
        peak = tl.full((BLOCK_H,), float("-inf"), tl.float32)
        weight = tl.zeros((BLOCK_H,), tl.float32)
        result = tl.zeros((BLOCK_H, BLOCK_V), tl.float32)
        for begin in range(
            0, active, BLOCK_C
        ):  # both loads of a round are under way together; most steps need one round
            c = begin + tl.arange(0, BLOCK_C)
            place = (first_head + h)[None, :] * splits + c[:, None]
            have = ours[None, :] & (c < active)[:, None]
            # ".cg": past the first-level cache, which knows nothing of the other programs' stores
            some = tl.load(
                workspace + place[:, :, None] * VALUE_DIM + e[None, None, :],
                mask=have[:, :, None] & (e < VALUE_DIM)[None, None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            found = tl.load(logs + place, mask=have, other=float("-inf"), cache_modifier=".cg")
            above = tl.maximum(peak, tl.max(found, 0))
            shift = tl.where(above == float("-inf"), 0.0, above)
            shares, decay = tl.exp2(found - shift[None, :]), tl.exp2(peak - shift)
            weight = weight * decay + tl.sum(shares, 0)
            result = result * decay[:, None] + tl.sum(some * shares[:, :, None], 0)
            peak = above
        weight = tl.where(weight == 0, 1.0, weight)
        to = out + (first_head + h)[:, None] * VALUE_DIM + e[None, :]
        tl.store(
            to,
            (result / weight[:, None]).to(out.dtype.element_ty),
            mask=ours[:, None] & (e < VALUE_DIM)[None, :],
        )
