"""Small random decoders, and greedy decoding on an engine without a server."""

from collections.abc import Mapping, Sequence

import torch
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request
from torch import Tensor
from transformers import PreTrainedModel

SHAPE: dict[str, object] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""The size of a random decoder: fields of its transformers configuration."""


def random_prompt(seed: int, tokens: int) -> list[int]:
    """Token ids of a vocabulary of at least 128."""
    return torch.randint(3, 128, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def generate(model: PreTrainedModel, prompt: list[int], tokens: int) -> list[int]:
    """transformers' own greedy continuation; it never stops early."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    result: list[int] = out[0, len(prompt) :].tolist()
    return result


def generate_together(
    instance: ModelInstance, prompts: Sequence[list[int]], tokens: int
) -> list[list[int]]:
    """Greedy decoding of all prompts at once: some decode while others are still prefilled."""
    rows = decode_together(instance, prompts, tokens, outputs=("next_token",))
    return [[int(outputs["next_token"]) for outputs in row] for row in rows]


def decode_together(
    instance: ModelInstance, prompts: Sequence[list[int]], tokens: int, outputs: Sequence[str]
) -> list[list[Mapping[str, Tensor]]]:
    """The named outputs of each step of `generate_together`, one of them ``next_token``."""
    generated: list[list[Mapping[str, Tensor]]] = [[] for _ in prompts]

    def request(index: int) -> Request:
        previous = generated[index]
        ids = [int(previous[-1]["next_token"])] if previous else prompts[index]
        return Request(
            index + 1,
            start=not previous,
            end=False,
            inputs={"input_ids": torch.tensor([ids])},
            requested_outputs=frozenset(outputs),
        )

    admitted = {index: instance.admit(request(index)) for index in range(len(prompts))}
    while admitted:
        instance.step(list(admitted.values()))
        for index, active in list(admitted.items()):
            if not active.finished:
                continue
            instance.finish(active)
            generated[index].append({name: active.outputs[name].clone() for name in outputs})
            del admitted[index]
            if len(generated[index]) < tokens:
                admitted[index] = instance.admit(request(index))
    return generated
