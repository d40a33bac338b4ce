"""Engines that cache keys and values as 8-bit floats."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from inplace.runtime.instance import ModelInstance
from inplace.schema.prefixes import PrefixOptions
from inplace.schema.served import Manifest
from inplace.schema.specs import Dtype, Update
from inplace.snapshots import state_contract
from inplace_builder import (
    BuildError,
    BuildOptions,
    DecoderOptions,
    build_decoder,
    capture_decoder,
    write_engine,
)
from inplace_builder.capture import cache_scales
from inplace_builder.capture.cache_scales import CacheScales, quantize_cache, read_scales
from inplace_builder.served.write import _digest_weights
from safetensors.torch import load_file, save_file
from support.copying import check_copy, feed, poison
from support.decoding import SHAPE, generate_together, random_prompt
from support.long import long_except
from support.models import accumulator, open_instance
from support.plugin_decoders import TwoSequences
from support.plugin_networks import tensorrt_with_plugins
from support.storing import check_snapshot
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

OPTIONS = BuildOptions(slots=4, max_rows=2, capacity=48, chunk=8, cache="fp8")
PROMPTS = [random_prompt(1, 11), random_prompt(2, 3)]
STORED = {"k_scale": (0.06, 0.02), "v_scale": (0.05, 0.003)}
"""Scales of a checkpoint, of two layers; the last ones clip some keys and values."""


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


def save_with_scales(model: PreTrainedModel, folder: Path, scales: dict[str, Any]) -> None:
    """A checkpoint with scales of cached keys and values, as vLLM and others read them."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name, of_layers in scales.items():
        for layer, scale in enumerate(of_layers):
            tensors[f"model.layers.{layer}.self_attn.{name}"] = torch.tensor(scale)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


