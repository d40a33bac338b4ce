"""Speculative decoding beside plain decoding: the time of a round, and tokens a second.

The model drafts with its own first layers. A random model is made of a configuration, with
``--agreeing`` such that its other layers change little: the draft is then nearly always right, as
without it nearly never. Both are bounds of what a trained model does. With ``--model`` it is one of
yours. The engine is built once with the draft (``--build-only`` stops there); plain decoding runs
the same engine's step. The two alternate, so that a change of the machine's speed affects both. The
result is written after each number of rows.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from inplace.runtime.batcher import ActiveRequest
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request
from inplace.runtime.speculative import SpeculativeInstance
from inplace.schema.served import Manifest
from inplace.schema.specs import Dtype
from inplace_builder.served.decoder import build_decoder
from inplace_builder.served.model_config import MODEL_VERSION
from inplace_builder.served.options import BuildOptions
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.phases import Phases
from benchmarks.record import facts

RESULT = Path(__file__).parent / "results" / "speculative.json"
PROMPT, ROUNDS = 16, 2
console = Console(stderr=True)


@dataclass(frozen=True)
class Decoding:
    """Decoding of some sequences together.

    Attributes:
        seconds: of each step, or round.
        tokens: of each sequence.
        accepted, drafted: tokens of the draft.
    """

    seconds: list[float]
    tokens: list[list[int]]
    accepted: int
    drafted: int


def random_model(folder: Path, arguments: argparse.Namespace) -> Path:
    """Save a random model; its layers after the draft's change little if they are to agree."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=4 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=max(1, arguments.hidden // 256),
        max_position_embeddings=4096,
    )
    with torch.device(arguments.device):
        model = LlamaForCausalLM(config).to(Dtype(arguments.dtype).as_torch)
    if arguments.agreeing:
        with torch.no_grad():
            for layer in model.model.layers[arguments.draft_layers :]:
                layer.self_attn.o_proj.weight.mul_(1e-3)
                layer.mlp.down_proj.weight.mul_(1e-3)
    model.save_pretrained(folder)
    return folder


def decode(instance: ModelInstance, rows: int, num_tokens: int, vocabulary: int) -> Decoding:
    """Decode greedily from random prompts, all rows in each step."""
    generator = torch.Generator().manual_seed(rows)
    prompts = torch.randint(0, vocabulary, (rows, 1, PROMPT), generator=generator)
    active = []
    for row, prompt in enumerate(prompts):
        request = Request(row + 1, start=True, end=True, inputs={"input_ids": prompt})
        validated = replace(instance.validate(request), max_new_tokens=num_tokens)
        active.append(instance.admit_validated(validated))
    tokens: list[list[int]] = [[] for _ in active]
    seconds = []
    accepted = drafted = 0
    while waiting := [each for each in active if not enough(each, tokens, num_tokens)]:
        is_prompt = any(each.decode_token is None for each in waiting)
        begin = time.perf_counter()
        outputs = instance.step(waiting)["next_token"].flatten().tolist()
        if not is_prompt:
            seconds.append(time.perf_counter() - begin)
        for each in waiting:
            if each.error is not None:
                raise each.error
            if not each.finished:
                continue
            places = each.accepted_rows or (each.step_outputs[1],)
            of_row = tokens[active.index(each)]
            of_row += [outputs[place] for place in places]
            if each.decode_token is not None:
                accepted += len(places) - 1
                drafted += instance.manifest.tokens_per_decode - 1
            each.feed(of_row[-1])
    for each in active:
        instance.finish(each)
    return Decoding(seconds, [each[:num_tokens] for each in tokens], accepted, drafted)


def enough(each: ActiveRequest, tokens: list[list[int]], num_tokens: int) -> bool:
    """Whether a sequence has its tokens."""
    return len(tokens[int(each.sequence.id) - 1]) >= num_tokens


def beside(
    plain: ModelInstance, drafting: SpeculativeInstance, rows: int, num_tokens: int
) -> dict[str, float | int | bool]:
    """Both with so many rows: medians of the rounds after a warm-up."""
    vocabulary = plain.program.vocab_size
    steps: list[float] = []
    rounds: list[float] = []
    equal, accepted, drafted, speeds = True, 0, 0, list[tuple[float, float]]()
    for index in range(ROUNDS + 1):
        one, several = (
            decode(instance, rows, num_tokens, vocabulary) for instance in (plain, drafting)
        )
        equal &= one.tokens == several.tokens
        if index:
            steps += one.seconds
            rounds += several.seconds
            accepted, drafted = accepted + several.accepted, drafted + several.drafted
            total = rows * (num_tokens - 1)
            speeds.append((total / sum(one.seconds), total / sum(several.seconds)))
    slow, fast = (statistics.median(each) for each in zip(*speeds, strict=True))
    return {
        "rows": rows,
        "step_ms": statistics.median(steps) * 1e3,
        "round_ms": statistics.median(rounds) * 1e3,
        "accepted_percent": 100 * accepted / max(1, drafted),
        "plain_tokens_per_second": slow,
        "drafted_tokens_per_second": fast,
        "times_as_fast": fast / slow,
        "tokens_equal": equal,
    }


def parse(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speculative", description=__doc__)
    parser.add_argument("--model", type=Path, help="a folder with a decoder; default: a random one")
    parser.add_argument("--agreeing", action="store_true", help="the random draft is mostly right")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--draft-layers", type=int, default=1)
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--engine", choices=("torch", "tensorrt"), default="torch")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--engine-folder", type=Path, help="keep the engine, or take what is kept")
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds for all of it")
    parser.add_argument("--output", type=Path, default=RESULT)
    return parser.parse_args(given)


def build(arguments: argparse.Namespace, output: Path) -> dict[str, float]:
    """Build the engine into ``output``; the seconds of each phase."""
    rows = max(arguments.rows)
    options = BuildOptions(
        dtype=Dtype(arguments.dtype),
        device=arguments.device,
        engine=arguments.engine,
        slots=rows,
        max_rows=rows,
        capacity=PROMPT + arguments.tokens + 1,
        chunk=max(PROMPT, arguments.draft_tokens + 1),
        serve="stream",
        draft_layers=arguments.draft_layers,
        draft_tokens=arguments.draft_tokens,
    )
    phases = Phases()
    with tempfile.TemporaryDirectory() as scratch:
        phases("make a model")
        source = arguments.model or random_model(Path(scratch, "model"), arguments)
        build_decoder(source, output, options, phases)
    phases("done")
    return phases.seconds


def main() -> None:
    """Run, print and write the result."""
    arguments, begin = parse(), time.monotonic()
    record = facts("speculative decoding beside plain decoding", "python -m benchmarks.speculative")
    record["results"] = []

    def save() -> None:
        arguments.output.write_text(json.dumps(record, indent=2) + "\n")

    with tempfile.TemporaryDirectory() as scratch:
        output = arguments.engine_folder or Path(scratch, "engine")
        folder = output / MODEL_VERSION
        if not folder.is_dir():
            record["build_seconds"] = build(arguments, output)
            save()
        if arguments.build_only:
            return
        drafting = SpeculativeInstance.open(folder)
        # The same engine and arena; sequences of the two never live at the same time.
        plain = ModelInstance(Manifest.load(folder), drafting.arena, drafting.engine, 600.0)
        with drafting.engine.on_stream():
            for rows in arguments.rows:
                if time.monotonic() - begin > arguments.limit:
                    break
                record["results"].append(beside(plain, drafting, rows, arguments.tokens))
                console.print(record["results"][-1])
                save()


if __name__ == "__main__":
    main()
