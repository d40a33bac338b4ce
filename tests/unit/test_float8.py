"""Weights, rows and caches of 8-bit floats: the operators, and their kernels for Hopper."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
from inplace.kernels.attention_kernels import append_kernel, decode_kernel, prefill_kernel
from inplace.kernels.linear import LinearSpec, PipelinedBlocks, choose_blocks
from inplace.kernels.linear_kernels import (
    gemv_kernel,
    pipelined_kernel,
    quantize_kernel,
    sliced_k_kernel,
)
from inplace.operators import attention, grouped_linear, linear
from inplace.operators.float8 import (
    FLOAT8,
    MIN_SCALE,
    dequantize,
    num_groups,
    power_of_two,
    quantize,
    quantize_heads,
)
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


def test_numbers_below_all_scales_are_no_nan() -> None:
    """A scale of 0 would make NaN of the zeros beside them."""
    tiny = torch.tensor([[0.0, 1e-45, 1e-43], [0.0, 0.0, 1e-40]])
    values, scale = quantize(tiny)
    assert (scale > 0).all()
    torch.testing.assert_close(dequantize(values, scale), tiny, rtol=0.07, atol=1e-42)
    largest = torch.tensor([0.0, 1e-45, 1e-42, 1e-20, 448.0, 449.0, 3e38])
    scale = power_of_two(largest)
    assert scale.tolist() == [1, *[MIN_SCALE] * 2, 2.0**-75, 1, 2, 2.0**120]
    assert quantize_heads(largest.expand(1, 7)[:, :, None], scale).float().isfinite().all()


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


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_compute_with_what_8_bit_weights_stand_for(transposed: bool) -> None:
    torch.manual_seed(0)
    x, ids = torch.randn(5, 24).bfloat16(), torch.tensor([[0, 2], [1, 1], [2, 0], [0, 3], [2, 1]])
    values, scale = quantize(torch.randn(3, 16, 24))
    scale = scale[..., 0]
    weight = values.mT.contiguous() if transposed else values
    bias = torch.randn(3, 16).bfloat16()
    options: dict[str, Any] = {"transposed": transposed, "activation": "silu", "gated": True}
    out = grouped_linear(x, ids, weight, bias, scale=scale, **options)
    whole = values.float() * scale[..., None]
    expected = grouped_linear(
        x.float(), ids, whole.mT.contiguous() if transposed else whole, bias.float(), **options
    )
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)
    assert (out[3, 1] == 0).all()
    for wrong, message in (
        ({"scale": None}, "weight torch.float8_e4m3fn"),
        ({"scale": scale[:, :8]}, r"must be \[3, 16\] of torch\.float32"),
        ({"scale": scale.half()}, r"must be \[3, 16\] of torch\.float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            grouped_linear(x, ids, weight, bias, **{**options, "scale": scale, **wrong})


def cache_step() -> dict[str, Any]:
    """A mixed step over caches of 8-bit floats; a token is far beyond the largest of them."""
    torch.manual_seed(0)
    key, value = torch.randn(6, 2, 8), torch.randn(6, 2, 4)
    key[2], value[3] = 1e6, -1e6
    key[0, 0, 0] = torch.inf
    states = [torch.full((4, 2, 16, dim), float("nan")).to(FLOAT8) for dim in (8, 4)]
    return {
        "query": torch.randn(6, 4, 8) * 1e-3,
        "key": key,
        "value": value,
        "key_state": states[0],
        "value_state": states[1],
        "slots": torch.tensor([3, -1, 1]),
        "row_offsets": torch.tensor([0, 4, 5, 6]),
        "write_indices": torch.tensor([0, 0, 0]),
        "scale": 0.3,
        "key_scale": torch.tensor([0.013, 0.5]),
        "value_scale": torch.tensor([0.25, 0.021]),
    }


def test_a_cache_of_8_bit_floats_attends_to_what_it_stores() -> None:
    """As over a cache in float32 with the rounded numbers; the largest stand for larger ones."""
    step = cache_step()
    out = attention(**step)
    assert torch.isfinite(out).all()
    rounded: dict[str, Any] = {"key_scale": None, "value_scale": None}
    for name in ("key", "value"):
        scale = step[f"{name}_scale"][:, None]
        stored = quantize_heads(step[name], step[f"{name}_scale"])
        rounded[name] = stored.float() * scale
        near = (rounded[name] - step[name]).abs() <= step[name].abs() / 16 + scale * 2.0**-10
        assert (near | (step[name].abs() > 448 * scale)).all()
        assert (rounded[name].abs() <= 448 * scale).all()
        state = step[f"{name}_state"].float()
        assert torch.equal(state[3, :, :4].transpose(0, 1), stored[:4].float())
        assert torch.equal(state[1, :, 0], stored[5].float())
        assert state[[0, 2]].isnan().all()
        assert state[3, :, 4:].isnan().all()
        rounded[f"{name}_state"] = torch.full_like(state, float("nan"))
    torch.testing.assert_close(out, attention(**step | rounded))
    assert (out[4] == 0).all()


def test_decode_steps_attend_to_what_prompts_have_stored() -> None:
    step = cache_step()
    attention(**step)
    further = step | {
        "query": torch.randn(3, 4, 8).bfloat16(),
        "key": torch.randn(3, 2, 8).bfloat16(),
        "value": torch.randn(3, 2, 4).bfloat16(),
        "row_offsets": torch.arange(4),
        "write_indices": torch.tensor([4, 0, 1]),
    }
    out = attention(**further)
    assert out.dtype is torch.bfloat16
    states = {
        name: further[name].float() * further[name.replace("state", "scale")][:, None, None]
        for name in ("key_state", "value_state")
    }
    again = further | states | {"append": False, "key": None, "value": None, "key_scale": None}
    again |= {
        "query": further["query"].float(),
        "value_scale": None,
        "write_indices": torch.tensor([5, 0, 2]),
        "causal": False,
    }
    torch.testing.assert_close(out.float(), attention(**again), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key_scale": None}, r"key_scale must be \[2\] of torch\.float32, .* not None"),
        ({"value_scale": torch.ones(3)}, r"value_scale must be \[2\] .* not \[3\] of"),
        ({"key_scale": torch.ones(2).half()}, r"not \[2\] of torch\.float16"),
        (
            {"key_state": torch.zeros(4, 2, 16, 8), "value_state": torch.zeros(4, 2, 16, 4)},
            r"there are scales, and the states are torch\.float32",
        ),
        (
            {"value_state": torch.zeros(4, 2, 16, 4)},
            r"that needs a value_state .* it is torch\.float32",
        ),
        ({"value_state": None, "value": None, "latent_dim": 4}, "there is none"),
    ],
)
def test_caches_without_fitting_scales_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        attention(**cache_step() | changes)


CACHE = {
    "query": "*bf16", "key": "*bf16", "value": "*bf16", "cos": "*bf16", "sin": "*bf16",
    "out": "*bf16", "key_state": "*fp8e4nv", "value_state": "*fp8e4nv", "slots": "*i32",
    "row_offsets": "*i32", "write_indices": "*i32", "locks": "*i32", "scale": "fp32",
    "query_stride": "i32", "key_stride": "i32", "value_stride": "i32", "capacity": "i32",
    "rows": "i32", "tokens": "i32", "splits": "i32",
}  # fmt: skip


@pytest.mark.parametrize("kernel", [decode_kernel, append_kernel, prefill_kernel], ids=str)
def test_attention_kernels_compile_for_hopper(kernel: Any) -> None:
    sizes = {
        "KV_HEADS": 2, "GROUP": 4, "DIM": 64, "VALUE_DIM": 64, "ROTARY": 64, "BLOCK_R": 4,
        "BLOCK_G": 16, "BLOCK_H": 4, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 64, "BLOCK_V": 64,
        "BLOCK_C": 8, "BLOCK_T": 16, "MIN_SPLIT": 128, "PACK": 4, "STAGES": 2, "WINDOW": 0,
        "CHUNK": 0, "SOFTCAP": 0.0, "SINKS": False, "BIAS_HEADS": 0, "LATENT": False,
        "QUANTIZED": True, "APPEND": True, "CAUSAL": True, "RING": False, "SPLIT_KV": True,
        "PDL": True, "PREFETCH": True,
    }  # fmt: skip
    names = kernel.arg_names
    constants = {name: value for name, value in sizes.items() if name in names}
    types = {name: "constexpr" if name in constants else CACHE.get(name, "*fp32") for name in names}
    source = ASTSource(
        kernel, types, {(names.index(name),): value for name, value in constants.items()}
    )
    assembly = triton.compile(source, GPUTarget("cuda", 90, 32)).asm["ptx"]
    if kernel is not prefill_kernel:  # it reads what has been rounded
        assert "cvt.rn.satfinite.e4m3x2" in assembly
