"""``inplace::grouped_linear`` equals a product for each token and expert."""

from typing import Any

import pytest
import torch
import triton
from inplace.kernels.grouped_linear import (
    MAX_FEW_PAIRS,
    GroupedLinearSpec,
    choose_blocks,
    grouped_linear_workspace,
)
from inplace.kernels.grouped_linear_kernels import few_pairs_kernel, many_pairs_kernel
from inplace.kernels.linear import HOPPER_SHARED_MEMORY
from inplace.operators import grouped_linear, weighted_sum
from support.grouped_linear_case import expert_ids, grouped_weights, products
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SPECS = [
    GroupedLinearSpec(6, 4, 5),
    GroupedLinearSpec(6, 4, 5, bias=True),
    GroupedLinearSpec(4, 6, 5, transposed=True, activation="silu", gated=True),
    GroupedLinearSpec(6, 4, 5, activation="relu"),
    GroupedLinearSpec(4, 6, 1, bias=True, transposed=True),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(("tokens", "per_token"), [(0, 2), (1, 1), (1, 3), (9, 2)])
@pytest.mark.parametrize("shared", [True, False])
def test_equals_a_product_for_each_token_and_expert(
    spec: GroupedLinearSpec, tokens: int, per_token: int, shared: bool
) -> None:
    weight, bias = grouped_weights(spec, torch.float64)
    ids = expert_ids(spec, tokens, per_token)
    x = torch.randn((tokens, spec.inputs) if shared else (tokens, per_token, spec.inputs))
    out = grouped_linear(
        x,
        ids,
        weight.float(),
        None if bias is None else bias.float(),
        transposed=spec.transposed,
        activation=spec.activation,
        gated=spec.gated,
    )
    assert out.shape == (tokens, per_token, spec.width)
    expected = products(spec, x, ids, weight, bias)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


X, IDS, WEIGHT = torch.zeros(3, 4), torch.zeros(3, 2, dtype=torch.int64), torch.zeros(5, 6, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, IDS, WEIGHT.to(torch.int8)), "weight torch.int8.*other quantized experts dequantized"),
        ((X.half(), IDS, WEIGHT), "x is torch.float16, weight torch.float32.*must be the same"),
        ((X, IDS.float(), WEIGHT), r"expert_ids must be .* int32 or int64, got \(3, 2\)"),
        ((X, IDS[:, 0], WEIGHT), r"expert_ids must be \[tokens, experts of a token\]"),
        ((X, IDS, WEIGHT[0]), r"weight must be \[experts, out, in\], got \(6, 4\)"),
        ((torch.zeros(3, 6), IDS, WEIGHT), r"x \(3, 6\) must be \[tokens, 4\]"),
        ((torch.zeros(2, 4), IDS, WEIGHT), r"x \(2, 4\) and expert_ids \(3, 2\) do not fit"),
        ((torch.zeros(3, 3, 4), IDS, WEIGHT), r"x \(3, 3, 4\) and expert_ids \(3, 2\) do not fit"),
        ((X, IDS, WEIGHT, torch.zeros(5, 4)), r"bias \(5, 4\) must be \[5, 6\]"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_arguments_that_do_not_fit_are_refused(
    arguments: tuple[Tensor, ...], message: str, device: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        grouped_linear(*(argument.to(device) for argument in arguments))


def test_calls_of_one_row_each_become_one_call() -> None:
    from inplace_builder.packing.row_rules import RULES, RowTensor

    rule = RULES[torch.ops.inplace.grouped_linear.default]
    weight, bias = grouped_weights(SPECS[1], torch.float32)
    ids = expert_ids(SPECS[1], 8, 2)
    for x in (torch.randn(8, 6), torch.randn(8, 2, 6)):
        per_row = RowTensor(x.unflatten(0, (4, 2))), RowTensor(ids.unflatten(0, (4, 2)))
        batched = rule(*per_row, weight, bias)
        torch.testing.assert_close(batched.flatten(0, 1), grouped_linear(x, ids, weight, bias))
        assert rule(*per_row, RowTensor(weight[:4])) is NotImplemented, "weights that differ"


def test_a_weighted_sum_is_that_of_the_experts_of_each_token() -> None:
    from inplace_builder.packing.row_rules import RULES, RowTensor

    x, weights = torch.randn(8, 3, 5), torch.rand(8, 3)
    expected = torch.stack([weights[token] @ x[token] for token in range(8)])
    torch.testing.assert_close(weighted_sum(x, weights), expected)
    assert weighted_sum(x.bfloat16(), weights).dtype == torch.bfloat16
    rule = RULES[torch.ops.inplace.weighted_sum.default]
    rows = rule(RowTensor(x.unflatten(0, (4, 2))), RowTensor(weights.unflatten(0, (4, 2))))
    torch.testing.assert_close(rows.flatten(0, 1), expected)
    with pytest.raises(RuntimeError, match=r"x \(8, 3, 5\) and weights \(8, 2\) do not fit"):
        weighted_sum(x, weights[:, :2])
    with pytest.raises(RuntimeError, match=r"weights \[tokens, k\], got"):
        weighted_sum(x[0], weights)


def test_scratch_memory_grows_with_the_step() -> None:
    spec = GroupedLinearSpec(2048, 1536, 128)
    sizes = [grouped_linear_workspace(spec, pairs) for pairs in range(0, 4096, 64)]
    assert sizes == sorted(sizes)
    assert grouped_linear_workspace(spec, MAX_FEW_PAIRS) == 0
    for tokens in (1, 16, 64, 65, 2048):
        for itemsize in (2, 4):
            blocks = choose_blocks(spec, tokens, 8, itemsize)
            staged = (blocks.m + blocks.n) * blocks.k * itemsize * blocks.stages
            assert staged <= HOPPER_SHARED_MEMORY


@pytest.mark.parametrize(
    ("spec", "tokens"),
    [
        (GroupedLinearSpec(2048, 1536, 128, activation="silu", gated=True), 1),
        (GroupedLinearSpec(2048, 1536, 128, activation="silu", gated=True), 64),
        (GroupedLinearSpec(2880, 5760, 32, bias=True, transposed=True), 2048),
        (GroupedLinearSpec(2048, 1536, 128, activation="silu", gated=True, scaled=True), 1),
        (GroupedLinearSpec(768, 2048, 128, scaled=True), 2048),
        (GroupedLinearSpec(2880, 5760, 32, bias=True, transposed=True, scaled=True), 2048),
    ],
    ids=str,
)
def test_kernels_compile_for_a_gpu_that_is_not_here(spec: GroupedLinearSpec, tokens: int) -> None:
    """For an H100 in bfloat16, which Triton's interpreter does not have."""
    blocks = choose_blocks(spec, tokens, 8, 2)
    few = tokens * 8 <= MAX_FEW_PAIRS
    kernel = few_pairs_kernel if few else many_pairs_kernel
    constants: dict[str, Any] = {
        "SHARED": True,
        "BIAS": spec.bias,
        "SCALED": spec.scaled,
        "TRANSPOSED": spec.transposed,
        "ACTIVATION": spec.activation,
        "GATED": spec.gated,
        "EVEN": spec.inputs % blocks.k == 0,
        "BLOCK_M": blocks.m,
        "BLOCK_N": blocks.n,
        "BLOCK_K": blocks.k,
        "STAGES": blocks.stages,
        "PDL": True,
        **(
            {"BY_EXPERT": tokens > 16, "PAIRS": tokens * 8}
            if few
            else {"REST": blocks.rest, "ROWS_FIRST": blocks.rows_first}
        ),
    }
    floats = {"x", "weight", "bias", "scale", "out"}
    others = {"expert_ids": "*i64", "workspace": "*i32"}
    if spec.scaled:
        others |= {"weight": "*fp8e4nv", "scale": "*fp32"}
    names = kernel.arg_names
    types = {
        name: "constexpr"
        if name in constants
        else others.get(name, "*bf16" if name in floats else "i32")
        for name in names
    }
    aligned = [*floats, "inputs", "width"]
    source = ASTSource(
        kernel,
        types,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(
        source, GPUTarget("cuda", 90, 32), options={"num_warps": blocks.warps}
    )
    assert compiled.metadata.shared <= HOPPER_SHARED_MEMORY
    # tensor cores, fed through shared memory while earlier tiles are multiplied
    assert "mma" in compiled.asm["ptx"] and "cp.async" in compiled.asm["ptx"]