class Rounding(DynamicCache):  # type: ignore[misc]
    """Transformers' cache with the numbers that 8-bit floats of these scales stand for."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any) -> Any:
        rounded = [
            (x / STORED[name][layer_idx]).clamp(-448, 448).to(torch.float8_e4m3fn).float()
            * STORED[name][layer_idx]
            for name, x in (("k_scale", key_states), ("v_scale", value_states))
        ]
        return super().update(*rounded, layer_idx, *args)


def greedy(model: PreTrainedModel, prompt: list[int], tokens: int, cache: type) -> list[int]:
    past, ids, out = cache(config=model.config), prompt, list[int]()
    with torch.no_grad():
        for _ in range(tokens):
            logits = model(torch.tensor([ids]), past_key_values=past, use_cache=True).logits
            out.append(int(logits[0, -1].argmax()))
            ids = [out[-1]]
    return out


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """An engine with the scales of its checkpoint."""
    folder = tmp_path_factory.mktemp("float8")
    save_with_scales(llama(), folder / "source", STORED)
    return folder / "model", build_decoder(folder / "source", folder / "model", OPTIONS)


@pytest.fixture
def instance(built: tuple[Path, Manifest]) -> ModelInstance:
    return open_instance(built[0])


@pytest.mark.slow
def test_an_engine_gives_the_tokens_of_a_rounded_cache(
    built: tuple[Path, Manifest], instance: ModelInstance
) -> None:
    """Chunks of prompts beside decode steps; a cache that is not rounded gives other tokens."""
    manifest = built[1]
    expected = [greedy(llama(), prompt, 12, Rounding) for prompt in PROMPTS]
    assert generate_together(instance, PROMPTS, 12) == expected
    assert expected != [greedy(llama(), prompt, 12, DynamicCache) for prompt in PROMPTS]
    assert {state.dtype for state in manifest.states} == {Dtype.FLOAT8_E4M3FN}
    assert manifest.slot_bytes == 2 * 2 * 2 * 48 * 8  # a byte an element
    assert instance.arena.tensors["key_states_0"].dtype is torch.float8_e4m3fn
    assert manifest.programs[0].engine.dtype is Dtype.FLOAT32
    assert float(manifest.built_with["verified_error"]) < 1e-4
    assert manifest.built_with["cache"] == (
        "keys and values are cached in fp8 (e4m3) in 2 layers, with a scale for each layer and "
        "head, those of the checkpoint: keys 0.02 to 0.06, values 0.003 to 0.05"
    )


@pytest.mark.slow
@pytest.mark.parametrize("length", long_except([13], [1, 13, 30]))
def test_sequences_are_copied_reused_and_stored(instance: ModelInstance, length: int) -> None:
    """To the bit, like any other state."""
    check_copy(instance, 5, length)
    check_snapshot(instance, 7, length)
    poison(instance)
    instance.reuse_prefixes(PrefixOptions())
    begin, rest = random_prompt(6, length), random_prompt(7, 3)
    feed(instance, "alone", begin, position=0, sequence_key="other")
    expected = feed(instance, "alone", rest, sequence_key="other")
    instance.table.end(instance.table.find("alone"))
    feed(instance, "first", begin, position=0)
    instance.table.end(instance.table.find("first"))
    assert torch.equal(feed(instance, "second", begin + rest, position=0), expected)
    assert instance.observer.metrics.snapshot()["inplace_prefix_tokens_total", ""] == length


@pytest.mark.slow
def test_a_contract_has_the_type_and_the_scales(built: tuple[Path, Manifest]) -> None:
    """So that neither a cache of another type nor one with other scales takes a snapshot."""
    _, manifest = built
    contracts = {state_contract(manifest)}
    contracts.add(
        state_contract(
            manifest.model_copy(
                update={
                    "states": tuple(
                        state.model_copy(update={"dtype": Dtype.FLOAT32})
                        for state in manifest.states
                    )
                }
            )
        )
    )
    model = llama()
    for factor in (1.0, 2.0):
        scale = torch.full((2,), factor)
        model.cache_scales = CacheScales(dict.fromkeys(range(2), (scale, scale)))
        capture = capture_decoder(model, DecoderOptions(48, 2, 8))
        contracts.add(_digest_weights([capture]))
    assert len(contracts) == 4


def test_measured_scales_leave_room(tmp_path: Path) -> None:
    """Powers of two, with which the largest measured number is a half to a quarter of the range."""
    model = llama()
    model.save_pretrained(tmp_path)
    note = quantize_cache(model, tmp_path, None, 48)
    assert "measured with 96 random tokens" in note
    largest: dict[tuple[int, int], Tensor] = {}

    class Watching(DynamicCache):  # type: ignore[misc]
        def update(self, key_states: Tensor, value_states: Tensor, layer: int, *args: Any) -> Any:
            for index, x in enumerate((key_states, value_states)):
                largest[layer, index] = x[0].abs().amax((1, 2))
            return super().update(key_states, value_states, layer, *args)

    generator = torch.Generator().manual_seed(0)
    ids = torch.cat([torch.randint(0, 128, (1, 48), generator=generator) for _ in range(2)])
    with torch.no_grad():
        parts = []
        for row in ids:
            model(row[None], past_key_values=Watching(config=model.config), use_cache=True)
            parts.append(dict(largest))
    scales = model.cache_scales.by_layer()
    for place in largest:
        scale = scales[place[0]][place[1]]
        assert torch.equal(scale, scale.log2().round().exp2())
        part = torch.maximum(parts[0][place], parts[1][place]) / (448 * scale)
        assert ((part > 0.25) & (part <= 0.5)).all()


@pytest.mark.slow
@pytest.mark.parametrize("factor", long_except([1.05], [1.05, 1 / 32]))
def test_verification_sees_other_scales(tmp_path: Path, factor: float) -> None:
    """An error of 5 % is refused, though 8-bit floats round by as much; so is one that clips."""
    model = llama()
    fitting = torch.full((2,), 0.0625)
    other = fitting * factor
    model.cache_scales = CacheScales(dict.fromkeys(range(2), (fitting, other)))
    capture = capture_decoder(model, DecoderOptions(48, 2, 8))
    model.cache_scales = CacheScales(dict.fromkeys(range(2), (fitting, fitting)))
    with pytest.raises(BuildError, match=r"from the model in float32 by .*, where the model's own"):
        write_engine(capture, tmp_path / "model", replace(OPTIONS, cache="auto"))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("dtype", [Dtype.FLOAT32, Dtype.BFLOAT16])
@pytest.mark.parametrize("kind", ["gemma3", "gpt2", "lfm2"])
def test_rings_and_hybrids_are_verified(tmp_path: Path, kind: str, dtype: Dtype) -> None:
    """The build wraps around rings; what is neither a key nor a value keeps its type."""
    torch.manual_seed(0)
    sizes = SHAPE | {"num_hidden_layers": 3}
    models: dict[str, Callable[[], PreTrainedModel]] = {
        "gemma3": lambda: Gemma3ForCausalLM(
            Gemma3TextConfig(**sizes, head_dim=8, sliding_window=9, sliding_window_pattern=2)
        ),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        ),
        "lfm2": lambda: Lfm2ForCausalLM(
            Lfm2Config(**sizes, layer_types=["conv", "full_attention", "conv"])
        ),
    }
    models[kind]().save_pretrained(tmp_path / "source")
    options = replace(OPTIONS, dtype=dtype)
    manifest = build_decoder(tmp_path / "source", tmp_path / "model", options)
    types = {state.name.partition("_")[0]: state.dtype for state in manifest.states}
    assert types["key"] is types["value"] is Dtype.FLOAT8_E4M3FN
    assert types.get("conv", dtype) is dtype
    rings = [state for state in manifest.states if state.update is Update.RING]
    assert bool(rings) == (kind == "gemma3")
    if kind != "lfm2":  # states that are rewritten by each token cannot be cut back
        check_copy(open_instance(tmp_path / "model"), 3, 20)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("changes", [{"draft_layers": 1}, {"prompt_logprobs": True}])
def test_drafts_and_scored_prompts_use_the_same_scales(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    """The build compares accepted and rejected tokens, and log-probabilities, with the model."""
    llama().save_pretrained(tmp_path / "source")
    options = replace(OPTIONS, serve="stream", **changes)
    manifest = build_decoder(tmp_path / "source", tmp_path / "model", options)
    assert {state.dtype for state in manifest.states} == {Dtype.FLOAT8_E4M3FN}
    assert manifest.verified == "executed"


@pytest.mark.slow
def test_a_network_has_caches_as_words() -> None:
    """The results of the model with a rounded cache, in ragged rows beside a null row."""
    model = llama()
    pairs = zip(STORED["k_scale"], STORED["v_scale"], strict=True)
    model.cache_scales = CacheScales(
        {layer: (torch.full((2,), k), torch.full((2,), v)) for layer, (k, v) in enumerate(pairs)}
    )
    capture = capture_decoder(model, DecoderOptions(32, 3, 4))
    sequences = TwoSequences(capture, tensorrt_with_plugins())
    network = sequences.network.network
    shapes = {
        tensor.name: tuple(tensor.shape)
        for tensor in map(network.get_input, range(network.num_inputs))
    }
    assert shapes["key_states_0"] == (-1, 2, 32, 2)
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = torch.cat(
            [model(row[None], past_key_values=Rounding(), use_cache=True).logits for row in ids]
        )
    at = [0, 0]
    for steps in ((4, 1), (3, 4), (1, 1), (1, 3)):
        parts = [ids[row, at[row] : at[row] + steps[row]].tolist() for row in (0, 1)]
        outputs = sequences.step(*parts)
        at = [at[0] + steps[0], at[1] + steps[1]]
        for row in (0, 1):
            torch.testing.assert_close(
                outputs[row]["logits"], expected[row, at[row] - 1], rtol=1e-3, atol=1e-3
            )


def bloom() -> PreTrainedModel:
    return BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4))


def deepseek() -> PreTrainedModel:
    sizes = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}
    latent = {
        "num_key_value_heads": 4, "head_dim": None, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 2,
    }  # fmt: skip
    return DeepseekV2ForCausalLM(DeepseekV2Config(**sizes, **latent))


def mamba() -> PreTrainedModel:
    return MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (deepseek, r"cache is fp8, and DeepseekV2ForCausalLM caches latents \(layer 0\)"),
        (bloom, "cache is fp8, and BloomForCausalLM attends in code of its own"),
        (mamba, "cache is fp8, and MambaForCausalLM"),
    ],
)
def test_models_without_such_caches_are_refused(
    tmp_path: Path, make: Callable[[], PreTrainedModel], message: str
) -> None:
    make().eval().save_pretrained(tmp_path / "source")
    with pytest.raises(BuildError, match=message):
        build_decoder(tmp_path / "source", tmp_path / "model", replace(OPTIONS, capacity=32))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({"k_scale": (0.1, 0.2)}, r"but not of both in the layers \[0, 1\] \(2 of 2\)"),
        ({"kv_scale": (0.1,)}, r"but not of both in the layers \[1\] \(1 of 2\)"),
        ({"k_scale": (0.1, 0.0), "v_scale": (1.0, 1.0)}, r"k_scale = \[0\.0\]; expected positive"),
        ({"k_scale": (0.1,), "kv_scale": (0.1,)}, "another scale of the keys of layer 0"),
        ({"kv_scale": ([0.1] * 3, [0.1] * 3)}, r"3 scales .* in layer 0, which has 2 heads"),
        (
            {"k_scale": (0.1, 0.1), "v_scale": (0.1, [0.1, 1e-6])},
            r"1e-06 of cached values in layer 1, head 1, .* caches numbers up to 0\.000448, and",
        ),
        ({"kv_scale": (1e6, 1e6)}, r"1e\+06 of cached keys in layer 0, head 0, .* to few bits"),
        ({"kv_scale": (1e-42, 1e-42)}, r"kv_scale = \[.*e-42\]; expected positive"),
    ],
)
def test_scales_that_do_not_fit_are_refused(
    tmp_path: Path, scales: dict[str, Any], message: str
) -> None:
    model = llama()
    save_with_scales(model, tmp_path, scales)
    with pytest.raises(BuildError, match=message):
        quantize_cache(model, tmp_path, None, 32)


def test_a_checkpoint_may_have_a_scale_of_each_head(tmp_path: Path) -> None:
    model = llama()
    save_with_scales(model, tmp_path, {"kv_scale": ([0.1, 0.2], 0.3)})
    assert set(read_scales(tmp_path)) == {0, 1}
    quantize_cache(model, tmp_path, None, 32)
    keys, values = model.cache_scales.by_layer()[0]
    assert torch.equal(keys, torch.tensor([0.1, 0.2]))
    assert torch.equal(values, keys)
    assert model.cache_scales.by_layer()[1][0].tolist() == [torch.tensor(0.3).item()] * 2


@pytest.mark.parametrize("tokens", [range(120, 140), [1] * 30, range(5)])
def test_a_tokenizer_that_does_not_fit_is_not_used(tmp_path: Path, tokens: Sequence[int]) -> None:
    """One with more tokens than the model, or without words: each text is unknown, or short."""
    model = llama()
    model.save_pretrained(tmp_path)

    def tokenize(_: str) -> dict[str, list[int]]:
        return {"input_ids": list(tokens)}

    assert "random tokens" in quantize_cache(model, tmp_path, tokenize, 32)


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BuildError, match="cache is 'int8'; choose one of"):
        BuildOptions(cache="int8")  # type: ignore[arg-type]
    with pytest.raises(BuildError, match="cache fp8 needs the plugins of TensorRT"):
        BuildOptions(cache="fp8", engine="tensorrt_rtx", device="cuda")
    with pytest.raises(BuildError, match="cache fp8 needs the mechanism plugin, and alias is copy"):
        BuildOptions(cache="fp8", engine="tensorrt", device="cuda", alias="copy")
    with pytest.raises(BuildError, match="holds a 'whisper' model, whose states are not rounded"):
        OPTIONS.check_no_fp8(Path("model"), "whisper")


def test_a_gpu_without_8_bit_floats_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    message = r"weights and cache fp8 needs a GPU of compute capability 8\.9 or later.* has 8\.0"
    with pytest.raises(BuildError, match=message):
        BuildOptions(device="cuda", engine="tensorrt", weights="fp8", cache="fp8")
    BuildOptions(device="cuda", engine="tensorrt")


def test_a_module_without_such_states_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"captured model has no states of 8-bit floats"):
        write_engine(accumulator(), tmp_path / "model", replace(OPTIONS, slots=4, max_rows=4))


def test_every_text_is_measured_in_the_models_own_tokens() -> None:
    assert len(cache_scales.TEXTS) == 7
    assert all(len(text) > 100 for text in cache_scales.TEXTS)
