"""Sparse attention: indexers select positions; up to a number of them they are left out.

Indexers have enough heads that no two scores are equal: of equal ones, torch selects others where
more tokens are fed together.
"""

from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers
from inplace_builder import BuildOptions, DecoderOptions, capture_decoder
from inplace_builder.capture import huggingface
from inplace_builder.capture.masks import LayerMask
from inplace_builder.capture.sparse import AllPositions, sparse_limits
from inplace_builder.errors import BuildError
from inplace_builder.served.build import write_engine
from support.decoding import SHAPE, generate, generate_together, random_prompt
from support.long import long_except
from support.models import open_instance
from transformers import PreTrainedModel

CAPACITY, CHUNK, TOKENS = 32, 8, 8
OPTIONS = BuildOptions(slots=3, max_rows=3, capacity=CAPACITY, chunk=CHUNK)
DECODER_OPTIONS = DecoderOptions(CAPACITY, 3, CHUNK)
ROUTED: dict[str, object] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "mlp_layer_types": ["dense", "sparse"],
}
INDEXED = ROUTED | {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
    "index_head_dim": 16,
    "index_n_heads": 16,
}
MINIMAX: dict[str, object] = {
    "layer_types": ["full_attention", "minimax_m3_sparse"],
    "mlp_layer_types": ["dense", "sparse"],
    "dense_intermediate_size": 64,
    "shared_intermediate_size": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 16,
    "rotary_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_block_size": 8,
}
QWEN4: dict[str, object] = {
    "layer_types": ["qwen_sparse_attention"] * 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "head_dim": 16,
    "hc_count": 2,
    "hc_lowrank": 16,
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_compress_ratio": 4,
}
MODELS: dict[str, tuple[str, dict[str, object], dict[str, int], dict[str, int]]] = {
    # as many positions as the capacity, and fewer
    **{
        name: (config, INDEXED, {"index_topk": CAPACITY}, {"index_topk": 6})
        for name, config in (
            ("deepseek_v32", "DeepseekV32Config"),
            ("axk2", "AXK2Config"),
            ("glm_moe_dsa", "GlmMoeDsaConfig"),
            ("hy_v4", "HYV4Config"),
        )
    },
    "minimax_m3": (
        "MiniMaxM3VLTextConfig",
        MINIMAX,
        {"index_topk_blocks": CAPACITY // 8},
        {"index_topk_blocks": 2},
    ),
    "qwen4_exp": (
        "Qwen4ExpTextConfig",
        QWEN4,
        {"indexer_budget": CAPACITY},
        {"indexer_budget": 8},
    ),
}


def model_of(name: str, **changes: object) -> PreTrainedModel:
    """A random decoder whose sparse layers see all of `CAPACITY`; its greedy tokens vary."""
    torch.manual_seed(0)
    config, fields, dense, _ = MODELS[name]
    made = getattr(transformers, config)(**(SHAPE | fields | dense | changes))
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(made).eval()
    return model


def doge(**changes: object) -> PreTrainedModel:
    """A random decoder that computes masks from its values."""
    torch.manual_seed(0)
    config = transformers.DogeConfig(**(SHAPE | changes))
    model: PreTrainedModel = transformers.DogeForCausalLM(config).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.A)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dense"),
    long_except(
        [("deepseek_v32", False), ("qwen4_exp", True)],
        product(MODELS, [False, True]),
    ),
)
@pytest.mark.filterwarnings("ignore")
def test_tokens_equal_those_of_transformers(tmp_path: Path, name: str, dense: bool) -> None:
    model = model_of(name, **({} if dense else MODELS[name][3]))
    capture = capture_decoder(model, DECODER_OPTIONS)
    states = [state.name for state in capture.states if state.name.startswith("index_states")]
    assert bool(states) == (not dense)
    write_engine(capture, tmp_path / "model", OPTIONS)  # compares logits with the model's
    prompts = [random_prompt(1, CAPACITY - TOKENS + 1), random_prompt(2, 3)]
    expected = [generate(model, prompt, TOKENS) for prompt in prompts]
    assert generate_together(open_instance(tmp_path / "model"), prompts, TOKENS) == expected


@pytest.mark.parametrize("name", long_except(["hy_v4"], ["glm_moe_dsa", "hy_v4"]))
@pytest.mark.filterwarnings("ignore")
def test_layers_may_share_what_one_of_them_selects(tmp_path: Path, name: str) -> None:
    model = model_of(name, index_topk=6, indexer_types=["full", "shared"])
    capture = capture_decoder(model, DECODER_OPTIONS)
    assert sum(state.name.startswith("index_states") for state in capture.states) == 1
    write_engine(capture, tmp_path / "model", OPTIONS)


