"""Linear layers of a step: RMS norm before, bias, activation, gate and residual after the product.

A decode step multiplies a few rows with every weight of the model, so its time is the time to read
the weights: bytes ÷ bandwidth. Up to `MAX_STREAMED_ROWS` rows are one kernel that streams the
weights: `gemv_kernel` for one row, `sliced_k_kernel` where a layer is so narrow that its blocks
must be small to fill the GPU, `pipelined_kernel` where it is wide. More rows take cuBLAS, with the
norm and the gate as kernels of their own. `choose_blocks` decides;
``benchmarks/linear_tune.py`` measures what it could choose.

Weights of 8-bit floats are streamed at any number of rows, and become x's type in registers. From
`LinearSpec.activation_rows` on, the rows become 8-bit floats first, in a kernel of their own. The
blocks of both were not tuned.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
from torch import Tensor

from inplace.kernels.linear_kernels import (
    epilogue_kernel,
    gemv_kernel,
    pipelined_kernel,
    quantize_kernel,
    rms_norm_kernel,
    sliced_k_kernel,
)
from inplace.kernels.memory import Memory, Pointer, as_tensor

SMALL_BATCH_ROWS = 16
"""Up to so many rows every layer is streamed."""


MAX_STREAMED_ROWS = 64
"""Up to so many rows a layer is streamed where that is faster than cuBLAS."""


MULTIPROCESSORS = 132
"""Of an H100: fewer programs leave some of them idle."""


HOPPER_SHARED_MEMORY = 227 * 1024
"""Bytes of shared memory that a program can have on an H100, to compile without a GPU."""


MIN_GROUP = 32
"""Inputs of a matrix instruction on 8-bit floats; a group of rows has a multiple."""


ALIGNMENT = 256
"""Bytes; every part of the workspace starts at a multiple."""


@dataclass(frozen=True)
class LinearSpec:
    """The static properties of one linear layer.

    Attributes:
        inputs, outputs: extents of the weight ``[outputs, inputs]``; the result of a gated layer
            has half the outputs.
        bias, norm, residual: whether there is one.
        eps: of the norm.
        activation: one of ``inplace.operators.ACTIVATIONS``.
        gated: ``activation(first half) * second half``.
        float_out: the result is float32.
        scaled: weights are 8-bit floats with scales, see ``inplace.operators.float8``.
        scale_group: inputs that share a scale; 0 for all.
        activation_rows: rows from which on these are 8-bit floats too; 0 for never.

    Raises:
        ValueError: there are groups of inputs that the kernels cannot take rows in.
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
    scaled: bool = False
    scale_group: int = 0
    activation_rows: int = 0

    def __post_init__(self) -> None:
        if self.activation_rows and self.scale_group % MIN_GROUP:
            raise ValueError(
                f"rows are 8-bit floats in groups of a multiple of {MIN_GROUP} inputs, not of "
                f"{self.scale_group}"
            )

    @property
    def groups(self) -> int:
        """Scales of an output."""
        return triton.cdiv(self.inputs, self.scale_group) if self.scale_group else 1

    def quantizes(self, tokens: int) -> bool:
        """Whether a step of so many tokens makes 8-bit floats of them."""
        return self.scaled and 0 < self.activation_rows <= tokens

    @property
    def width(self) -> int:
        """Columns of the result."""
        return self.outputs // 2 if self.gated else self.outputs

    @property
    def has_epilogue(self) -> bool:
        """Whether something follows the product that cuBLAS does not do."""
        return (
            self.gated
            or self.activation != "none"
            or self.float_out
            or (self.residual and self.bias)
        )


@dataclass(frozen=True)
class GemvBlocks:
    """Blocks of `gemv_kernel`: outputs of a program, inputs of a round, warps."""

    n: int
    k: int
    warps: int


@dataclass(frozen=True)
class SlicedKBlocks:
    """Blocks of `sliced_k_kernel`: outputs of a program, inputs of a slice in one tile, warps."""

    n: int
    k: int
    warps: int


@dataclass(frozen=True)
class PipelinedBlocks:
    """Blocks of `pipelined_kernel`: outputs of a program, inputs of a round, warps, stages."""

    n: int
    k: int
    warps: int
    stages: int


