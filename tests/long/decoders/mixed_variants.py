"""Unusual configurations of decoders with experts, latent attention or states of fixed size.

See `decoders.variants`.
"""

from typing import Any

from decoders.configs import (
    EXPERTS,
    LATENT,
    LOCAL,
    MAMBA_HEADS,
    MIXED,
    ROUTED,
    SLIDING,
    WINDOW,
    Tiny,
    rope,
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


MIXED_LAYERS: dict[str, Tiny] = {
    # experts
    "gpt_oss/narrow": Tiny({**LOCAL, **NARROW}),
    "mixtral/top-three": Tiny(
        {"num_local_experts": 5, "num_experts_per_tok": 3, "intermediate_size": 48, "head_dim": 24}
    ),
    "qwen2_moe/mixed": Tiny(
        {
            **EXPERTS,
            "num_hidden_layers": 3,
            "shared_expert_intermediate_size": 40,
            "mlp_only_layers": [1],
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
        }
    ),
    "qwen3_moe/sparse-step": Tiny(
        {
            **EXPERTS,
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "norm_topk_prob": True,
            "attention_bias": True,
        }
    ),
    "qwen3_moe/window": Tiny(
        {**EXPERTS, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}
    ),
    "llama4_text/odd": Tiny(
        {
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "intermediate_size_mlp": 70,
            "no_rope_layers": [1, 0, 1],
            "num_hidden_layers": 3,
            "attention_chunk_size": 10,
            "interleave_moe_layer_step": 2,
            "attn_temperature_tuning": True,
            "floor_scale": 4,
            "attn_scale": 0.5,
            "use_qk_norm": True,
        }
    ),
    "glm4_moe/norm": Tiny(
        {
            **ROUTED,
            "first_k_dense_replace": 0,
            "use_qk_norm": True,
            "attention_bias": True,
            "partial_rotary_factor": 0.25,
        }
    ),
    "dots1/window": Tiny(
        {
            **ROUTED,
            "first_k_dense_replace": 1,
            "sliding_window": 6,
            "layer_types": MIXED,
            "attention_bias": True,
        }
    ),
    "hunyuan_v1_moe/shared": Tiny({"num_experts": 4, "moe_topk": 1, "attention_bias": True}),
    "olmoe/bias": Tiny(
        {**EXPERTS, "num_experts_per_tok": 1, "attention_bias": True, "num_key_value_heads": 1}
    ),
    "phimoe/bias": Tiny(
        {
            "num_local_experts": 3,
            "sliding_window": 5,
            "attention_bias": True,
            "lm_head_bias": True,
            "router_jitter_noise": 0.0,
        }
    ),
    "gpt_oss/odd-heads": Tiny(
        {
            **LOCAL,
            **WINDOW,
            "vocab_size": 299,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 24,
            "intermediate_size": 40,
        }
    ),
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
    # latent attention
    "deepseek_v3/no-query-rank": Tiny(
        {**LATENT, **ROUTED, "q_lora_rank": None, "first_k_dense_replace": 1}
    ),
    "deepseek_v3/dense-yarn": Tiny(
        {
            **LATENT,
            **ROUTED,
            "first_k_dense_replace": 2,
            **rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=64,
                mscale=1.0,
                mscale_all_dim=1.0,
            ),
        }
    ),
    "deepseek_v2/groups": Tiny(
        {
            **LATENT,
            **ROUTED,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 2.0,
            "first_k_dense_replace": 1,
            "n_shared_experts": 2,
            "norm_topk_prob": True,
        }
    ),
    "deepseek_v2/yarn": Tiny(
        {
            **LATENT,
            **ROUTED,
            "q_lora_rank": None,
            "first_k_dense_replace": 0,
            **rope(
                "yarn",
                factor=8.0,
                original_max_position_embeddings=32,
                mscale=0.7,
                mscale_all_dim=0.7,
            ),
        }
    ),
    # states of fixed size
    "mamba2/one-group-odd": Tiny(
        {
            "hidden_size": 60,
            "expand": 2,
            "state_size": 20,
            "num_heads": 6,
            "head_dim": 20,
            "n_groups": 3,
            "chunk_size": 7,
            "conv_kernel": 5,
            "use_conv_bias": False,
            "rms_norm": True,
            "norm_before_gate": True,
            "time_step_limit": (0.0, float("inf")),
        },
        std=0.3,
    ),
    "mamba/odd": Tiny(
        {
            "state_size": 5,
            "expand": 3,
            "conv_kernel": 6,
            "time_step_rank": 3,
            "use_bias": True,
            "use_conv_bias": False,
        },
        std=0.3,
    ),
    "falcon_h1/multipliers": Tiny(
        {
            **MAMBA_HEADS,
            "mamba_d_ssm": 128,
            "attention_in_multiplier": 0.8,
            "attention_out_multiplier": 1.3,
            "ssm_in_multiplier": 1.2,
            "ssm_out_multiplier": 0.7,
            "embedding_multiplier": 2.0,
            "lm_head_multiplier": 0.5,
            "key_multiplier": 0.4,
            "mlp_multipliers": [0.7, 1.4],
            "ssm_multipliers": [0.5, 0.6, 1.5, 1.2, 0.9],
        }
    ),
    "falcon_h1/rms-norm": Tiny(
        {
            **MAMBA_HEADS,
            "mamba_d_ssm": 128,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
            "mamba_n_groups": 2,
            "projectors_bias": True,
            "mamba_proj_bias": True,
            "attention_bias": True,
        }
    ),
    "bamba/two": Tiny(
        {
            **MAMBA_HEADS,
            "mamba_n_groups": 2,
            "num_hidden_layers": 3,
            "attn_layer_indices": [0, 2],
            "partial_rotary_factor": 1.0,
            "mamba_conv_bias": False,
            "mamba_proj_bias": True,
            "tie_word_embeddings": True,
        }
    ),
    "lfm2/four": Tiny(
        {
            "num_hidden_layers": 4,
            "layer_types": ["full_attention", "conv", "conv", "full_attention"],
            "block_multiple_of": 8,
            "conv_L_cache": 4,
            "conv_bias": True,
            "num_key_value_heads": 1,
        }
    ),
    "qwen3_next/interval": Tiny(
        {
            **EXPERTS,
            "num_hidden_layers": 3,
            "full_attention_interval": 3,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 12,
            "linear_conv_kernel_dim": 3,
            "shared_expert_intermediate_size": 32,
            "mlp_only_layers": [0],
            "partial_rotary_factor": 0.5,
            "norm_topk_prob": False,
        }
    ),
    "qwen3_5_text/heads": Tiny(
        {
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "linear_attention", "linear_attention"],
            "linear_num_value_heads": 6,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 12,
            "linear_value_head_dim": 8,
        }
    ),
    "recurrent_gemma/odd": Tiny(
        {
            "num_hidden_layers": 4,
            "lru_width": 60,
            "hidden_size": 60,
            "num_attention_heads": 3,
            "head_dim": 20,
            "attention_window_size": 5,
            "block_types": ["attention", "recurrent"],
            "conv1d_width": 3,
            "num_key_value_heads": 1,
        },
        std=0.5,
    ),
    "jamba/periods": Tiny(
        {
            "num_hidden_layers": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_period": 3,
            "attn_layer_offset": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 6,
            "mamba_d_conv": 3,
            "mamba_expand": 3,
            "mamba_dt_rank": 5,
            "mamba_conv_bias": False,
            "mamba_proj_bias": True,
            "use_mamba_kernels": False,
        }
    ),
    "granitemoehybrid/dense": Tiny(
        {
            **MAMBA_HEADS,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "layer_types": ["mamba", "attention"],
            "shared_intermediate_size": 32,
            "position_embedding_type": "rope",
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
            "attention_multiplier": 0.3,
        }
    ),
    "nemotron_h/groups": Tiny(
        {
            "layers_block_type": ["mamba", "moe", "attention", "mamba", "mlp"],
            "num_hidden_layers": 5,
            "ssm_state_size": 12,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 4,
            "chunk_size": 5,
            **ROUTED,
            "moe_shared_expert_intermediate_size": 32,
            "use_mamba_kernels": False,
            "use_bias": True,
            "mlp_bias": True,
        }
    ),
    "minimax/odd": Tiny(
        {
            **LOCAL,
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "linear_attention", "linear_attention"],
            "block_size": 5,
            "head_dim": 24,
            "linear_attn_alpha_factor": 0.8,
            "linear_attn_beta_factor": 1.2,
        }
    ),
    "olmo_hybrid/three": Tiny(
        {
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 4,
            "linear_key_head_dim": 12,
            "linear_value_head_dim": 24,
        }
    ),
    "mamba2/groups": Tiny(
        {"state_size": 12, "num_heads": 8, "head_dim": 16, "n_groups": 4, "chunk_size": 5}
        | {"conv_kernel": 3, "use_bias": True},
        std=0.3,
    ),
}
"""Decoders whose layers are not only attention and one feed-forward network."""
