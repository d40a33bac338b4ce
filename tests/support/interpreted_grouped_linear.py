"""Layers of experts in Triton's interpreter; `tests/unit/test_grouped_linear.py` runs this file.

fp32 and fp16 only: the interpreter's `tl.dot` is wrong for bf16 (Triton 3.6).
"""

from dataclasses import replace
from itertools import product

import pytest
import torch
from inplace.kernels import grouped_linear as kernels
from inplace.kernels.grouped_linear import GroupedBlocks, GroupedLinearSpec
from inplace.operators.grouped_linear import _grouped_linear_on_gpu, _weighted_sum_on_gpu

from support.grouped_linear_case import check_grouped_linear, expert_ids, grouped_weights
from support.long import long_except

pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim > 0:DeprecationWarning"
)  # Triton's own
SPECS = [
    GroupedLinearSpec(40, 72, 5, bias=True, activation="gelu_tanh", gated=True),
    GroupedLinearSpec(72, 40, 5, bias=True, transposed=True),
    GroupedLinearSpec(33, 7, 1, bias=True),
    GroupedLinearSpec(64, 64, 40, transposed=True, activation="silu", gated=True),
]
STEPS = [(1, 1), (1, 4), (3, 2), (9, 3), (20, 1)]
"""Tokens, and experts of each: fewer pairs than experts, and more."""


@pytest.mark.parametrize(
    ("spec", "step", "shared"),
    long_except(
        list(zip(SPECS, STEPS[1:], (False, True, False, True), strict=True)),
        product(SPECS, STEPS, [False, True]),
    ),
)
def test_few_pairs(spec: GroupedLinearSpec, step: tuple[int, int], shared: bool) -> None:
    check_grouped_linear(spec, *step, shared=shared, dtype=torch.float16)
    check_grouped_linear(spec, *step, shared=shared, dtype=torch.float32)


def test_more_rows_of_an_expert_than_a_block_has() -> None:
    spec = GroupedLinearSpec(40, 24, 3, bias=True)
    blocks = GroupedBlocks(16, 16, 32, 4, 2)
    check_grouped_linear(spec, 41, 2, shared=True, dtype=torch.float16, blocks=blocks)


@pytest.mark.parametrize("spec", long_except(SPECS[:1], SPECS))
@pytest.mark.parametrize("shared", long_except([True], [False, True]))
def test_many_pairs(monkeypatch: pytest.MonkeyPatch, spec: GroupedLinearSpec, shared: bool) -> None:
    monkeypatch.setattr(kernels, "MAX_FEW_PAIRS", 8)
    monkeypatch.setattr(kernels, "SORTED_BLOCK", 32)
    for blocks in (
        GroupedBlocks(16, 32, 32, 4, 2),
        GroupedBlocks(16, 32, 32, 4, 2, together=2, rows_first=True),
        GroupedBlocks(32, 16, 32, 4, 2, together=3, rest=16),
        GroupedBlocks(64, 16, 32, 4, 2, rest=16, rows_first=True),
    ):
        check_grouped_linear(spec, 29, 3, shared=shared, dtype=torch.float16, blocks=blocks)
    check_grouped_linear(spec, 5, 2, shared=shared, dtype=torch.float32)


def test_the_operator_for_gpus_equals_the_one_for_cpus() -> None:
    spec = replace(SPECS[1], experts=4)
    weight, bias = grouped_weights(spec, torch.float32)
    ids = expert_ids(spec, 6, 2)
    for x in (torch.randn(6, spec.inputs), torch.randn(6, 2, spec.inputs)):
        arguments = (x, ids, weight, bias)
        torch.testing.assert_close(
            _grouped_linear_on_gpu(*arguments, transposed=True),
            torch.ops.inplace.grouped_linear(*arguments, transposed=True),
        )
    x, weights = torch.randn(6, 3, 1030).half(), torch.rand(6, 3)
    torch.testing.assert_close(
        _weighted_sum_on_gpu(x, weights), torch.ops.inplace.weighted_sum(x, weights)
    )
    nobody = _grouped_linear_on_gpu(torch.zeros(0, 72), ids[:0], weight, bias, transposed=True)
    assert nobody.shape == (0, 2, 40)
