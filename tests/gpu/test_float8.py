"""Linear layers and decoders with weights in fp8 on a GPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from inplace.kernels.grouped_linear import GroupedLinearSpec
from inplace.kernels.linear import LinearSpec
from inplace.kernels.linear_kernels import quantize_kernel
from inplace.operators.float8 import quantize
from inplace.schema.specs import Dtype
from inplace_builder import BuildOptions, build_decoder
from support.decoding import SHAPE, generate, generate_together, random_prompt
from support.float8_case import LAYERS, check
from support.float8_checkpoint import WHOLE, save_fp8
from support.float8_checkpoint import quantize as quantize_blocks
from support.grouped_linear_case import check_grouped_linear
from support.models import open_instance
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use; there is none here"
)
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
LARGE = [
    LinearSpec(2048, 3072, norm=True, eps=1e-5, scaled=True),
    LinearSpec(4096, 2048, residual=True, scaled=True, scale_group=128),
    LinearSpec(1024, 8192, norm=True, eps=1e-5, activation="silu", gated=True, scaled=True),
]
SPECS = pytest.mark.parametrize(
    "spec", [*LAYERS, *LARGE], ids=lambda spec: f"{spec.inputs}x{spec.outputs}"
)


@SPECS
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("tokens", [1, 2, 9, 17, 64, 130])
def test_weights_become_the_type_of_the_rows(
    spec: LinearSpec, tokens: int, dtype: torch.dtype
) -> None:
    for pdl in (False, True):
        check(spec, tokens, dtype, TOLERANCE[dtype], device="cuda", pdl=pdl)


@SPECS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [65, 70, 513])
def test_many_rows_become_8_bit_floats(spec: LinearSpec, tokens: int, dtype: torch.dtype) -> None:
    if spec.scale_group % 32:
        pytest.skip("its groups are too small")
    quantized = replace(spec, activation_rows=65)
    check(quantized, tokens, dtype, 1.2 * TOLERANCE[dtype], device="cuda")


@pytest.mark.parametrize(("inputs", "group"), [(2048, 0), (14336, 0), (2048, 128), (200, 64)])
def test_rows_are_rounded_as_on_the_cpu(inputs: int, group: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(70, inputs).bfloat16()
    x[4] = 0
    values, scales = quantize(x, group)
    out, out_scales = (
        torch.empty_like(values, device="cuda"),
        torch.empty_like(scales, device="cuda"),
    )
    block = 1 << ((group or inputs) - 1).bit_length()
    grid = (70, scales.shape[1])
    quantize_kernel[grid](x.cuda(), out, out_scales, inputs, GROUP=group, BLOCK=block, PDL=False)
    assert torch.equal(out_scales.cpu(), scales)
    assert torch.equal(out.cpu().float(), values.float())


PROMPTS = [random_prompt(1, 11), random_prompt(2, 3)]


def options(engine: str, dtype: Dtype) -> BuildOptions:
    return BuildOptions(
        device="cuda",
        engine=engine,  # type: ignore[arg-type]
        slots=2,
        max_rows=2,
        capacity=128,
        chunk=80,
        dtype=dtype,
        weights="fp8",
    )


@pytest.mark.parametrize("engine", ["tensorrt", "torch"])
def test_a_decoder_in_float32_has_the_tokens_of_the_rounded_model(
    engine: str, tmp_path: Path
) -> None:
    if engine == "tensorrt":
        pytest.importorskip("tensorrt", reason="needs TensorRT; it is not installed")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    model.save_pretrained(tmp_path / "source")
    build_decoder(tmp_path / "source", tmp_path / "model", options(engine, Dtype.FLOAT32))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("_proj.weight"):
                parameter.copy_(quantize_blocks(parameter, 1, WHOLE)[2])
    expected = [generate(model, prompt, 16) for prompt in PROMPTS]
    assert generate_together(open_instance(tmp_path / "model"), PROMPTS, 16) == expected


EXPERTS = [
    GroupedLinearSpec(256, 192, 6, bias=True, activation="silu", gated=True, scaled=True),
    GroupedLinearSpec(2048, 1536, 32, activation="silu", gated=True, scaled=True),
    GroupedLinearSpec(768, 2048, 32, scaled=True),
    GroupedLinearSpec(288, 160, 5, bias=True, transposed=True, scaled=True),
]


@pytest.mark.parametrize("spec", EXPERTS, ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("tokens", [1, 9, 40, 300])
def test_experts_may_have_8_bit_weights(
    spec: GroupedLinearSpec, tokens: int, dtype: torch.dtype
) -> None:
    for pdl in (False, True):
        check_grouped_linear(spec, tokens, 4, shared=True, dtype=dtype, device="cuda", pdl=pdl)


@pytest.mark.parametrize("engine", ["tensorrt", "torch"])
def test_a_mixture_of_experts_is_verified_in_bfloat16(engine: str, tmp_path: Path) -> None:
    if engine == "tensorrt":
        pytest.importorskip("tensorrt", reason="needs TensorRT; it is not installed")
    torch.manual_seed(0)
    sizes = SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    MixtralForCausalLM(MixtralConfig(**sizes)).eval().save_pretrained(tmp_path / "source")
    chosen = options(engine, Dtype.BFLOAT16)
    manifest = build_decoder(tmp_path / "source", tmp_path / "model", chosen)
    assert "experts of 2 layers are fp8 too" in manifest.built_with["weights"]


@pytest.mark.parametrize("engine", ["tensorrt", "torch"])
def test_a_checkpoint_in_fp8_is_verified_in_bfloat16(engine: str, tmp_path: Path) -> None:
    """Chunks of 80 tokens, which are rounded too; the build compares with PyTorch."""
    if engine == "tensorrt":
        pytest.importorskip("tensorrt", reason="needs TensorRT; it is not installed")
    torch.manual_seed(0)
    sizes = SHAPE | {"hidden_size": 256, "intermediate_size": 384}
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    save_fp8(model, tmp_path / "source", "blocks", (128, 128))
    chosen = options(engine, Dtype.BFLOAT16)
    manifest = build_decoder(tmp_path / "source", tmp_path / "model", chosen)
    assert "fp8 (e4m3) in 14 linear layers, as they are stored" in manifest.built_with["weights"]
    assert "fp8 too in steps of 65 tokens or more" in manifest.built_with["weights"]
    scales = manifest.programs[0].engine.scales
    assert len(scales) == (8 if engine == "tensorrt" else 14)