LinearBlocks = GemvBlocks | SlicedKBlocks | PipelinedBlocks


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
    """Launch ``inplace::rms_norm`` of ``[tokens, width]`` on the current stream."""
    block = triton.next_power_of_2(width)
    warps = 8 if block >= 2048 else 4 if block >= 256 else 1
    launch = {"PDL": pdl, **({"launch_pdl": True} if pdl else {})}
    rms_norm_kernel[(tokens,)](x, weight, out, width, eps, BLOCK=block, num_warps=warps, **launch)


def linear_workspace(spec: LinearSpec, tokens: int, itemsize: int) -> int:
    """Bytes of scratch memory that `linear` needs for up to so many tokens.

    ``itemsize`` is the bytes of an element of the weights.
    """
    if spec.quantizes(tokens):
        return sum(_quantized_parts(spec, tokens, itemsize))
    if choose_blocks(spec, tokens, itemsize) is not None:
        return 0
    normed = _aligned(tokens * spec.inputs * itemsize) if spec.norm else 0
    return normed + (_aligned(tokens * spec.outputs * itemsize) if spec.has_epilogue else 0)


def _quantized_parts(spec: LinearSpec, tokens: int, itemsize: int) -> tuple[int, int, int]:
    """Bytes for rows after their norm, for rows as 8-bit floats, and for the scales of these."""
    normed = _aligned(tokens * spec.inputs * itemsize) if spec.norm else 0
    return normed, _aligned(tokens * spec.inputs), _aligned(tokens * spec.groups * 4)


def linear(
    spec: LinearSpec,
    *,
    x: Memory,
    weight: Memory,
    bias: Memory | None,
    norm: Memory | None,
    residual: Memory | None,
    out: Memory,
    workspace: int | Tensor,
    tokens: int,
    scale: Memory | None = None,
    pdl: bool = False,
    blocks: LinearBlocks | None = None,
) -> None:
    """Launch the layer on the current stream.

    Args:
        spec: the static properties.
        x: ``[tokens, inputs]``.
        weight: ``[outputs, inputs]``, the dtype of ``x``, or 8-bit floats.
        bias: ``[outputs]``.
        norm: ``[inputs]``, any floating dtype.
        residual: ``[tokens, width]``.
        out: ``[tokens, width]``.
        workspace: address of `linear_workspace` bytes, or a tensor ``[bytes]`` uint8.
        tokens: rows of ``x``.
        scale: ``[outputs, groups]`` float32, where weights are 8-bit floats.
        pdl: use programmatic dependent launch (compute capability 9.0 or later). Most kernels then
            load their first weights before they wait for their predecessor on the stream.
        blocks: in place of what `choose_blocks` chooses; for tuning.
    """
    if spec.quantizes(tokens):
        x, x_scale = _quantize_rows(spec, x, norm, workspace, tokens, pdl)
        blocks = blocks or _quantized_blocks(spec)
        norm, spec = None, replace(spec, norm=False)
    else:
        x_scale = None
        blocks = blocks or choose_blocks(spec, tokens, x.dtype.itemsize)
    if blocks is None:
        _cublas_linear(spec, x, weight, bias, norm, residual, out, workspace, tokens, pdl)
        return
    flags = {
        "BIAS": spec.bias,
        "NORM": spec.norm,
        "RESIDUAL": spec.residual,
        "SCALED": spec.scaled,
        "ACTIVATION": spec.activation,
        "GATED": spec.gated,
        "BLOCK_N": blocks.n,
        "BLOCK_K": blocks.k,
        "PDL": pdl,
        "num_warps": blocks.warps,
        **({"launch_pdl": True} if pdl else {}),
    }
    columns = triton.cdiv(spec.width, blocks.n)
    # x stands for what is absent; the kernels do not read it.
    optional = [x if part is None else part for part in (bias, norm, residual, scale)]
    extents = (spec.inputs, spec.width, spec.eps)
    if isinstance(blocks, GemvBlocks):
        gemv_kernel[(columns,)](
            x, weight, *optional, out, *extents, GROUP=spec.scale_group, **flags
        )
    elif isinstance(blocks, SlicedKBlocks):
        long = spec.inputs > 4 * blocks.k * blocks.warps
        block_m = max(8, triton.next_power_of_2(tokens))
        sliced_k_kernel[(columns,)](
            x, weight, *optional, out, tokens, *extents,
            BLOCK_M=block_m, SLICES=blocks.warps, LONG=long, **flags,
        )  # fmt: skip
    else:
        block_m = min(MAX_STREAMED_ROWS, max(16, triton.next_power_of_2(tokens)))
        pipelined_kernel[(columns, triton.cdiv(tokens, block_m))](
            x, x if x_scale is None else x_scale, weight, *optional, out, tokens, *extents,
            GROUP=spec.scale_group, QUANTIZED=x_scale is not None,
            BLOCK_M=block_m, STAGES=blocks.stages, **flags,
        )  # fmt: skip


