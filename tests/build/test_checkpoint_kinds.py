"""Checkpoints as people have them: sharded, `.bin`, quantized, and in the layout of downloads."""

import json
import os
import pickle
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import constants
from inplace.schema.specs import Dtype
from inplace_builder import BuildOptions, build_decoder, load_decoder
from inplace_builder.capture.checkpoint import check_checkpoint, load_model
from inplace_builder.capture.quantized import dequantize
from inplace_builder.errors import BuildError
from safetensors.torch import load_file, save_file
from support.decoding import SHAPE, generate, generate_together, random_prompt
from support.float8_checkpoint import fp8_format, quantize, save_fp8
from support.long import long_except
from support.models import change_config, open_instance
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

IDS = torch.tensor([[5, 6, 7, 8, 9]])
OPTIONS = BuildOptions(slots=2, max_rows=2, capacity=48, chunk=8)
BLOCK = (24, 20)
"""Rows and columns with one scale; they divide no weight of the model."""


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS).logits
    return result


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


def check_equal(source: Path | str, model: PreTrainedModel) -> None:
    loaded, _ = load_decoder(source, Dtype.FLOAT32)
    assert torch.equal(logits(loaded), logits(model))


def save_as_bin(folder: Path, shards: int) -> None:
    """Replace the safetensors of a folder by files of `torch.save`."""
    tensors = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(dict(tensors), folder / "pytorch_model.bin")
        return
    names = [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)]
    for index, name in enumerate(names):
        torch.save(dict(tensors[index::shards]), folder / name)
    weight_map = {key: names[i % shards] for i, (key, _) in enumerate(tensors)}
    index_file = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index_file))


