"""A Hugging Face decoder exactly as transformers exports it: built, then eight conversations of different lengths in each step.

transformers exports it for one sequence and a static cache, one token a step. Built, it steps several sequences, with chunks of tokens.
"""

import tempfile
import warnings
from pathlib import Path

import torch
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request
from inplace_builder import DecoderOptions, capture_exported_decoder
from inplace_builder.served.build import write_engine
from inplace_builder.served.model_config import MODEL_VERSION
from inplace_builder.served.options import BuildOptions
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.executorch import convert_and_export_with_cache

ROWS, CAPACITY, CHUNK, TOKENS = 8, 64, 16, 12


def exported(model: LlamaForCausalLM) -> torch.export.ExportedProgram:
    """What transformers exports, with a static cache of `CAPACITY` positions."""
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


def main() -> None:
    """Export, build, step eight rows together, and compare with ``generate``."""
    torch.manual_seed(0)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, initializer_range=0.3, **shape)).eval()
    capture = capture_exported_decoder(exported(model), DecoderOptions(CAPACITY, ROWS, CHUNK))
    layers = sum(
        node.target is torch.ops.inplace.attention.default for node in capture.exported.graph.nodes
    )
    print(f"{layers} of {model.config.num_hidden_layers} layers are inplace::attention")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "llama"
        manifest = write_engine(
            capture, path, BuildOptions(capacity=CAPACITY, chunk=CHUNK, slots=ROWS, max_rows=ROWS)
        )
        print("aliases (output@input@kind):", *manifest.program("step").aliases)
        instance = ModelInstance.open(path / MODEL_VERSION)
        arena = instance.arena
        for tensor in arena.tensors.values():
            tensor.fill_(float("nan"))
        addresses = arena.addresses()
        prompts = [torch.randint(0, 512, (1, 3 * row + 1)) for row in range(ROWS)]
        said: list[list[int]] = [[] for _ in prompts]
        for step in range(TOKENS):
            ids = prompts if step == 0 else [torch.tensor([row[-1:]]) for row in said]
            works = [
                instance.admit(Request(row + 1, step == 0, False, {"input_ids": given}))
                for row, given in enumerate(ids)
            ]
            while pending := [work for work in works if not work.finished]:
                instance.step(pending)
            for row, work in zip(said, works, strict=True):
                row.append(int(work.outputs["next_token"]))
                instance.finish(work)
        for prompt, row in zip(prompts, said, strict=True):
            options = {
                "max_new_tokens": TOKENS,
                "do_sample": False,
                "eos_token_id": None,
                "pad_token_id": 0,
                "disable_compile": True,
            }
            wanted = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
            assert wanted[0, prompt.shape[1] :].tolist() == row
        assert arena.addresses() == addresses
        keys = arena.tensors["key_states_0"]
        touched = (~keys.isnan().any(-1).any(1)).sum(1)  # positions of each slot
        wanted_positions = sorted(3 * row + 1 + TOKENS - 1 for row in range(ROWS))
        assert sorted(touched.tolist()) == wanted_positions
        print(
            f"{ROWS} rows say what generate says; keys of layer 0 at {keys.data_ptr():#x} hold {wanted_positions} positions, else NaN"
        )
    print(
        "nothing was copied: states lie where they lay, and no bit was written but those of the sequences' own positions"
    )


if __name__ == "__main__":
    main()
