"""The same generations without a server: ``python -m benchmarks.generation.alone MODEL/1 ROWS[,ROWS…] PROMPT TOKENS``.

Prints a line of JSON for each number of rows. All rows begin together, as a batch of the engine's own step function; a request is never
parsed and nothing is sent.
"""

import json
import sys
import time
from pathlib import Path

import torch
from inplace.runtime.instance import ModelInstance
from inplace.runtime.metrics import STEP
from inplace.runtime.requests import Request


def busy_until_now(instance: ModelInstance) -> float:
    """Seconds that steps have taken."""
    return instance.observer.metrics.snapshot()[STEP.sum.name, ""]


def measured(instance: ModelInstance, rows: int, prompt: int, tokens: int) -> dict[str, float]:
    """Seconds, and the share of them that the engine was busy, of the second of two rounds."""
    names = instance.program.decoder_io
    assert names is not None
    seconds = busy = first = 0.0
    for _ in range(2):
        before, begin = busy_until_now(instance), time.perf_counter()
        works = [
            instance.admit(
                Request(row + 1, True, True, {names[0]: torch.full((1, prompt), 5 + row)})
            )
            for row in range(rows)
        ]
        while pending := [work for work in works if not work.finished]:
            instance.step(pending)
        first = time.perf_counter() - begin
        said = [int(work.outputs[names[1]]) for work in works]
        for _ in range(tokens - 1):
            for work, token in zip(works, said, strict=True):
                work.feed(token)
            said = instance.step(works)[names[1]].flatten().tolist()
        for work in works:
            instance.finish(work)
        seconds, busy = time.perf_counter() - begin, busy_until_now(instance) - before
    return {
        "seconds": seconds,
        "first_token_s": first,
        "tokens_per_second": rows * tokens / seconds,
        "engine_busy": busy / seconds,
    }


def main(folder: Path, counts: str, prompt: int, tokens: int) -> None:
    """One engine, each number of rows after the other."""
    instance = ModelInstance.open(folder, idle_timeout=float("inf"))
    for rows in map(int, counts.split(",")):
        print(json.dumps(measured(instance, rows, prompt, tokens)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
