"""Layers whose keys and values have sizes of their own, as the model hands them over."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from inplace_builder import BuildOptions, DecoderOptions, capture_decoder
from inplace_builder.served.build import write_engine
from support.decoding import SHAPE, generate_together, random_prompt
from support.long import long_except
from support.models import greedy, open_instance
from transformers import PreTrainedModel
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

CAPACITY, CHUNK, WINDOW = 64, 8, 12
OPTIONS = BuildOptions(slots=3, max_rows=3, capacity=CAPACITY, chunk=CHUNK)


def latent() -> PreTrainedModel:
    """Latent attention: latents of 16 elements and rotated parts of 4, shared by all heads."""
    sizes = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 10}
    fields = SHAPE | sizes | {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16}
    return transformers.MiniCPM3ForCausalLM(transformers.MiniCPM3Config(**fields))


def global_heads() -> PreTrainedModel:
    """Heads of 8 elements in a window, of 16 without one."""
    fields = SHAPE | {
        "head_dim": 8,
        "global_head_dim": 16,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "hidden_size_per_layer_input": 0,
        "tie_word_embeddings": False,
    }
    return transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**fields))


def shared() -> PreTrainedModel:
    """The last two of four layers attend to keys and values of the first two."""
    fields = SHAPE | {
        "num_hidden_layers": 4,
        "head_dim": 8,
        "global_head_dim": 16,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 0,
        "tie_word_embeddings": False,
    }
    return transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**fields))


def twice() -> PreTrainedModel:
    """Each of two layers attends twice: with the same keys, to each half of its values."""
    return transformers.DiffLlamaForCausalLM(transformers.DiffLlamaConfig(**SHAPE))


def repeated() -> PreTrainedModel:
    """Two stacks of one layer run twice in turn, and keep keys of each time."""
    fields = SHAPE | {"num_hidden_layers": 1, "H_cycles": 2, "L_cycles": 1, "head_dim": 8}
    return transformers.HrmTextForCausalLM(transformers.HrmTextConfig(**fields))


def of_text_alone() -> PreTrainedModel:
    """The second of three layers attends to images only, so text passes over it."""
    fields = SHAPE | {"num_hidden_layers": 3, "cross_attention_layers": [1]}
    return transformers.MllamaForCausalLM(MllamaTextConfig(**fields))


SIZES = {
    latent: {"key_states_0": (1, CAPACITY, 20), "key_states_1": (1, CAPACITY, 20)},
    global_heads: {
        "key_states_0": (2, WINDOW + CHUNK - 1, 8),
        "value_states_1": (2, CAPACITY, 16),
    },
    shared: {
        "key_states_0": (2, WINDOW + CHUNK - 1, 8),
        "key_states_1": (2, CAPACITY, 16),
    },
    repeated: {"key_states_3": (4, CAPACITY, 8)},
    of_text_alone: {"key_states_2": (2, CAPACITY, 8)},
    twice: {"key_states_3": (2, CAPACITY, 8), "value_states_3": (2, CAPACITY, 8)},
}


@pytest.mark.parametrize("make", long_except([latent, shared, repeated], SIZES))
@pytest.mark.filterwarnings("ignore")
def test_states_have_the_sizes_of_their_layer(
    tmp_path: Path, make: Callable[[], PreTrainedModel]
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    capture = capture_decoder(model, DecoderOptions(CAPACITY, 3, CHUNK))
    shapes = {state.name: state.shape for state in capture.states}
    assert SIZES[make].items() <= shapes.items()
    write_engine(capture, tmp_path / "model", OPTIONS)
    prompts = [random_prompt(1, 2 * WINDOW + 5), random_prompt(2, 3)]
    expected = [greedy(model, prompt, 24) for prompt in prompts]
    assert generate_together(open_instance(tmp_path / "model"), prompts, 24) == expected