def _quantize_rows(
    spec: LinearSpec,
    x: Memory,
    norm: Memory | None,
    workspace: int | Tensor,
    tokens: int,
    pdl: bool,
) -> tuple[Memory, Memory]:
    """Norm the rows and make 8-bit floats of them: these, and their scales."""
    launch = {"PDL": pdl, **({"launch_pdl": True} if pdl else {})}
    normed, floats, _ = _quantized_parts(spec, tokens, x.dtype.itemsize)
    if norm is not None:
        source, x = x, _scratch(workspace, 0, tokens * spec.inputs, x.dtype)
        rms_norm(
            x=source, weight=norm, out=x, tokens=tokens, width=spec.inputs, eps=spec.eps, pdl=pdl
        )
    values = _scratch(workspace, normed, tokens * spec.inputs, torch.float8_e4m3fn)
    scales = _scratch(workspace, normed + floats, tokens * spec.groups, torch.float32)
    block = triton.next_power_of_2(spec.scale_group or spec.inputs)
    quantize_kernel[(tokens, spec.groups)](
        x, values, scales, spec.inputs, GROUP=spec.scale_group, BLOCK=block,
        num_warps=8 if block >= 2048 else 4 if block >= 256 else 1, **launch,
    )  # fmt: skip
    return values, scales


def _scratch(workspace: int | Tensor, offset: int, count: int, dtype: torch.dtype) -> Memory:
    """A part of the workspace, from this byte on."""
    if isinstance(workspace, int):
        return Pointer(workspace + offset, dtype)
    return workspace[offset : offset + count * dtype.itemsize].view(dtype)


def choose_blocks(spec: LinearSpec, tokens: int, itemsize: int) -> LinearBlocks | None:
    """Which streaming kernel takes a step of so many tokens, and its blocks; None is cuBLAS.

    They are the best of a grid on an H200 (bf16, layers of Llama-3.2-1B and SmolLM2-135M; 1, 8 and
    64 rows). `SlicedKBlocks` for 9 to 16 rows were not measured: with them four tiles are in
    registers without spills, and all programs of such layers are on the GPU at once. Weights of
    8-bit floats take the same ones, and are always streamed.
    """
    blocks = _measured_blocks(spec, tokens, itemsize)
    if not spec.scaled:
        return blocks
    if blocks is None or (isinstance(blocks, SlicedKBlocks) and spec.scale_group):
        few = tokens <= SMALL_BATCH_ROWS
        blocks = PipelinedBlocks(16 if few else 64, 128 if itemsize < 4 else 64, 4, 3)
        blocks = _fit_shared_memory(spec, tokens, blocks) if itemsize < 4 else blocks
    return _within_groups(spec, blocks)


def _quantized_blocks(spec: LinearSpec) -> LinearBlocks:
    """The blocks for rows that are 8-bit floats too."""
    blocks = _fit_shared_memory(spec, MAX_STREAMED_ROWS, PipelinedBlocks(128, 128, 8, 3))
    return _within_groups(spec, blocks)


def _within_groups(spec: LinearSpec, blocks: LinearBlocks) -> LinearBlocks:
    """The blocks with tiles that lie in one group of inputs, where groups are large enough."""
    divisor = spec.scale_group & -spec.scale_group  # the largest power of two in it
    if not isinstance(blocks, PipelinedBlocks) or divisor < MIN_GROUP:
        return blocks
    return replace(blocks, k=min(blocks.k, divisor))


