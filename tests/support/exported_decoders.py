"""Random decoders with static caches, exported as transformers exports them."""

import warnings
from collections.abc import Callable, Sequence

import torch
import transformers
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request
from inplace_builder.capture.checkpoint import quiet
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel
from transformers.integrations.executorch import (
    TorchExportableModuleForDecoderOnlyLM,
    convert_and_export_with_cache,
)

VOCABULARY, WINDOW = 64, 8
_SMALL = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
_LLAMA = {
    **_SMALL,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_GEMMA = {**_LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW}
_HYBRID = {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"]}

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_LLAMA)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_LLAMA, head_dim=16)),
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**_LLAMA, sliding_window=WINDOW)
    ),
    # its scores are capped, which SDPA cannot do: its attention is explicit
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**_HYBRID, attn_implementation="eager")
    ),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**_HYBRID)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=128,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=0,
        )
    ),
}
WINDOWED = {"mistral": 2, "gemma2": 1, "gemma3": 1}
"""Layers that attend in a window."""


def decoder(name: str) -> PreTrainedModel:
    """A random decoder of this family."""
    torch.manual_seed(0)
    return FAMILIES[name]().eval()


def exported(
    model: PreTrainedModel, *, dynamic: bool, capacity: int = 48, strict: bool = True
) -> ExportedProgram:
    """transformers' export of a model: steps of one token, or of a dynamic number of them."""
    with warnings.catch_warnings(), quiet(), torch.no_grad():
        warnings.simplefilter("ignore")
        model.generation_config.cache_implementation = "static"
        model.generation_config.cache_config = {
            "batch_size": 1,
            "max_cache_len": capacity,
            "device": "cpu",
        }
        if not dynamic:
            alone: ExportedProgram = convert_and_export_with_cache(model)
            return alone
        module = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=capacity)
        program: ExportedProgram = module.export(
            input_ids=torch.zeros(1, 4, dtype=torch.int64),
            cache_position=torch.arange(4),
            dynamic_shapes={"input_ids": {1: Dim.DYNAMIC}, "cache_position": {0: Dim.DYNAMIC}},
            strict=strict,
        )
    return program


def generate_as_rows(
    instance: ModelInstance, prompts: Sequence[Sequence[int]], tokens: int
) -> list[list[int]]:
    """Continue all prompts, stepped together as rows of different lengths; some join late."""
    generated: list[list[int]] = [[] for _ in prompts]
    step = 0
    while any(len(one) < tokens for one in generated):
        admitted = []
        for row, prompt in enumerate(prompts):
            if step < row % 2 or len(generated[row]) == tokens:
                continue
            ids = generated[row][-1:] or list(prompt)
            admitted.append(
                (
                    row,
                    instance.admit(
                        Request(
                            row + 1, not generated[row], False, {"input_ids": torch.tensor([ids])}
                        )
                    ),
                )
            )
        while pending := [active for _, active in admitted if not active.finished]:
            instance.step(pending[: instance.program.max_rows])
        for row, active in admitted:
            assert active.error is None, active.error
            generated[row].append(int(active.outputs["next_token"]))
            instance.finish(active)
        step += 1
    return generated


PROMPTS = [
    [5],
    [6, 7],
    [8, 9, 10],
    [11, 12, 13, 14],
    list(range(20, 31)),
    [1, 2, 3, 4, 5, 6],
    [40, 41],
    list(range(30, 47)),
]
"""Eight, some shorter than a window and a chunk, some longer."""
