"""The attention kernels: decode with split-KV, append, and prefill.

Grids depend only on row and token counts and on capacity, so that a launch can be captured into a
CUDA graph; cached lengths are read on the device.

**Decode**: every row has one token. One kernel appends it and attends, a row's cached positions
split over several programs. A program beyond its row's length ends at once. The last program of a
row and head to finish combines the splits: flash decoding, with a counter in place of a second
kernel.

The order of a decode program's loads decides what memory latency a step pays. If the caller
guarantees that they are `settled`, slots, write indices and the first block of keys and values are
loaded before the wait of programmatic dependent launch, while the kernel that makes the query
still runs. That is right only for memory that no earlier kernel of the step writes: cached
positions were written by earlier steps, which have ended before a step begins; slots and write
indices were uploaded before its first kernel; and a kernel never starts before its predecessor
has started. Query, new key and value, cosines and sines are computed in the step and always loaded
after the wait.

**Mixed steps**: rows with any number of tokens. One kernel appends all keys and values, the next
attends (flash attention, arXiv:2205.14135). Each program finds its row, and its tokens of that row,
on the device.

**Caches of 8-bit floats** (``QUANTIZED``) have a scale for each kv head. What is loaded becomes the
query's type, which has all of these numbers; the scale of keys is a factor of scores, that of
values one of results.
"""

import triton
import triton.language as tl

from inplace.kernels.memory import keep_in_registers, load_cached, load_rotated, quantized

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def scaled_scores(products, scale, SOFTCAP: tl.constexpr):
    """Scores for a softmax of base 2: scaled, soft-capped if asked, times log2(e)."""
    if SOFTCAP > 0:
        ratio = products * (scale / SOFTCAP)
        # tanh |z| = (1 - exp(-2 |z|)) / (1 + exp(-2 |z|)) never overflows
        small = tl.exp2(tl.abs(ratio) * (-2.0 * LOG2E))
        bounded = (1.0 - small) / (1.0 + small)
        products = tl.where(ratio < 0, -bounded, bounded) * (SOFTCAP * LOG2E)
    else:
        products = products * (scale * LOG2E)
    return products


