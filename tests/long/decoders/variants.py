"""Unusual configurations of decoders whose usual ones `decoders.configs` has.

Each changes what checkpoints may set but the ones that were published first do not: shapes that are
no powers of two, one head, one layer, layers without rotary embeddings, windows shorter than a
chunk, every expert chosen. `tests/long/test_decoder_variants.py` compares the engines of each
with the model.
"""

from decoders.configs import (
    DYNAMIC,
    FULL,
    GPT,
    LLAMA3,
    LOCAL,
    LONG,
    MAMBA_HEADS,
    MIXED,
    ROUTED,
    WINDOW,
    YARN,
    Tiny,
    rope,
)
from decoders.mixed_variants import MIXED_LAYERS, NARROW, ODD

ATTENTION: dict[str, Tiny] = {
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
    "llama/longrope": Tiny(LONG),
    "phi3/partial": Tiny({"partial_rotary_factor": 0.5, "original_max_position_embeddings": 256}),
    "llama/llama3-tied": Tiny({**LLAMA3, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama/yarn-odd": Tiny(
        {
            **ODD,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 5000.0,
                "factor": 3.0,
                "original_max_position_embeddings": 48,
                "attention_factor": 1.3,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
            },
        }
    ),
    "qwen3/dynamic": Tiny(DYNAMIC),
    "qwen3/linear-wide": Tiny(
        {**rope("linear", factor=2.5), "head_dim": 32, "num_key_value_heads": 1}
    ),
    "gemma3_text/ropes": Tiny(
        {
            **WINDOW,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
        },
        std=0.5,
    ),
    "smollm3/interval": Tiny(
        {"num_hidden_layers": 4, "no_rope_layer_interval": 2, "use_sliding_window": False}
    ),
    "smollm3/window": Tiny({"no_rope_layers": [1, 0], "use_sliding_window": True, **WINDOW}),
    "glm4/quarter": Tiny({"partial_rotary_factor": 0.25, "attention_bias": True, "head_dim": 24}),
    "glm/whole": Tiny({"partial_rotary_factor": 1.0, "num_key_value_heads": 1}),
    "stablelm/bias": Tiny(
        {
            "partial_rotary_factor": 0.5,
            "use_qkv_bias": True,
            "qk_layernorm": True,
            "use_parallel_residual": False,
        }
    ),
    "stablelm/odd": Tiny(
        {
            "vocab_size": 299,
            "hidden_size": 60,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "partial_rotary_factor": 0.5,
            "use_parallel_residual": True,
        }
    ),
    "phi/norm": Tiny(
        {"partial_rotary_factor": 0.5, "qk_layernorm": True, "num_key_value_heads": 1}
    ),
    "persimmon/plain": Tiny(
        {"partial_rotary_factor": 1.0, "qk_layernorm": False, "hidden_act": "gelu"}
    ),
    "gpt_neox/serial-part": Tiny(
        {
            "use_parallel_residual": False,
            "partial_rotary_factor": 0.5,
            "attention_bias": False,
            "tie_word_embeddings": True,
        }
    ),
    "gpt_neox/rotary-pct": Tiny({"rotary_pct": 1.0, "hidden_act": "gelu_fast"}),
    "nemotron/odd": Tiny(
        {
            **ODD,
            "head_dim": 20,
            "partial_rotary_factor": 0.2,
            "attention_bias": True,
            "mlp_bias": True,
        }
    ),
    "arcee/bias": Tiny({**YARN, "attention_bias": True, "mlp_bias": True}),
    "apertus/odd": Tiny({**ODD, **LLAMA3}),
    "gptj/odd": Tiny({**GPT, "rotary_dim": 4, "n_inner": 50, "tie_word_embeddings": True}, std=0.3),
    "olmo3/ropes": Tiny(
        {
            **NARROW,
            "layer_types": MIXED,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        }
    ),
    # scales, norms, residuals, windows
    "falcon/sequential": Tiny({"parallel_attn": False, "num_kv_heads": 1}),
    "falcon/multi-head-parallel": Tiny({"multi_query": False, "parallel_attn": True}),
    "falcon/one-norm": Tiny(
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}
    ),
    "falcon/sequential-alibi": Tiny(
        {
            "parallel_attn": False,
            "alibi": True,
            "bias": True,
            "num_attention_heads": 3,
            "hidden_size": 48,
        },
        std=0.3,
    ),
    "mpt/six-heads": Tiny(
        {"d_model": 96, "n_heads": 6, "n_layers": 2, "max_seq_len": 256}, std=0.3
    ),
    "granite/multipliers": Tiny(
        {
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.22,
            "embedding_multiplier": 3.0,
            "logits_scaling": 4.0,
        }
    ),
    "cohere2/narrow": Tiny(NARROW, std=0.5),
    "llama/all-bias-odd": Tiny(
        {**ODD, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
    ),
    "llama/relu2": Tiny({"hidden_act": "relu2"}),
    "llama/quick-gelu": Tiny({"hidden_act": "quick_gelu"}),
    "qwen2/mixed-layers": Tiny(
        {
            "use_sliding_window": True,
            "sliding_window": 12,
            "max_window_layers": 1,
            "num_hidden_layers": 3,
        }
    ),
    "qwen3/mixed-layers": Tiny(
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 1,
            "num_hidden_layers": 3,
            "attention_bias": True,
        }
    ),
    "gemma3_text/three": Tiny(
        {
            "num_hidden_layers": 4,
            "sliding_window": 5,
            "layer_types": [
                "full_attention",
                "sliding_attention",
                "sliding_attention",
                "full_attention",
            ],
            "query_pre_attn_scalar": 9,
        },
        std=0.5,
    ),
    "gemma3_text/caps": Tiny(
        {**WINDOW, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0}, std=0.5
    ),
    "gemma3_text/odd": Tiny({**ODD, **NARROW}, std=0.5),
    "gemma3_text/pattern": Tiny(
        {"num_hidden_layers": 3, "sliding_window": 12, "sliding_window_pattern": 2}, std=0.5
    ),
    "olmo2/odd": Tiny({**ODD, "head_dim": None, "attention_bias": True}),
    "olmo3/four": Tiny({"num_hidden_layers": 4, "sliding_window": 6}),
    "starcoder2/narrow": Tiny({"sliding_window": 2, "num_key_value_heads": 1}),
    "gpt_bigcode/odd": Tiny({**GPT, "n_embd": 60, "n_head": 3, "n_inner": 50, "vocab_size": 301}),
    "gpt_bigcode/multi-head-odd": Tiny(
        {**GPT, "n_embd": 60, "n_head": 5, "multi_query": False, "scale_attn_weights": False}
    ),
    "bloom/five-heads": Tiny(
        {
            "n_layer": 2,
            "n_head": 5,
            "hidden_size": 40,
            "apply_residual_connection_post_layernorm": True,
        },
        std=1.0,
    ),
    "xglm/odd": Tiny(
        {
            "d_model": 60,
            "ffn_dim": 50,
            "num_layers": 3,
            "attention_heads": 3,
            "scale_embedding": False,
            "vocab_size": 299,
        },
        std=0.5,
    ),
    "opt/narrow-embedding": Tiny(
        {
            "ffn_dim": 50,
            "word_embed_proj_dim": 24,
            "do_layer_norm_before": True,
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
        }
    ),
    "biogpt/odd": Tiny(
        {"hidden_size": 60, "num_attention_heads": 3, "vocab_size": 299, "scale_embedding": False},
        std=0.5,
    ),
    "ministral/narrow": Tiny(
        {
            "num_hidden_layers": 3,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "head_dim": 24,
        }
    ),
    "falcon_mamba/odd": Tiny({"state_size": 5, "conv_kernel": 3, "use_bias": True}, std=0.3),
    "gemma2/scale": Tiny(
        {
            **WINDOW,
            "query_pre_attn_scalar": 5,
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 20.0,
            "num_key_value_heads": 1,
        },
        std=0.5,
    ),
    "gemma3n_text/sparse": Tiny(
        {
            "num_hidden_layers": 4,
            "sliding_window": 5,
            "layer_types": MIXED * 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 300,
            "num_kv_shared_layers": 0,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.95, 0.3, 0.0, 0.0],
            "altup_num_inputs": 3,
            "altup_active_idx": 1,
            "altup_coef_clip": 1.0,
        },
        std=0.5,
    ),
    "gemma4_text/narrow": Tiny(
        {
            **NARROW,
            "layer_types": MIXED,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 299,
            "vocab_size": 299,
            "global_head_dim": 24,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
        },
        std=0.5,
    ),
    "gemma4_text/double-mlp": Tiny(
        {
            "num_hidden_layers": 4,
            "sliding_window": 12,
            "layer_types": MIXED * 2,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 300,
        },
        std=0.5,
    ),
    "exaone4/pattern": Tiny(
        {"num_hidden_layers": 4, "sliding_window": 3, "sliding_window_pattern": 2}
    ),
    "cohere/scale": Tiny(
        {"logit_scale": 0.5, "attention_bias": True, "num_key_value_heads": 1}, std=0.5
    ),
    "cohere2/pattern": Tiny(
        {
            "num_hidden_layers": 4,
            "sliding_window": 6,
            "sliding_window_pattern": 4,
            "attention_bias": True,
        },
        std=0.5,
    ),
    "ernie4_5/odd": Tiny({**ODD, "use_bias": True, "tie_word_embeddings": False}),
    "bitnet/odd": Tiny(
        {
            "vocab_size": 299,
            "hidden_size": 60,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "head_dim": 20,
        }
    ),
    "seed_oss/bias": Tiny(
        {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True, "head_dim": 24}
    ),
    "diffllama/odd": Tiny(
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "attention_bias": True,
            "head_dim": 24,
            "lambda_std_dev": 0.3,
        }
    ),
    "mimo_v2_flash/narrow": Tiny(
        {
            **ROUTED,
            **NARROW,
            "layer_types": MIXED,
            "head_dim": 24,
            "v_head_dim": 16,
            "mlp_layer_types": ["dense", "sparse"],
        }
    ),
    "exaone4/all-global": Tiny(
        {"sliding_window": None, "sliding_window_pattern": 0, "layer_types": FULL}
    ),
    "granite/one-window": Tiny(
        {
            "attention_multiplier": 0.3,
            "logits_scaling": 8.0,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        }
    ),
    "olmo/bias": Tiny({"attention_bias": True, "clip_qkv": 1.0, "tie_word_embeddings": True}),
    "starcoder2/untied": Tiny({"tie_word_embeddings": False, "use_bias": False}),
    "gpt2/wide": Tiny({"n_embd": 60, "n_layer": 1, "n_head": 3, "n_positions": 90, "n_inner": 70}),
    "falcon/parallel": Tiny({"multi_query": False, "parallel_attn": False, "bias": True}),
    "bloom/three-heads": Tiny({"n_layer": 2, "n_head": 3, "hidden_size": 48}, std=1.0),
}
"""Decoders whose layers are attention and one feed-forward network."""

