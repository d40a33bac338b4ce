"""Tiny decoders with random weights whose states are of convolutions and recurrences."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers

from support.decoding import SHAPE

DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
SCAN = {"state_size": 8, "num_hidden_layers": 1}
MODELS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "lfm2": ("Lfm2Config", SHAPE | {"layer_types": ["conv", "full_attention"]}),
    "mamba2": (
        "Mamba2Config",
        SCAN
        | {
            "vocab_size": 128,
            "hidden_size": 32,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 2,
            "initializer_range": 0.3,
        },
    ),
    "mamba": (
        "MambaConfig",
        SCAN | {"vocab_size": 128, "hidden_size": 32, "initializer_range": 0.3},
    ),
    "olmo_hybrid": ("OlmoHybridConfig", SHAPE | DELTA),
}


def recurrent_model(name: str) -> transformers.PreTrainedModel:
    """A model of `MODELS`."""
    torch.manual_seed(0)
    config, fields = MODELS[name]
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**fields))
    return model.eval()