@triton.jit
def online_softmax(
    q, latent, k, v, bias, positions, j, upper, scale, row_max, row_sum, acc,
    BOUNDED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    EMPTY: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, LATENT: tl.constexpr,
):  # fmt: skip
    """Attend to keys and values of positions ``j``; return the new ``row_max, row_sum, acc``.

    One block of online softmax (arXiv:2205.14135): ``row_max`` is the largest score so far,
    ``row_sum`` the sum of ``exp2(score - row_max)``, ``acc`` the values weighted by it.

    ``BOUNDED``: positions from ``upper`` on are masked, and what ``CAUSAL``, ``WINDOW`` and
    ``CHUNK`` hide. ``BIAS``: ``bias``, in `load_bias`'s form, is added to the scores.
    ``EMPTY``: a query may see none of these positions and none before them. ``LATENT``: values are
    a part of keys: ``latent`` is the part of the queries that they are multiplied with, ``q`` and
    ``k`` are the rest. Keys and values of 8 bits become the query's type, without rounding.
    """
    k, v = k.to(q.dtype), v.to(q.dtype)
    products = tl.dot(q, tl.trans(k), input_precision="ieee")
    if LATENT:
        products = tl.dot(latent, tl.trans(v), products, input_precision="ieee")
    scores = scaled_scores(products, scale, SOFTCAP)
    if BIAS:
        scores += bias
    if BOUNDED:
        visible = (j < upper)[None, :]
        if CAUSAL:
            visible = visible & (j[None, :] <= positions[:, None])
        if WINDOW > 0:
            visible = visible & (j[None, :] > positions[:, None] - WINDOW)
        if CHUNK > 0:
            visible = visible & (j[None, :] >= positions[:, None] // CHUNK * CHUNK)
        scores = tl.where(visible, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    shift = new_max
    if EMPTY:  # inf - inf is NaN
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    decay = tl.exp2(row_max - shift)
    weights = tl.exp2(scores - shift[:, None])
    row_sum = row_sum * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return new_max, row_sum, acc


@triton.jit
def load_bias(
    bias, token, head, j, inside, upper, capacity, BIAS_HEADS: tl.constexpr
):  # fmt: skip
    """What is added to the scores of positions ``j``, times log2(e); 0 without a bias.

    ``token``, ``head`` and ``inside`` are of the rows of a block of scores. A bias has heads of
    its own, or one that all share.
    """
    if BIAS_HEADS > 0:
        of_head = head if BIAS_HEADS > 1 else head * 0
        at = bias + (token.to(tl.int64) * BIAS_HEADS + of_head) * capacity
        loaded = tl.load(
            at[:, None] + j[None, :], mask=inside[:, None] & (j < upper)[None, :], other=0.0
        )
        added = loaded.to(tl.float32) * LOG2E
    else:
        added = 0.0
    return added


@triton.jit
def is_attended(added, inside, BIAS_HEADS: tl.constexpr):
    """Whether a block of scores has any that its bias, from `load_bias`, does not hide.

    Keys and values of a block that is hidden as a whole are not loaded.
    """
    if BIAS_HEADS > 0:
        shown = (inside[:, None] & (added != float("-inf"))).to(tl.int32)
        attended = tl.max(tl.max(shown, 1), 0) > 0
    else:
        attended = True
    return attended


@triton.jit
def start_softmax(
    sinks, head, inside, SIZE: tl.constexpr, SINKS: tl.constexpr
):  # fmt: skip
    """``row_max`` and ``row_sum`` of `online_softmax` before the first position, ``[SIZE]`` each.

    A sink is a score that has no value: with ``SINKS`` it is the largest score so far.
    """
    if SINKS:
        row_max = tl.load(sinks + head, mask=inside, other=0.0).to(tl.float32) * LOG2E
        row_sum = tl.full((SIZE,), 1.0, tl.float32)
    else:
        row_max = tl.full((SIZE,), float("-inf"), tl.float32)
        row_sum = tl.zeros((SIZE,), tl.float32)
    return row_max, row_sum


@triton.jit(do_not_specialize=["splits"])
def decode_kernel(
    query, key, value, cos, sin, key_state, value_state, slots, write_indices, sinks, bias,
    key_scale, value_scale, out,
    workspace, locks, query_stride, key_stride, value_stride, capacity, splits, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    ROTARY: tl.constexpr, APPEND: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    RING: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, BIAS_HEADS: tl.constexpr,
    LATENT: tl.constexpr, QUANTIZED: tl.constexpr, SPLIT_KV: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """Append and attend with one token a row. Program (row, kv head and block of its heads, split).

    ``SPLIT_KV``: there are several splits; ``MIN_SPLIT``: fewest positions of one; ``BLOCK_G``:
    query heads of a program, padded for `tl.dot`; ``BLOCK_H``: the same, not padded; ``BLOCK_C``:
    splits that are combined at a time; ``PREFETCH``: what is `settled` is loaded before the wait.
    Nothing is written before the wait.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if not PREFETCH:
            tl.extra.cuda.gdc_wait()
    KEY_WIDTH: tl.constexpr = DIM - VALUE_DIM if LATENT else DIM
    VALUE_STRIDE: tl.constexpr = DIM if LATENT else VALUE_DIM
    row, head_block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    blocks: tl.constexpr = (GROUP + BLOCK_G - 1) // BLOCK_G
    heads: tl.constexpr = KV_HEADS * GROUP
    kv, block = head_block // blocks, head_block % blocks
    slot = tl.load(slots + row).to(tl.int64)
    start = tl.load(write_indices + row)
    g = block * BLOCK_G + tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    first_head = row.to(tl.int64) * heads + kv * GROUP  # of [rows, heads]
    out_at = out + first_head * VALUE_DIM + g[:, None] * VALUE_DIM + e[None, :]
    out_mask = (g < GROUP)[:, None] & (e < VALUE_DIM)[None, :]
    live = slot >= 0
    # A null row has nothing cached and appends nothing. No branch, which would separate the loads.
    start = tl.where(live, start, 0)

    lower = start * 0
    if WINDOW > 0:
        lower = tl.maximum(start - WINDOW + 1, 0)
    if CHUNK > 0:
        lower = tl.maximum(lower, start // CHUNK * CHUNK)
    if RING:
        lower = tl.maximum(lower, start + (1 if APPEND else 0) - capacity)
    split_length = MIN_SPLIT
    if SPLIT_KV:
        split_length = tl.maximum(
            MIN_SPLIT, tl.cdiv(tl.cdiv(start - lower, splits), BLOCK_N) * BLOCK_N
        )
    active_splits = 1
    if SPLIT_KV:
        active_splits = tl.maximum(1, tl.cdiv(start - lower, split_length))
    # Split 0 is always active: a program of every row waits, so this kernel ends after its
    # predecessor on the stream.
    if split >= active_splits:
        return
    upper = start if RING else tl.minimum(start, capacity)
    begin = lower
    if SPLIT_KV:
        begin = lower + split * split_length
        upper = tl.minimum(upper, begin + split_length)
    ring_first = lower % capacity if RING else lower

    keys = key_state + (slot * KV_HEADS + kv) * capacity * DIM + (DIM - KEY_WIDTH)
    values = value_state + (slot * KV_HEADS + kv) * capacity * VALUE_STRIDE
    j = begin + tl.arange(0, BLOCK_N)
    old_k = load_cached(
        keys, j, lower, upper, ring_first, capacity, True, RING,
        DIM, KEY_WIDTH, BLOCK_D,
    )  # fmt: skip
    old_v = load_cached(
        values, j, lower, upper, ring_first, capacity, True, RING,
        VALUE_STRIDE, VALUE_DIM, BLOCK_V,
    )  # fmt: skip
    # Of the first block: the positions of its bias, and how many of them are cached.
    bias_positions, num_cached = j, BLOCK_N
    if PREFETCH:
        tl.extra.cuda.gdc_wait()
    if QUANTIZED:
        of_keys, of_values = tl.load(key_scale + kv), tl.load(value_scale + kv)
        scale *= of_keys

    angles = row.to(tl.int64) * ROTARY
    one = tl.full((1, 1), 1, tl.int1)
    zero = tl.zeros((1, 1), tl.int32)
    q_at = query + row.to(tl.int64) * query_stride + kv * GROUP * DIM + g[:, None] * DIM
    q = load_rotated(
        q_at + (DIM - KEY_WIDTH), d[None, :], (g < GROUP)[:, None], cos + angles + zero,
        sin + angles + zero, one, KEY_WIDTH, ROTARY,
    )  # fmt: skip
    latent = q
    if LATENT:
        latent = tl.load(
            q_at + e[None, :], mask=(g < GROUP)[:, None] & (e < VALUE_DIM)[None, :], other=0.0
        )
    token = tl.zeros((BLOCK_G,), tl.int32) + row
    # The sinks join the softmax where a row's splits are combined, or at the end of its only one.
    row_max, row_sum = start_softmax(sinks, g, g < GROUP, BLOCK_G, False)
    sink, _ = start_softmax(sinks, kv * GROUP + g, g < GROUP, BLOCK_G, SINKS)
    acc = tl.zeros((BLOCK_G, BLOCK_V), tl.float32)
    if APPEND:
        # The last split takes the new token from registers: it may not see what another program
        # appends.
        owns_token = live & (split == active_splits - 1)
        k_at = key + row.to(tl.int64) * key_stride + kv * DIM + zero
        k = load_rotated(
            k_at + (DIM - KEY_WIDTH), d[None, :], one & owns_token, cos + angles + zero,
            sin + angles + zero, one & owns_token, KEY_WIDTH, ROTARY,
        )  # fmt: skip
        if not QUANTIZED:
            k = k.to(key_state.dtype.element_ty)
        v_at = k_at + e[None, :]
        if not LATENT:
            v_at = value + row.to(tl.int64) * value_stride + kv * VALUE_DIM + e[None, :]
        v = tl.load(v_at, mask=owns_token & (e < VALUE_DIM)[None, :], other=0.0)
        if QUANTIZED:
            k = quantized(k, of_keys).to(key_state.dtype.element_ty)
            v = quantized(v, of_values).to(value_state.dtype.element_ty)
        entry = start % capacity if RING else start
        write = owns_token & (block == 0) & (entry < capacity)
        tl.store(keys + entry * DIM + d[None, :], k, mask=write & (d < KEY_WIDTH)[None, :])
        tl.store(
            values + entry * VALUE_STRIDE + e[None, :],
            v.to(value_state.dtype.element_ty),
            mask=write & (e < VALUE_DIM)[None, :],
        )
        if LATENT:
            # The token takes the last place of the first block, as a position that is visible: a
            # score of its own, of so many elements, needs registers that there are not.
            own = (tl.arange(0, BLOCK_N) == BLOCK_N - 1) & owns_token
            old_k = tl.where(own[:, None], k, old_k)
            old_v = tl.where(own[:, None], v, old_v)
            bias_positions, j = tl.where(own, start, j), tl.where(own, -1, j)
            num_cached -= owns_token.to(tl.int32)
        else:
            product = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)
            score = scaled_scores(product, scale, SOFTCAP)
            if BIAS_HEADS > 0:
                added = load_bias(
                    bias, token, kv * GROUP + g, start + tl.arange(0, 1), g < GROUP, capacity,
                    capacity, BIAS_HEADS,
                )  # fmt: skip
                score += tl.sum(added, 1)
            row_max = tl.where(owns_token, score, row_max)
            row_sum = tl.where(owns_token, 1.0, row_sum)
            acc += v.to(tl.float32)
            if BIAS_HEADS > 0:  # it may hide the token from itself
                hidden = score == float("-inf")
                row_sum = tl.where(hidden, 0.0, row_sum)
                acc = tl.where(hidden[:, None], 0.0, acc)

    # There are not enough registers for wider elements.
    keep: tl.constexpr = PDL and key_state.dtype.element_ty.primitive_bitwidth == 16
    if keep:
        old_k, old_v = keep_in_registers(old_k), keep_in_registers(old_v)
    bias_end = tl.minimum(upper + 1, capacity) if LATENT and APPEND else upper
    added = load_bias(
        bias, token, kv * GROUP + g, bias_positions, g < GROUP, bias_end, capacity, BIAS_HEADS
    )
    row_max, row_sum, acc = online_softmax(
        q, latent, old_k, old_v, added, g, j, upper, scale, row_max, row_sum, acc,
        True, False, 0, 0, True, SOFTCAP, BIAS_HEADS > 0, LATENT,
    )  # fmt: skip
    for block_begin in tl.range(begin + num_cached, upper, BLOCK_N, num_stages=STAGES):
        j = block_begin + tl.arange(0, BLOCK_N)
        added = load_bias(bias, token, kv * GROUP + g, j, g < GROUP, upper, capacity, BIAS_HEADS)
        if is_attended(added, g < GROUP, BIAS_HEADS):
            old_k = load_cached(
                keys, j, lower, upper, ring_first, capacity, True, RING,
                DIM, KEY_WIDTH, BLOCK_D,
            )  # fmt: skip
            old_v = load_cached(
                values, j, lower, upper, ring_first, capacity, True, RING,
                VALUE_STRIDE, VALUE_DIM, BLOCK_V,
            )  # fmt: skip
            if keep and STAGES == 1:
                old_k, old_v = keep_in_registers(old_k), keep_in_registers(old_v)
            row_max, row_sum, acc = online_softmax(
                q, latent, old_k, old_v, added, g, j, upper, scale, row_max, row_sum, acc,
                True, False, 0, 0, True, SOFTCAP, BIAS_HEADS > 0, LATENT,
            )  # fmt: skip

    if QUANTIZED:
        acc *= of_values
    if active_splits == 1:
        if SINKS:
            new_max = tl.maximum(row_max, sink)
            decay = tl.exp2(row_max - new_max)
            row_sum = row_sum * decay + tl.exp2(sink - new_max)
            acc = acc * decay[:, None]
        row_sum = tl.where(row_sum == 0, 1.0, row_sum)  # nothing cached, nothing appended: 0
        tl.store(out_at, (acc / row_sum[:, None]).to(out.dtype.element_ty), mask=out_mask)
    elif SPLIT_KV:
        combine_splits(
            row_max, row_sum, acc, g, e, first_head, split, splits, active_splits,
            sinks + kv * GROUP, out, workspace,
            locks + row * tl.num_programs(1) + head_block, tl.num_programs(0) * heads,
            block * BLOCK_G, GROUP, VALUE_DIM, SINKS, BLOCK_H, BLOCK_V, BLOCK_C,
        )  # fmt: skip


@triton.jit
def combine_splits(
    row_max, row_sum, acc, g, e, first_head, split, splits, active_splits, sinks, out, workspace,
    lock, all_heads, first_g,
    GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, SINKS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store this split's result; the last of ``active_splits`` programs combines all of them.

    It leaves ``lock``, which counts the splits that have arrived, at 0. ``sinks`` are those of the
    kv head's query heads.

    The workspace holds float32 results ``[rows, heads, splits, value_dim]``, each a softmax over
    its split, then the log-sum-exp (base 2) of each split, ``[rows, heads, splits]``.
    """
    lse = workspace + all_heads.to(tl.int64) * splits * VALUE_DIM
    part = (first_head + g) * splits + split
    divisor = tl.where(row_sum == 0, 1.0, row_sum)
    result_at = workspace + part[:, None] * VALUE_DIM + e[None, :]
    tl.store(
        result_at, acc / divisor[:, None], mask=(g < GROUP)[:, None] & (e < VALUE_DIM)[None, :]
    )
    tl.store(
        lse + part,
        tl.where(row_sum == 0, float("-inf"), row_max + tl.log2(divisor)),
        mask=g < GROUP,
    )
    tl.debug_barrier()  # the stores of every thread come before the one thread's release
    if tl.atomic_add(lock, 1, sem="acq_rel") == active_splits - 1:
        tl.store(lock, 0)
        h = first_g + tl.arange(0, BLOCK_H)
        own = (h < GROUP) & (h < first_g + BLOCK_H)
        max_lse, weight_sum = start_softmax(sinks, h, own, BLOCK_H, SINKS)
        result = tl.zeros((BLOCK_H, BLOCK_V), tl.float32)
        # Both loads of a round are in flight together; most steps need one round.
        for begin in range(0, active_splits, BLOCK_C):
            c = begin + tl.arange(0, BLOCK_C)
            place = (first_head + h)[None, :] * splits + c[:, None]
            present = own[None, :] & (c < active_splits)[:, None]
            # ".cg" skips the L1 cache, which does not see the stores of other programs
            part_result = tl.load(
                workspace + place[:, :, None] * VALUE_DIM + e[None, None, :],
                mask=present[:, :, None] & (e < VALUE_DIM)[None, None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            part_lse = tl.load(lse + place, mask=present, other=float("-inf"), cache_modifier=".cg")
            new_max = tl.maximum(max_lse, tl.max(part_lse, 0))
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            weights, decay = tl.exp2(part_lse - shift[None, :]), tl.exp2(max_lse - shift)
            weight_sum = weight_sum * decay + tl.sum(weights, 0)
            result = result * decay[:, None] + tl.sum(part_result * weights[:, :, None], 0)
            max_lse = new_max
        weight_sum = tl.where(weight_sum == 0, 1.0, weight_sum)
        to = out + (first_head + h)[:, None] * VALUE_DIM + e[None, :]
        tl.store(
            to,
            (result / weight_sum[:, None]).to(out.dtype.element_ty),
            mask=own[:, None] & (e < VALUE_DIM)[None, :],
        )


@triton.jit(do_not_specialize=["rows", "tokens"])
def append_kernel(
    key, value, cos, sin, key_state, value_state, slots, row_offsets, write_indices, key_scale,
    value_scale, key_stride, value_stride, capacity, rows, tokens,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, ROTARY: tl.constexpr,
    RING: tl.constexpr, LATENT: tl.constexpr, QUANTIZED: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Append the keys, rotated, and values of a mixed step. Program (block of tokens, kv head)."""
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

    KEY_WIDTH: tl.constexpr = DIM - VALUE_DIM if LATENT else DIM
    VALUE_STRIDE: tl.constexpr = DIM if LATENT else VALUE_DIM
    d = tl.arange(0, BLOCK_D)[None, :]
    e = tl.arange(0, BLOCK_V)[None, :]
    token = t.to(tl.int64)[:, None]
    to = ((slot.to(tl.int64) * KV_HEADS + kv) * capacity + entry)[:, None]
    mask = present[:, None]
    k_at = key + token * key_stride + kv * DIM
    k = load_rotated(
        k_at + (DIM - KEY_WIDTH), d, mask, cos + token * ROTARY, sin + token * ROTARY, mask,
        KEY_WIDTH, ROTARY,
    )  # fmt: skip
    if QUANTIZED:
        k = quantized(k, tl.load(key_scale + kv))
    tl.store(
        key_state + to * DIM + (DIM - KEY_WIDTH) + d,
        k.to(key_state.dtype.element_ty),
        mask=mask & (d < KEY_WIDTH),
    )
    v_at = k_at if LATENT else value + token * value_stride + kv * VALUE_DIM
    v = tl.load(v_at + e, mask=mask & (e < VALUE_DIM), other=0.0)
    if QUANTIZED:
        v = quantized(v, tl.load(value_scale + kv))
    tl.store(
        value_state + to * VALUE_STRIDE + e,
        v.to(value_state.dtype.element_ty),
        mask=mask & (e < VALUE_DIM),
    )


@triton.jit(do_not_specialize=["rows"])
def prefill_kernel(
    query, cos, sin, key_state, value_state, slots, row_offsets, write_indices, sinks, bias,
    key_scale, value_scale, out, query_stride, capacity, scale, rows,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    ROTARY: tl.constexpr, APPEND: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    CHUNK: tl.constexpr, RING: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    BIAS_HEADS: tl.constexpr, LATENT: tl.constexpr, QUANTIZED: tl.constexpr, PACK: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attend in a mixed step whose keys and values are in their slots.

    Program (block of one row's tokens, kv head and pack of ``PACK`` of its query heads). A block's
    ``BLOCK_M`` queries are ``BLOCK_M // PACK`` tokens times ``PACK`` heads: they share the keys and
    values that are loaded.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    KEY_WIDTH: tl.constexpr = DIM - VALUE_DIM if LATENT else DIM
    VALUE_STRIDE: tl.constexpr = DIM if LATENT else VALUE_DIM
    span: tl.constexpr = BLOCK_M // PACK
    packs: tl.constexpr = (GROUP + PACK - 1) // PACK
    # The last tokens of a row see most positions, so their blocks start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
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
    in_pack = (i < span * PACK) & (token < count) & (g < GROUP)
    present = in_pack[:, None]
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
    if CHUNK > 0:
        lower = tl.maximum(lower, (start + begin) // CHUNK * CHUNK)
    if RING:
        lower = tl.maximum(lower, cached - capacity)
    else:
        upper = tl.minimum(upper, capacity)
    ring_first = lower % capacity if RING else lower
    keys = key_state + (slot * KV_HEADS + kv) * capacity * DIM + (DIM - KEY_WIDTH)
    values = value_state + (slot * KV_HEADS + kv) * capacity * VALUE_STRIDE
    q_at = query + packed * query_stride + (kv * GROUP + g)[:, None] * DIM
    q = load_rotated(
        q_at + (DIM - KEY_WIDTH), d, present, cos + packed * ROTARY, sin + packed * ROTARY, present,
        KEY_WIDTH, ROTARY,
    )  # fmt: skip
    latent = q
    if LATENT:
        latent = tl.load(q_at + e, mask=present & (e < VALUE_DIM), other=0.0)
    if QUANTIZED:
        scale *= tl.load(key_scale + kv)
    row_max, row_sum = start_softmax(sinks, kv * GROUP + g, g < GROUP, BLOCK_M, SINKS)
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    positions = start + token
    masked_from = lower
    if WINDOW == 0 and CHUNK == 0:  # positions that every token of the block sees need no mask
        visible_to_all = tl.minimum(upper, start + begin + 1) if CAUSAL else upper
        masked_from = lower + tl.maximum(visible_to_all - lower, 0) // BLOCK_N * BLOCK_N
        for block_begin in tl.range(lower, masked_from, BLOCK_N, num_stages=STAGES):
            j = block_begin + tl.arange(0, BLOCK_N)
            added = load_bias(
                bias, first + token, kv * GROUP + g, j, in_pack, upper, capacity, BIAS_HEADS
            )
            if is_attended(added, in_pack, BIAS_HEADS):
                k = load_cached(
                    keys, j, lower, upper, ring_first, capacity, False, RING,
                    DIM, KEY_WIDTH, BLOCK_D,
                )  # fmt: skip
                v = load_cached(
                    values, j, lower, upper, ring_first, capacity, False, RING,
                    VALUE_STRIDE, VALUE_DIM, BLOCK_V,
                )  # fmt: skip
                row_max, row_sum, acc = online_softmax(
                    q, latent, k, v, added, positions, j, upper, scale, row_max, row_sum, acc,
                    False, False, 0, 0, BIAS_HEADS > 0, SOFTCAP, BIAS_HEADS > 0, LATENT,
                )  # fmt: skip
    may_be_empty: tl.constexpr = CAUSAL or WINDOW > 0 or CHUNK > 0 or BIAS_HEADS > 0
    for block_begin in tl.range(masked_from, upper, BLOCK_N, num_stages=STAGES):
        j = block_begin + tl.arange(0, BLOCK_N)
        added = load_bias(
            bias, first + token, kv * GROUP + g, j, in_pack, upper, capacity, BIAS_HEADS
        )
        if is_attended(added, in_pack, BIAS_HEADS):
            k = load_cached(
                keys, j, lower, upper, ring_first, capacity, True, RING,
                DIM, KEY_WIDTH, BLOCK_D,
            )  # fmt: skip
            v = load_cached(
                values, j, lower, upper, ring_first, capacity, True, RING,
                VALUE_STRIDE, VALUE_DIM, BLOCK_V,
            )  # fmt: skip
            row_max, row_sum, acc = online_softmax(
                q, latent, k, v, added, positions, j, upper, scale, row_max, row_sum, acc,
                True, CAUSAL, WINDOW, CHUNK, may_be_empty, SOFTCAP, BIAS_HEADS > 0, LATENT,
            )  # fmt: skip
    row_sum = tl.where(row_sum == 0, 1.0, row_sum)  # a token that sees nothing: 0
    if QUANTIZED:
        acc *= tl.load(value_scale + kv)
    tl.store(
        out_at, (acc / row_sum[:, None]).to(out.dtype.element_ty), mask=present & (e < VALUE_DIM)
    )
