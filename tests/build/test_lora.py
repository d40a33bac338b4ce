"""LoRA adapters in peft's format, merged at the build. Expected weights are computed by hand."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from inplace.schema.specs import Dtype
from inplace_builder import BuildOptions, build_decoder, load_decoder
from inplace_builder.capture.checkpoint import load_model, load_tokenizer
from inplace_builder.errors import BuildError
from safetensors.torch import load_file, save_file
from support.decoding import SHAPE, generate, generate_together, random_prompt
from support.long import long_except
from support.models import open_instance
from support.vocabulary import save_tokenizer
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

RANK, ALPHA = 4, 12
IDS = torch.tensor([[5, 6, 7, 8, 9]])
OPTIONS = BuildOptions(slots=2, max_rows=2, capacity=48, chunk=8)
QUERY, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def config(**fields: object) -> dict[str, object]:
    """`adapter_config.json` with the fields that peft writes."""
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.05,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": RANK,
        "rank_pattern": {},
        "revision": None,
        "target_modules": ["q_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    } | fields


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], **fields: object) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config(**fields)))
    prefixed = {f"base_model.model.{key}": x.contiguous() for key, x in tensors.items()}
    save_file(prefixed, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def pair(model: PreTrainedModel, module: str, rank: int = RANK) -> dict[str, Tensor]:
    """Random matrices for a linear layer, ``[out, in]`` its weight."""
    rows, columns = model.get_submodule(module).weight.shape
    generator = torch.Generator().manual_seed(len(module))
    return {
        f"{module}.lora_A.weight": torch.randn(rank, columns, generator=generator) * 0.3,
        f"{module}.lora_B.weight": torch.randn(rows, rank, generator=generator) * 0.3,
    }


def add(model: PreTrainedModel, tensors: Mapping[str, Tensor], module: str, scale: float) -> None:
    """peft's formula, by hand."""
    weight = model.get_submodule(module).weight
    product = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
    weight.data += scale * product


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS).logits
    return result


def check(source: Path, expected: PreTrainedModel, base: Tensor) -> dict[str, str]:
    loaded, notes = load_model(source, Dtype.FLOAT32)
    torch.testing.assert_close(logits(loaded), logits(expected), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(expected), base, atol=1e-2)
    return notes


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    "place", long_except(["hub id"], ["beside", "named", "relative", "hub id"])
)
def test_the_tokens_are_those_of_the_merged_model(
    model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "models--some--llama" / "snapshots" / "abc"
    base = folder if place == "hub id" else tmp_path / "base"
    source = base if place == "beside" else tmp_path / "adapter"
    model.save_pretrained(base)
    names = {"named": str(base), "relative": "../base", "hub id": "some/llama"}
    tensors = pair(model, QUERY) | pair(model, DOWN)
    write_adapter(source, tensors, base_model_name_or_path=names.get(place, "/trained/elsewhere"))
    manifest = build_decoder(source, tmp_path / "model", OPTIONS)
    assert manifest.built_with["adapter"] == "LoRA of rank 4, alpha 12, merged layers: 2"
    prompts = [random_prompt(1, 11), random_prompt(2, 3)]
    unmerged = [generate(model, prompt, 16) for prompt in prompts]
    for module in (QUERY, DOWN):
        add(model, tensors, module, ALPHA / RANK)
    expected = [generate(model, prompt, 16) for prompt in prompts]
    assert expected != unmerged
    assert generate_together(open_instance(tmp_path / "model"), prompts, 16) == expected


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
def test_ranks_and_alphas_of_layers_and_a_stabilised_scale(
    model: LlamaForCausalLM, tmp_path: Path, file: str
) -> None:
    model.save_pretrained(tmp_path)
    tensors = pair(model, QUERY, rank=9) | pair(model, DOWN)
    patterns: dict[str, Any] = {
        "rank_pattern": {"layers.0.self_attn.q_proj": 9},
        "alpha_pattern": {"down_proj": 2},
    }
    write_adapter(tmp_path, tensors, use_rslora=True, **patterns)
    if file.endswith(".bin"):
        torch.save(
            load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin"
        )
        (tmp_path / "adapter_model.safetensors").unlink()
    base = logits(model)
    add(model, tensors, QUERY, ALPHA / math.sqrt(9))
    add(model, tensors, DOWN, 2 / math.sqrt(RANK))
    notes = check(tmp_path, model, base)
    assert notes["adapter"].startswith(
        "LoRA of rank 4, 9, alpha 12 (rank stabilised), merged layers: 2"
    )


def test_weights_of_gpt2_are_transposed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 128, "initializer_range": 0.3}
    model = GPT2LMHeadModel(GPT2Config(**shape)).eval()
    model.save_pretrained(tmp_path)
    name = "transformer.h.1.attn.c_attn"
    a, b = torch.randn(RANK, 32) * 0.3, torch.randn(96, RANK) * 0.3
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    write_adapter(tmp_path, tensors, fan_in_fan_out=True)
    base = logits(model)
    model.get_submodule(name).weight.data += (ALPHA / RANK) * (b @ a).T
    check(tmp_path, model, base)


