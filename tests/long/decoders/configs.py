"""Tiny configurations of every causal language model of transformers, written before any result.

`CONFIGS` has an entry for each model type of ``MODEL_FOR_CAUSAL_LM_MAPPING_NAMES`` of transformers
5.17 whose stock ``generate`` runs with tiny random weights; `WITHOUT_GENERATE` names the rest and
why. A name after a slash is a variant of the same architecture that published checkpoints use.
Windows are 12 positions: all prompts of the survey go past them.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

BASE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "init_std": 0.3,
    "head_dim": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""Given to every configuration that declares the field, under this or another name."""


@dataclass(frozen=True)
class Tiny:
    """A configuration.

    Attributes:
        fields: what it has beside `BASE`; None leaves a field of `BASE` out.
        std: the standard deviation of all matrices; None leaves the model's own initialization.
        embedding_std: that of embeddings, if ``std`` is given; small, so that a model with tied
            embeddings does not only repeat its last token.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    std: float | None = None
    embedding_std: float = 0.03


FULL = ["full_attention"] * 2
MIXED = ["sliding_attention", "full_attention"]
SLIDING = ["sliding_attention"] * 2
WINDOW = {"sliding_window": 12, "layer_types": MIXED}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "num_key_value_heads": 4,
    "head_dim": None,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
# With few heads some positions have the score 0 for all of them. Of equal scores torch selects
# others where more tokens are fed together, so ``generate`` itself depends on how it is fed.
INDEXED = LATENT | {"head_dim": 8, "index_topk": 8, "index_head_dim": 16, "index_n_heads": 16}
DENSE = INDEXED | {"index_topk": 256}
"""Of a sparse model, whose indexer selects all positions of a sequence."""
DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MAMBA_HEADS = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_chunk_size": 8,
}
ENCODER = {"is_decoder": True}
"""Of an encoder, as a causal language model."""
BART = {
    "is_decoder": True,
    "is_encoder_decoder": False,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "forced_eos_token_id": None,
    "decoder_start_token_id": 1,
}
"""The decoder of an encoder-decoder, alone."""
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}


def rope(kind: str, **fields: Any) -> dict[str, Any]:
    """The parameters of a scaled rotary embedding."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **fields}}


LLAMA3 = rope(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=64)
DYNAMIC = rope("dynamic", factor=2.0)
LONG = rope("longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8) | {
    "original_max_position_embeddings": 128
}

