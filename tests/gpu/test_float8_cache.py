"""Caches of 8-bit floats on a GPU: the kernels, and decoders on both engines."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from inplace.kernels.attention import AttentionSpec
from inplace.schema.specs import Dtype
from inplace_builder import BuildOptions, build_decoder
from support.attention_case import Row
from support.copying import check_copy
from support.decoding import SHAPE, generate_together, random_prompt
from support.float8_cache_case import DECODE, MIXED, SPECS, check
from support.models import open_instance
from support.storing import check_snapshot
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use; there is none here"
)
LARGE = AttentionSpec(32, 8, 128, 128, 128**-0.5, rotary=128, quantized=True)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("spec", [*SPECS, LARGE], ids=lambda spec: f"{spec.heads}x{spec.dim}")
@pytest.mark.parametrize("rows", [DECODE, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_caches_store_what_the_operator_stores(
    spec: AttentionSpec, rows: list[Row], dtype: torch.dtype
) -> None:
    """The same bits, but where the rotation rounds a sum otherwise than a CPU."""
    for pdl in (False, True):
        check(spec, rows, dtype=dtype, device="cuda", pdl=pdl, exact=not spec.rotary)


@pytest.mark.parametrize("dtype", DTYPES)
def test_split_rows_and_rings(dtype: torch.dtype) -> None:
    rows = [Row(0, 2000, 1), Row(1, 3, 1), Row(2, 700, 1)]
    check(SPECS[0], rows, capacity=2048, dtype=dtype, device="cuda")
    ring = AttentionSpec(4, 2, 32, 32, 0.2, window=16, ring=True, quantized=True)
    for tokens in (1, 5):
        rows = [Row(0, 61, tokens), Row(1, 3, 1)]
        check(ring, rows, capacity=20, dtype=dtype, device="cuda")


@pytest.mark.parametrize("engine", ["tensorrt", "torch"])
@pytest.mark.parametrize("dtype", [Dtype.FLOAT32, Dtype.BFLOAT16])
def test_a_decoder_is_verified_with_a_rounded_cache(
    engine: str, dtype: Dtype, tmp_path: Path
) -> None:
    """The build compares with PyTorch; in float32 the tokens are those of an engine on a CPU."""
    if engine == "tensorrt":
        pytest.importorskip("tensorrt", reason="needs TensorRT; it is not installed")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).eval().save_pretrained(tmp_path / "source")
    on_cpu = BuildOptions(slots=4, max_rows=2, capacity=128, chunk=16, dtype=dtype, cache="fp8")
    options = replace(on_cpu, device="cuda", engine=engine)  # type: ignore[arg-type]
    manifest = build_decoder(tmp_path / "source", tmp_path / "model", options)
    assert {state.dtype for state in manifest.states} == {Dtype.FLOAT8_E4M3FN}
    instance = open_instance(tmp_path / "model")
    if dtype is Dtype.FLOAT32:
        build_decoder(tmp_path / "source", tmp_path / "cpu", on_cpu)
        prompts = [random_prompt(1, 21), random_prompt(2, 3)]
        expected = generate_together(open_instance(tmp_path / "cpu"), prompts, 16)
        assert generate_together(instance, prompts, 16) == expected
    check_copy(instance, 5, 30)
    check_snapshot(instance, 6, 30)