def test_dora_scales_rows_to_their_lengths(model: LlamaForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    magnitude = torch.rand(32) + 0.5
    tensors = pair(model, QUERY) | {f"{QUERY}.lora_magnitude_vector.weight": magnitude}
    write_adapter(tmp_path, tensors, use_dora=True)
    base = logits(model)
    add(model, tensors, QUERY, ALPHA / RANK)
    weight = model.get_submodule(QUERY).weight
    weight.data *= (magnitude / weight.data.norm(dim=1))[:, None]
    check(tmp_path, model, base)


def test_routers_and_experts_that_are_one_tensor(tmp_path: Path) -> None:
    """peft keeps the matrices of all experts in one pair, and nests a module's second pair."""
    torch.manual_seed(0)
    experts, name = 4, "model.layers.1.mlp"
    model = MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=experts)).eval()
    model.save_pretrained(tmp_path)
    tensors: dict[str, Tensor] = {}
    base = logits(model)
    for key, target in (("gate", "weight"), ("experts", "gate_up_proj"), ("experts", "down_proj")):
        weight = model.get_parameter(f"{name}.{key}.{target}")
        count = experts if weight.ndim == 3 else 1
        a = torch.randn(RANK * count, weight.shape[-1]) * 0.3
        b = torch.randn(weight.shape[-2], RANK * count) * 0.3
        nested = ".base_layer" if target == "gate_up_proj" else ""
        tensors |= {
            f"{name}.{key}{nested}.lora_{part}.weight": x
            for part, x in zip("AB", (a, b), strict=True)
        }
        for expert in range(count):
            rows = slice(expert * RANK, (expert + 1) * RANK)
            product = b[:, expert::count] @ a[rows]
            (weight[expert] if weight.ndim == 3 else weight).data.add_(ALPHA / RANK * product)
    targets = ["gate.weight", "mlp.experts.gate_up_proj", "experts.down_proj"]
    write_adapter(tmp_path, tensors, target_parameters=targets)
    assert check(tmp_path, model, base)["adapter"].endswith("merged layers: 3")
    write_adapter(tmp_path, tensors, target_parameters=targets[:2])
    with pytest.raises(BuildError, match=r"fit 0 of the parameters \['gate_up_proj'\]"):
        load_decoder(tmp_path, Dtype.FLOAT32)


