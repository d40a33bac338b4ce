"""SmolLM2-135M-Instruct with weights or cache in fp8, against transformers in float32.

    python -m benchmarks.gpu.fp8_accuracy --device cpu --alone 1 [--rounded cache] [--tokens 32]

As `benchmarks.gpu.accuracy`, whose prompts, runs and rules it has, but for what excuses a token: it
may differ from the float32 reference's only where the reference's top two are closer than the error
of PyTorch with the same fp8. Weights: on a GPU that rounds all activations to fp8 too, and the
engine those of long steps, as ADR 0050 says; on a CPU neither does. Cache: it attends to keys and
values that are rounded as the engine rounds them (ADR 0053). It also counts how many tokens of
PyTorch with fp8 are those of the reference, which is what fp8 costs.
"""

import argparse
import copy
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from inplace.runtime.instance import ModelInstance
from inplace.schema.specs import Dtype
from inplace_builder import capture_decoder, load_decoder
from inplace_builder.capture.cache_scales import quantize_cache
from inplace_builder.capture.scaled_linear import round_all
from inplace_builder.served.build import write_engine
from inplace_builder.served.decoder import decoder_options
from inplace_builder.served.model_config import MODEL_VERSION
from inplace_builder.served.options import BuildOptions

from benchmarks.gpu.accuracy import (
    CHUNK,
    PROMPTS,
    ROWS,
    SLOTS,
    TOKENS,
    Runner,
    Stages,
    changed_states,
    compare,
    halved,
    poison,
    references,
    smollm2,
)
from benchmarks.record import facts


def main() -> None:
    """Build, run, compare, write ``fp8_accuracy_<device>.json`` or ``fp8_cache_accuracy_….json``.

    Returns status 1 if a token differs that may not, or memory changes that may not.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--rounded", choices=("weights", "cache"), default="weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--alone", type=int, default=len(PROMPTS), help="prompts run alone too")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    arguments = parser.parse_args()
    source, device = smollm2(), arguments.device
    options = BuildOptions(
        dtype=Dtype(arguments.dtype),
        weights="fp8" if arguments.rounded == "weights" else "auto",
        cache="fp8" if arguments.rounded == "cache" else "auto",
        device=device,
        engine="torch" if device == "cpu" else "tensorrt",
        slots=SLOTS,
        max_rows=ROWS,
        capacity=512,
        chunk=CHUNK,
    )
    stage = Stages()
    stage("load the model")
    full, tokenizer = load_decoder(source, Dtype.FLOAT32)
    assert tokenizer is not None
    rounded = halved(full) if options.dtype is Dtype.BFLOAT16 else copy.deepcopy(full)
    if arguments.rounded == "weights":  # as a build does
        how = round_all(rounded, options.weight_options)
    else:
        how = quantize_cache(rounded, source, tokenizer, options.capacity)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "smollm2"
        stage("capture the graph")
        capture = capture_decoder(rounded, decoder_options(options))
        manifest = write_engine(capture, model, options, stage, prepare=lambda: rounded.to(device))
        stage("continue the prompts with transformers")
        prompts = [list(tokenizer(text)["input_ids"]) for text in PROMPTS]
        expected = references(full.to(device), rounded, prompts, arguments.tokens)
        stage("continue them with the engine")
        instance = ModelInstance.open(model / MODEL_VERSION, idle_timeout=float("inf"))
        arena = instance.arena
        foreign, addresses = poison(arena), arena.addresses()
        alone, together = compare(Runner(instance), expected, arguments.alone)
        moved = arena.addresses() != addresses
        changed = changed_states(arena, foreign)
    stage("done")
    errors = [error for each in expected for error in each.errors]
    result = facts(
        f"greedy tokens of an engine with {arguments.rounded} in fp8 against the float32 reference",
        "python -m benchmarks.gpu.fp8_accuracy",
    ) | {
        "model": "SmolLM2-135M-Instruct",
        arguments.rounded: how,
        "dtype": str(options.dtype),
        "device": device,
        "reference": f"transformers, float32, {arguments.rounded} not rounded",
        "verified_error": manifest.built_with["verified_error"],
        "tokens": arguments.tokens,
        "pytorch_fp8_equal": sum(each.eager_half for each in expected),
        "pytorch_fp8_tokens": arguments.tokens * len(expected),
        "pytorch_fp8_logit_error_mean": sum(errors) / len(errors),
        "pytorch_fp8_logit_error_max": max(errors),
        "alone": [asdict(each) for each in alone],
        "eight_ragged_rows": [asdict(each) for each in together],
        "states_moved": moved,
        "foreign_states_changed": changed,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    of = "" if arguments.rounded == "weights" else "_cache"
    path = arguments.out / f"fp8{of}_accuracy_{device}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if moved or changed or any(each.unexcused for each in (*alone, *together)):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
