"""The kernels of linear layers with few rows, and the kernels around cuBLAS for many.

The kernels for few rows stream the weights: each weight is read once, at the speed of memory.
`gemv_kernel` and `sliced_k_kernel` load their first weights before the wait of programmatic
dependent launch, so that memory is busy while one grid ends and the next starts. Only what no
kernel writes is loaded there: weights, biases, norms. `pipelined_kernel` waits first.
"""

import triton
import triton.language as tl

from inplace.kernels.memory import keep_in_registers, load_weights


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """One of ``inplace.operators.ACTIVATIONS``, in float32."""
    if ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh z) = sigmoid(2 z)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x


@triton.jit
def load_scales(scale, n, k, inside, inputs, GROUP: tl.constexpr):
    """The scale of the group that each input ``k`` is in, of the weights of outputs ``n``."""
    at = n.to(tl.int64) * tl.cdiv(inputs, GROUP) + k // GROUP
    return tl.load(scale + at, mask=inside & (k < inputs), other=0.0)


@triton.jit
def gemv_kernel(
    x, weight, bias, norm, residual, scale, out, inputs, width, eps,
    BIAS: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, SCALED: tl.constexpr,
    GROUP: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row, ``BLOCK_N`` outputs a program: products and sums on the CUDA cores.

    The residual is loaded before the products, so that its latency is not added to theirs. Inputs
    are not loaded a round early as weights are: the registers for that cost more programs than it
    saves. ``SCALED``: weights are 8-bit floats, with a scale for each output (``GROUP`` is 0), or
    for each ``GROUP`` inputs of one.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = n < width
    rows = weight + n[:, None].to(tl.int64) * inputs
    up_rows = rows + tl.cast(width, tl.int64) * inputs
    w = load_weights(rows, k[None, :], inside[:, None], inputs)
    if GATED:
        u = load_weights(up_rows, k[None, :], inside[:, None], inputs)
    if NORM:
        factor = tl.load(norm + k, mask=k < inputs, other=0.0)
    if BIAS:
        bias_tile = tl.load(bias + n, mask=inside, other=0.0)
        if GATED:
            up_bias = tl.load(bias + width + n, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if RESIDUAL:
        residual_tile = tl.load(residual + n, mask=inside, other=0.0)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    up_acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, inputs, BLOCK_K):
        value = tl.load(x + start + k, mask=start + k < inputs, other=0.0).to(tl.float32)
        next_k = start + BLOCK_K + k
        if NORM:
            squares += value * value
            value *= factor.to(tl.float32)
            factor = tl.load(norm + next_k, mask=next_k < inputs, other=0.0)
        w32 = w.to(tl.float32)
        if SCALED and GROUP > 0:
            w32 *= load_scales(
                scale, n[:, None], start + k[None, :], inside[:, None], inputs, GROUP
            )
        acc += w32 * value[None, :]
        w = load_weights(rows, next_k[None, :], inside[:, None], inputs)
        if GATED:
            u32 = u.to(tl.float32)
            if SCALED and GROUP > 0:
                u32 *= load_scales(
                    scale, width + n[:, None], start + k[None, :], inside[:, None], inputs, GROUP
                )
            up_acc += u32 * value[None, :]
            u = load_weights(up_rows, next_k[None, :], inside[:, None], inputs)
    y = tl.sum(acc, 1)
    if SCALED and GROUP == 0:
        y *= tl.load(scale + n, mask=inside, other=0.0)
    if NORM:
        inverse = 1.0 / tl.sqrt(tl.sum(squares, 0) / inputs + eps)
        y *= inverse
    if BIAS:
        y += bias_tile.to(tl.float32)
    y = activate(y, ACTIVATION)
    if GATED:
        z = tl.sum(up_acc, 1)
        if SCALED and GROUP == 0:
            z *= tl.load(scale + width + n, mask=inside, other=0.0)
        if NORM:
            z *= inverse
        if BIAS:
            z += up_bias.to(tl.float32)
        y *= z
    if RESIDUAL:
        y += residual_tile.to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def store_epilogue(
    acc, up_acc, squares, n, m, count, bias, scale, residual_tile, out, inputs, width, eps,
    BIAS: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, SCALED: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Store outputs ``n`` of rows ``m`` from their products ``[n, m]``.

    The epilogue: norm, bias, activation, gate, and the residual ``residual_tile``. ``SCALED``: each
    output's product has a scale.
    """
    if SCALED:
        acc *= tl.load(scale + n, mask=n < width, other=0.0)[:, None]
        if GATED:
            up_acc *= tl.load(scale + width + n, mask=n < width, other=0.0)[:, None]
    if NORM:
        inverse = 1.0 / tl.sqrt(squares / inputs + eps)
        acc *= inverse[None, :]
        up_acc *= inverse[None, :]
    if BIAS:
        acc += tl.load(bias + n, mask=n < width, other=0.0).to(tl.float32)[:, None]
        if GATED:
            up_acc += tl.load(bias + width + n, mask=n < width, other=0.0).to(tl.float32)[:, None]
    y = activate(acc, ACTIVATION)
    if GATED:
        y *= up_acc
    if RESIDUAL:
        y += residual_tile.to(tl.float32)
    at = m[None, :].to(tl.int64) * width + n[:, None]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=(n < width)[:, None] & (m < count)[None, :])


@triton.jit
def multiply_tile(
    w, u, value, factor, acc, up_acc, squares,
    NORM: tl.constexpr, GATED: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Add one tile's products: ``[slices, n, k] @ [slices, k, m]``; 8-bit weights become x's."""
    if NORM:
        x32 = value.to(tl.float32)
        squares += tl.sum(x32 * x32, 2)
        value = (x32 * factor.to(tl.float32)).to(value.dtype)
    value = tl.trans(value, 0, 2, 1)
    if KEEP:
        w = keep_in_registers(w)
    acc = tl.dot(w.to(value.dtype), value, acc, input_precision="ieee")
    if GATED:
        if KEEP:
            u = keep_in_registers(u)
        up_acc = tl.dot(u.to(value.dtype), value, up_acc, input_precision="ieee")
    return acc, up_acc, squares


@triton.jit
def sliced_k_kernel(
    x, weight, bias, norm, residual, scale, out, count, inputs, width, eps,
    BIAS: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, SCALED: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr, LONG: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Up to ``BLOCK_M`` rows, ``BLOCK_N`` outputs of each a program: sliced-K on the tensor cores.

    Narrow blocks let a narrow layer fill the GPU. To read at full speed all the same, a program has
    four tiles of weights in flight in registers, loaded before the wait. The inputs are cut into
    ``SLICES``, one for each warp, so that no warp repeats another's work (a batched product); the
    slices are summed at the end. ``BLOCK_K``: inputs of a slice in one tile; ``LONG``: there are
    more inputs than four tiles. ``SCALED``: weights are 8-bit floats with a scale for each output.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tile: tl.constexpr = SLICES * BLOCK_K
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    k = (tl.arange(0, SLICES)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :])[:, None, :]
    inside, present = (n < width)[None, :, None], (m < count)[None, :, None]
    rows = weight + n[None, :, None].to(tl.int64) * inputs
    up_rows = rows + tl.cast(width, tl.int64) * inputs
    w0 = load_weights(rows, k, inside, inputs)
    w1 = load_weights(rows, k + tile, inside, inputs)
    w2 = load_weights(rows, k + 2 * tile, inside, inputs)
    w3 = load_weights(rows, k + 3 * tile, inside, inputs)
    u0, u1, u2, u3 = w0, w1, w2, w3
    if GATED:
        u0 = load_weights(up_rows, k, inside, inputs)
        u1 = load_weights(up_rows, k + tile, inside, inputs)
        u2 = load_weights(up_rows, k + 2 * tile, inside, inputs)
        u3 = load_weights(up_rows, k + 3 * tile, inside, inputs)
    s0, s1, s2, s3 = 0, 0, 0, 0
    if NORM:
        s0 = tl.load(norm + k, mask=k < inputs, other=0.0)
        s1 = tl.load(norm + k + tile, mask=k + tile < inputs, other=0.0)
        s2 = tl.load(norm + k + 2 * tile, mask=k + 2 * tile < inputs, other=0.0)
        s3 = tl.load(norm + k + 3 * tile, mask=k + 3 * tile < inputs, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    x_rows = x + m[None, :, None] * inputs
    v0 = tl.load(x_rows + k, mask=present & (k < inputs), other=0.0)
    residual_tile = 0.0
    if RESIDUAL:
        at = m[None, :].to(tl.int64) * width + n[:, None]
        residual_tile = tl.load(
            residual + at, mask=(n < width)[:, None] & (m < count)[None, :], other=0.0
        )
    acc = tl.zeros((SLICES, BLOCK_N, BLOCK_M), tl.float32)
    up_acc = tl.zeros((SLICES, BLOCK_N, BLOCK_M), tl.float32)
    squares = tl.zeros((SLICES, BLOCK_M), tl.float32)
    for start in tl.range(0, inputs if LONG else 1, 4 * tile, num_stages=1):  # pipelined by hand
        k1, k2, k3, k4 = (
            start + tile + k,
            start + 2 * tile + k,
            start + 3 * tile + k,
            start + 4 * tile + k,
        )
        v1 = tl.load(x_rows + k1, mask=present & (k1 < inputs), other=0.0)
        acc, up_acc, squares = multiply_tile(w0, u0, v0, s0, acc, up_acc, squares, NORM, GATED, PDL)
        if LONG:
            w0 = load_weights(rows, k4, inside, inputs)
            if GATED:
                u0 = load_weights(up_rows, k4, inside, inputs)
            if NORM:
                s0 = tl.load(norm + k4, mask=k4 < inputs, other=0.0)
        v2 = tl.load(x_rows + k2, mask=present & (k2 < inputs), other=0.0)
        acc, up_acc, squares = multiply_tile(w1, u1, v1, s1, acc, up_acc, squares, NORM, GATED, PDL)
        if LONG:
            w1 = load_weights(rows, k4 + tile, inside, inputs)
            if GATED:
                u1 = load_weights(up_rows, k4 + tile, inside, inputs)
            if NORM:
                s1 = tl.load(norm + k4 + tile, mask=k4 + tile < inputs, other=0.0)
        v3 = tl.load(x_rows + k3, mask=present & (k3 < inputs), other=0.0)
        acc, up_acc, squares = multiply_tile(w2, u2, v2, s2, acc, up_acc, squares, NORM, GATED, PDL)
        if LONG:
            w2 = load_weights(rows, k4 + 2 * tile, inside, inputs)
            if GATED:
                u2 = load_weights(up_rows, k4 + 2 * tile, inside, inputs)
            if NORM:
                s2 = tl.load(norm + k4 + 2 * tile, mask=k4 + 2 * tile < inputs, other=0.0)
            v0 = tl.load(x_rows + k4, mask=present & (k4 < inputs), other=0.0)
        acc, up_acc, squares = multiply_tile(w3, u3, v3, s3, acc, up_acc, squares, NORM, GATED, PDL)
        if LONG:
            w3 = load_weights(rows, k4 + 3 * tile, inside, inputs)
            if GATED:
                u3 = load_weights(up_rows, k4 + 3 * tile, inside, inputs)
            if NORM:
                s3 = tl.load(norm + k4 + 3 * tile, mask=k4 + 3 * tile < inputs, other=0.0)
    store_epilogue(
        tl.sum(acc, 0), tl.sum(up_acc, 0), tl.sum(squares, 0), n, m, count, bias, scale,
        residual_tile, out, inputs, width, eps, BIAS, NORM, RESIDUAL, SCALED, ACTIVATION, GATED,
    )  # fmt: skip


@triton.jit
def pipelined_kernel(
    x, x_scale, weight, bias, norm, residual, scale, out, count, inputs, width, eps,
    BIAS: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, SCALED: tl.constexpr,
    GROUP: tl.constexpr, QUANTIZED: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``BLOCK_M`` rows, ``BLOCK_N`` outputs of each a program, as ``weight @ x.T``.

    Weights and inputs are pipelined through shared memory. ``SCALED``: weights are 8-bit floats,
    with a scale for each output (``GROUP`` is 0), or for each ``GROUP`` inputs of one.
    ``QUANTIZED``: rows are 8-bit floats too, with scales ``x_scale`` of the same groups.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    inside, present = n < width, m < count
    rows = weight + n[:, None].to(tl.int64) * inputs
    up_rows = rows + tl.cast(width, tl.int64) * inputs
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up_acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in tl.range(0, inputs, BLOCK_K, num_stages=STAGES):
        column = start + k
        w = load_weights(rows, column[None, :], inside[:, None], inputs)
        value = tl.load(
            x + m[None, :] * inputs + column[:, None],
            mask=present[None, :] & (column < inputs)[:, None],
            other=0.0,
        )
        if NORM:
            x32 = value.to(tl.float32)
            squares += tl.sum(x32 * x32, 0)
            factor = tl.load(norm + column, mask=column < inputs, other=0.0).to(tl.float32)
            value = (x32 * factor[:, None]).to(value.dtype)
        acc = add_product(
            acc, w, value, scale, x_scale, n, m, start, inside, present, inputs,
            SCALED, GROUP, QUANTIZED, BLOCK_K,
        )  # fmt: skip
        if GATED:
            u = load_weights(up_rows, column[None, :], inside[:, None], inputs)
            up_acc = add_product(
                up_acc, u, value, scale, x_scale, width + n, m, start, inside, present, inputs,
                SCALED, GROUP, QUANTIZED, BLOCK_K,
            )  # fmt: skip
    if QUANTIZED and GROUP == 0:
        x_factor = tl.load(x_scale + m, mask=present, other=0.0)[None, :]
        acc *= x_factor
        up_acc *= x_factor
    residual_tile = 0.0
    if RESIDUAL:
        at = m[None, :].to(tl.int64) * width + n[:, None]
        residual_tile = tl.load(residual + at, mask=inside[:, None] & present[None, :], other=0.0)
    store_epilogue(
        acc, up_acc, squares, n, m, count, bias, scale, residual_tile, out, inputs, width, eps,
        BIAS, NORM, RESIDUAL, SCALED and GROUP == 0, ACTIVATION, GATED,
    )  # fmt: skip


@triton.jit
def add_product(
    acc, w, value, scale, x_scale, n, m, start, inside, present, inputs,
    SCALED: tl.constexpr, GROUP: tl.constexpr, QUANTIZED: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add the product of weights ``[n, k]`` and rows ``[k, m]`` of inputs ``start`` to a sum.

    Where the tile is in one group, the product is scaled, else each weight.
    """
    if not SCALED:
        acc = tl.dot(w, value, acc, input_precision="ieee")
    elif GROUP == 0:
        if not QUANTIZED:
            w = w.to(value.dtype)
        acc = tl.dot(w, value, acc, input_precision="ieee")
    elif GROUP % BLOCK_K == 0:
        if not QUANTIZED:
            w = w.to(value.dtype)
        product = tl.dot(w, value, input_precision="ieee")
        product *= load_scales(scale, n, start, inside, inputs, GROUP)[:, None]
        if QUANTIZED:
            product *= load_scales(x_scale, m, start, present, inputs, GROUP)[None, :]
        acc += product
    else:
        column = start + tl.arange(0, BLOCK_K)
        factors = load_scales(scale, n[:, None], column[None, :], inside[:, None], inputs, GROUP)
        w = (w.to(tl.float32) * factors).to(value.dtype)
        acc = tl.dot(w, value, acc, input_precision="ieee")
    return acc


@triton.jit
def quantize_kernel(
    x, out, scales, inputs, GROUP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """``inplace.operators.float8.quantize`` of one group of one token a program."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    k = tl.arange(0, BLOCK)
    first = tl.program_id(1) * GROUP
    inside = first + k < inputs
    if GROUP > 0:
        inside = inside & (k < GROUP)
    token = tl.program_id(0).to(tl.int64) * inputs + first
    value = tl.load(x + token + k, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(value), 0)
    scale = tl.div_rn(largest, 448.0)
    scale = tl.where(scale == 0.0, 1.0, scale)
    value = tl.clamp(tl.div_rn(value, tl.broadcast_to(scale, (BLOCK,))), -448.0, 448.0)
    tl.store(out + token + k, value.to(out.dtype.element_ty), mask=inside)
    tl.store(scales + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), scale)


@triton.jit
def rms_norm_kernel(x, weight, out, inputs, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """RMS norm (arXiv:1910.07467, eq. 4) of one token a program; ``BLOCK`` covers a token."""
    k = tl.arange(0, BLOCK)
    scale = tl.load(weight + k, mask=k < inputs, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64) * inputs
    value = tl.load(x + token + k, mask=k < inputs, other=0.0).to(tl.float32)
    value *= 1.0 / tl.sqrt(tl.sum(value * value, 0) / inputs + eps)
    tl.store(out + token + k, (value * scale).to(out.dtype.element_ty), mask=k < inputs)


@triton.jit
def epilogue_kernel(
    product, residual, out, width,
    GATED: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Activation, gate and residual of a finished product; a block of one token a program."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.program_id(0).to(tl.int64)
    inside = n < width
    line = product + token * (2 * width if GATED else width)
    y = activate(tl.load(line + n, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    if GATED:
        y *= tl.load(line + width + n, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        y += tl.load(residual + token * width + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * width + n, y.to(out.dtype.element_ty), mask=inside)
