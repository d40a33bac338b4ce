"""A Hugging Face decoder as transformers exports it, stepped for eight conversations at a time.

transformers exports it for one sequence, a static cache, and one token a step. The built engine
steps several sequences of different lengths, with chunks of tokens.
"""

import tempfile
import warnings
from pathlib import Path

import inplace
import inplace_builder as ib
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.executorch import convert_and_export_with_cache

ROWS, CAPACITY, CHUNK, TOKENS = 8, 64, 16, 12


def small_llama() -> LlamaForCausalLM:
    """A Llama of two layers with random weights."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def export(model: LlamaForCausalLM) -> torch.export.ExportedProgram:
    """Export the model with transformers, with a static cache of `CAPACITY` positions."""
    model.generation_config.cache_implementation = "static"
    model.generation_config.cache_config = {
        "batch_size": 1,
        "max_cache_len": CAPACITY,
        "device": "cpu",
    }
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program: torch.export.ExportedProgram = convert_and_export_with_cache(model)
    return program


def generate(instance: inplace.ModelInstance, prompts: list[Tensor]) -> list[list[int]]:
    """Greedy tokens for each prompt ``[1, tokens]``; all sequences share the steps."""
    tokens: list[list[int]] = [[] for _ in prompts]
    for step in range(TOKENS):
        inputs = prompts if step == 0 else [torch.tensor([row[-1:]]) for row in tokens]
        requests = [
            instance.admit(inplace.Request(row + 1, step == 0, False, {"input_ids": ids}))
            for row, ids in enumerate(inputs)
        ]
        while unfinished := [request for request in requests if not request.finished]:
            instance.step(unfinished)
        for row, request in zip(tokens, requests, strict=True):
            row.append(int(request.outputs["next_token"]))
            instance.finish(request)
    return tokens


def expected_tokens(model: LlamaForCausalLM, prompt: Tensor) -> list[int]:
    """The greedy tokens of transformers' own ``generate``."""
    generated = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        disable_compile=True,
    )
    tokens: list[int] = generated[0, prompt.shape[1] :].tolist()
    return tokens


def main() -> None:
    """Export, build, step eight rows together, and compare with ``generate``."""
    torch.manual_seed(0)
    model = small_llama()
    capture = ib.capture_exported_decoder(export(model), ib.DecoderOptions(CAPACITY, ROWS, CHUNK))
    layers = sum(
        node.target is torch.ops.inplace.attention.default for node in capture.exported.graph.nodes
    )
    print(f"{layers} of {model.config.num_hidden_layers} layers are inplace::attention")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "llama"
        options = ib.BuildOptions(capacity=CAPACITY, chunk=CHUNK, slots=ROWS, max_rows=ROWS)
        manifest = ib.write_engine(capture, path, options)
        print("aliases (output@input@kind):", *manifest.program("step").aliases)
        instance = inplace.ModelInstance.open(path / "1")
        arena = instance.arena
        for tensor in arena.tensors.values():
            tensor.fill_(float("nan"))
        addresses = arena.addresses()
        prompts = [torch.randint(0, 512, (1, 3 * row + 1)) for row in range(ROWS)]
        for prompt, tokens in zip(prompts, generate(instance, prompts), strict=True):
            assert tokens == expected_tokens(model, prompt)
        assert arena.addresses() == addresses
        keys = arena.tensors["key_states_0"]
        written = (~keys.isnan().any(-1).any(1)).sum(1)  # positions of each slot
        lengths = sorted(prompt.shape[1] + TOKENS - 1 for prompt in prompts)
        assert sorted(written.tolist()) == lengths
        print(
            f"{ROWS} rows give generate's tokens; the keys of layer 0 at {keys.data_ptr():#x} "
            f"hold {lengths} positions, the rest is still NaN"
        )
    print("nothing was copied: no state moved, and only the sequences' own positions were written")


if __name__ == "__main__":
    main()
