"""A mixture of experts, from a Hugging Face model to a served sequence: a small Mixtral.

The model's experts become ``inplace::grouped_linear``, which reads each expert that a step uses
once. Two clients send prompts of different lengths; their tokens are those of ``generate``.
"""

import tempfile
from pathlib import Path

import inplace_builder as ib
import numpy as np
import torch
from inplace.client import Client, Sequence
from transformers import MixtralConfig, MixtralForCausalLM

TOKENS = 12


def small_mixtral() -> MixtralForCausalLM:
    """A Mixtral of two layers with random weights; two of eight experts for each token."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    return MixtralForCausalLM(config).eval()


def generate(client: Client, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens for each prompt, a sequence each; the sequences take turns."""
    sequences = [Sequence(client, "mixtral") for _ in prompts]
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
    model, prompts = small_mixtral(), [[5, 6, 7], list(range(20, 43))]
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "model_repository"
        repository.mkdir()
        model.save_pretrained(Path(folder) / "mixtral")
        options = ib.BuildOptions(capacity=64, chunk=16, slots=8, max_rows=4)
        manifest = ib.build_decoder(Path(folder) / "mixtral", repository / "mixtral", options)
        print("aliases (output@input@kind):", *manifest.program("step").aliases)
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
