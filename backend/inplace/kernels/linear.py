"""Linear layers of a step: RMS norm before, bias, activation, gate and residual after, in one kernel.

A decode step multiplies a few rows with every weight of the model, so its time is the time to read the weights: bytes ÷ bandwidth.
One row is for the CUDA cores (`gemv_kernel`), more for the tensor cores: `few_kernel` where a layer is so narrow that its blocks must be
small to fill the GPU, `skinny_kernel` where it is wide. Steps with more rows use cuBLAS, with the norm and the gate as kernels of their
own. `streaming_blocks` chooses; ``benchmarks/linear_tune.py`` measures what it could choose.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl

from inplace.kernels.memory import Memory, Pointer, as_tensor
from inplace.kernels.streaming import activated, few_kernel, gemv_kernel, skinny_kernel

FEW_ROWS = 16
"""Most rows that are always streamed."""


MOST_ROWS = 64
"""Most rows that are streamed where it pays."""


MULTIPROCESSORS = 132
"""Of an H100: fewer programs than that leave some idle."""


HOPPER_SHARED = 227 * 1024
"""Bytes of shared memory that a program can have on an H100, for compiling where there is no GPU to ask."""


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


@dataclass(frozen=True)
class Gemv:
    """Blocks of `gemv_kernel`: outputs of a program, inputs of a round, warps."""

    n: int
    k: int
    warps: int


@dataclass(frozen=True)
class Few:
    """Blocks of `few_kernel`: outputs of a program, inputs of a warp in one tile, warps."""

    n: int
    k: int
    warps: int


@dataclass(frozen=True)
class Skinny:
    """Blocks of `skinny_kernel`: outputs of a program, inputs of a round, warps, rounds under way."""

    n: int
    k: int
    warps: int
    stages: int


Blocks = Gemv | Few | Skinny


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
    y = activated(tl.load(line + n, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    if GATED:
        y *= tl.load(line + width + n, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        y += tl.load(residual + token * width + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * width + n, y.to(out.dtype.element_ty), mask=inside)


def rms_norm(
    *,
    x: Memory,
    weight: Memory,
    out: Memory,
    tokens: int,
    width: int,
    eps: float,
    pdl: bool = False,
) -> None:
    """``inplace::rms_norm`` of ``[tokens, width]``, on the current stream."""
    block = triton.next_power_of_2(width)
    warps = 8 if block >= 2048 else 4 if block >= 256 else 1
    launch = {"PDL": pdl, **({"launch_pdl": True} if pdl else {})}
    _rms_norm[(tokens,)](x, weight, out, width, eps, BLOCK=block, num_warps=warps, **launch)


def linear_workspace(spec: LinearSpec, tokens: int, itemsize: int) -> int:
    """Bytes of scratch memory that `linear` needs for up to this many tokens, of weights with this many bytes an element."""
    if streaming_blocks(spec, tokens, itemsize) is not None:
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
    blocks: Blocks | None = None,
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
        blocks: instead of what `streaming_blocks` chooses, for tuning.
    """
    blocks = blocks or streaming_blocks(spec, tokens, x.dtype.itemsize)
    if blocks is None:
        _library(spec, x, weight, bias, norm, residual, out, workspace, tokens, pdl)
        return
    flags = {
        "BIAS": spec.bias,
        "NORM": spec.norm,
        "RESIDUAL": spec.residual,
        "ACTIVATION": spec.activation,
        "GATED": spec.gated,
        "BLOCK_N": blocks.n,
        "BLOCK_K": blocks.k,
        "PDL": pdl,
        "num_warps": blocks.warps,
        **({"launch_pdl": True} if pdl else {}),
    }
    grid = (triton.cdiv(spec.width, blocks.n),)
    pointers = (
        x,
        weight,
        *(x if part is None else part for part in (bias, norm, residual)),
        out,
    )  # x where there is none: never read
    extents = (spec.inputs, spec.width, spec.eps)
    if isinstance(blocks, Gemv):
        gemv_kernel[grid](*pointers, *extents, **flags)
    elif isinstance(blocks, Few):
        long = spec.inputs > 4 * blocks.k * blocks.warps
        block_m = max(8, triton.next_power_of_2(tokens))
        few_kernel[grid](
            *pointers, tokens, *extents, BLOCK_M=block_m, PARTS=blocks.warps, LONG=long, **flags
        )
    else:
        block_m = max(16, triton.next_power_of_2(tokens))
        skinny_kernel[grid](
            *pointers, tokens, *extents, BLOCK_M=block_m, STAGES=blocks.stages, **flags
        )


