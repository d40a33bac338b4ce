"""Folders of GPTQ and AWQ checkpoints as they are published, built into engines."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from inplace.schema.specs import Dtype
from inplace_builder import BuildOptions, build_decoder, load_decoder
from inplace_builder.capture.checkpoint import load_model
from inplace_builder.errors import BuildError
from safetensors.torch import load_file, save_file
from support.decoding import SHAPE, generate, generate_together, random_prompt
from support.integer_packing import contiguous, groups_of, pack_awq, pack_gptq, quantize
from support.models import change_config, open_instance
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

OPTIONS = BuildOptions(slots=2, max_rows=2, capacity=48, chunk=8)
# as AutoGPTQ and AutoAWQ write them
GPTQ_CONFIG: dict[str, Any] = {
    "bits": 4, "group_size": 16, "damp_percent": 0.1, "desc_act": True, "sym": False,
    "true_sequential": True, "model_name_or_path": None, "model_file_base_name": "model",
    "static_groups": False, "quant_method": "gptq",
}  # fmt: skip
AWQ_CONFIG: dict[str, Any] = {
    "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm", "quant_method": "awq",
    "modules_to_not_convert": ["down_proj"],
}  # fmt: skip
SIZES = SHAPE | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


def quantize_folder(
    folder: Path, model: PreTrainedModel, method: str, skip: tuple[str, ...] = ()
) -> None:
    """Write a model as a quantized checkpoint, and give it the weights that this stands for."""
    fields = GPTQ_CONFIG if method == "gptq" else AWQ_CONFIG
    model.save_pretrained(folder)
    change_config(folder, quantization_config=fields)
    stored: dict[str, Tensor] = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        layer = key.removesuffix(".weight")
        if not layer.endswith("_proj") or layer.endswith(skip):
            stored[key] = tensor.half()
            continue
        group = groups_of(tensor.shape[1], 16, act_order=method == "gptq")
        integers, zeros, scales, whole = quantize(tensor, group, 4, symmetric=False)
        parts = (
            pack_gptq(integers, zeros, scales, group, 4, v2=False)
            if method == "gptq"
            else pack_awq(integers, zeros, scales)
        )
        stored |= {f"{layer}.{part}": value for part, value in contiguous(parts).items()}
        if isinstance(model, LlamaForCausalLM):
            model.get_parameter(key).data.copy_(whole)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    if isinstance(model, LlamaForCausalLM):
        for key, parameter in model.named_parameters():
            if key in stored:
                parameter.data.copy_(stored[key])


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(torch.tensor([[5, 6, 7, 8, 9]])).logits
    return result


@pytest.mark.slow
@pytest.mark.parametrize(("method", "skip"), [("gptq", ()), ("awq", ("down_proj",))])
def test_a_folder_is_dequantized(
    model: LlamaForCausalLM, tmp_path: Path, method: str, skip: tuple[str, ...]
) -> None:
    """The tokens are those of transformers with the weights that the integers stand for."""
    before = logits(model)
    quantize_folder(tmp_path / "source", model, method, skip)
    loaded, notes = load_model(tmp_path / "source", Dtype.FLOAT32)
    layers = 14 - 2 * len(skip)
    expected = f"{method} weights (4 bits, groups of 16), dequantized to float32: {layers} layers"
    assert notes["quantization"] == f"{expected}; activations are not quantized"
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.allclose(logits(model), before, atol=1e-3)
    manifest = build_decoder(tmp_path / "source", tmp_path / "model", OPTIONS)
    assert manifest.built_with["quantization"].startswith(expected)
    prompts = [random_prompt(1, 11), random_prompt(2, 3)]
    tokens = [generate(model, prompt, 8) for prompt in prompts]
    assert generate_together(open_instance(tmp_path / "model"), prompts, 8) == tokens


def test_experts_are_dequantized_before_they_become_one_tensor(tmp_path: Path) -> None:
    torch.manual_seed(2)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    config = transformers.Qwen3MoeConfig(**SIZES, **experts)
    quantize_folder(tmp_path, transformers.Qwen3MoeForCausalLM(config), "gptq")
    loaded, notes = load_model(tmp_path, Dtype.BFLOAT16)
    assert "dequantized to bfloat16: 32 layers" in notes["quantization"]
    assert loaded.dtype is torch.bfloat16


def test_zero_biases_that_autogptq_wrote_are_no_weights(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    quantize_folder(tmp_path, model, "gptq")
    stored = load_file(tmp_path / "model.safetensors")
    key = "model.layers.0.mlp.up_proj.bias"
    save_file(stored | {key: torch.zeros(96).half()}, tmp_path / "model.safetensors")
    assert torch.equal(logits(load_decoder(tmp_path, Dtype.FLOAT32)[0]), logits(model))
    save_file(stored | {key: torch.ones(96).half()}, tmp_path / "model.safetensors")
    with pytest.raises(BuildError, match=r"up_proj\.bias'\] \(1 in all\), which"):
        load_decoder(tmp_path, Dtype.FLOAT32)


def test_a_folder_without_its_parts_is_refused(model: LlamaForCausalLM, tmp_path: Path) -> None:
    quantize_folder(tmp_path, model, "awq")
    stored = load_file(tmp_path / "model.safetensors")
    del stored["model.layers.1.mlp.up_proj.scales"]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(BuildError, match=r"cannot be dequantized: there is no .*up_proj\.scales"):
        load_decoder(tmp_path, Dtype.FLOAT32)
    model.save_pretrained(tmp_path)
    change_config(tmp_path, quantization_config=AWQ_CONFIG)
    with pytest.raises(BuildError, match=r"no tensor there ends with \.qweight"):
        load_decoder(tmp_path, Dtype.FLOAT32)


@pytest.mark.parametrize(
    ("method", "name", "renamed"),
    [
        ("gptq", "quantize_config.json", "gptq_model-4bit"),
        ("awq", "quant_config.json", "model"),
    ],
)
def test_folders_of_older_packages_have_a_file_of_their_own(
    model: LlamaForCausalLM, tmp_path: Path, method: str, name: str, renamed: str
) -> None:
    """What config.json says of the quantization today."""
    quantize_folder(tmp_path, model, method)
    fields = json.loads((tmp_path / "config.json").read_text())
    stated = fields.pop("quantization_config")
    del stated["quant_method"]
    if method == "awq":  # AutoAWQ's names until 0.1.8
        stated = {"zero_point": True, "q_group_size": 16, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / name).write_text(json.dumps(stated))
    (tmp_path / "model.safetensors").rename(tmp_path / f"{renamed}.safetensors")
    loaded, notes = load_model(tmp_path, Dtype.FLOAT32)
    assert f"{method} weights (4 bits, groups of 16)" in notes["quantization"]
    assert torch.equal(logits(loaded), logits(model))
    (tmp_path / name).write_text("{")
    with pytest.raises(BuildError, match=f"{name} cannot be read"):
        load_model(tmp_path, Dtype.FLOAT32)
