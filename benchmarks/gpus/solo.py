"""Generations of a server beside the same engine alone, which runs one sequence at a time.

``python -m benchmarks.gpus.solo MODEL/1 TIE`` reads generations from its input, a JSON list of
``{"prompt": …, "tokens": …}``, and prints a line of JSON.

The engine is fed the served tokens one after the other. At each position a served token is the
most likely one of the engine alone, or it differs: then it is wrong, unless its log-probability is
within ``TIE`` of the largest. In bfloat16 the scores depend on how many rows a step has, because
matrix products add in another order, so that the two most likely tokens may change places where
they are that close. A token of another sequence is not: random weights give almost all tokens a
log-probability several nats below the largest.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from inplace.protocol import TOP_LOGPROBS, TOP_TOKENS
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request

TOP = 20
"""Most likely tokens that are looked at."""


def step(instance: ModelInstance, token_ids: list[int], **flags: bool) -> tuple[list[int], Any]:
    """Feed tokens of the only sequence; the most likely next ones with their log-probabilities."""
    names = instance.program.decoder_io
    assert names is not None
    request = Request(
        1,
        flags.get("start", False),
        flags.get("end", False),
        {names[0]: torch.tensor([token_ids])},
        parameters={"logprobs": TOP},
    )
    active = instance.admit(request)
    while not active.finished:
        instance.step([active])
    instance.finish(active)
    outputs = active.outputs
    return outputs[TOP_TOKENS].flatten().tolist(), outputs[TOP_LOGPROBS].flatten().tolist()


def compared(
    instance: ModelInstance, generations: list[dict[str, list[int]]], tie: float
) -> dict[str, Any]:
    """How many tokens are those of the engine alone, differ, and are wrong."""
    same, gaps, wrong = 0, list[float](), 0
    for generation in generations:
        fed, start = generation["prompt"], True
        for count, token in enumerate(generation["tokens"], 1):
            end = count == len(generation["tokens"])
            likely, logprobs = step(instance, fed, start=start, end=end)
            fed, start = [token], False
            if token == likely[0]:
                same += 1
            elif token not in likely:
                wrong += 1
            else:
                gap = logprobs[0] - logprobs[likely.index(token)]
                gaps.append(gap)
                wrong += gap > tie
    return {
        "generations": len(generations),
        "tokens": sum(len(generation["tokens"]) for generation in generations),
        "same": same,
        "close": sum(gap <= tie for gap in gaps),
        "largest_gap": max(gaps, default=0.0),
        "wrong": wrong,
    }


if __name__ == "__main__":
    opened = ModelInstance.open(Path(sys.argv[1]), idle_timeout=float("inf"))
    print(json.dumps(compared(opened, json.load(sys.stdin), float(sys.argv[2]))))
