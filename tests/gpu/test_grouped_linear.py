"""The kernels of a mixture of experts on a GPU equal a product for each token and expert."""

from pathlib import Path

import pytest
import torch
from inplace.kernels.grouped_linear import GroupedLinearSpec
from inplace.operators import grouped_linear, weighted_sum
from inplace_builder.choices import EngineKind
from inplace_builder.served.decoder import build_decoder
from inplace_builder.served.options import BuildOptions
from support.experts import CAPACITY, CHUNK, CONFIGURATIONS, moe_decoder
from support.exported_decoders import generate_as_rows
from support.grouped_linear_case import (
    TOLERANCE,
    check_grouped_linear,
    expert_ids,
    grouped_weights,
)
from support.models import greedy, open_instance

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use; there is none here"
)
SPECS = [
    GroupedLinearSpec(2048, 1536, 128, activation="silu", gated=True),
    GroupedLinearSpec(768, 2048, 128),
    GroupedLinearSpec(2880, 720, 32, bias=True, transposed=True),
    GroupedLinearSpec(100, 72, 5, bias=True),
    GroupedLinearSpec(80, 48, 1, transposed=True),
]
STEPS = [(1, 8), (8, 8), (64, 8), (65, 8), (300, 4), (2000, 2)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("tokens", "per_token"), STEPS)
def test_equals_the_products(
    spec: GroupedLinearSpec, dtype: torch.dtype, tokens: int, per_token: int
) -> None:
    for shared in (True, False):
        check_grouped_linear(
            spec, tokens, per_token, shared=shared, dtype=dtype, device="cuda", pdl=not shared
        )


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("tokens", "per_token", "width"), [(1, 8, 2048), (300, 2, 1100)])
def test_a_weighted_sum_equals_the_one_in_float64(
    dtype: torch.dtype, tokens: int, per_token: int, width: int
) -> None:
    x = torch.randn(tokens, per_token, width, dtype=dtype, device="cuda")
    for weights in (torch.rand(tokens, per_token, device="cuda"), torch.rand_like(x[..., 0])):
        expected = (x.double() * weights.double().unsqueeze(-1)).sum(1)
        error = (weighted_sum(x, weights).double() - expected).norm() / expected.norm()
        assert float(error) < TOLERANCE[dtype]


def test_a_graph_computes_a_step_with_other_experts() -> None:
    """Nothing of the launch depends on the ids, which a CUDA graph reads anew."""
    spec = GroupedLinearSpec(64, 96, 16)
    weight, _ = grouped_weights(spec, torch.float32)
    weight = weight.nan_to_num(0.5).cuda()
    for tokens in (4, 400):
        x, ids = torch.randn(tokens, 64, device="cuda"), expert_ids(spec, tokens, 2).cuda()
        grouped_linear(x, ids, weight)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = grouped_linear(x, ids, weight)
        ids.copy_(expert_ids(spec, tokens, 2, seed=1))
        graph.replay()
        torch.testing.assert_close(
            out.cpu(), grouped_linear(x.cpu(), ids.cpu(), weight.cpu()), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("engine", ["tensorrt", "torch"])
@pytest.mark.filterwarnings("ignore")
def test_a_decoder_generates_what_transformers_generates(
    tmp_path: Path, name: str, engine: EngineKind
) -> None:
    if engine == "tensorrt":
        pytest.importorskip("tensorrt", reason="needs TensorRT; it is not installed")
    model = moe_decoder(name)
    model.save_pretrained(tmp_path / "model")
    options = BuildOptions(
        capacity=CAPACITY, chunk=CHUNK, slots=9, max_rows=8, engine=engine, device="cuda"
    )
    build_decoder(tmp_path / "model", tmp_path / "out", options)
    prompts = [[5], [8, 9, 10], list(range(20, 31))]
    assert generate_as_rows(open_instance(tmp_path / "out"), prompts, 12) == [
        greedy(model, prompt, 12) for prompt in prompts
    ]
