"""Triton-language kernels of convolutions and recurrences.

`inplace.kernels.recurrence` launches them.
"""

import triton
import triton.language as tl


@triton.jit
def store_zeros(out, first, end, stride, entries, mask):
    """Store zeros for tokens from ``first`` to ``end``: of null rows, and those of no row."""
    zeros = tl.zeros_like(entries).to(out.dtype.element_ty)
    for token in range(first, end):
        tl.store(out + token * stride + entries, zeros, mask=mask)


@triton.jit
def conv_kernel(
    x, weight, bias, state, slots, row_offsets, out, tokens, rows, channels,
    WIDTH: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (block of tokens, block of channels): their outputs. States are only read."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_R)
    ends = tl.load(row_offsets + r + 1, mask=r < rows, other=2147483647)
    row = tl.sum((ends[None, :] <= token[:, None]).to(tl.int32), 1)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    slot = tl.load(slots + row, mask=row < rows, other=-1).to(tl.int64)
    place = token - tl.load(row_offsets + row, mask=row < rows, other=0)
    is_live = (slot >= 0) & (token < tokens)
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    if BIAS:
        total += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(WIDTH):
        back = WIDTH - 1 - k
        is_past = is_live & (place < back)
        past = state + (slot * (WIDTH - 1) + (WIDTH - 1) - (back - place)) * channels
        mask = is_past[:, None] & inside[None, :]
        value = tl.load(past[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
        at = x + (token - back).to(tl.int64) * channels
        mask = (is_live & (place >= back))[:, None] & inside[None, :]
        value += tl.load(at[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
        factor = tl.load(weight + c * WIDTH + k, mask=inside, other=0.0).to(tl.float32)
        total += value * factor[None, :]
    if SILU:
        total = total / (1.0 + tl.exp(-total))
    total = tl.where(is_live[:, None], total, 0.0)
    to = (out + token.to(tl.int64) * channels)[:, None] + c[None, :]
    mask = (token < tokens)[:, None] & inside[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def conv_state_kernel(
    x, state, slots, row_offsets, channels, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Program (row, block of channels): the last inputs of the row, the newest last."""
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    first = tl.load(row_offsets + row)
    count = tl.load(row_offsets + row + 1) - first
    if (slot < 0) | (count == 0):
        return
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    kept = state + slot * (WIDTH - 1) * channels + c
    # an entry is read before it is written: its source is behind it
    for entry in tl.static_range(WIDTH - 1):
        place = entry + count - (WIDTH - 1)  # among the row's tokens; negative: in the old state
        old = tl.load(
            kept + (entry + count).to(tl.int64) * channels, mask=inside & (place < 0), other=0.0
        )
        at = x + (first + place).to(tl.int64) * channels + c
        new = tl.load(at, mask=inside & (place >= 0), other=0.0)
        tl.store(kept + entry * channels, tl.where(place < 0, old, new), mask=inside)


@triton.jit
def scan_kernel(
    x, dt, rates, key, query, skip, state, slots, row_offsets, out, tokens,
    HEADS: tl.constexpr, DIM: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
    RATE_DIM: tl.constexpr, RATE_SIZE: tl.constexpr, SKIP: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """Program (block of channels, group, row): `inplace.operators.selective_scan`.

    Programs that follow each other work on parts of a state that do so too.
    """
    row, group = tl.program_id(2), tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    first = tl.load(row_offsets + row).to(tl.int64)
    end = tl.load(row_offsets + row + 1).to(tl.int64)
    of_group: tl.constexpr = HEADS // GROUPS * DIM
    place = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c, n = group * of_group + place, tl.arange(0, BLOCK_N)
    known, sized = place < of_group, n < SIZE
    if row == tl.num_programs(2) - 1:
        store_zeros(out, end, tokens, HEADS * DIM, c, known)
    if slot < 0:
        store_zeros(out, first, end, HEADS * DIM, c, known)
        return
    state_mask = known[:, None] & sized[None, :]
    at = state + slot * HEADS * DIM * SIZE + (c[:, None] * SIZE + n[None, :])
    h = tl.load(at, mask=state_mask, other=0.0, eviction_policy=EVICT).to(tl.float32)
    head = c // DIM
    rate = rates + head * RATE_DIM * RATE_SIZE + (c % DIM) * RATE_SIZE * (RATE_DIM > 1)
    if RATE_SIZE > 1:
        a = tl.load(rate[:, None] + n[None, :], mask=state_mask, other=0.0).to(tl.float32)
    else:
        a = tl.load(rate, mask=known, other=0.0).to(tl.float32)[:, None]
    for token in range(first, end):
        step = tl.load(dt + token * HEADS + head, mask=known, other=0.0).to(tl.float32)
        value = tl.load(x + token * HEADS * DIM + c, mask=known, other=0.0).to(tl.float32)
        of_token = (token * GROUPS + group) * SIZE + n
        k = tl.load(key + of_token, mask=sized, other=0.0).to(tl.float32)
        q = tl.load(query + of_token, mask=sized, other=0.0).to(tl.float32)
        h = h * tl.exp(a * step[:, None]) + (step * value)[:, None] * k[None, :]
        total = tl.sum(h * q[None, :], 1)
        if SKIP:
            total += value * tl.load(skip + head, mask=known, other=0.0).to(tl.float32)
        to = out + token * HEADS * DIM + c
        tl.store(to, total.to(out.dtype.element_ty), mask=known)
    tl.store(at, h.to(state.dtype.element_ty), mask=state_mask, eviction_policy=EVICT)


@triton.jit
def delta_kernel(
    query, key, value, decay, beta, state, slots, row_offsets, out, tokens,
    HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, DIAGONAL: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """Program (block of the value, head, row): `inplace.operators.delta_rule`.

    Programs that follow each other work on parts of a state that do so too.
    """
    row, head = tl.program_id(2), tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    first = tl.load(row_offsets + row).to(tl.int64)
    end = tl.load(row_offsets + row + 1).to(tl.int64)
    k, v = tl.arange(0, BLOCK_K), tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    keyed, valued = k < KEY_DIM, v < VALUE_DIM
    of_head = head * VALUE_DIM + v
    if row == tl.num_programs(2) - 1:
        store_zeros(out, end, tokens, HEADS * VALUE_DIM, of_head, valued)
    if slot < 0:
        store_zeros(out, first, end, HEADS * VALUE_DIM, of_head, valued)
        return
    state_mask = keyed[:, None] & valued[None, :]
    of_state = k[:, None] * VALUE_DIM + v[None, :]
    at = state + (slot * HEADS + head) * KEY_DIM * VALUE_DIM + of_state
    s = tl.load(at, mask=state_mask, other=0.0, eviction_policy=EVICT).to(tl.float32)
    for token in range(first, end):
        pair = token * HEADS + head
        q = tl.load(query + pair * KEY_DIM + k, mask=keyed, other=0.0).to(tl.float32)
        kk = tl.load(key + pair * KEY_DIM + k, mask=keyed, other=0.0).to(tl.float32)
        vv = tl.load(value + pair * VALUE_DIM + v, mask=valued, other=0.0).to(tl.float32)
        if DIAGONAL:
            g = tl.load(decay + pair * KEY_DIM + k, mask=keyed, other=0.0).to(tl.float32)
            s = s * tl.exp(g)[:, None]
        else:
            s = s * tl.exp(tl.load(decay + pair).to(tl.float32))
        predicted = tl.sum(s * kk[:, None], 0)
        correction = (vv - predicted) * tl.load(beta + pair).to(tl.float32)
        s += kk[:, None] * correction[None, :]
        total = tl.sum(s * q[:, None], 0)
        to = out + pair * VALUE_DIM + v
        tl.store(to, total.to(out.dtype.element_ty), mask=valued)
    tl.store(at, s.to(state.dtype.element_ty), mask=state_mask, eviction_policy=EVICT)


@triton.jit
def linear_recurrence_kernel(
    decay, x, state, slots, row_offsets, out, tokens, channels, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Program (row, block of channels): `inplace.operators.linear_recurrence`."""
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    first = tl.load(row_offsets + row).to(tl.int64)
    end = tl.load(row_offsets + row + 1).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    if row == tl.num_programs(0) - 1:
        store_zeros(out, end, tokens, channels, c, inside)
    at = state + slot * channels + c
    h = tl.load(at, mask=inside & (slot >= 0), other=0.0).to(tl.float32)
    for token in range(first, end):
        of_token = token * channels + c
        a = tl.load(decay + of_token, mask=inside, other=0.0).to(tl.float32)
        h = a * h + tl.load(x + of_token, mask=inside, other=0.0).to(tl.float32)
        total = tl.where(slot >= 0, h, 0.0)
        tl.store(out + of_token, total.to(out.dtype.element_ty), mask=inside)
    tl.store(at, h.to(state.dtype.element_ty), mask=inside & (slot >= 0))


@triton.jit
def find_chunk(row_offsets, rows, index, CHUNK: tl.constexpr, BLOCK_R: tl.constexpr):
    """The row of a chunk, or ``rows`` if there are fewer chunks, and its number in the row.

    Every row with tokens begins a chunk of its own.
    """
    r = tl.arange(0, BLOCK_R)
    firsts = tl.load(row_offsets + r, mask=r < rows, other=0)
    ends = tl.load(row_offsets + r + 1, mask=r < rows, other=0)
    chunks = tl.cumsum((ends - firsts + CHUNK - 1) // CHUNK, 0)
    row = tl.sum(((chunks <= index) & (r < rows)).to(tl.int32), 0)
    return row, index - tl.max(tl.where(r < row, chunks, 0), 0)


@triton.jit
def count_chunks(row_offsets, row, CHUNK: tl.constexpr, BLOCK_R: tl.constexpr):
    """The number of chunks of the rows before a row."""
    r = tl.arange(0, BLOCK_R)
    firsts = tl.load(row_offsets + r, mask=r < row, other=0)
    ends = tl.load(row_offsets + r + 1, mask=r < row, other=0)
    return tl.sum((ends - firsts + CHUNK - 1) // CHUNK, 0).to(tl.int64)


@triton.jit
def scan_states_kernel(
    x, dt, rates, key, state, slots, row_offsets, states, out, tokens,
    HEADS: tl.constexpr, DIM: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (row, head, block of its channels): the states before each chunk of the row.

    The outputs are `scan_outputs_kernel`'s. Both are the state-space dual of Mamba 2
    (arXiv:2405.21060, section 6) for heads with one decay.
    """
    row, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    first = tl.load(row_offsets + row).to(tl.int64)
    end = tl.load(row_offsets + row + 1).to(tl.int64)
    t = tl.arange(0, CHUNK)
    p, n = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    of_head, sized = p < DIM, n < SIZE
    if row == tl.num_programs(0) - 1:
        store_zeros(out, end, tokens, HEADS * DIM, head * DIM + p, of_head)
    if (slot < 0) | (first == end):
        return
    # Entries of a chunk from its first one: 32-bit offsets need half the registers of addresses.
    of_values = t[:, None] * (HEADS * DIM) + p[None, :]
    of_keys = t[:, None] * (GROUPS * SIZE) + n[None, :]
    of_state = p[:, None] * SIZE + n[None, :]
    state_mask = of_head[:, None] & sized[None, :]
    at = state + (slot * HEADS + head) * DIM * SIZE
    h = tl.load(at + of_state, mask=state_mask, other=0.0).to(tl.float32)
    rate = tl.load(rates + head).to(tl.float32)
    chunk = count_chunks(row_offsets, row, CHUNK, BLOCK_R)
    for start in range(first, end, CHUNK):
        to = states + (chunk * HEADS + head) * DIM * SIZE
        tl.store(to + of_state, h.to(states.dtype.element_ty), mask=state_mask)
        chunk += 1
        inside = t < end - start
        pair = start * HEADS + head
        step = tl.load(dt + pair + t * HEADS, mask=inside, other=0.0).to(tl.float32)
        total, last = tl.cumsum(step * rate, 0), tl.sum(step * rate, 0)
        value_mask = inside[:, None] & of_head[None, :]
        value = tl.load(x + pair * DIM + of_values, mask=value_mask, other=0.0).to(tl.float32)
        key_mask = inside[:, None] & sized[None, :]
        shared = (start * GROUPS + head // (HEADS // GROUPS)) * SIZE
        k = tl.load(key + shared + of_keys, mask=key_mask, other=0.0)
        scaled = (value * (step * tl.exp(last - total))[:, None]).to(k.dtype)
        h = h * tl.exp(last) + tl.dot(tl.trans(scaled), k)
    tl.store(at + of_state, h.to(state.dtype.element_ty), mask=state_mask)


@triton.jit
def scan_outputs_kernel(
    x, dt, rates, key, query, skip, slots, row_offsets, states, out, rows,
    HEADS: tl.constexpr, DIM: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
    SKIP: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (chunk of a row, head, block of its channels): its outputs."""
    index, head = tl.program_id(0), tl.program_id(1)
    row, number = find_chunk(row_offsets, rows, index, CHUNK, BLOCK_R)
    if row >= rows:
        return
    slot = tl.load(slots + row)
    start = tl.load(row_offsets + row).to(tl.int64) + number * CHUNK
    t = tl.arange(0, CHUNK)
    inside = t < tl.load(row_offsets + row + 1) - start
    p, n = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    of_head, sized = p < DIM, n < SIZE
    value_mask = inside[:, None] & of_head[None, :]
    of_values = t[:, None] * (HEADS * DIM) + p[None, :]
    pair = start * HEADS + head
    if slot < 0:
        zeros = tl.zeros((CHUNK, BLOCK_P), out.dtype.element_ty)
        tl.store(out + pair * DIM + of_values, zeros, mask=value_mask)
        return
    rate = tl.load(rates + head).to(tl.float32)
    step = tl.load(dt + pair + t * HEADS, mask=inside, other=0.0).to(tl.float32)
    total = tl.cumsum(step * rate, 0)
    key_mask = inside[:, None] & sized[None, :]
    of_keys = t[:, None] * (GROUPS * SIZE) + n[None, :]
    shared = (start * GROUPS + head // (HEADS // GROUPS)) * SIZE
    k = tl.load(key + shared + of_keys, mask=key_mask, other=0.0)
    q = tl.load(query + shared + of_keys, mask=key_mask, other=0.0).to(k.dtype)
    at = states + (index.to(tl.int64) * HEADS + head) * DIM * SIZE
    state_mask = sized[:, None] & of_head[None, :]
    h = tl.load(at + n[:, None] + p[None, :] * SIZE, mask=state_mask, other=0.0).to(k.dtype)
    result = tl.dot(q, h) * tl.exp(total)[:, None]
    decay = tl.where(t[:, None] >= t[None, :], total[:, None] - total[None, :], float("-inf"))
    weights = tl.dot(q, tl.trans(k)) * tl.exp(decay) * step[None, :]
    value = tl.load(x + pair * DIM + of_values, mask=value_mask, other=0.0)
    result += tl.dot(weights.to(value.dtype), value)
    if SKIP:
        result += value.to(tl.float32) * tl.load(skip + head).to(tl.float32)
    tl.store(out + pair * DIM + of_values, result.to(out.dtype.element_ty), mask=value_mask)


@triton.jit
def delta_inverse_kernel(
    key, decay, beta, slots, row_offsets, inverses, rows,
    HEADS: tl.constexpr, KEY_DIM: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (part of a chunk of a row, head): ``(1 + A)^-1`` of the part, ``[PART, PART]``.

    With ``A[i, j] = beta[i] * (k[i] . k[j]) * exp(decay from j to i)`` for j before i. Forward
    substitution is exact where keys repeat, which a series in A is not.
    """
    index, head = tl.program_id(0), tl.program_id(1)
    parts: tl.constexpr = CHUNK // PART
    row, number = find_chunk(row_offsets, rows, index // parts, CHUNK, BLOCK_R)
    if row >= rows:
        return
    start = tl.load(row_offsets + row).to(tl.int64) + number * CHUNK + index % parts * PART
    end = tl.load(row_offsets + row + 1)
    if (tl.load(slots + row) < 0) | (start >= end):
        return
    t, c = tl.arange(0, PART), tl.arange(0, BLOCK_K)
    inside = t < end - start
    pair = start * HEADS + head
    total = tl.cumsum(tl.load(decay + pair + t * HEADS, mask=inside, other=0.0).to(tl.float32), 0)
    b = tl.load(beta + pair + t * HEADS, mask=inside, other=0.0).to(tl.float32)
    key_mask = inside[:, None] & (c < KEY_DIM)[None, :]
    of_keys = t[:, None] * (HEADS * KEY_DIM) + c[None, :]
    k = tl.load(key + pair * KEY_DIM + of_keys, mask=key_mask, other=0.0)
    between = tl.where(t[:, None] > t[None, :], total[:, None] - total[None, :], float("-inf"))
    inverse = -tl.dot(k, tl.trans(k)) * tl.exp(between) * b[:, None]
    for i in range(1, PART):
        own = tl.sum(tl.where(t[:, None] == i, inverse, 0.0), 0)
        own += tl.sum(own[:, None] * inverse, 0)
        inverse = tl.where(t[:, None] == i, own[None, :], inverse)
    inverse += tl.where(t[:, None] == t[None, :], 1.0, 0.0)
    to = inverses + pair * PART + (t[:, None] * (HEADS * PART) + t[None, :])
    tl.store(to, inverse.to(inverses.dtype.element_ty), mask=inside[:, None])


@triton.jit
def delta_solve_kernel(
    key, value, decay, beta, slots, row_offsets, inverses, reads, writes, rows,
    HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, CHUNK: tl.constexpr,
    PART: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (chunk of a row, head): what the chunk writes, but for the state before it.

    A chunk writes ``writes - reads @ state``, where ``writes = (1 + A)^-1 (beta * value)`` and
    ``reads = (1 + A)^-1 (beta * decayed key)``, with A as in `delta_inverse_kernel` but of the
    whole chunk: the chunks of gated delta networks (arXiv:2412.06464, section 3.3), for heads with
    one decay. The second part of a chunk is solved with the first one's result.
    """
    index, head = tl.program_id(0), tl.program_id(1)
    row, number = find_chunk(row_offsets, rows, index, CHUNK, BLOCK_R)
    if row >= rows:
        return
    if tl.load(slots + row) < 0:
        return
    t, c, v = tl.arange(0, PART), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    keyed, valued = (c < KEY_DIM)[None, :], (v < VALUE_DIM)[None, :]
    of_keys = t[:, None] * (HEADS * KEY_DIM) + c[None, :]
    of_values = t[:, None] * (HEADS * VALUE_DIM) + v[None, :]
    of_inverse = t[:, None] * (HEADS * PART) + t[None, :]
    start = tl.load(row_offsets + row).to(tl.int64) + number * CHUNK
    count = tl.load(row_offsets + row + 1) - start
    pair, inside = start * HEADS + head, t < count
    g = tl.load(decay + pair + t * HEADS, mask=inside, other=0.0).to(tl.float32)
    total, so_far = tl.cumsum(g, 0), tl.sum(g, 0)
    b = tl.load(beta + pair + t * HEADS, mask=inside, other=0.0).to(tl.float32)
    key_mask, value_mask = inside[:, None] & keyed, inside[:, None] & valued
    inverse = tl.load(inverses + pair * PART + of_inverse, mask=inside[:, None], other=0.0)
    k = tl.load(key + pair * KEY_DIM + of_keys, mask=key_mask, other=0.0)
    decayed = (k.to(tl.float32) * (b * tl.exp(total))[:, None]).to(k.dtype)
    read = tl.dot(inverse, decayed).to(k.dtype)
    tl.store(reads + pair * KEY_DIM + of_keys, read.to(reads.dtype.element_ty), mask=key_mask)
    target = tl.load(value + pair * VALUE_DIM + of_values, mask=value_mask, other=0.0).to(
        tl.float32
    )
    written = tl.dot(inverse, (target * b[:, None]).to(k.dtype)).to(k.dtype)
    to = writes + pair * VALUE_DIM + of_values
    tl.store(to, written.to(writes.dtype.element_ty), mask=value_mask)
    if CHUNK > PART:
        pair += PART * HEADS
        inside = t < count - PART
        g = tl.load(decay + pair + t * HEADS, mask=inside, other=0.0).to(tl.float32)
        later = so_far + tl.cumsum(g, 0)
        b = tl.load(beta + pair + t * HEADS, mask=inside, other=0.0).to(tl.float32)
        key_mask, value_mask = inside[:, None] & keyed, inside[:, None] & valued
        inverse = tl.load(inverses + pair * PART + of_inverse, mask=inside[:, None], other=0.0)
        own = tl.load(key + pair * KEY_DIM + of_keys, mask=key_mask, other=0.0)
        between = tl.exp(later[:, None] - total[None, :]) * b[:, None]
        across = (tl.dot(own, tl.trans(k)) * between).to(k.dtype)
        decayed = own.to(tl.float32) * (b * tl.exp(later))[:, None]
        read = tl.dot(inverse, (decayed - tl.dot(across, read)).to(k.dtype))
        tl.store(reads + pair * KEY_DIM + of_keys, read.to(reads.dtype.element_ty), mask=key_mask)
        target = tl.load(value + pair * VALUE_DIM + of_values, mask=value_mask, other=0.0)
        target = target.to(tl.float32) * b[:, None]
        written = tl.dot(inverse, (target - tl.dot(across, written)).to(k.dtype))
        to = writes + pair * VALUE_DIM + of_values
        tl.store(to, written.to(writes.dtype.element_ty), mask=value_mask)


@triton.jit
def delta_states_kernel(
    key, decay, state, slots, row_offsets, reads, writes, states, out, tokens,
    HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (row, head, block of the value): the states before each chunk of the row.

    ``writes`` becomes what each token writes.
    """
    row, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    first = tl.load(row_offsets + row).to(tl.int64)
    end = tl.load(row_offsets + row + 1).to(tl.int64)
    t, c = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K)
    v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    keyed, valued = c < KEY_DIM, v < VALUE_DIM
    if row == tl.num_programs(0) - 1:
        store_zeros(out, end, tokens, HEADS * VALUE_DIM, head * VALUE_DIM + v, valued)
    if (slot < 0) | (first == end):
        return
    of_values = t[:, None] * (HEADS * VALUE_DIM) + v[None, :]
    of_keys = t[:, None] * (HEADS * KEY_DIM) + c[None, :]
    of_state = c[:, None] * VALUE_DIM + v[None, :]
    state_mask = keyed[:, None] & valued[None, :]
    at = state + (slot * HEADS + head) * KEY_DIM * VALUE_DIM
    s = tl.load(at + of_state, mask=state_mask, other=0.0).to(tl.float32)
    chunk = count_chunks(row_offsets, row, CHUNK, BLOCK_R)
    for start in range(first, end, CHUNK):
        to = states + (chunk * HEADS + head) * KEY_DIM * VALUE_DIM
        tl.store(to + of_state, s.to(states.dtype.element_ty), mask=state_mask)
        chunk += 1
        inside = t < end - start
        pair = start * HEADS + head
        g = tl.load(decay + pair + t * HEADS, mask=inside, other=0.0).to(tl.float32)
        total, last = tl.cumsum(g, 0), tl.sum(g, 0)
        key_mask = inside[:, None] & keyed[None, :]
        read = tl.load(reads + pair * KEY_DIM + of_keys, mask=key_mask, other=0.0)
        value_mask = inside[:, None] & valued[None, :]
        own = writes + pair * VALUE_DIM + of_values
        written = tl.load(own, mask=value_mask, other=0.0).to(tl.float32)
        written -= tl.dot(read, s.to(read.dtype))
        tl.store(own, written.to(read.dtype), mask=value_mask)
        k = tl.load(key + pair * KEY_DIM + of_keys, mask=key_mask, other=0.0)
        scaled = (written * tl.exp(last - total)[:, None]).to(k.dtype)
        s = s * tl.exp(last) + tl.dot(tl.trans(k), scaled)
    tl.store(at + of_state, s.to(state.dtype.element_ty), mask=state_mask)


@triton.jit
def delta_outputs_kernel(
    query, key, decay, slots, row_offsets, writes, states, out, rows,
    HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (chunk of a row, head, block of the value): its outputs."""
    index, head = tl.program_id(0), tl.program_id(1)
    row, number = find_chunk(row_offsets, rows, index, CHUNK, BLOCK_R)
    if row >= rows:
        return
    slot = tl.load(slots + row)
    start = tl.load(row_offsets + row).to(tl.int64) + number * CHUNK
    t, c = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K)
    v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    keyed, valued = c < KEY_DIM, v < VALUE_DIM
    inside = t < tl.load(row_offsets + row + 1) - start
    value_mask = inside[:, None] & valued[None, :]
    of_values = t[:, None] * (HEADS * VALUE_DIM) + v[None, :]
    pair = start * HEADS + head
    if slot < 0:
        zeros = tl.zeros((CHUNK, BLOCK_V), out.dtype.element_ty)
        tl.store(out + pair * VALUE_DIM + of_values, zeros, mask=value_mask)
        return
    total = tl.cumsum(tl.load(decay + pair + t * HEADS, mask=inside, other=0.0).to(tl.float32), 0)
    key_mask = inside[:, None] & keyed[None, :]
    of_keys = t[:, None] * (HEADS * KEY_DIM) + c[None, :]
    k = tl.load(key + pair * KEY_DIM + of_keys, mask=key_mask, other=0.0)
    q = tl.load(query + pair * KEY_DIM + of_keys, mask=key_mask, other=0.0).to(k.dtype)
    at = states + (index.to(tl.int64) * HEADS + head) * KEY_DIM * VALUE_DIM
    state_mask = keyed[:, None] & valued[None, :]
    s = tl.load(at + c[:, None] * VALUE_DIM + v[None, :], mask=state_mask, other=0.0).to(k.dtype)
    result = tl.dot(q, s) * tl.exp(total)[:, None]
    between = tl.where(t[:, None] >= t[None, :], total[:, None] - total[None, :], float("-inf"))
    weights = tl.dot(q, tl.trans(k)) * tl.exp(between)
    written = tl.load(writes + pair * VALUE_DIM + of_values, mask=value_mask, other=0.0).to(k.dtype)
    result += tl.dot(weights.to(k.dtype), written)
    tl.store(out + pair * VALUE_DIM + of_values, result.to(out.dtype.element_ty), mask=value_mask)