VARIANTS = ATTENTION | MIXED_LAYERS
"""Unusual configurations of decoders: the engines of each choose ``generate``'s tokens."""

BY_FORWARD: dict[str, Tiny] = {
    # windows of one position
    "mistral/one": Tiny({"sliding_window": 1}),
    "gemma3_text/one": Tiny({"sliding_window": 1, "layer_types": MIXED}, std=0.5),
    "gpt_oss/one": Tiny({**LOCAL, "sliding_window": 1, "layer_types": MIXED}),
    # no layer of attention
    "lfm2/convolutions": Tiny({"layer_types": ["conv", "conv"]}),
    "granitemoehybrid/mamba": Tiny(
        {**MAMBA_HEADS, **LOCAL, "layer_types": ["mamba", "mamba"], "shared_intermediate_size": 32}
    ),
}
"""Configurations whose reference is the model's own forward over all tokens, without a cache.

In a window of one position a token sees itself only. The cache of transformers keeps
``[-sliding_window + 1 :]``, which is everything for such a window, so that ``generate`` chooses
other tokens. Without a layer of attention it fails: it asks one for the length of the sequence.
"""

REFUSED: dict[str, tuple[Tiny, str]] = {
    "mistral/no-window": (Tiny({"sliding_window": 0}), "neither causal nor a sliding window"),
    "gemma3_text/two-way": (
        Tiny({**WINDOW, "use_bidirectional_attention": True}, std=0.5),
        "neither causal nor a sliding window",
    ),
}
"""Configurations that cannot be decoded token by token, and a part of the reason."""
