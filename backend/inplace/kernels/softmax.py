"""What the attention kernels share on the device: rotary embedding at load, and one block of a running softmax."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def rotated(vectors, d, present, cos, sin, known, DIM: tl.constexpr, ROTARY: tl.constexpr):
    """Load vectors and rotate their first ``ROTARY`` components, halves paired (arXiv:2104.09864), in fp32, rounded once.

    ``vectors``: pointers ``[n, 1]``; ``d``: ``[1, BLOCK_D]``; ``cos`` and ``sin``: pointers ``[n, 1]`` or ``[1, 1]``. ``present`` and
    ``known`` mask them. Returns ``[n, BLOCK_D]``, zero where absent.
    """
    inside = present & (d < DIM)
    x = tl.load(vectors + d, mask=inside, other=0.0)
    if ROTARY > 0:
        half: tl.constexpr = ROTARY // 2
        partner = tl.where(d < half, d + half, d - half)
        y = tl.load(vectors + partner, mask=inside & (d < ROTARY), other=0.0).to(tl.float32)
        c = tl.load(cos + d, mask=known & (d < ROTARY), other=1.0).to(tl.float32)
        s = tl.load(sin + d, mask=known & (d < ROTARY), other=0.0).to(tl.float32)
        x = (x.to(tl.float32) * c + y * tl.where(d < half, -s, s)).to(x.dtype)
    return x


@triton.jit
def scaled(products, scale, SOFTCAP: tl.constexpr):
    """Scores for a softmax of base 2: scaled, soft-capped if asked, times log2(e)."""
    if SOFTCAP > 0:
        ratio = products * (scale / SOFTCAP)
        small = tl.exp2(
            tl.abs(ratio) * (-2.0 * LOG2E)
        )  # tanh |z| = (1 - exp(-2 |z|)) / (1 + exp(-2 |z|)), which never overflows
        bounded = (1.0 - small) / (1.0 + small)
        products = tl.where(ratio < 0, -bounded, bounded) * (SOFTCAP * LOG2E)
    else:
        products = products * (scale * LOG2E)
    return products


@triton.jit
def entries(
    state, j, lower, upper, ring_first, capacity,
    BOUNDED: tl.constexpr, RING: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Load positions ``j`` of one slot and head, ``[len(j), BLOCK]``; below ``upper`` only if ``BOUNDED``, zero elsewhere.

    What lies at or beyond ``upper`` is never loaded: it may be NaN, and 0 x NaN is NaN.
    """
    d = tl.arange(0, BLOCK)
    entry = j
    if RING:  # the visible positions go round at most once
        entry = ring_first + (j - lower)
        entry = tl.where(entry >= capacity, entry - capacity, entry)
    at = state + entry[:, None] * WIDTH + d[None, :]
    if BOUNDED:
        found = tl.load(at, mask=(j < upper)[:, None] & (d < WIDTH)[None, :], other=0.0)
    elif WIDTH == BLOCK:
        found = tl.load(at)
    else:
        found = tl.load(at, mask=(d < WIDTH)[None, :], other=0.0)
    return found


@triton.jit
def held(x):
    """``x``, as far as the compiler knows made here: its way to shared memory does not begin, and wait for it, ahead of this place.

    Triton copies what is loaded for `tl.dot` to shared memory right after the load, which would serialise loads that could be under
    way together. Not for the interpreter, which has no inline assembly.
    """
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;",
        "=r,r",
        [x],
        dtype=x.dtype,
        is_pure=False,
        pack=32 // x.dtype.primitive_bitwidth,
    )


@triton.jit
def absorb(
    q, k, v, positions, j, upper, scale, most, total, acc,
    BOUNDED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, EMPTY: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Attend over the loaded keys and values of positions ``j`` (below ``upper`` if ``BOUNDED``); returns ``most, total, acc``.

    Running softmax (arXiv:2205.14135): ``most`` the largest score so far, ``total`` the sum of ``exp2(score - most)``, ``acc`` the
    values weighted by it. ``EMPTY``: a query may see none of these positions, and none before them.
    """
    scores = scaled(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, SOFTCAP)
    if BOUNDED:
        seen = (j < upper)[None, :]
        if CAUSAL:
            seen = seen & (j[None, :] <= positions[:, None])
        if WINDOW > 0:
            seen = seen & (j[None, :] > positions[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
    above = tl.maximum(most, tl.max(scores, 1))
    shift = above
    if EMPTY:  # inf - inf is NaN
        shift = tl.where(above == float("-inf"), 0.0, above)
    decay = tl.exp2(most - shift)
    weights = tl.exp2(scores - shift[:, None])
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return above, total, acc