@pytest.mark.parametrize("part", ["embeddings", "saved output layer"])
def test_a_tied_weight_is_changed_where_the_adapter_changes_it(tmp_path: Path, part: str) -> None:
    torch.manual_seed(0)
    tied = LlamaForCausalLM(LlamaConfig(**SHAPE | {"tie_word_embeddings": True})).eval()
    tied.save_pretrained(tmp_path)
    base = logits(tied)
    expected = LlamaForCausalLM(LlamaConfig(**SHAPE | {"tie_word_embeddings": False})).eval()
    expected.load_state_dict(tied.state_dict())
    if part == "embeddings":
        a, b = torch.randn(RANK, 128) * 0.3, torch.randn(32, RANK) * 0.3
        name = "model.embed_tokens"
        write_adapter(tmp_path, {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b})
        expected.model.embed_tokens.weight.data += (ALPHA / RANK) * (b @ a).T
    else:
        head, pairs = torch.randn(128, 32), pair(expected, QUERY)
        write_adapter(tmp_path, pairs | {"lm_head.weight": head}, modules_to_save=["lm_head"])
        expected.lm_head.weight.data = head
        add(expected, pairs, QUERY, ALPHA / RANK)
    notes = check(tmp_path, expected, base)
    assert (", replaced tensors: 1" in notes["adapter"]) == (part != "embeddings")
    build_decoder(tmp_path, tmp_path / "model", OPTIONS)  # verified beside the merged model


def test_the_adapters_tokenizer_comes_first(model: LlamaForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "adapter", pair(model, QUERY), base_model_name_or_path="../base")
    assert load_tokenizer(tmp_path / "adapter")[0] is None
    save_tokenizer(tmp_path / "adapter")
    assert load_tokenizer(tmp_path / "adapter")[0] is not None


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "another adapter": ({"peft_type": "IA3"}, "of type 'IA3'; only LORA is merged"),
    "new layers": ({"layer_replication": [[0, 2], [1, 2]]}, "uses layer_replication, which"),
    "changed base": ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa .it changes the"),
    "no rank": ({"r": None}, "no usable r and lora_alpha"),
    "another rank": ({"r": 8}, r"lora_A \(4, 32\) and lora_B \(32, 4\); .* says rank 8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged_is_refused(
    model: LlamaForCausalLM, tmp_path: Path, name: str
) -> None:
    fields, match = REFUSED[name]
    model.save_pretrained(tmp_path)
    write_adapter(tmp_path, pair(model, QUERY), **fields)
    with pytest.raises(BuildError, match=match):
        load_decoder(tmp_path, Dtype.FLOAT32)


def test_tensors_that_do_not_fit_are_refused(model: LlamaForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    a, b = torch.zeros(RANK, 32), torch.zeros(32, RANK)
    missing = "model.layers.7.self_attn.q_proj"
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({f"{missing}.lora_A.weight": a, f"{missing}.lora_B.weight": b}, f"changes {missing}, whi"),
        ({f"{QUERY}.lora_A.weight": a}, "has no lora_B"),
        ({f"{QUERY}.lora_A.weight": a, f"{QUERY}.lora_B.weight": b[:9]}, r"for a weight \(9, 32\)"),
        ({"model.embed_tokens.weight": torch.zeros(130, 32)}, "resized vocabulary"),
        (
            {"model.norm.lora_A.weight": a, "model.norm.lora_B.weight": b},
            "norm, a LlamaRMSNorm, has lora_A",
        ),
        ({}, "holds no tensors"),
    ]
    for tensors, match in cases:
        write_adapter(tmp_path, tensors)
        with pytest.raises(BuildError, match=match):
            load_decoder(tmp_path, Dtype.FLOAT32)


def test_an_adapter_whose_base_is_not_here_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", {}, base_model_name_or_path="some/llama-that-is-not-here")
    with pytest.raises(BuildError, match="`hf download some/llama-that-is-not-here`"):
        load_decoder(tmp_path / "a", Dtype.FLOAT32)
    write_adapter(tmp_path / "b", {})
    with pytest.raises(BuildError, match="no base_model_name_or_path; name the model's folder"):
        load_decoder(tmp_path / "b", Dtype.FLOAT32)


def test_weights_of_an_adapter_without_its_configuration_are_refused(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(BuildError, match=r"without adapter_config\.json, which says how to merge"):
        load_decoder(tmp_path, Dtype.FLOAT32)