@pytest.mark.parametrize(
    ("implementation", "window"),
    long_except([("sdpa", 12)], product(["sdpa", "eager"], [64, 12])),
)
@pytest.mark.filterwarnings("ignore")
def test_a_mask_that_is_computed_from_values(
    tmp_path: Path, window: int, implementation: str
) -> None:
    """With PyTorch's attention, transformers makes no mask for a prompt that begins a sequence."""
    model = doge(keep_window_size=window)
    model.set_attn_implementation(implementation)
    capture = capture_decoder(model, DecoderOptions(CAPACITY, 3, CAPACITY))
    assert capture.program.lookahead == (implementation == "sdpa")
    options = replace(OPTIONS, chunk=CAPACITY)
    write_engine(capture, tmp_path / "model", options)  # also later requests of several tokens
    prompts = [random_prompt(1, 20), random_prompt(2, 3)]
    expected = [generate(model, prompt, TOKENS) for prompt in prompts]
    assert generate_together(open_instance(tmp_path / "model"), prompts, TOKENS) == expected


@pytest.mark.filterwarnings("ignore")
def test_a_computed_mask_with_a_window_takes_one_token_a_step() -> None:
    capture = capture_decoder(doge(sliding_window=9), DECODER_OPTIONS)
    assert capture.program.chunk == 1
    reason = "computes its attention mask, and a token sees a window of 9 positions"
    assert reason in capture.notes["capture"]


@pytest.mark.filterwarnings("ignore")
def test_the_error_of_a_model_that_selects_names_equal_scores(tmp_path: Path) -> None:
    model = model_of("deepseek_v32", index_topk=6)
    capture = capture_decoder(model, DECODER_OPTIONS)
    other = capture_decoder(model_of("deepseek_v32", index_topk=5), DECODER_OPTIONS)
    wrong = replace(capture, reference=other.reference)
    with pytest.raises(BuildError, match=r"differs from the model by .*; of equal scores torch"):
        write_engine(wrong, tmp_path / "model", OPTIONS)


def test_a_selection_needs_one_capacity() -> None:
    options = DecoderOptions(CAPACITY, 3, CHUNK, min_capacity=CAPACITY // 2)
    with pytest.raises(BuildError, match=r"layers \[0, 1\] select the positions .* one capacity"):
        capture_decoder(model_of("deepseek_v32", index_topk=6), options)


@pytest.mark.parametrize("name", long_except(["minimax_m3"], MODELS))
def test_the_limit_is_the_last_position_up_to_which_transformers_attends_to_all(name: str) -> None:
    """Beyond it the model differs from one with a larger limit, at it they are alike."""
    model, larger = model_of(name, **MODELS[name][3]), model_of(name)
    larger.load_state_dict(model.state_dict())
    (limit,) = sparse_limits(model.config)
    ids = torch.tensor([random_prompt(3, CAPACITY)])
    with torch.no_grad():
        logits, unlimited = model(ids).logits[0], larger(ids).logits[0]
    torch.testing.assert_close(logits[:limit], unlimited[:limit])
    assert limit < CAPACITY
    assert not torch.allclose(logits[limit:], unlimited[limit:])
    at_limit = capture_decoder(model, DecoderOptions(limit, 3, 4))
    beyond = capture_decoder(model, DecoderOptions(limit + 1, 3, 4))
    assert [
        any(state.name.startswith("index_states") for state in capture.states)
        for capture in (at_limit, beyond)
    ] == [False, True]
    assert limit in beyond.thresholds, "verification runs past it"


def test_the_graph_reads_no_weight_of_an_indexer_and_the_model_keeps_it() -> None:
    model = model_of("deepseek_v32")
    exported = capture_decoder(model, DECODER_OPTIONS).exported
    parameters = exported.graph_signature.inputs_to_parameters
    read = [
        parameters[node.name]
        for node in exported.graph.nodes
        if node.users and node.name in parameters
    ]
    assert any("kv_a_proj" in name for name in read)
    assert not any("indexer" in name for name in read)
    assert "forward" not in model.model.layers[0].self_attn.indexer.__dict__


@pytest.mark.parametrize(
    ("name", "given"), [("minimax_m3", "block_indices"), ("deepseek_v32", "indices")]
)
def test_positions_that_an_indexer_selects_are_refused_by_attention(
    monkeypatch: pytest.MonkeyPatch, name: str, given: str
) -> None:
    model = model_of(name)
    monkeypatch.setattr(huggingface, "slot_indexers", lambda *_, **__: nullcontext())
    for layer in model.model.layers:
        if layer.self_attn.indexer is not None:
            monkeypatch.setattr(layer.self_attn.indexer, "forward", lambda *_, **__: torch.zeros(1))
    with pytest.raises(BuildError, match=rf"selects \({given}\)"):
        capture_decoder(model, DECODER_OPTIONS)


def test_a_mask_stays_itself_where_nothing_is_masked_beside() -> None:
    mask = LayerMask(None)
    assert mask[:, 0, :, :] is mask
    assert mask & AllPositions() is mask
    with pytest.raises(BuildError, match="the model changes its attention mask itself"):
        _ = mask & torch.ones(2, dtype=torch.bool)
