"""Unusual configurations of decoders whose usual ones `decoders.configs` has.

Each changes what checkpoints may set but the ones that were published first do not: shapes that are
no powers of two, one head, one layer, layers without rotary embeddings, windows shorter than a
chunk, every expert chosen. `tests/long/test_decoder_variants.py` compares the CPU engine of each
with ``generate``: it was equal for all.
"""

from typing import Any

from decoders.configs import (
    EXPERTS,
    LATENT,
    ROUTED,
    SLIDING,
    WINDOW,
    Tiny,
)

NARROW: dict[str, Any] = {"sliding_window": 3, "layer_types": SLIDING}
"""A window shorter than a chunk of 8 tokens."""
ODD: dict[str, Any] = {
    "vocab_size": 299,
    "hidden_size": 60,
    "intermediate_size": 77,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 10,
}
"""Extents that no power of two divides; heads that do not fill the hidden size."""

VARIANTS: dict[str, Tiny] = {
    # shapes
    "llama/odd": Tiny(ODD),
    "llama/wide-heads": Tiny({"head_dim": 48}),
    "llama/narrow-heads": Tiny({"head_dim": 4}),
    "llama/one-head": Tiny({"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64}),
    "llama/one-layer": Tiny({"num_hidden_layers": 1}),
    "llama/multi-head": Tiny({"num_key_value_heads": 4}),
    "llama/short": Tiny({"max_position_embeddings": 80}),
    "llama/tied-bias": Tiny({"tie_word_embeddings": True, "attention_bias": True}),
    "llama/tanh": Tiny({"hidden_act": "gelu_pytorch_tanh"}),
    "llama/theta": Tiny({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "mistral/odd": Tiny(ODD | {"sliding_window": 5}),
    "mistral/narrow": Tiny({"sliding_window": 3}),
    "qwen2/odd": Tiny(ODD | {"head_dim": None, "hidden_size": 60}),
    "qwen3/odd": Tiny(ODD),
    "qwen3/bias-tied": Tiny({"attention_bias": True, "tie_word_embeddings": True}),
    "qwen3/narrow": Tiny({"use_sliding_window": True, "max_window_layers": 0, **NARROW}),
    "gemma/odd": Tiny(ODD),
    "gemma2/odd": Tiny({**ODD, **WINDOW, "query_pre_attn_scalar": 7}, std=0.5),
    "gemma2/narrow": Tiny({**NARROW, "attn_logit_softcapping": 1.0}, std=0.5),
    "gemma2/no-caps": Tiny(
        {**WINDOW, "attn_logit_softcapping": None, "final_logit_softcapping": None}, std=0.5
    ),
    # rotary embeddings
    "smollm3/no-rope": Tiny({"no_rope_layers": [0, 0], "use_sliding_window": False}),
    # scales, norms, residuals
    "olmo/bias": Tiny({"attention_bias": True, "clip_qkv": 1.0, "tie_word_embeddings": True}),
    "starcoder2/untied": Tiny({"tie_word_embeddings": False, "use_bias": False}),
    "gpt2/wide": Tiny({"n_embd": 60, "n_layer": 1, "n_head": 3, "n_positions": 90, "n_inner": 70}),
    "falcon/parallel": Tiny({"multi_query": False, "parallel_attn": False, "bias": True}),
    "bloom/three-heads": Tiny({"n_layer": 2, "n_head": 3, "hidden_size": 48}, std=1.0),
    # experts
    "mixtral/one-expert": Tiny({"num_local_experts": 1, "num_experts_per_tok": 1}),
    "mixtral/all-experts": Tiny({"num_local_experts": 4, "num_experts_per_tok": 4}),
    "olmoe/normalized": Tiny({**EXPERTS, "norm_topk_prob": True, "clip_qkv": 2.0}),
    "granitemoe/all": Tiny({"num_local_experts": 4, "num_experts_per_tok": 4}),
    "deepseek_v3/groups": Tiny(
        {
            **LATENT,
            **ROUTED,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.5,
            "first_k_dense_replace": 1,
        }
    ),
    "ernie4_5_moe/all": Tiny(
        {
            "moe_num_experts": 4,
            "moe_k": 4,
            "moe_intermediate_size": 32,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "use_bias": True,
        }
    ),
    # states of fixed size
    "mamba2/groups": Tiny(
        {"state_size": 12, "num_heads": 8, "head_dim": 16, "n_groups": 4, "chunk_size": 5}
        | {"conv_kernel": 3, "use_bias": True},
        std=0.3,
    ),
}
