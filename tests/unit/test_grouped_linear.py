"""``inplace::grouped_linear`` equals a product for each token and expert."""

import pytest
import torch
from inplace.kernels.grouped_linear import (
    MAX_FEW_PAIRS,
    GroupedLinearSpec,
    choose_blocks,
    grouped_linear_workspace,
)
from inplace.operators import grouped_linear
from support.grouped_linear_case import expert_ids, grouped_weights
from support.interpreter import needs_interpreter, run_interpreted
from support.long import long_except
from torch import Tensor

SPECS = [
    GroupedLinearSpec(6, 4, 5),
    GroupedLinearSpec(6, 4, 5, bias=True),
    GroupedLinearSpec(4, 6, 5, transposed=True),
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
    own = None if bias is None else bias.float()
    out = grouped_linear(x, ids, weight.float(), own, transposed=spec.transposed)
    assert out.shape == (tokens, per_token, spec.outputs)
    for token in range(tokens):
        for place in range(per_token):
            expert = int(ids[token, place])
            expected = torch.zeros(spec.outputs, dtype=torch.float64)
            if 0 <= expert < spec.experts:
                matrix = weight[expert].mT if spec.transposed else weight[expert]
                expected += matrix @ (x[token] if shared else x[token, place]).double()
                expected += 0 if bias is None else bias[expert]
            torch.testing.assert_close(out[token, place].double(), expected, rtol=1e-5, atol=1e-6)


X, IDS, WEIGHT = torch.zeros(3, 4), torch.zeros(3, 2, dtype=torch.int64), torch.zeros(5, 6, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, IDS, WEIGHT.to(torch.int8)), "weight torch.int8.*quantized experts are not supported"),
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


def test_scratch_memory_grows_with_the_step() -> None:
    spec = GroupedLinearSpec(2048, 1536, 128)
    sizes = [grouped_linear_workspace(spec, pairs) for pairs in range(0, 4096, 64)]
    assert sizes == sorted(sizes)
    assert grouped_linear_workspace(spec, MAX_FEW_PAIRS) == 0
    for tokens in (1, 16, 64, 65, 2048):
        for itemsize in (2, 4):
            blocks = choose_blocks(spec, tokens, 8, itemsize)
            staged = (blocks.m + blocks.n) * blocks.k * itemsize * blocks.stages
            assert staged <= 227 * 1024, "more shared memory than an H100 has"


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("marked", long_except(["not long"], ["not long", "long"]))
def test_kernels_equal_the_products_in_the_interpreter(marked: str) -> None:
    run_interpreted("interpreted_grouped_linear.py", marked)
