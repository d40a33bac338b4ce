"""Linear layers and caches of 8-bit floats in Triton's interpreter, run by `test_float8.py`."""

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from inplace.kernels import grouped_linear as grouped
from inplace.kernels.attention import AttentionSpec
from inplace.kernels.grouped_linear import GroupedBlocks, GroupedLinearSpec
from inplace.kernels.linear import (
    GemvBlocks,
    LinearBlocks,
    LinearSpec,
    PipelinedBlocks,
    SlicedKBlocks,
)
from inplace.kernels.linear_kernels import quantize_kernel
from inplace.operators.float8 import quantize
from triton.runtime import interpreter

from support.attention_case import Row
from support.float8_cache_case import DECODE, MIXED, SPECS
from support.float8_cache_case import check as check_attention
from support.float8_case import LAYERS, check
from support.grouped_linear_case import check_grouped_linear
from support.long import long_except

pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim > 0:DeprecationWarning"
)  # Triton's own

_convert: Any = interpreter._convert_float


def _convert_float(given: Any, source: Any, target: Any, rounding: Any) -> Any:
    """The interpreter's conversion of numbers, with PyTorch's rounding to 8-bit floats.

    Its own loses the carry where a mantissa rounds up to the next power of two (Triton 3.6).
    """
    if (source, target) != (tl.float32, tl.float8e4nv):
        return _convert(given, source, target, rounding)
    rounded = torch.from_numpy(np.ascontiguousarray(given)).to(torch.float8_e4m3fn)
    return rounded.view(torch.uint8).numpy()


interpreter._convert_float = _convert_float


LAUNCHES: list[tuple[int, LinearBlocks | None]] = [
    (1, GemvBlocks(16, 64, 2)),
    (8, SlicedKBlocks(32, 32, 4)),
    (3, PipelinedBlocks(16, 64, 4, 3)),
    (1, None),
    (9, None),
    (70, None),
]


def _id(value: object) -> str:
    return f"{value.inputs}x{value.outputs}" if isinstance(value, LinearSpec) else str(value)


CASES = [
    (spec, *launch)
    for spec in LAYERS
    for launch in LAUNCHES
    if not (spec.scale_group and isinstance(launch[1], SlicedKBlocks))
]


@pytest.mark.parametrize(("spec", "tokens", "blocks"), long_except(CASES[::2], CASES), ids=_id)
def test_weights_become_the_type_of_the_rows(
    spec: LinearSpec, tokens: int, blocks: LinearBlocks | None
) -> None:
    check(spec, tokens, torch.float16, 2e-3, blocks=blocks)
    if blocks is None and tokens < 70:
        check(spec, tokens, torch.float32, 3e-6)


GROUPED = [spec for spec in LAYERS if spec.scale_group % 32 == 0]


@pytest.mark.parametrize("spec", long_except(GROUPED[1::3], GROUPED), ids=_id)
def test_many_rows_become_8_bit_floats(spec: LinearSpec) -> None:
    """From this number of rows on, and not before."""
    quantized = replace(spec, activation_rows=6)
    results = [check(each, 6, torch.float16, 3e-3) for each in (spec, quantized)]
    error = float((results[0].float() - results[1].float()).norm() / results[0].float().norm())
    assert 5e-3 < error < 0.1
    fewer = [check(each, 5, torch.float16, 2e-3) for each in (spec, quantized)]
    assert torch.equal(*fewer)
    check(quantized, 70, torch.float16, 3e-3)


@pytest.mark.parametrize(("inputs", "group"), [(72, 0), (136, 64), (64, 64)])
def test_rows_are_rounded_as_the_operator_says(inputs: int, group: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, inputs).half() * torch.tensor([1.0, 1e-3, 50, 0, 1])[:, None].half()
    x[4, 3] = 3e4
    values, scales = quantize(x, group)
    groups = scales.shape[1]
    out, out_scales = torch.zeros_like(values), torch.zeros(5, groups)
    quantize_kernel[(5, groups)](x, out, out_scales, inputs, GROUP=group, BLOCK=256, PDL=False)
    assert torch.equal(out_scales, scales)
    assert torch.equal(out.float(), values.float())


EXPERTS = [
    GroupedLinearSpec(40, 72, 5, bias=True, activation="silu", gated=True, scaled=True),
    GroupedLinearSpec(72, 40, 5, bias=True, transposed=True, scaled=True),
]


@pytest.mark.parametrize("spec", long_except(EXPERTS[:1], EXPERTS))
def test_experts_may_have_8_bit_weights(
    monkeypatch: pytest.MonkeyPatch, spec: GroupedLinearSpec
) -> None:
    check_grouped_linear(spec, 3, 2, shared=True, dtype=torch.float16)
    check_grouped_linear(spec, 9, 3, shared=False, dtype=torch.float32)
    monkeypatch.setattr(grouped, "MAX_FEW_PAIRS", 8)
    for blocks in (
        GroupedBlocks(16, 32, 32, 4, 2, together=2, rows_first=True),
        GroupedBlocks(32, 16, 32, 4, 2, together=3, rest=16),
    ):
        check_grouped_linear(spec, 29, 3, shared=True, dtype=torch.float16, blocks=blocks)


CACHES = list(product(SPECS, [DECODE, MIXED], [torch.float16, torch.float32]))


@pytest.mark.parametrize(
    ("spec", "rows", "dtype"),
    long_except(
        [(SPECS[1], DECODE, torch.float16), (SPECS[2], MIXED, torch.float16)],
        CACHES,
    ),
)
def test_caches_store_what_the_operator_stores(
    spec: AttentionSpec, rows: list[Row], dtype: torch.dtype
) -> None:
    check_attention(spec, rows, dtype=dtype)


@pytest.mark.parametrize("rows", [[Row(0, 61, 1), Row(1, 3, 1)], [Row(0, 61, 5), Row(1, 3, 1)]])
def test_rings_of_8_bit_floats_wrap_around(rows: list[Row]) -> None:
    spec = AttentionSpec(4, 2, 32, 32, 0.2, window=16, ring=True, quantized=True)
    check_attention(spec, rows, capacity=20)


@pytest.mark.long
def test_rows_that_are_split_have_scales() -> None:
    check_attention(SPECS[0], [Row(0, 500, 1), Row(1, 3, 1)], capacity=600)