def streaming_blocks(spec: LinearSpec, tokens: int, itemsize: int) -> Blocks | None:
    """How our kernels take a step of so many tokens, or None: cuBLAS takes it.

    They are the best of a grid on an H200 (bf16, layers of Llama-3.2-1B and SmolLM2-135M, 1, 8 and 64 rows). Those of `Few` for 9 to 16
    rows were not measured: they keep four tiles in registers without spills, and all programs of such layers on the GPU at once.
    """
    if tokens == 1:
        if spec.width > 16384:  # the head of a language model
            return Gemv(4, 256, 2) if spec.inputs <= 1024 else Gemv(8, 512, 2)
        if spec.inputs <= 1024:
            return Gemv(4 if spec.outputs > 1024 else 2, 1024, 2)
        return (
            Gemv(8, 512, 2)
            if spec.gated
            else Gemv(4, 1024, 2)
            if spec.outputs > 2048
            else Gemv(2, 2048, 2)
        )
    if tokens > MOST_ROWS:
        return None
    if itemsize == 4:
        return Skinny(16, 64, 4, 3) if tokens <= FEW_ROWS or spec.float_out else None
    wide = spec.width >= 64 * (MULTIPROCESSORS - 4)
    if tokens > FEW_ROWS:
        if (
            spec.float_out
        ):  # the head of a language model: cuBLAS would need a kernel more to convert it
            return _fitted(spec, tokens, Skinny(64, 64, 4, 3))
        if spec.gated:  # saves the norm's and the gate's own kernels
            return _fitted(spec, tokens, Skinny(64, 128, 8, 3)) if wide else None
        return (
            None
            if spec.norm or spec.inputs > 2048
            else _fitted(spec, tokens, Skinny(16, 256, 4, 5))
        )
    if wide:
        return _fitted(spec, tokens, Skinny(64, 256, 4, 3) if spec.gated else Skinny(64, 128, 8, 3))
    if spec.inputs <= 1024:
        return Few(16, 32 if tokens > 8 and (spec.gated or spec.norm) else 64, 4)
    if tokens <= 8 and spec.inputs <= 2048 and not spec.gated:
        return Few(16, 128, 4)
    single = (
        spec.width <= 16 * MULTIPROCESSORS
    )  # one program a multiprocessor: it may take half of the registers
    return Few(16, 64 if single and not (spec.gated or spec.norm) else 32, 8)


def _fitted(spec: LinearSpec, tokens: int, blocks: Skinny) -> Skinny:
    """With as many stages as the GPU has shared memory for."""
    block_m = max(16, triton.next_power_of_2(tokens))
    stage = (blocks.n * (2 if spec.gated else 1) + block_m) * blocks.k * 2
    stages = min(blocks.stages, (_shared_memory() - 2048) // stage)
    return replace(blocks, stages=stages) if stages > 1 else Skinny(blocks.n // 2, 64, 4, 2)


@cache
def _shared_memory() -> int:
    """Bytes that a program can have on the current GPU."""
    if not torch.cuda.is_available():
        return HOPPER_SHARED
    return int(
        triton.runtime.driver.active.utils.get_device_properties(torch.cuda.current_device())[
            "max_shared_mem"
        ]
    )


def _has_epilogue(spec: LinearSpec) -> bool:
    return (
        spec.gated or spec.activation != "none" or spec.float_out or (spec.residual and spec.bias)
    )


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
        rms_norm(
            x=x, weight=norm, out=normed, tokens=tokens, width=spec.inputs, eps=spec.eps, pdl=pdl
        )
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
            torch.addmm(
                as_tensor(residual, (tokens, spec.outputs)), source, transposed, out=product
            )
        else:
            torch.mm(source, transposed, out=product)
    if _has_epilogue(spec):
        block = min(1024, triton.next_power_of_2(spec.width))
        _epilogue[(tokens, triton.cdiv(spec.width, block))](
            product, residual if residual is not None else x, out, spec.width,
            spec.gated, spec.residual, spec.activation, block, num_warps=4, **launch,
        )  # fmt: skip
