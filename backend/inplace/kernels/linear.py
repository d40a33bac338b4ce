"""Linear layers of a step: RMS norm before, bias, activation, gate and residual after, in one kernel.

A decode step multiplies a few rows with every weight of the model, so its time is the time to read the weights: bytes ÷ bandwidth.
Two kernels stream the weights once, `_gemv` for one row (products and sums on the CUDA cores) and `_skinny` for up to
`SKINNY_ROWS` (tensor cores, rows padded to 16). Both ask for their first weights before they wait for the kernel that makes their
input (programmatic dependent launch), so the memory is busy while the grids change. Steps with more rows use cuBLAS, with the norm
and the gate as kernels of their own.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from inplace.kernels.memory import Memory, Pointer, as_tensor

SKINNY_ROWS = 16
"""Most rows that `_skinny` is chosen for when a cuBLAS product could be used instead."""
WIDEST_SKINNY = 64
"""Most rows `_skinny` can take."""
ALIGNMENT = 256
"""Bytes; every part of the workspace starts at a multiple."""


@dataclass(frozen=True)
class LinearSpec:
    """The static facts of one linear layer.

    Attributes:
        inputs, outputs: extents of the weight ``[outputs, inputs]``; a gated layer's result has half the outputs.
        bias, norm, residual: whether there is one.
        eps: of the norm.
        activation: one of ``inplace.operators.ACTIVATIONS``.
        gated: ``activation(first half) * second half``.
        float_out: the result is float32.
    """

    inputs: int
    outputs: int
    bias: bool = False
    norm: bool = False
    residual: bool = False
    eps: float = 0.0
    activation: str = "none"
    gated: bool = False
    float_out: bool = False

    @property
    def width(self) -> int:
        """Columns of the result."""
        return self.outputs // 2 if self.gated else self.outputs


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # 0.5 (1 + tanh z) = sigmoid(2 z)
    return x


@triton.jit
def _gemv(
    x, weight, bias, norm, residual, out, inputs, width, eps,
    BIAS: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row: ``BLOCK_N`` outputs a program."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = n < width
    rows = weight + n[:, None].to(tl.int64) * inputs
    second = rows + width.to(tl.int64) * inputs
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    mask = inside[:, None] & (k < inputs)[None, :]
    w = tl.load(rows + k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
    if GATED:
        u = tl.load(second + k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
    if NORM:
        scale = tl.load(norm + k, mask=k < inputs, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    other = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, inputs, BLOCK_K):
        value = tl.load(x + start + k, mask=start + k < inputs, other=0.0).to(tl.float32)
        if NORM:
            squares += value * value
            value *= scale
        following = start + BLOCK_K + k
        mask = inside[:, None] & (following < inputs)[None, :]
        total += w.to(tl.float32) * value[None, :]
        w = tl.load(rows + following[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
        if GATED:
            other += u.to(tl.float32) * value[None, :]
            u = tl.load(second + following[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
        if NORM:
            scale = tl.load(norm + following, mask=following < inputs, other=0.0).to(tl.float32)
    y = tl.sum(total, 1)
    if NORM:
        inverse = 1.0 / tl.sqrt(tl.sum(squares, 0) / inputs + eps)
        y *= inverse
    if BIAS:
        y += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    y = _activated(y, ACTIVATION)
    if GATED:
        z = tl.sum(other, 1)
        if NORM:
            z *= inverse
        if BIAS:
            z += tl.load(bias + width + n, mask=inside, other=0.0).to(tl.float32)
        y *= z
    if RESIDUAL:
        y += tl.load(residual + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _skinny(
    x, weight, bias, norm, residual, out, count, inputs, width, eps,
    BIAS: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Up to ``BLOCK_M`` rows: ``BLOCK_N`` outputs of all of them a program, as ``weight @ x.T``."""
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
        mask = inside[:, None] & (column < inputs)[None, :]
        w = tl.load(rows + column[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
        value = tl.load(x + m[None, :] * inputs + column[:, None], mask=present[None, :] & (column < inputs)[:, None], other=0.0)
        if NORM:
            wide = value.to(tl.float32)
            squares += tl.sum(wide * wide, 0)
            scale = tl.load(norm + column, mask=column < inputs, other=0.0).to(tl.float32)
            value = (wide * scale[:, None]).to(w.dtype)
        total = tl.dot(w, value, total, input_precision="ieee")
        if GATED:
            u = tl.load(second + column[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
            other = tl.dot(u, value, other, input_precision="ieee")
    if NORM:
        inverse = 1.0 / tl.sqrt(squares / inputs + eps)
        total *= inverse[None, :]
        other *= inverse[None, :]
    if BIAS:
        total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[:, None]
        if GATED:
            other += tl.load(bias + width + n, mask=inside, other=0.0).to(tl.float32)[:, None]
    y = _activated(total, ACTIVATION)
    if GATED:
        y *= other
    place = m[None, :].to(tl.int64) * width + n[:, None]
    written = inside[:, None] & present[None, :]
    if RESIDUAL:
        y += tl.load(residual + place, mask=written, other=0.0).to(tl.float32)
    tl.store(out + place, y.to(out.dtype.element_ty), mask=written)


@triton.jit
def _rms_norm(x, weight, out, inputs, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One token a program; ``BLOCK`` covers it whole."""
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
def _epilogue(
    product, residual, out, width,
    GATED: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Activation, gate and residual of a finished product; one block of one token a program."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.program_id(0).to(tl.int64)
    inside = n < width
    line = product + token * (2 * width if GATED else width)
    y = _activated(tl.load(line + n, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    if GATED:
        y *= tl.load(line + width + n, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        y += tl.load(residual + token * width + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * width + n, y.to(out.dtype.element_ty), mask=inside)


def rms_norm(*, x: Memory, weight: Memory, out: Memory, tokens: int, width: int, eps: float, pdl: bool = False) -> None:
    """``inplace::rms_norm`` of ``[tokens, width]``, on the current stream."""
    block = triton.next_power_of_2(width)
    warps = 8 if block >= 2048 else 4 if block >= 256 else 1
    launch = {"PDL": pdl, **({"launch_pdl": True} if pdl else {})}
    _rms_norm[(tokens,)](x, weight, out, width, eps, BLOCK=block, num_warps=warps, **launch)


def linear_workspace(spec: LinearSpec, tokens: int, itemsize: int) -> int:
    """Bytes of scratch memory that `linear` needs for up to this many tokens, of weights with this many bytes an element."""
    if _streams(spec, tokens):
        return 0
    normed = _aligned(tokens * spec.inputs * itemsize) if spec.norm else 0
    return normed + (_aligned(tokens * spec.outputs * itemsize) if _has_epilogue(spec) else 0)


def linear(
    spec: LinearSpec,
    *,
    x: Memory,
    weight: Memory,
    bias: Memory | None,
    norm: Memory | None,
    residual: Memory | None,
    out: Memory,
    workspace: int,
    tokens: int,
    pdl: bool = False,
) -> None:
    """Launch the layer on the current stream.

    Args:
        spec: what the layer is.
        x: ``[tokens, inputs]``.
        weight: ``[outputs, inputs]``, the dtype of ``x``.
        bias: ``[outputs]``.
        norm: ``[inputs]``, any floating dtype.
        residual: ``[tokens, width]``.
        out: ``[tokens, width]``.
        workspace: address of `linear_workspace` bytes.
        tokens: rows of ``x``.
        pdl: launch as programmatic dependents of what is before on the stream (Hopper and later).
    """
    if not _streams(spec, tokens):
        _library(spec, x, weight, bias, norm, residual, out, workspace, tokens, pdl)
        return
    flags = {
        "BIAS": spec.bias,
        "NORM": spec.norm,
        "RESIDUAL": spec.residual,
        "ACTIVATION": spec.activation,
        "GATED": spec.gated,
        "PDL": pdl,
        **({"launch_pdl": True} if pdl else {}),
    }
    optional = (bias if bias is not None else x, norm if norm is not None else x, residual if residual is not None else x)
    if tokens == 1:
        block_n, block_k, warps = gemv_blocks(spec)
        _gemv[(triton.cdiv(spec.width, block_n),)](
            x, weight, *optional, out, spec.inputs, spec.width, spec.eps, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, **flags
        )  # fmt: skip
        return
    block_m = max(16, triton.next_power_of_2(tokens))
    block_n, block_k, warps, stages = skinny_blocks(spec, block_m, x.dtype.itemsize)
    _skinny[(triton.cdiv(spec.width, block_n),)](
        x, weight, *optional, out, tokens, spec.inputs, spec.width, spec.eps,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, STAGES=stages, num_warps=warps, **flags,
    )  # fmt: skip


def gemv_blocks(spec: LinearSpec) -> tuple[int, int, int]:
    """``BLOCK_N``, ``BLOCK_K`` and warps of `_gemv`."""
    if spec.inputs <= 1024:
        return 4, 1024, 2
    return (8, 512, 2) if spec.gated else (4, 1024, 2) if spec.outputs > 2048 else (2, 2048, 2)


def skinny_blocks(spec: LinearSpec, block_m: int, itemsize: int) -> tuple[int, int, int, int]:
    """``BLOCK_N``, ``BLOCK_K``, warps and pipeline stages of `_skinny`."""
    if itemsize == 4:
        return 16, 64, 4, 3
    if block_m > 16:
        return (32 if spec.gated else 64), 128, 8, 3
    if spec.inputs <= 1024:
        return (32, 256, 4, 3) if spec.outputs > 2048 else (16, 256, 4, 3)
    return (64, 128, 4, 5) if spec.inputs > 4096 else (64, 256, 4, 3)


def _streams(spec: LinearSpec, tokens: int) -> bool:
    """Whether a kernel of ours takes it; the head of a language model has at most as many tokens as rows, and returns float32."""
    return tokens <= SKINNY_ROWS or (spec.float_out and tokens <= WIDEST_SKINNY)


def _has_epilogue(spec: LinearSpec) -> bool:
    return spec.gated or spec.activation != "none" or spec.float_out or (spec.residual and spec.bias)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _library(
    spec: LinearSpec,
    x: Memory,
    weight: Memory,
    bias: Memory | None,
    norm: Memory | None,
    residual: Memory | None,
    out: Memory,
    workspace: int,
    tokens: int,
    pdl: bool,
) -> None:
    """Norm, cuBLAS through PyTorch, and what follows, for many rows."""
    launch = {"PDL": pdl, **({"launch_pdl": True} if pdl else {})}
    if norm is not None:
        normed = Pointer(workspace, x.dtype)
        rms_norm(x=x, weight=norm, out=normed, tokens=tokens, width=spec.inputs, eps=spec.eps, pdl=pdl)
        workspace += _aligned(tokens * spec.inputs * x.dtype.itemsize)
        x = normed
    source = as_tensor(x, (tokens, spec.inputs))
    transposed = as_tensor(weight, (spec.outputs, spec.inputs)).t()
    target: Memory = Pointer(workspace, x.dtype) if _has_epilogue(spec) else out
    product = as_tensor(target, (tokens, spec.outputs))
    with torch.inference_mode():
        if bias is not None:
            torch.addmm(as_tensor(bias, (spec.outputs,)), source, transposed, out=product)
        elif residual is not None and not _has_epilogue(spec):
            torch.addmm(as_tensor(residual, (tokens, spec.outputs)), source, transposed, out=product)
        else:
            torch.mm(source, transposed, out=product)
    if _has_epilogue(spec):
        block = min(1024, triton.next_power_of_2(spec.width))
        _epilogue[(tokens, triton.cdiv(spec.width, block))](
            product, residual if residual is not None else x, out, spec.width,
            spec.gated, spec.residual, spec.activation, block, num_warps=4, **launch,
        )  # fmt: skip