def test_sharded_safetensors(model: LlamaForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    check_equal(tmp_path, model)


@pytest.mark.parametrize("shards", [1, 3])
def test_files_of_torch_save(model: LlamaForCausalLM, tmp_path: Path, shards: int) -> None:
    model.save_pretrained(tmp_path)
    save_as_bin(tmp_path, shards)
    check_equal(tmp_path, model)


class Harmful:
    """What a pickle may hold: a call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_is_not_run(model: LlamaForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    content = pickle.dumps({"model.norm.weight": Harmful(tmp_path / "run")})
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(BuildError, match="cannot be loaded"):
        load_decoder(tmp_path / "model", Dtype.FLOAT32)
    assert not (tmp_path / "run").exists()


def download(model: PreTrainedModel, cache: Path, hub_id: str, revision: str) -> Path:
    """Write a model as `hf download` does: links to blobs. Returns the folder of the model."""
    folder = cache / f"models--{hub_id.replace('/', '--')}"
    model.save_pretrained(folder / "saved")
    (folder / "blobs").mkdir(exist_ok=True)
    snapshot = folder / "snapshots" / revision
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted((folder / "saved").iterdir())):
        blob = shutil.move(path, folder / "blobs" / f"{revision}{number}")
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    (folder / "saved").rmdir()
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(revision)
    return folder


def test_the_cache_of_downloads(
    model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the folder of the model, by that of a revision, and by its id."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = download(model, tmp_path, "some/llama", "abc123")
    for source in (folder, folder / "snapshots" / "abc123", "some/llama"):
        check_equal(source, model)
    other = LlamaForCausalLM(model.config).eval()
    download(other, tmp_path, "some/llama", "def456")
    check_equal(folder, other)  # main has moved
    (folder / "refs" / "main").unlink()
    with pytest.raises(BuildError, match=r"2 revisions and none is its main; give one of .*abc123"):
        check_checkpoint(folder)


def test_the_id_of_a_model_is_answered_with_the_command_that_fetches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BuildError, match=r"fetch it with `hf download some/llama-1\.5B`, then"):
        build_decoder("some/llama-1.5B", tmp_path / "model", OPTIONS)
    with pytest.raises(BuildError, match="fetch it with `hf download gpt2`, then"):
        build_decoder("gpt2", tmp_path / "model", OPTIONS)
    with pytest.raises(BuildError, match=r"gpt2\.gguf does not exist; give the folder"):
        check_checkpoint("gpt2.gguf")
    with pytest.raises(BuildError, match=r"/no/such/folder does not exist; give the folder"):
        check_checkpoint("/no/such/folder")


@pytest.mark.parametrize("stated", [False, True])
def test_scales_of_an_8_bit_cache_are_named(
    model: LlamaForCausalLM, tmp_path: Path, stated: bool
) -> None:
    """Keys and values are cached as they are, whatever the checkpoint has for another cache."""
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("k_scale", "v_scale"):
        tensors[f"model.layers.1.self_attn.{name}"] = torch.tensor(0.5)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    if stated:
        cache = {"num_bits": 8, "type": "float", "strategy": "tensor"}
        fields = {"quant_method": "compressed-tensors", "kv_cache_scheme": cache}
        change_config(tmp_path, quantization_config=fields | {"config_groups": {}})
    loaded, notes = load_model(tmp_path, Dtype.FLOAT32)
    assert torch.equal(logits(loaded), logits(model))
    assert notes == {
        "cache": "keys and values are cached in float32, not in 8 bits: "
        "['model.layers.1.self_attn.k_scale', 'model.layers.1.self_attn.v_scale'] (2 scales in "
        "all) are not used; cache fp8 uses them"
    }


FORMATS = ("blocks", "rows", "compressed rows", "compressed tensor")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shards"),
    long_except([("blocks", 2), ("compressed rows", 1)], product(FORMATS, [1, 2])),
)
def test_fp8_is_dequantized(tmp_path: Path, name: str, shards: int) -> None:
    """The tokens are those of transformers with the products of weights and scales."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    original = logits(model)
    source = tmp_path / "source"
    model.generation_config.eos_token_id = 77
    save_fp8(model, source, name, BLOCK)
    if shards > 1:
        save_as_bin(source, shards)
    loaded, notes = load_model(source, Dtype.FLOAT32)
    assert notes["quantization"].startswith("fp8 weights, dequantized to float32")
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.allclose(logits(model), original, atol=1e-3)
    manifest = build_decoder(source, tmp_path / "model", OPTIONS)
    assert "fp8 weights" in manifest.built_with["quantization"]
    prompts = [random_prompt(1, 11), random_prompt(2, 3)]
    expected = [generate(model, prompt, 16) for prompt in prompts]
    assert generate_together(open_instance(tmp_path / "model"), prompts, 16) == expected


def test_fp8_experts_are_dequantized_before_they_become_one_tensor(tmp_path: Path) -> None:
    """A checkpoint has a weight and scales for each expert; transformers has one tensor."""
    torch.manual_seed(2)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    config = transformers.Qwen3MoeConfig(**SHAPE, **experts, head_dim=8)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "fp8")
    stored = load_file(tmp_path / "whole" / "model.safetensors")
    whole = dict(stored)
    quantized = [key for key in stored if ".experts." in key]
    assert len(quantized) == 2 * 4 * 3
    for key in quantized:
        stored[key], stored[f"{key}_scale_inv"], whole[key] = quantize(stored[key], *BLOCK)
    for name, tensors in (("whole", whole), ("fp8", stored)):
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    change_config(tmp_path / "fp8", quantization_config=fp8_format("blocks", BLOCK)[0])
    check_equal(tmp_path / "fp8", load_decoder(tmp_path / "whole", Dtype.FLOAT32)[0].eval())


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def test_mxfp4_experts_are_dequantized(tmp_path: Path) -> None:
    """Blocks of 32 numbers with one exponent, two numbers a byte, as gpt-oss is published."""
    torch.manual_seed(3)
    shape = SHAPE | {"intermediate_size": 32}
    config = transformers.GptOssConfig(
        **shape, num_local_experts=4, num_experts_per_tok=2, head_dim=8
    )
    model = transformers.GptOssForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for key in [key for key in stored if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = stored.pop(key).shape
        codes = torch.randint(0, 16, (experts, rows, columns // 32, 32), dtype=torch.uint8)
        exponents = torch.randint(124, 127, (experts, rows, columns // 32), dtype=torch.uint8)
        stored[f"{key}_blocks"] = codes[..., 0::2] | codes[..., 1::2] << 4
        stored[f"{key}_scales"] = exponents
        values = FP4[codes.int()] * (exponents.float() - 127).exp2()[..., None]
        weight = values.reshape(experts, rows, columns).transpose(1, 2)
        model.get_parameter(key).data.copy_(weight)
    change_config(tmp_path, quantization_config={"quant_method": "mxfp4"})
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, notes = load_model(tmp_path, Dtype.FLOAT32)
    loaded.set_attn_implementation("eager")
    assert notes["quantization"].startswith("mxfp4 weights, dequantized to float32")
    assert torch.equal(logits(loaded), logits(model))


def test_scales_that_do_not_fit_are_refused() -> None:
    weight = torch.ones(6, 4).to(torch.float8_e4m3fn)
    exponents = torch.tensor([[128], [126]], dtype=torch.uint8)
    assert dequantize(weight, exponents, None)[:, 0].tolist() == [2, 2, 2, 0.5, 0.5, 0.5]
    for shape in ((4, 1), (6, 3), (2, 6, 4)):
        with pytest.raises(ValueError, match="scales"):
            dequantize(weight, torch.ones(shape), None)


@pytest.mark.parametrize("missing", ["scale", "weight"])
def test_fp8_without_its_parts_is_refused(
    model: LlamaForCausalLM, tmp_path: Path, missing: str
) -> None:
    model.save_pretrained(tmp_path)
    change_config(tmp_path, quantization_config=fp8_format("blocks", BLOCK)[0])
    if missing == "scale":
        tensors = load_file(tmp_path / "model.safetensors")
        key = "model.layers.0.mlp.up_proj.weight"
        tensors[key] = tensors[key].to(torch.float8_e4m3fn)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    match = "up_proj.weight as torch.float8_e4m3fn without" if missing == "scale" else "no weight"
    with pytest.raises(BuildError, match=match):
        load_decoder(tmp_path, Dtype.FLOAT32)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (
            {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
            "'gptq' and cannot be read: its checkpoint_format is 'marlin'",
        ),
        (
            {"quant_method": "awq", "bits": 4, "version": "gemv"},
            "'awq' and cannot be read: its layout is 'gemv'",
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            r"'bitsandbytes' \(4 bits\), which is not",
        ),
        ({"load_in_8bit": True}, r"'bitsandbytes' \(8 bits\), which is not"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            r"'compressed-tensors' \(format pack-quantized\), which is not",
        ),
        ({"quant_method": "abacus"}, "'abacus', which is not read here"),
    ],
    ids=str,
)
def test_other_quantizations_are_refused_before_the_weights_are_read(
    model: LlamaForCausalLM, tmp_path: Path, fields: dict[str, object], named: str
) -> None:
    model.save_pretrained(tmp_path / "source")
    change_config(tmp_path / "source", quantization_config=fields)
    (tmp_path / "source" / "model.safetensors").unlink()
    with pytest.raises(BuildError, match=f"quantized with {named}"):
        build_decoder(tmp_path / "source", tmp_path / "model", OPTIONS)
