"""Sparse attention is full causal attention up to a number of positions, and refused beyond."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers
from inplace_builder import BuildOptions, DecoderOptions, capture_decoder
from inplace_builder.capture import huggingface
from inplace_builder.capture.checkpoint import check_positions
from inplace_builder.capture.slot_cache import LayerMask
from inplace_builder.capture.sparse import AllPositions
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
    "index_n_heads": 2,
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
LLAMA4: dict[str, object] = {
    "layer_types": ["chunked_attention", "full_attention"],
    "no_rope_layers": [1, 0],
    "head_dim": 8,
    "intermediate_size_mlp": 48,
    "num_local_experts": 2,
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
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_compress_ratio": 4,
}
MODELS: dict[str, tuple[str, dict[str, object], dict[str, int], dict[str, int]]] = {
    # at the limit of what is full attention, and one less
    "llama4": (
        "Llama4TextConfig",
        LLAMA4,
        {"attention_chunk_size": CAPACITY},
        {"attention_chunk_size": CAPACITY - 1},
    ),
    **{
        name: (config, INDEXED, {"index_topk": CAPACITY}, {"index_topk": CAPACITY - 1})
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
        {"index_topk_blocks": CAPACITY // 8 - 1},
    ),
    # of 32 positions the last blocks of 4 are 8 with an incomplete one, of 31 they are 7
    "qwen4_exp": (
        "Qwen4ExpTextConfig",
        QWEN4,
        {"indexer_budget": CAPACITY},
        {"indexer_budget": CAPACITY - 4},
    ),
}


def model_of(name: str, **changes: object) -> PreTrainedModel:
    """A random decoder whose sparse layers see all of `CAPACITY`; its greedy tokens vary."""
    torch.manual_seed(0)
    config, fields, dense, _ = MODELS[name]
    made = getattr(transformers, config)(**(SHAPE | fields | dense | changes))
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(made).eval()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", long_except(["llama4", "deepseek_v32", "qwen4_exp"], MODELS))
@pytest.mark.filterwarnings("ignore")
def test_tokens_up_to_the_limit_equal_those_of_transformers(tmp_path: Path, name: str) -> None:
    model = model_of(name)
    write_engine(capture_decoder(model, DECODER_OPTIONS), tmp_path / "model", OPTIONS)
    prompts = [random_prompt(1, CAPACITY - TOKENS + 1), random_prompt(2, 3)]
    expected = [generate(model, prompt, TOKENS) for prompt in prompts]
    assert generate_together(open_instance(tmp_path / "model"), prompts, TOKENS) == expected


@pytest.mark.parametrize("name", MODELS)
def test_a_capacity_beyond_the_limit_is_refused_with_what_limits_it(name: str) -> None:
    model = model_of(name, **MODELS[name][3])
    (field,) = MODELS[name][3]
    with pytest.raises(
        BuildError,
        match=rf"a capacity of {CAPACITY} is more than the \d+ positions up to which its layers of "
        rf"the kind '\w+' \(.*{field}.*\) attend to all positions; .*; choose at most \d+",
    ):
        capture_decoder(model, DECODER_OPTIONS)


@pytest.mark.parametrize("name", MODELS)
def test_the_limit_is_the_last_position_up_to_which_transformers_attends_to_all(name: str) -> None:
    """Beyond it the model differs from one with a larger limit, at it they are alike."""
    model, larger = model_of(name, **MODELS[name][3]), model_of(name)
    larger.load_state_dict(model.state_dict())
    limit = largest_capacity(model)
    ids = torch.tensor([random_prompt(3, CAPACITY)])
    with torch.no_grad():
        logits, unlimited = model(ids).logits[0], larger(ids).logits[0]
    torch.testing.assert_close(logits[:limit], unlimited[:limit])
    assert limit < CAPACITY
    assert not torch.allclose(logits[limit:], unlimited[limit:])


def largest_capacity(model: PreTrainedModel) -> int:
    """The largest capacity that is not refused."""
    allowed = 0
    for capacity in range(1, CAPACITY + 1):
        try:
            check_positions(model.config, capacity)
        except BuildError:
            break
        allowed = capacity
    return allowed


def test_a_layer_without_a_limit_of_its_own_is_not_limited_by_it() -> None:
    model = model_of("llama4", layer_types=["full_attention"] * 2, attention_chunk_size=4)
    check_positions(model.config, CAPACITY)


def test_the_graph_reads_no_weight_of_an_indexer_and_the_model_keeps_it() -> None:
    model = model_of("deepseek_v32")
    exported = capture_decoder(model, DECODER_OPTIONS).exported
    parameters = exported.graph_signature.inputs_to_parameters
    read = [
        parameters[node.name]
        for node in exported.graph.nodes
        if node.users and node.name in parameters
    ]
    assert any("kv_b_proj" in name for name in read)
    assert not any("indexer" in name for name in read)
    assert "forward" not in model.model.layers[0].self_attn.indexer.__dict__


@pytest.mark.parametrize(
    ("name", "given"), [("minimax_m3", "block_indices"), ("deepseek_v32", "indices")]
)
def test_positions_that_an_indexer_selects_are_refused_by_attention(
    monkeypatch: pytest.MonkeyPatch, name: str, given: str
) -> None:
    model = model_of(name)
    monkeypatch.setattr(huggingface, "without_indexers", lambda _: nullcontext())
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
