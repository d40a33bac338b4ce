"""A hybrid decoder, from a Hugging Face model to a served sequence: a small LFM2.

One layer keeps the last inputs of a convolution, the other keys and values; both are states in
place. Two clients send prompts of different lengths; their tokens are those of ``generate``.
"""

import tempfile
from pathlib import Path

import inplace_builder as ib
import numpy as np
import torch
from inplace.client import Client, Sequence
from transformers import Lfm2Config, Lfm2ForCausalLM

TOKENS = 12


def small_lfm2() -> Lfm2ForCausalLM:
    """An LFM2 with random weights: a convolution layer and an attention layer."""
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    return Lfm2ForCausalLM(config).eval()


def generate(client: Client, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens for each prompt, a sequence each; the sequences take turns."""
    sequences = [Sequence(client, "lfm2") for _ in prompts]
    tokens: list[list[int]] = [[] for _ in prompts]
    for step in range(TOKENS):
        for sequence, prompt, row in zip(sequences, prompts, tokens, strict=True):
            ids = row[-1:] if step else prompt
            outputs = sequence.step({"input_ids": np.array(ids)})
            row.append(int(outputs["next_token"].item()))
    for sequence in sequences:
        sequence.close()
    return tokens


def main() -> None:
    """Save, build, serve, and compare with ``generate``."""
    model, prompts = small_lfm2(), [[5, 6, 7], list(range(20, 43))]
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "model_repository"
        repository.mkdir()
        model.save_pretrained(Path(folder) / "lfm2")
        options = ib.BuildOptions(capacity=64, chunk=16, slots=8, max_rows=4)
        manifest = ib.build_decoder(Path(folder) / "lfm2", repository / "lfm2", options)
        for state in manifest.states:
            print(f"state {state.name}: {list(state.shape)} a sequence, {state.update}")
        log = Path(folder) / "tritonserver.log"
        with (
            ib.TritonServer(repository, ib.Ports(0, 0, 0), log=log) as server,
            Client(server.grpc_url) as client,
        ):
            served = generate(client, prompts)
    for prompt, tokens in zip(prompts, served, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
        assert tokens == expected[0, len(prompt) :].tolist()
        print(f"{len(prompt)} tokens of prompt, then what transformers generates: {tokens}")


if __name__ == "__main__":
    main()