CONFIGS: dict[str, Tiny] = {
    # grouped-query attention with a rotary embedding, and what differs little from it
    "llama": Tiny(),
    "llama/llama3-rope": Tiny(LLAMA3),
    "llama/linear-rope": Tiny(rope("linear", factor=4.0)),
    "llama/dynamic-rope": Tiny(DYNAMIC),
    "llama/yarn": Tiny(YARN),
    "llama/bias": Tiny({"attention_bias": True, "mlp_bias": True}),
    "llama/tied": Tiny({"tie_word_embeddings": True}),
    "llama/multi-query": Tiny({"num_key_value_heads": 1}),
    "mistral": Tiny({"sliding_window": None}),
    "mistral/window": Tiny({"sliding_window": 12}),
    "qwen2": Tiny(),
    "qwen2/window": Tiny({"use_sliding_window": True, **WINDOW}),
    "qwen2/yarn": Tiny(YARN),
    "qwen3": Tiny(),
    "qwen3/window": Tiny({"use_sliding_window": True, **WINDOW}),
    "gemma": Tiny(),
    "gemma2": Tiny({**WINDOW, "query_pre_attn_scalar": 16}, std=0.5),
    "gemma3_text": Tiny({**WINDOW, "query_pre_attn_scalar": 16}, std=0.5),
    "gemma3": Tiny(
        {
            "text_config": {**BASE, **WINDOW, "query_pre_attn_scalar": 16},
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "image_token_index": 299,
            "boi_token_index": 298,
            "eoi_token_index": 297,
            "mm_tokens_per_image": 4,
        },
        std=0.5,
        embedding_std=0.01,
    ),
    "vaultgemma": Tiny({**WINDOW, "query_pre_attn_scalar": 16}),
    "phi": Tiny({"partial_rotary_factor": 0.5}),
    "phi3": Tiny({"original_max_position_embeddings": 256}),
    "phi3/longrope": Tiny(LONG),
    "phi3/window": Tiny({"original_max_position_embeddings": 256, "sliding_window": 12}),
    "phi4_multimodal": Tiny(
        {
            "original_max_position_embeddings": 256,
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "audio_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_blocks": 1,
                "num_attention_heads": 2,
                "ext_pw_out_channel": 32,
                "nemo_conv_channels": 32,
            },
        }
    ),
    "apertus": Tiny(),
    "arcee": Tiny(),
    "bitnet": Tiny(),
    "cohere": Tiny(),
    "cohere/qk-norm": Tiny({"use_qk_norm": True}),
    "cohere2": Tiny(WINDOW, std=0.5),
    "cohere_compass_text": Tiny(
        {
            **WINDOW,
            "rope_parameters": {
                "sliding_attention": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [4, 2, 2],
                },
                "full_attention": None,
            },
        }
    ),
    "cwm": Tiny(WINDOW),
    "diffllama": Tiny(),
    "doge": Tiny({"keep_window_size": 512}),
    "emu3": Tiny({"text_config": BASE, "vq_config": {"base_channels": 32, "embed_dim": 4}}),
    "ernie4_5": Tiny(),
    "exaone4": Tiny({**WINDOW, "sliding_window_pattern": "LG"}),
    "fuyu": Tiny({"text_config": {"model_type": "persimmon", **BASE}}),
    "glm": Tiny({"partial_rotary_factor": 0.5}),
    "glm4": Tiny({"partial_rotary_factor": 0.5}),
    "got_ocr2": Tiny({"text_config": {"model_type": "qwen2", **BASE}, "image_token_index": 299}),
    "granite": Tiny({"attention_multiplier": 0.25, "residual_multiplier": 0.22}),
    "granite_swa": Tiny({**WINDOW, "attention_multiplier": 0.25}),
    "helium": Tiny(),
    # its stacks run several times: with larger weights float32 and float64 differ by 2 %
    "hrm_text": Tiny(std=0.1, embedding_std=0.1),
    "hunyuan_v1_dense": Tiny(),
    "hunyuan_v1_dense/dynamic-rope": Tiny(
        rope("dynamic", factor=1.0, alpha=1000.0, beta_fast=32, beta_slow=1)
    ),
    "hyperclovax": Tiny(),
    "jais2": Tiny(),
    "ministral": Tiny(WINDOW),
    "ministral3": Tiny(
        rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=64,
            llama_4_scaling_beta=0.1,
            beta_fast=32.0,
            beta_slow=1.0,
            mscale=1.0,
            mscale_all_dim=1.0,
        )
    ),
    "mllama": Tiny({"text_config": {**BASE, "cross_attention_layers": []}}),
    "nanochat": Tiny(),
    "nemotron": Tiny({"partial_rotary_factor": 0.5}),
    "olmo": Tiny(),
    "olmo/clip": Tiny({"clip_qkv": 8.0}),
    "olmo2": Tiny(),
    "olmo3": Tiny(WINDOW),
    "persimmon": Tiny({"partial_rotary_factor": 0.5}),
    "seed_oss": Tiny(),
    "smollm3": Tiny({"no_rope_layers": [1, 0], "use_sliding_window": False}),
    "stablelm": Tiny({"partial_rotary_factor": 0.25}),
    "stablelm/parallel": Tiny(
        {"partial_rotary_factor": 0.25, "use_parallel_residual": True, "qk_layernorm": True}
    ),
    "starcoder2": Tiny(),
    "starcoder2/window": Tiny({"sliding_window": 12}),
    "modernbert-decoder": Tiny({**WINDOW, "local_attention": 12}),
    # learned or absolute positions
    "gpt2": Tiny(GPT),
    "gpt2/scaled": Tiny({**GPT, "scale_attn_by_inverse_layer_idx": True}),
    "gpt-sw3": Tiny(GPT),
    "gpt_bigcode": Tiny(GPT),
    "gpt_bigcode/multi-head": Tiny({**GPT, "multi_query": False}),
    "gpt_neo": Tiny(
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
        | {"window_size": 12}
    ),
    "gpt_neox": Tiny(),
    "gpt_neox/serial": Tiny({"use_parallel_residual": False}),
    "gpt_neox_japanese": Tiny(),
    "gptj": Tiny({**GPT, "rotary_dim": 8}, std=0.3),
    "codegen": Tiny({**GPT, "rotary_dim": 8}, std=0.3),
    "openai-gpt": Tiny(GPT, std=1.0, embedding_std=0.1),
    "opt": Tiny({"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "opt/post-norm": Tiny(
        {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False}
    ),
    "biogpt": Tiny(std=0.5),
    "ctrl": Tiny({**GPT, "dff": 96}, std=0.5),
    "xglm": Tiny({"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4}, std=0.5),
    "cpmant": Tiny(
        {"dim_head": 16, "dim_ff": 96, "prompt_length": 4, "prompt_types": 4, "segment_types": 4}
        | {"position_bias_num_buckets": 32, "position_bias_max_distance": 128, "init_std": 0.3}
    ),
    # attention with slopes
    "bloom": Tiny({"n_layer": 2, "n_head": 4}, std=1.0),
    "mpt": Tiny({"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256}, std=0.3),
    "falcon": Tiny({"num_kv_heads": 1}),
    "falcon/alibi": Tiny({"alibi": True}, std=1.0),
    "falcon/grouped": Tiny({"new_decoder_architecture": True, "num_kv_heads": 2}),
    # encoders as decoders
    "bert": Tiny(ENCODER, std=0.5),
    "bert-generation": Tiny(ENCODER),
    "big_bird": Tiny({**ENCODER, "attention_type": "original_full"}),
    "camembert": Tiny(ENCODER),
    "data2vec-text": Tiny(ENCODER),
    "electra": Tiny({**ENCODER, "embedding_size": 32}),
    "ernie": Tiny(ENCODER, std=0.5),
    "megatron-bert": Tiny(ENCODER),
    "rembert": Tiny({**ENCODER, "input_embedding_size": 32, "output_embedding_size": 48}),
    "roberta": Tiny(ENCODER),
    "roberta-prelayernorm": Tiny(ENCODER),
    "roc_bert": Tiny(
        {
            **ENCODER,
            "pronunciation_embed_dim": 16,
            "pronunciation_vocab_size": 300,
            "shape_embed_dim": 16,
            "shape_vocab_size": 300,
        }
    ),
    "roformer": Tiny({**ENCODER, "embedding_size": 64}),
    "xlm-roberta": Tiny(ENCODER),
    "xlm-roberta-xl": Tiny(ENCODER),
    "xmod": Tiny({**ENCODER, "default_language": "en_XX"}, std=0.3),
    "xlnet": Tiny(
        {"max_position_embeddings": None, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 96},
        std=1.0,
    ),
    "reformer": Tiny(
        {
            "is_decoder": True,
            "attention_head_size": 16,
            "attn_layers": ["local", "local"],
            "axial_pos_embds": False,
            "feed_forward_size": 96,
            "local_attn_chunk_length": 16,
        }
    ),
    # decoders of encoder-decoders
    "bart": Tiny(BART),
    "bigbird_pegasus": Tiny({**BART, "attention_type": "original_full"}),
    "blenderbot": Tiny(BART),
    "blenderbot-small": Tiny(BART),
    "marian": Tiny(BART, std=1.0),
    "mbart": Tiny(BART),
    "mvp": Tiny(BART),
    "pegasus": Tiny(BART, std=1.0),
    "plbart": Tiny(BART),
    "prophetnet": Tiny(
        {
            "is_decoder": True,
            "is_encoder_decoder": False,
            "add_cross_attention": False,
            "num_decoder_layers": 2,
            "num_decoder_attention_heads": 4,
            "decoder_ffn_dim": 96,
            "num_encoder_layers": 2,
            "num_encoder_attention_heads": 4,
            "encoder_ffn_dim": 96,
            "num_hidden_layers": None,
            "num_attention_heads": None,
        }
    ),
    "trocr": Tiny(
        {"d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 96}
        | {"is_decoder": True}
    ),
    "whisper": Tiny(
        {
            **BART,
            "max_target_positions": 256,
            "max_source_positions": 32,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        }
    ),
    "moshi": Tiny({"vocab_size": 300, "sliding_window": 12, "ffn_dim": 96}),
    "git": Tiny(
        std=0.5,
        fields={
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            }
        },
    ),
    # mixtures of experts
    "afmoe": Tiny({**EXPERTS, **WINDOW, "num_shared_experts": 1, "num_dense_layers": 1}),
    "aria_text": Tiny({"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}),
    "cohere2_moe": Tiny(
        {**WINDOW, "num_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 1}
    ),
    "dbrx": Tiny(
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 256,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {
                "hidden_size": 64,
                "ffn_hidden_size": 96,
                "moe_num_experts": 4,
                "moe_top_k": 2,
            },
        }
    ),
    "dots1": Tiny({**ROUTED, "first_k_dense_replace": 1, "layer_types": FULL}),
    "ernie4_5_moe": Tiny(
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1}
    ),
    "exaone_moe": Tiny({**EXPERTS, **WINDOW, "num_shared_experts": 1}),
    "flex_olmo": Tiny({"num_experts": 4, "num_experts_per_tok": 2}),
    "glm4_moe": Tiny({**ROUTED, "first_k_dense_replace": 1, "partial_rotary_factor": 0.5}),
    "gpt_oss": Tiny({**LOCAL, **WINDOW}),
    "granitemoe": Tiny({**LOCAL, "attention_multiplier": 0.25}),
    "granitemoe_swa": Tiny({**LOCAL, **WINDOW, "attention_multiplier": 0.25}),
    "granitemoeshared": Tiny({**LOCAL, "shared_intermediate_size": 32}),
    "hunyuan_v1_moe": Tiny({"num_experts": 4, "moe_topk": 2}),
    "hy_v3": Tiny({**EXPERTS, "num_shared_experts": 1, "mlp_layer_types": ["dense", "sparse"]}),
    "jetmoe": Tiny({**LOCAL, "kv_channels": 16, "num_key_value_heads": 2}),
    "laguna": Tiny(
        {**EXPERTS, **WINDOW, "shared_expert_intermediate_size": 32}
        | {"mlp_layer_types": ["dense", "sparse"]}
    ),
    "llama4_text": Tiny(
        {
            "num_local_experts": 2,
            "intermediate_size_mlp": 96,
            "layer_types": FULL,
            "no_rope_layers": [1, 0],
            "attention_chunk_size": 256,
        }
    ),
    "llama4_text/chunked": Tiny(
        {
            "num_local_experts": 2,
            "intermediate_size_mlp": 96,
            "no_rope_layers": [1, 0],
            "attention_chunk_size": 16,
        }
    ),
    "llama4_text/long-chunk": Tiny(
        {
            "num_local_experts": 2,
            "intermediate_size_mlp": 96,
            "no_rope_layers": [1, 0],
            "attention_chunk_size": 256,
        }
    ),
    "mellum": Tiny({**EXPERTS, **WINDOW, "mlp_layer_types": ["dense", "sparse"]}),
    "minimax_m2": Tiny(LOCAL),
    "mixtral": Tiny({**LOCAL, "sliding_window": None}),
    "mixtral/window": Tiny({**LOCAL, "sliding_window": 12}),
    "olmoe": Tiny({"num_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": Tiny({"num_local_experts": 4, "sliding_window": None}),
    "phimoe/window": Tiny({"num_local_experts": 4, "sliding_window": 12}),
    "qwen2_moe": Tiny({**EXPERTS, "shared_expert_intermediate_size": 32, "layer_types": FULL}),
    "qwen3_moe": Tiny(EXPERTS),
    "solar_open": Tiny({**ROUTED, "partial_rotary_factor": 1.0}),
    # latent attention: keys and values of different sizes
    "axk1": Tiny({**LATENT, **ROUTED, "first_k_dense_replace": 1}),
    "deepseek_v2": Tiny({**LATENT, **ROUTED, "first_k_dense_replace": 1}),
    "deepseek_v2/lite": Tiny({**LATENT, **ROUTED, "q_lora_rank": None, "topk_method": "greedy"}),
    "deepseek_v3": Tiny({**LATENT, **ROUTED, "first_k_dense_replace": 1}),
    "deepseek_v3/wide-values": Tiny(
        {**LATENT, **ROUTED, "first_k_dense_replace": 1, "v_head_dim": 24}
    ),
    "glm4_moe_lite": Tiny({**LATENT, **ROUTED, "mlp_layer_types": ["dense", "sparse"]}),
    "longcat_flash": Tiny(
        {
            **LATENT,
            "head_dim": 8,
            "num_layers": 1,
            "ffn_hidden_size": 96,
            "expert_ffn_hidden_size": 32,
            "moe_topk": 2,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
        }
    ),
    "minicpm3": Tiny(LATENT, std=0.5),
    "youtu": Tiny(LATENT),
    "mimo_v2_flash": Tiny(
        {**ROUTED, **WINDOW, "head_dim": 24, "v_head_dim": 16}
        | {"mlp_layer_types": ["dense", "sparse"]}
    ),
    # sparse attention with an indexer
    "axk2": Tiny({**INDEXED, **ROUTED, "mlp_layer_types": ["dense", "sparse"]}),
    "axk2/dense": Tiny({**DENSE, **ROUTED, "mlp_layer_types": ["dense", "sparse"]}),
    "deepseek_v32": Tiny({**INDEXED, **ROUTED, "mlp_layer_types": ["dense", "sparse"]}),
    "deepseek_v32/dense": Tiny({**DENSE, **ROUTED, "mlp_layer_types": ["dense", "sparse"]}),
    "deepseek_v4": Tiny({**ROUTED, "q_lora_rank": 16, "o_groups": 2, "o_lora_rank": 16}),
    "glm_moe_dsa": Tiny({**INDEXED, **ROUTED, "mlp_layer_types": ["dense", "sparse"]}),
    "glm_moe_dsa/dense": Tiny({**DENSE, **ROUTED, "mlp_layer_types": ["dense", "sparse"]}),
    "hy_v4": Tiny({**INDEXED, **ROUTED, "mlp_layer_types": ["dense", "sparse"]}),
    "hy_v4/dense": Tiny({**DENSE, **ROUTED, "mlp_layer_types": ["dense", "sparse"]}),
    "minimax_m3_vl_text": Tiny(
        {
            **LOCAL,
            "dense_intermediate_size": 96,
            "shared_intermediate_size": 32,
            "rotary_dim": 8,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_block_size": 8,
            "index_topk_blocks": 2,
            "mlp_layer_types": ["dense", "sparse"],
        }
    ),
    "minimax_m3_vl_text/sparse": Tiny(
        {
            **LOCAL,
            "dense_intermediate_size": 96,
            "shared_intermediate_size": 32,
            "rotary_dim": 8,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_block_size": 8,
            "index_topk_blocks": 2,
            "layer_types": ["full_attention", "minimax_m3_sparse"],
            "mlp_layer_types": ["dense", "sparse"],
        }
    ),
    "minimax_m3_vl_text/dense": Tiny(
        {
            **LOCAL,
            "dense_intermediate_size": 96,
            "shared_intermediate_size": 32,
            "rotary_dim": 8,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_block_size": 8,
            "index_topk_blocks": 32,
            "layer_types": ["full_attention", "minimax_m3_sparse"],
            "mlp_layer_types": ["dense", "sparse"],
        }
    ),
    # heads of different sizes, shared keys and values, several streams
    "gemma3n_text": Tiny(
        {
            **WINDOW,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 300,
            "num_kv_shared_layers": 0,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0, 0.0],
            "altup_num_inputs": 2,
        },
        std=0.5,
    ),
    "gemma3n_text/shared": Tiny(
        {
            "num_hidden_layers": 4,
            "sliding_window": 12,
            "layer_types": MIXED * 2,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 300,
            "num_kv_shared_layers": 2,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
            "altup_num_inputs": 2,
        },
        std=0.5,
    ),
    "gemma4_text": Tiny(
        {**WINDOW, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 300}, std=0.5
    ),
    "gemma4_text/global-heads": Tiny(
        {
            **WINDOW,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 300,
        },
        std=0.5,
    ),
    "gemma4_text/shared": Tiny(
        {
            "num_hidden_layers": 4,
            "sliding_window": 12,
            "layer_types": MIXED * 2,
            "global_head_dim": 32,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 300,
        },
        std=0.5,
    ),
    "gemma4_text/moe": Tiny(
        {
            **WINDOW,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 300,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
        std=0.5,
    ),
    "gemma4_unified_text": Tiny(WINDOW, std=0.5),
    "inkling_text": Tiny(
        {
            **ROUTED,
            "layer_types": ["hybrid_sliding", "hybrid"],
            "sliding_window_size": 12,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 16,
            "d_rel": 4,
            "rel_extent": 16,
            "mlp_layer_types": ["dense", "sparse"],
        }
    ),
    # convolutions, state-space models, linear attention
    "bamba": Tiny({**MAMBA_HEADS, "attn_layer_indices": [1]}),
    "falcon_h1": Tiny({**MAMBA_HEADS, "mamba_d_ssm": 128}),
    "falcon_mamba": Tiny({"state_size": 8}, std=0.3),
    "granitemoehybrid": Tiny(
        {**MAMBA_HEADS, **LOCAL, "layer_types": ["mamba", "attention"]}
        | {"shared_intermediate_size": 32, "attention_multiplier": 0.25}
    ),
    "jamba": Tiny(
        {
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        }
    ),
    "kimi_linear": Tiny(
        {
            **LATENT,
            **LOCAL,
            "q_lora_rank": None,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse"],
            "linear_head_dim": 16,
            "linear_num_heads": 4,
        }
    ),
    "lfm2": Tiny({"layer_types": ["conv", "full_attention"], "block_multiple_of": 32}),
    "lfm2_moe": Tiny({**EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "mamba": Tiny({"state_size": 8}, std=0.3),
    "mamba2": Tiny(
        {"state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 8}, std=0.3
    ),
    "minimax": Tiny(
        {**LOCAL, "layer_types": ["linear_attention", "full_attention"], "block_size": 8}
    ),
    "nemotron_h": Tiny(
        {
            "layers_block_type": ["mamba", "attention", "mlp", "moe"],
            "num_hidden_layers": 4,
            "ssm_state_size": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 1,
            "chunk_size": 8,
            **ROUTED,
            "moe_shared_expert_intermediate_size": 32,
            "use_mamba_kernels": False,
        }
    ),
    "olmo_hybrid": Tiny(DELTA),
    "qwen3_5_text": Tiny(DELTA),
    "qwen3_5": Tiny({"text_config": {**BASE, **DELTA}}),
    "qwen3_5_moe_text": Tiny({**DELTA, **EXPERTS, "shared_expert_intermediate_size": 32}),
    "qwen3_next": Tiny({**DELTA, **EXPERTS, "shared_expert_intermediate_size": 32}),
    "qwen4_exp_text": Tiny(
        {
            **DELTA,
            **EXPERTS,
            "shared_expert_intermediate_size": 32,
            "hc_count": 2,
            "hc_lowrank": 16,
            "ngram_vocab_size_base": 64,
            "heads_per_ngram": 2,
            "split_ngram_parts": 1,
            "indexer_n_heads": 16,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        }
    ),
    "qwen4_exp_text/dense": Tiny(
        {
            **DELTA,
            **EXPERTS,
            "shared_expert_intermediate_size": 32,
            "hc_count": 2,
            "hc_lowrank": 16,
            "ngram_vocab_size_base": 64,
            "heads_per_ngram": 2,
            "split_ngram_parts": 1,
            "indexer_n_heads": 16,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 256,
            "indexer_compress_ratio": 2,
        }
    ),
    "recurrent_gemma": Tiny(
        {
            "num_hidden_layers": 3,
            "lru_width": 64,
            "attention_window_size": 12,
            "block_types": ["recurrent", "recurrent", "attention"],
        },
        std=0.5,
    ),
    "rwkv": Tiny({"attention_hidden_size": 64, "context_length": 256}, std=0.3),
    "xlstm": Tiny(
        {
            "num_heads": 4,
            "num_blocks": 2,
            "qk_dim_factor": 1.0,
            "chunk_size": 8,
            "ffn_round_up_to_multiple_of": 16,
        }
    ),
    "zamba": Tiny(
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
            "num_key_value_heads": 4,
        }
    ),
    "zamba2": Tiny(
        {
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "mamba_d_state": 16,
            "mamba_ngroups": 1,
            "n_mamba_heads": 8,
            "chunk_size": 8,
            "num_mem_blocks": 1,
            "use_mamba_kernels": False,
            "num_key_value_heads": 4,
        }
    ),
    "zaya": Tiny(
        {"num_experts": 4, "moe_intermediate_size": 32, "router_hidden_size": 16, "head_dim": 16},
        std=0.5,
    ),
}


WITHOUT_GENERATE: dict[str, str] = {
    "blt": "fails in transformers: its configuration has no num_hidden_layers",
    "gemma3n": "its vision model needs the package timm; its text is gemma3n_text",
    "gemma4": "its text is gemma4_text",
    "gemma4_assistant": "drafts for another model, whose keys and values it reads",
    "gemma4_unified": "its text is gemma4_unified_text",
    "gemma4_unified_assistant": "drafts for another model, whose keys and values it reads",
    "llama4": "its text is llama4_text",
    "musicgen": "takes audio codes of several codebooks",
    "musicgen_melody": "takes audio codes of several codebooks",
    "xlm": "appends a mask token at each step, and chooses one token only with random weights",
    "qwen3_5_moe": "its text is qwen3_5_moe_text",
    "qwen4_exp": "its text is qwen4_exp_text",
}
"""Model types whose stock ``generate`` cannot run alone on token ids, and why."""

FORWARD: dict[str, str] = {
    "git": "positions in decode count the cached tokens twice",
    "moshi": "its cache keeps the last keys and values only, its mask shows all",
    "nemotron_h": "time steps are clamped in prefill, not in decode",
    "zamba2": "time steps are clamped in prefill, not in decode",
}
"""Models whose stock ``generate`` differs from their own forward over all tokens, and how.

Their reference is greedy decoding by that forward, without a cache.
"""


def make_config(name: str, tiny: Tiny | None = None) -> PretrainedConfig:
    """The configuration of this name in `CONFIGS`, or another one of its model type."""
    tiny = tiny or CONFIGS[name]
    kind = name.partition("/")[0]
    config_class = transformers.CONFIG_MAPPING[kind]
    declared = {each.name for each in dataclasses.fields(config_class)}
    declared |= set(config_class.attribute_map)
    fields = {key: value for key, value in BASE.items() if key in declared} | tiny.fields
    return config_class(
        **{key: value for key, value in fields.items() if value is not None or key not in BASE}
    )


def make_model(name: str, tiny: Tiny | None = None) -> PreTrainedModel:
    """A random model of this name, the same at every call; of another configuration if given."""
    tiny = tiny or CONFIGS[name]
    torch.manual_seed(0)
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(make_config(name, tiny))
    if tiny.std is not None:
        embeddings = {
            id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
        }
        for parameter in model.parameters():
            if parameter.dim() > 1:
                small = id(parameter) in embeddings
                nn.init.normal_(parameter, std=tiny.embedding_std if small else tiny.std)
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            # Routers begin at zero: every expert is a tie, and devices break ties differently.
            nn.init.normal_(parameter, std=0.1)
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # the default one ignores it
    return model.eval()
