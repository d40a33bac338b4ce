"""Decoders that only their own code can step: one token of each row a step."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from inplace.schema.specs import Update
from inplace_builder import BuildError, BuildOptions, DecoderOptions, capture_decoder
from inplace_builder.capture.model_memory import ModelMemory
from inplace_builder.capture.token_steps import _check_steps
from inplace_builder.served.build import write_engine
from support.decoding import SHAPE, generate, generate_together, random_prompt
from support.long import long_except
from support.models import open_instance
from torch import Tensor
from transformers import PreTrainedModel

CAPACITY = 48
OPTIONS = BuildOptions(slots=3, max_rows=3, capacity=CAPACITY, chunk=8)
DECODER_OPTIONS = DecoderOptions(CAPACITY, 3, 8)
UPDATES = {"rwkv": {Update.REPLACE}, "xlstm": {Update.REPLACE}}
"""How the states change, where not some grow and others are replaced."""
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "rwkv": ("RwkvConfig", {"attention_hidden_size": 32, "context_length": 64}),
    "xlstm": (
        "xLSTMConfig",
        {"num_heads": 4, "num_blocks": 2, "chunk_size": 8, "qk_dim_factor": 1.0, "hidden_size": 64},
    ),
    # attention, convolutions and the last token's values
    "zaya": (
        "ZayaConfig",
        {"num_experts": 4, "moe_intermediate_size": 16, "router_hidden_size": 8, "head_dim": 8},
    ),
    # scores have a bias that the query and the distance of the key choose
    "inkling": (
        "InklingTextConfig",
        {
            "head_dim": 8,
            "swa_head_dim": 8,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "sliding_window_size": 12,
            "layer_types": ["hybrid_sliding", "hybrid"],
            "d_rel": 4,
            "rel_extent": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
        },
    ),
}


def model_of(name: str) -> PreTrainedModel:
    """A random decoder; its greedy tokens vary."""
    config, fields = MODELS[name]
    torch.manual_seed(0)
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, config)(**{**SHAPE, **fields})
    ).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.03)
    return model


@pytest.mark.parametrize("name", long_except(["rwkv"], MODELS))
@pytest.mark.filterwarnings("ignore")
def test_tokens_of_ragged_rows_equal_those_of_transformers(tmp_path: Path, name: str) -> None:
    model = model_of(name)
    manifest = write_engine(capture_decoder(model, DECODER_OPTIONS), tmp_path / "model", OPTIONS)
    prompts = [random_prompt(1, 25), random_prompt(2, 3)]
    expected = [generate(model, prompt, 20) for prompt in prompts]
    assert len({token for tokens in expected for token in tokens}) >= 8
    assert generate_together(open_instance(tmp_path / "model"), prompts, 20) == expected
    assert manifest.programs[0].chunk == 1
    updates = {state.update for state in manifest.states}
    assert updates == UPDATES.get(name, {Update.APPEND, Update.REPLACE})
    assert manifest.built_with["capture"].startswith("one token of each row a step")


def test_states_are_what_the_model_keeps() -> None:
    rwkv = ModelMemory.of(model_of("rwkv"), CAPACITY)
    assert [place.name for place in rwkv.states] == [f"state_{number}" for number in range(5)]
    assert rwkv.initial[4].unique().item() == pytest.approx(-1e30)  # the maximum over no tokens
    zaya = ModelMemory.of(model_of("zaya"), CAPACITY)
    shapes = {
        place.name: tuple(initial.shape)
        for place, initial in zip(zaya.states, zaya.initial, strict=True)
    }
    assert shapes["layers_0_keys"] == (1, 2, CAPACITY, 8)
    assert shapes["layers_1_conv_states_0"] == (1, 48, 2)
    # the number of cached tokens is the position that the runtime gives
    assert [place.name for place in zaya.counters] == [
        f"layers_{layer}_cumulative_length" for layer in range(2)
    ]


@pytest.mark.filterwarnings("ignore")
def test_a_model_whose_steps_differ_is_refused() -> None:
    torch.manual_seed(0)
    model = transformers.CpmAntForCausalLM(
        transformers.CpmAntConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2)
    ).eval()
    with pytest.raises(BuildError) as refused:
        capture_decoder(model, DECODER_OPTIONS)
    assert "computes masked_fill of its weights" in str(refused.value)
    assert "cannot run token by token with states of fixed size" in str(refused.value)


@pytest.mark.filterwarnings("ignore")
def test_steps_are_compared_with_the_forward_of_all_tokens() -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()
    _check_steps(model, CAPACITY)
    layer = model.model.layers[0].self_attn
    original = layer.forward

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        later = hidden_states.roll(-1, 1)  # of one token it is the token
        return original(hidden_states + later, *args, **kwargs)

    layer.forward = forward
    with pytest.raises(BuildError, match=r"other scores token by token .*, from position 0 on"):
        _check_steps(model, CAPACITY)


@pytest.mark.filterwarnings("ignore")
def test_a_capacity_chosen_at_load_is_refused() -> None:
    options = DecoderOptions(CAPACITY, 3, 8, min_capacity=16)
    with pytest.raises(BuildError, match="the capacity of its own caches is fixed"):
        capture_decoder(model_of("rwkv"), options)
