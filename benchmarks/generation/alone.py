"""The same generations without a server.

``python -m benchmarks.generation.alone MODEL/1 ROWS[,ROWS…] PROMPT TOKENS`` prints a line of JSON
for each number of rows. All rows begin together, as a batch of the engine's own step function; no
request is parsed and nothing is sent.
"""

import json
import sys
import time
from pathlib import Path

import torch
from inplace.runtime.instance import ModelInstance
from inplace.runtime.observer import STEP
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
        requests = [
            instance.admit(
                Request(row + 1, True, True, {names[0]: torch.full((1, prompt), 5 + row)})
            )
            for row in range(rows)
        ]
        while unfinished := [request for request in requests if not request.finished]:
            instance.step(unfinished)
        first = time.perf_counter() - begin
        last_tokens = [int(request.outputs[names[1]]) for request in requests]
        for _ in range(tokens - 1):
            for request, token in zip(requests, last_tokens, strict=True):
                request.feed(token)
            last_tokens = instance.step(requests)[names[1]].flatten().tolist()
        for request in requests:
            instance.finish(request)
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
