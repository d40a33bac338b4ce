"""Captured models for the tests of lowering, and the shapes that they are built for."""

from collections.abc import Callable
from functools import cache

import torch
import transformers
from inplace.schema.specs import Role
from inplace.trt import TensorRT
from inplace_builder import Capture, DecoderOptions, capture_decoder
from inplace_builder.capture.decoder import SAMPLING_INPUTS, decoder_input
from inplace_builder.fusion.fuse import without_sampling
from inplace_builder.lower import LoweredNetwork, lower, lowerable
from inplace_builder.lower.compile import Range
from torch import Tensor, manual_seed

CAPACITY, ROWS, CHUNK, VOCABULARY = 32, 4, 8, 64
_SMALL = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
_LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
_GROUPED = {**_SMALL, **_LLAMA, "num_key_value_heads": 2}
_GEMMA = {
    **_GROUPED,
    "head_dim": 8,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 8,
}
_LATENT = {
    "num_key_value_heads": 4,
    "head_dim": None,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 2,
}

DECODERS: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_GROUPED)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_GROUPED)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**_GROUPED, head_dim=16)
    ),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**_GEMMA)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**_GEMMA)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            initializer_range=0.3,
        )
    ),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**_SMALL, **_LLAMA)
    ),
    "phi": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**_SMALL, **_LLAMA)),
    # rotary embeddings of complex numbers
    "deepseek_v2": lambda: transformers.DeepseekV2ForCausalLM(
        transformers.DeepseekV2Config(**_SMALL, **_LLAMA, **_LATENT)
    ),
}


@cache
def captured(name: str, rows: int = ROWS) -> Capture:
    """A random decoder of this family, captured for batches of ``rows`` rows.

    Tests share it, so none may change it.
    """
    manual_seed(0)
    return capture_decoder(DECODERS[name]().eval(), DecoderOptions(CAPACITY, rows, CHUNK))


def greedy_rows(count: int, num_scores: int = VOCABULARY) -> dict[str, Tensor]:
    """The sampling inputs of greedy rows of so many scores."""
    return {
        spec.name: torch.zeros((count, *spec.shape), dtype=spec.dtype.as_torch)
        for spec in (decoder_input(role, num_scores) for role in SAMPLING_INPUTS)
    }


def lowered(capture: Capture, kind: str, tensorrt: TensorRT) -> LoweredNetwork:
    """The network of a capture, with every state of one kind."""
    # these kinds have no kernel that samples
    greedy, program = without_sampling(lowerable(capture.exported), capture.program)
    return lower(
        greedy,
        outputs=[spec.name for spec in program.outputs],
        states=capture.states,
        kinds={state.name: kind for state in capture.states},
        tensorrt=tensorrt,
    )


def decoder_profiles(capture: Capture) -> list[dict[str, Range]]:
    """A profile of decode steps of 1 to all rows, and one of prefill steps of one row."""
    rows, chunk = capture.program.max_rows, capture.program.chunk
    return [
        _profile(capture, (1, 2, rows), (1, 2, rows)),
        _profile(capture, (1, 1, 1), (1, chunk, chunk)),
    ]


def _profile(
    capture: Capture, rows: tuple[int, int, int], tokens: tuple[int, int, int]
) -> dict[str, Range]:
    def shape(role: Role, own: tuple[int, ...], index: int) -> tuple[int, ...]:
        match role:
            case Role.TOKENS:
                return (tokens[index], *own[1:])
            case Role.POSITIONS:
                return (tokens[index],)
            case Role.ROW_OFFSETS:
                return (rows[index] + 1,)
            case _:
                return (rows[index], *own)

    inputs = {
        spec.name: (spec.role, spec.shape)
        for spec in without_sampling(capture.exported, capture.program)[1].inputs
    }
    inputs |= {state.name: (Role.ROW, state.shape) for state in capture.states}
    return {
        name: (shape(role, own, 0), shape(role, own, 1), shape(role, own, 2))
        for name, (role, own) in inputs.items()
    }