def _measured_blocks(spec: LinearSpec, tokens: int, itemsize: int) -> LinearBlocks | None:
    """The blocks that were measured, for weights of x's type."""
    if tokens == 1:
        if spec.width > 16384:  # the head of a language model
            return GemvBlocks(4, 256, 2) if spec.inputs <= 1024 else GemvBlocks(8, 512, 2)
        if spec.inputs <= 1024:
            return GemvBlocks(4 if spec.outputs > 1024 else 2, 1024, 2)
        if spec.gated:
            return GemvBlocks(8, 512, 2)
        return GemvBlocks(4, 1024, 2) if spec.outputs > 2048 else GemvBlocks(2, 2048, 2)
    if tokens > MAX_STREAMED_ROWS:
        return None
    if itemsize == 4:
        streamed = tokens <= SMALL_BATCH_ROWS or spec.float_out
        return PipelinedBlocks(16, 64, 4, 3) if streamed else None
    wide = spec.width >= 64 * (MULTIPROCESSORS - 4)
    if tokens > SMALL_BATCH_ROWS:
        if spec.float_out:  # a language model's head: cuBLAS would need a kernel more to convert it
            return _fit_shared_memory(spec, tokens, PipelinedBlocks(64, 64, 4, 3))
        if spec.gated:  # saves the norm's and the gate's own kernels
            blocks = PipelinedBlocks(64, 128, 8, 3)
            return _fit_shared_memory(spec, tokens, blocks) if wide else None
        if spec.norm or spec.inputs > 2048:
            return None
        return _fit_shared_memory(spec, tokens, PipelinedBlocks(16, 256, 4, 5))
    if wide:
        blocks = PipelinedBlocks(64, 256, 4, 3) if spec.gated else PipelinedBlocks(64, 128, 8, 3)
        return _fit_shared_memory(spec, tokens, blocks)
    if spec.inputs <= 1024:
        return SlicedKBlocks(16, 32 if tokens > 8 and (spec.gated or spec.norm) else 64, 4)
    if tokens <= 8 and spec.inputs <= 2048 and not spec.gated:
        return SlicedKBlocks(16, 128, 4)
    # With one program a multiprocessor, each may take half of the registers.
    one_each = spec.width <= 16 * MULTIPROCESSORS
    return SlicedKBlocks(16, 64 if one_each and not (spec.gated or spec.norm) else 32, 8)


def _fit_shared_memory(spec: LinearSpec, tokens: int, blocks: PipelinedBlocks) -> PipelinedBlocks:
    """The blocks with as many stages as the GPU has shared memory for."""
    block_m = min(MAX_STREAMED_ROWS, max(16, triton.next_power_of_2(tokens)))
    stage = (blocks.n * (2 if spec.gated else 1) + block_m) * blocks.k * 2
    stages = min(blocks.stages, (shared_memory() - 2048) // stage)
    if stages > 1:
        return replace(blocks, stages=stages)
    return PipelinedBlocks(blocks.n // 2, 64, 4, 2)


@cache
def shared_memory() -> int:
    """Bytes that a program can have on the current GPU."""
    if not torch.cuda.is_available():
        return HOPPER_SHARED_MEMORY
    device = torch.cuda.current_device()
    properties = triton.runtime.driver.active.utils.get_device_properties(device)
    return int(properties["max_shared_mem"])


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _cublas_linear(
    spec: LinearSpec,
    x: Memory,
    weight: Memory,
    bias: Memory | None,
    norm: Memory | None,
    residual: Memory | None,
    out: Memory,
    workspace: int | Tensor,
    tokens: int,
    pdl: bool,
) -> None:
    """Norm, cuBLAS through PyTorch, and the epilogue, for many rows."""
    launch = {"PDL": pdl, **({"launch_pdl": True} if pdl else {})}
    used = 0
    if norm is not None:
        normed = _scratch(workspace, 0, tokens * spec.inputs, x.dtype)
        rms_norm(
            x=x, weight=norm, out=normed, tokens=tokens, width=spec.inputs, eps=spec.eps, pdl=pdl
        )
        used = _aligned(tokens * spec.inputs * x.dtype.itemsize)
        x = normed
    source = as_tensor(x, (tokens, spec.inputs))
    transposed = as_tensor(weight, (spec.outputs, spec.inputs)).t()
    target = out
    if spec.has_epilogue:
        target = _scratch(workspace, used, tokens * spec.outputs, x.dtype)
    product = as_tensor(target, (tokens, spec.outputs))
    with torch.inference_mode():
        if bias is not None:
            torch.addmm(as_tensor(bias, (spec.outputs,)), source, transposed, out=product)
        elif residual is not None and not spec.has_epilogue:
            torch.addmm(
                as_tensor(residual, (tokens, spec.outputs)), source, transposed, out=product
            )
        else:
            torch.mm(source, transposed, out=product)
    if spec.has_epilogue:
        block = min(1024, triton.next_power_of_2(spec.width))
        epilogue_kernel[(tokens, triton.cdiv(spec.width, block))](
            product, residual if residual is not None else x, out, spec.width,
            spec.gated, spec.residual, spec.activation, block, num_warps=4, **launch,
        )  # fmt: skip
