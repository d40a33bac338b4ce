"""Linear layers of a few rows: kernels that read every weight once, as fast as memory gives them.

All ask for their first weights before they wait for the kernel that makes their input (programmatic dependent launch), so memory is
busy while the grids change; only what no kernel writes (weights, biases, norms) is read there.
"""

import triton
import triton.language as tl

from inplace.kernels.softmax import held


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """One of ``inplace.operators.ACTIVATIONS``, in float32."""
    if ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        x = x * tl.sigmoid(
            1.5957691216057308 * (x + 0.044715 * x * x * x)
        )  # 0.5 (1 + tanh z) = sigmoid(2 z)
    return x


@triton.jit
def weights(rows, k, inside, inputs):
    """A tile of weights; each is read once, so none should stay in the cache."""
    return tl.load(rows + k, mask=inside & (k < inputs), other=0.0, eviction_policy="evict_first")


@triton.jit
def gemv_kernel(
    x, weight, bias, norm, residual, out, inputs, width, eps,
    BIAS: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row: ``BLOCK_N`` outputs a program, products and sums on the CUDA cores.

    The residual is asked for before the products, not when they are done: its latency would come on top of theirs. Inputs are not asked
    for a round ahead as weights are: the registers that takes cost more programs than it saves.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = n < width
    rows = weight + n[:, None].to(tl.int64) * inputs
    second = rows + width.to(tl.int64) * inputs
    w = weights(rows, k[None, :], inside[:, None], inputs)
    if GATED:
        u = weights(second, k[None, :], inside[:, None], inputs)
    if NORM:
        scale = tl.load(norm + k, mask=k < inputs, other=0.0)
    if BIAS:
        first_bias = tl.load(bias + n, mask=inside, other=0.0)
        if GATED:
            second_bias = tl.load(bias + width + n, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if RESIDUAL:
        added = tl.load(residual + n, mask=inside, other=0.0)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    other = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, inputs, BLOCK_K):
        value = tl.load(x + start + k, mask=start + k < inputs, other=0.0).to(tl.float32)
        following = start + BLOCK_K + k
        if NORM:
            squares += value * value
            value *= scale.to(tl.float32)
            scale = tl.load(norm + following, mask=following < inputs, other=0.0)
        total += w.to(tl.float32) * value[None, :]
        w = weights(rows, following[None, :], inside[:, None], inputs)
        if GATED:
            other += u.to(tl.float32) * value[None, :]
            u = weights(second, following[None, :], inside[:, None], inputs)
    y = tl.sum(total, 1)
    if NORM:
        inverse = 1.0 / tl.sqrt(tl.sum(squares, 0) / inputs + eps)
        y *= inverse
    if BIAS:
        y += first_bias.to(tl.float32)
    y = activated(y, ACTIVATION)
    if GATED:
        z = tl.sum(other, 1)
        if NORM:
            z *= inverse
        if BIAS:
            z += second_bias.to(tl.float32)
        y *= z
    if RESIDUAL:
        y += added.to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def finish(
    total, other, squares, n, m, count, bias, added, out, inputs, width, eps,
    BIAS: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Store outputs ``n`` of rows ``m`` from their products ``[n, m]``: norm, bias, activation, gate, residual ``added``."""
    if NORM:
        inverse = 1.0 / tl.sqrt(squares / inputs + eps)
        total *= inverse[None, :]
        other *= inverse[None, :]
    if BIAS:
        total += tl.load(bias + n, mask=n < width, other=0.0).to(tl.float32)[:, None]
        if GATED:
            other += tl.load(bias + width + n, mask=n < width, other=0.0).to(tl.float32)[:, None]
    y = activated(total, ACTIVATION)
    if GATED:
        y *= other
    if RESIDUAL:
        y += added.to(tl.float32)
    at = m[None, :].to(tl.int64) * width + n[:, None]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=(n < width)[:, None] & (m < count)[None, :])


@triton.jit
def _multiply(
    w, u, value, scale, total, other, squares, NORM: tl.constexpr, GATED: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    """Add one tile's products: ``[parts, n, k] @ [parts, k, m]``."""
    if NORM:
        wide = value.to(tl.float32)
        squares += tl.sum(wide * wide, 2)
        value = (wide * scale.to(tl.float32)).to(w.dtype)
    value = tl.trans(value, 0, 2, 1)
    if HOLD:
        w = held(w)
    total = tl.dot(w, value, total, input_precision="ieee")
    if GATED:
        if HOLD:
            u = held(u)
        other = tl.dot(u, value, other, input_precision="ieee")
    return total, other, squares


@triton.jit
def few_kernel(
    x, weight, bias, norm, residual, out, count, inputs, width, eps,
    BIAS: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, LONG: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Up to ``BLOCK_M`` rows, ``BLOCK_N`` outputs of all of them a program, on the tensor cores.

    Narrow blocks let a narrow layer fill the GPU; to read at full speed all the same, a program has four tiles of weights under way in
    registers, asked for before the wait. The inputs are cut into ``PARTS``, one a warp, so that no warp repeats another's work (a
    batched product); the parts are added at the end. ``BLOCK_K``: inputs of a part in one tile; ``LONG``: more inputs than four tiles.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tile: tl.constexpr = PARTS * BLOCK_K
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    k = (tl.arange(0, PARTS)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :])[:, None, :]
    inside, present = (n < width)[None, :, None], (m < count)[None, :, None]
    rows = weight + n[None, :, None].to(tl.int64) * inputs
    second = rows + width.to(tl.int64) * inputs
    w0 = weights(rows, k, inside, inputs)
    w1 = weights(rows, k + tile, inside, inputs)
    w2 = weights(rows, k + 2 * tile, inside, inputs)
    w3 = weights(rows, k + 3 * tile, inside, inputs)
    u0, u1, u2, u3 = w0, w1, w2, w3
    if GATED:
        u0 = weights(second, k, inside, inputs)
        u1 = weights(second, k + tile, inside, inputs)
        u2 = weights(second, k + 2 * tile, inside, inputs)
        u3 = weights(second, k + 3 * tile, inside, inputs)
    s0, s1, s2, s3 = 0, 0, 0, 0
    if NORM:
        s0 = tl.load(norm + k, mask=k < inputs, other=0.0)
        s1 = tl.load(norm + k + tile, mask=k + tile < inputs, other=0.0)
        s2 = tl.load(norm + k + 2 * tile, mask=k + 2 * tile < inputs, other=0.0)
        s3 = tl.load(norm + k + 3 * tile, mask=k + 3 * tile < inputs, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    lines = x + m[None, :, None] * inputs
    v0 = tl.load(lines + k, mask=present & (k < inputs), other=0.0)
    added = 0.0
    if RESIDUAL:
        at = m[None, :].to(tl.int64) * width + n[:, None]
        added = tl.load(residual + at, mask=(n < width)[:, None] & (m < count)[None, :], other=0.0)
    total = tl.zeros((PARTS, BLOCK_N, BLOCK_M), tl.float32)
    other = tl.zeros((PARTS, BLOCK_N, BLOCK_M), tl.float32)
    squares = tl.zeros((PARTS, BLOCK_M), tl.float32)
    for start in tl.range(0, inputs if LONG else 1, 4 * tile, num_stages=1):  # pipelined by hand
        k1, k2, k3, k4 = (
            start + tile + k,
            start + 2 * tile + k,
            start + 3 * tile + k,
            start + 4 * tile + k,
        )
        v1 = tl.load(lines + k1, mask=present & (k1 < inputs), other=0.0)
        total, other, squares = _multiply(w0, u0, v0, s0, total, other, squares, NORM, GATED, PDL)
        if LONG:
            w0 = weights(rows, k4, inside, inputs)
            if GATED:
                u0 = weights(second, k4, inside, inputs)
            if NORM:
                s0 = tl.load(norm + k4, mask=k4 < inputs, other=0.0)
        v2 = tl.load(lines + k2, mask=present & (k2 < inputs), other=0.0)
        total, other, squares = _multiply(w1, u1, v1, s1, total, other, squares, NORM, GATED, PDL)
        if LONG:
            w1 = weights(rows, k4 + tile, inside, inputs)
            if GATED:
                u1 = weights(second, k4 + tile, inside, inputs)
            if NORM:
                s1 = tl.load(norm + k4 + tile, mask=k4 + tile < inputs, other=0.0)
        v3 = tl.load(lines + k3, mask=present & (k3 < inputs), other=0.0)
        total, other, squares = _multiply(w2, u2, v2, s2, total, other, squares, NORM, GATED, PDL)
        if LONG:
            w2 = weights(rows, k4 + 2 * tile, inside, inputs)
            if GATED:
                u2 = weights(second, k4 + 2 * tile, inside, inputs)
            if NORM:
                s2 = tl.load(norm + k4 + 2 * tile, mask=k4 + 2 * tile < inputs, other=0.0)
            v0 = tl.load(lines + k4, mask=present & (k4 < inputs), other=0.0)
        total, other, squares = _multiply(w3, u3, v3, s3, total, other, squares, NORM, GATED, PDL)
        if LONG:
            w3 = weights(rows, k4 + 3 * tile, inside, inputs)
            if GATED:
                u3 = weights(second, k4 + 3 * tile, inside, inputs)
            if NORM:
                s3 = tl.load(norm + k4 + 3 * tile, mask=k4 + 3 * tile < inputs, other=0.0)
    finish(
        tl.sum(total, 0), tl.sum(other, 0), tl.sum(squares, 0), n, m, count, bias, added, out, inputs, width, eps,
        BIAS, NORM, RESIDUAL, ACTIVATION, GATED,
    )  # fmt: skip


@triton.jit
def skinny_kernel(
    x, weight, bias, norm, residual, out, count, inputs, width, eps,
    BIAS: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Up to ``BLOCK_M`` rows: ``BLOCK_N`` outputs of all of them a program, as ``weight @ x.T``, pipelined through shared memory."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    inside, present = n < width, m < count
    rows = weight + n[:, None].to(tl.int64) * inputs
    second = rows + width.to(tl.int64) * inputs
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    other = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in tl.range(0, inputs, BLOCK_K, num_stages=STAGES):
        column = start + k
        w = weights(rows, column[None, :], inside[:, None], inputs)
        value = tl.load(
            x + m[None, :] * inputs + column[:, None],
            mask=present[None, :] & (column < inputs)[:, None],
            other=0.0,
        )
        if NORM:
            wide = value.to(tl.float32)
            squares += tl.sum(wide * wide, 0)
            scale = tl.load(norm + column, mask=column < inputs, other=0.0).to(tl.float32)
            value = (wide * scale[:, None]).to(w.dtype)
        total = tl.dot(w, value, total, input_precision="ieee")
        if GATED:
            u = weights(second, column[None, :], inside[:, None], inputs)
            other = tl.dot(u, value, other, input_precision="ieee")
    added = 0.0
    if RESIDUAL:
        at = m[None, :].to(tl.int64) * width + n[:, None]
        added = tl.load(residual + at, mask=inside[:, None] & present[None, :], other=0.0)
    finish(
        total, other, squares, n, m, count, bias, added, out, inputs, width, eps,
        BIAS, NORM, RESIDUAL, ACTIVATION, GATED,
    )  # fmt: skip
