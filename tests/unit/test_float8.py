"""Weights and rows of 8-bit floats: the operator, and its kernels in Triton's interpreter."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
from inplace.kernels.linear import LinearSpec, PipelinedBlocks, choose_blocks
from inplace.kernels.linear_kernels import (
    gemv_kernel,
    pipelined_kernel,
    quantize_kernel,
    sliced_k_kernel,
)
from inplace.operators import linear
from inplace.operators.float8 import FLOAT8, dequantize, num_groups, quantize
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def test_rounding_keeps_three_bits_of_each_number() -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 100)
    x[3] = 0
    values, scale = quantize(x, 40)
    assert values.dtype is FLOAT8
    assert scale.shape == (7, num_groups(100, 40)) == (7, 3)
    assert scale[3].tolist() == [1, 1, 1]
    for group in range(3):
        part = x[:, 40 * group : 40 * group + 40].abs().amax(1)
        torch.testing.assert_close(scale[:3, group], part[:3] / 448)
    # half of the last of three bits; below the smallest normal number 2**-6, half of 2**-9
    error = (dequantize(values, scale, 40) - x).abs()
    bound = torch.maximum(x.abs() / 16, scale.repeat_interleave(40, 1)[:, :100] * 2.0**-10)
    assert (error <= bound * 1.0001).all()


@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_that_with_the_dequantized_weights(group: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, bias = torch.randn(3, 5, 80).to(dtype), torch.randn(24).to(dtype)
    weight, scale = quantize(torch.randn(24, 80), group)
    out = linear(x, weight, bias, scale=scale, scale_group=group, activation="silu")
    whole = torch.stack([dequantize(weight, scale, group)[row] for row in range(24)])
    expected = F.silu(F.linear(x.float(), whole, bias.float()).to(dtype))
    assert out.dtype is dtype
    torch.testing.assert_close(out, expected)


def test_rows_are_quantized_from_a_number_of_them_on() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64)
    weight, scale = quantize(torch.randn(24, 64), 32)
    options: dict[str, Any] = {"scale": scale, "scale_group": 32}
    plain = linear(x, weight, **options)
    rounded = linear(dequantize(*quantize(x, 32), 32), weight, **options)
    assert torch.equal(linear(x, weight, **options, activation_rows=6), rounded)
    assert torch.equal(linear(x, weight, **options, activation_rows=7), plain)
    assert not torch.equal(plain, rounded)


@pytest.mark.parametrize("fake", [False, True])
def test_weights_without_their_scales_are_refused(fake: bool) -> None:
    x, (weight, scale) = torch.randn(3, 64), quantize(torch.randn(24, 64))
    mode = FakeTensorMode()
    with mode:
        fakes = [mode.from_tensor(each) for each in (x, weight, scale)]
    if fake:
        x, weight, scale = fakes
    message = r"expected torch\.float8_e4m3fn with scales \(24, 2\) of float32 for groups of 32"
    with pytest.raises(RuntimeError, match=message):
        linear(x, weight, scale=scale, scale_group=32)
    with pytest.raises(RuntimeError, match="such weights need a scale"):
        linear(x, weight)
    with pytest.raises(RuntimeError, match=r"weight is torch\.float32 with scales"):
        linear(x, weight.float(), scale=scale)


def test_tiles_lie_in_one_group_of_inputs() -> None:
    for tokens in (2, 16, 40, 64, 500):
        for itemsize in (2, 4):
            spec = LinearSpec(4096, 4096, scaled=True, scale_group=128)
            blocks = choose_blocks(spec, tokens, itemsize)
            assert isinstance(blocks, PipelinedBlocks)
            assert 128 % blocks.k == 0
    with pytest.raises(ValueError, match="a multiple of 32 inputs, not of 20"):
        LinearSpec(100, 10, scaled=True, scale_group=20, activation_rows=65)


FP8 = {"x": "*bf16", "weight": "*fp8e4nv", "out": "*bf16"}


@pytest.mark.parametrize(
    ("kernel", "pointers", "constants"),
    [
        (gemv_kernel, FP8, {"GROUP": 0}),
        (gemv_kernel, FP8, {"GROUP": 128}),
        (sliced_k_kernel, FP8, {"BLOCK_M": 8, "SLICES": 4, "LONG": True}),
        (pipelined_kernel, FP8, {"GROUP": 0, "QUANTIZED": False}),
        (pipelined_kernel, FP8, {"GROUP": 128, "QUANTIZED": False}),
        (pipelined_kernel, FP8, {"GROUP": 20, "QUANTIZED": False}),
        (pipelined_kernel, FP8 | {"x": "*fp8e4nv"}, {"GROUP": 0, "QUANTIZED": True}),
        (pipelined_kernel, FP8 | {"x": "*fp8e4nv"}, {"GROUP": 128, "QUANTIZED": True}),
        (quantize_kernel, {"x": "*bf16", "out": "*fp8e4nv"}, {"GROUP": 128, "BLOCK": 128}),
    ],
    ids=str,
)
def test_kernels_compile_for_hopper(
    kernel: Any, pointers: dict[str, str], constants: dict[str, Any]
) -> None:
    constants = constants | {"PDL": True}
    if kernel is not quantize_kernel:
        constants |= {
            "BIAS": False, "NORM": False, "RESIDUAL": True, "SCALED": True, "ACTIVATION": "silu",
            "GATED": True, "BLOCK_N": 64, "BLOCK_K": 64,
        }  # fmt: skip
    if kernel is pipelined_kernel:
        constants |= {"BLOCK_M": 64, "STAGES": 3}
    names = kernel.arg_names
    scalars = {"eps": "fp32", "inputs": "i32", "width": "i32", "count": "i32"}
    types = {
        name: "constexpr" if name in constants else pointers.get(name) or scalars.get(name, "*fp32")
        for name in names
    }
    source = ASTSource(
        kernel, types, {(names.index(name),): value for name, value in constants.items()}
    )
    assembly = triton.compile(source, GPUTarget("cuda", 90, 32)).asm["ptx"]
    if constants.get("QUANTIZED"):
        assert "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3" in assembly
