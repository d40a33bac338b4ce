"""Convolutions and recurrences on a GPU, over each row's own tokens and the state of its slot.

A program of a recurrence holds a part of one row's state in registers, and goes through the row's
tokens. So a decode step reads and writes each state once; a prompt takes a time that is linear in
its tokens. All arithmetic is in float32.
"""

import triton
import triton.language as tl

from inplace.kernels.memory import Memory

BLOCK = 64
"""Channels that a program computes."""


@triton.jit
def conv_kernel(
    x, weight, bias, state, slots, row_offsets, out, rows, channels,
    WIDTH: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (token, block of channels): the token's output. States are only read."""
    token = tl.program_id(0)
    r = tl.arange(0, BLOCK_R)
    ends = tl.load(row_offsets + r + 1, mask=r < rows, other=2147483647)
    row = tl.sum((ends <= token).to(tl.int32), 0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    slot = tl.load(slots + row, mask=row < rows, other=-1).to(tl.int64)
    place = token - tl.load(row_offsets + row, mask=row < rows, other=0)
    total = tl.zeros((BLOCK_C,), tl.float32)
    if BIAS:
        total += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(WIDTH):
        back = WIDTH - 1 - k
        new = place >= back
        past = state + (slot * (WIDTH - 1) + (WIDTH - 1) - (back - place)) * channels + c
        value = tl.load(past, mask=inside & (slot >= 0) & (place < back), other=0.0).to(tl.float32)
        at = x + (token - back).to(tl.int64) * channels + c
        value += tl.load(at, mask=inside & new, other=0.0).to(tl.float32)
        total += value * tl.load(weight + c * WIDTH + k, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        total = total / (1.0 + tl.exp(-total))
    total = tl.where(slot >= 0, total, 0.0)
    to = out + token.to(tl.int64) * channels + c
    tl.store(to, total.to(out.dtype.element_ty), mask=inside)


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
    x, dt, rates, key, query, skip, state, slots, row_offsets, out,
    HEADS: tl.constexpr, DIM: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
    RATE_DIM: tl.constexpr, RATE_SIZE: tl.constexpr, SKIP: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (row, group, block of its channels): `inplace.operators.selective_scan`."""
    row, group = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    first = tl.load(row_offsets + row).to(tl.int64)
    end = tl.load(row_offsets + row + 1).to(tl.int64)
    of_group: tl.constexpr = HEADS // GROUPS * DIM
    place = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    c, n = group * of_group + place, tl.arange(0, BLOCK_N)
    known, sized = place < of_group, n < SIZE
    if slot < 0:
        for token in range(first, end):
            to = out + token * HEADS * DIM + c
            tl.store(to, tl.zeros((BLOCK_C,), out.dtype.element_ty), mask=known)
        return
    both = known[:, None] & sized[None, :]
    at = state + (slot * HEADS * DIM + c[:, None]) * SIZE + n[None, :]
    h = tl.load(at, mask=both, other=0.0).to(tl.float32)
    head = c // DIM
    rate = rates + head[:, None] * RATE_DIM * RATE_SIZE + n[None, :] * (RATE_SIZE > 1)
    rate += (c % DIM)[:, None] * RATE_SIZE * (RATE_DIM > 1)
    a = tl.load(rate, mask=both, other=0.0).to(tl.float32)
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
    tl.store(at, h.to(state.dtype.element_ty), mask=both)


@triton.jit
def delta_kernel(
    query, key, value, decay, beta, state, slots, row_offsets, out,
    HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, DIAGONAL: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Program (row, head, block of the value): `inplace.operators.delta_rule`."""
    row, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    first = tl.load(row_offsets + row).to(tl.int64)
    end = tl.load(row_offsets + row + 1).to(tl.int64)
    k, v = tl.arange(0, BLOCK_K), tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    keyed, valued = k < KEY_DIM, v < VALUE_DIM
    if slot < 0:
        for token in range(first, end):
            to = out + (token * HEADS + head) * VALUE_DIM + v
            tl.store(to, tl.zeros((BLOCK_V,), out.dtype.element_ty), mask=valued)
        return
    both = keyed[:, None] & valued[None, :]
    at = state + ((slot * HEADS + head) * KEY_DIM + k[:, None]) * VALUE_DIM + v[None, :]
    s = tl.load(at, mask=both, other=0.0).to(tl.float32)
    for token in range(first, end):
        this = token * HEADS + head
        q = tl.load(query + this * KEY_DIM + k, mask=keyed, other=0.0).to(tl.float32)
        kk = tl.load(key + this * KEY_DIM + k, mask=keyed, other=0.0).to(tl.float32)
        vv = tl.load(value + this * VALUE_DIM + v, mask=valued, other=0.0).to(tl.float32)
        if DIAGONAL:
            g = tl.load(decay + this * KEY_DIM + k, mask=keyed, other=0.0).to(tl.float32)
            s = s * tl.exp(g)[:, None]
        else:
            s = s * tl.exp(tl.load(decay + this).to(tl.float32))
        known = tl.sum(s * kk[:, None], 0)
        correction = (vv - known) * tl.load(beta + this).to(tl.float32)
        s += kk[:, None] * correction[None, :]
        total = tl.sum(s * q[:, None], 0)
        to = out + this * VALUE_DIM + v
        tl.store(to, total.to(out.dtype.element_ty), mask=valued)
    tl.store(at, s.to(state.dtype.element_ty), mask=both)


@triton.jit
def linear_recurrence_kernel(
    decay, x, state, slots, row_offsets, out, channels, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Program (row, block of channels): `inplace.operators.linear_recurrence`."""
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    first = tl.load(row_offsets + row).to(tl.int64)
    end = tl.load(row_offsets + row + 1).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    at = state + slot * channels + c
    h = tl.load(at, mask=inside & (slot >= 0), other=0.0).to(tl.float32)
    for token in range(first, end):
        of_token = token * channels + c
        a = tl.load(decay + of_token, mask=inside, other=0.0).to(tl.float32)
        h = a * h + tl.load(x + of_token, mask=inside, other=0.0).to(tl.float32)
        total = tl.where(slot >= 0, h, 0.0)
        tl.store(out + of_token, total.to(out.dtype.element_ty), mask=inside)
    tl.store(at, h.to(state.dtype.element_ty), mask=inside & (slot >= 0))


def causal_conv1d(
    *,
    x: Memory,
    weight: Memory,
    bias: Memory | None,
    state: Memory,
    slots: Memory,
    row_offsets: Memory,
    out: Memory,
    tokens: int,
    rows: int,
    channels: int,
    width: int,
    silu: bool,
) -> None:
    """Launch `inplace.operators.causal_conv1d` on the current stream; all memory is contiguous."""
    if tokens == 0 or rows == 0:
        return
    blocks = triton.cdiv(channels, 2 * BLOCK)
    conv_kernel[(tokens, blocks)](
        x, weight, x if bias is None else bias, state, slots, row_offsets, out, rows, channels,
        WIDTH=width, BIAS=bias is not None, SILU=silu, BLOCK_C=2 * BLOCK,
        BLOCK_R=triton.next_power_of_2(rows),
    )  # fmt: skip
    conv_state_kernel[(rows, blocks)](
        x, state, slots, row_offsets, channels, WIDTH=width, BLOCK_C=2 * BLOCK
    )


def selective_scan(
    *,
    x: Memory,
    dt: Memory,
    rates: Memory,
    key: Memory,
    query: Memory,
    skip: Memory | None,
    state: Memory,
    slots: Memory,
    row_offsets: Memory,
    out: Memory,
    rows: int,
    shape: tuple[int, int, int],
    groups: int,
    rate_shape: tuple[int, int],
) -> None:
    """Launch `inplace.operators.selective_scan` on the current stream; all memory is contiguous.

    Args:
        x, dt, key, query, skip, state, slots, row_offsets: of the operator; ``rates`` is its A.
        out: ``[tokens, heads, dim]``.
        rows: rows of the step.
        shape: of a slot: heads, dim, size.
        groups: of key and query.
        rate_shape: extents of a head's rates.
    """
    if rows == 0:
        return
    heads, dim, size = shape
    block_n = triton.next_power_of_2(size)
    block_c = min(BLOCK, max(1, 4096 // block_n), triton.next_power_of_2(heads // groups * dim))
    scan_kernel[(rows, groups, triton.cdiv(heads // groups * dim, block_c))](
        x, dt, rates, key, query, x if skip is None else skip, state, slots, row_offsets, out,
        HEADS=heads, DIM=dim, GROUPS=groups, SIZE=size, RATE_DIM=rate_shape[0],
        RATE_SIZE=rate_shape[1], SKIP=skip is not None, BLOCK_C=block_c, BLOCK_N=block_n,
    )  # fmt: skip


def delta_rule(
    *,
    query: Memory,
    key: Memory,
    value: Memory,
    decay: Memory,
    beta: Memory,
    state: Memory,
    slots: Memory,
    row_offsets: Memory,
    out: Memory,
    rows: int,
    shape: tuple[int, int, int],
    diagonal: bool,
) -> None:
    """Launch `inplace.operators.delta_rule` on the current stream; all memory is contiguous.

    Args:
        query, key, value, decay, beta, state, slots, row_offsets: of the operator.
        out: ``[tokens, heads, value_dim]``.
        rows: rows of the step.
        shape: of a slot: heads, key_dim, value_dim.
        diagonal: whether each key component has a decay of its own.
    """
    if rows == 0:
        return
    heads, key_dim, value_dim = shape
    block_k = triton.next_power_of_2(key_dim)
    block_v = min(triton.next_power_of_2(value_dim), max(1, 4096 // block_k))
    delta_kernel[(rows, heads, triton.cdiv(value_dim, block_v))](
        query, key, value, decay, beta, state, slots, row_offsets, out,
        HEADS=heads, KEY_DIM=key_dim, VALUE_DIM=value_dim, DIAGONAL=diagonal,
        BLOCK_K=block_k, BLOCK_V=block_v,
    )  # fmt: skip


def linear_recurrence(
    *,
    decay: Memory,
    x: Memory,
    state: Memory,
    slots: Memory,
    row_offsets: Memory,
    out: Memory,
    rows: int,
    channels: int,
) -> None:
    """Launch `inplace.operators.linear_recurrence` on the current stream; memory is contiguous."""
    if rows == 0:
        return
    linear_recurrence_kernel[(rows, triton.cdiv(channels, 2 * BLOCK))](
        decay, x, state, slots, row_offsets, out, channels, BLOCK_C=2 * BLOCK
    )
