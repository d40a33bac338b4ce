"""Streams that begin at one moment and generate a fixed number of times: one client process.

``python -m benchmarks.generation.burst JSON`` prints each `TimedGeneration`.
"""

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from benchmarks.generation.clients import (
    GrpcClient,
    Target,
    TimedGeneration,
    answer,
    check_whole,
    client_of,
    request_of,
)


@dataclass(frozen=True)
class Burst:
    """What one process of clients does.

    Attributes:
        target: the model.
        first, streams: numbers of its streams; each has prompts of its own.
        begin: Unix time at which all streams of all processes begin.
        rounds: generations of each stream, one after the other.
        prompt, tokens: tokens of a prompt, and of a generation.
        salt: prompts of another salt are others.
        keeps_tokens: whether prompts and generated tokens are returned; over gRPC only.
    """

    target: Target
    streams: int
    rounds: int
    prompt: int
    tokens: int
    first: int = 0
    begin: float = 0.0
    salt: str = ""
    keeps_tokens: bool = False


def prompt_of(burst: Burst, stream: int, round_index: int) -> list[int]:
    """Random tokens, the same in every run."""
    return burst.target.prompt(f"{burst.salt}{stream} {round_index}", burst.prompt)


def request(burst: Burst, stream: int, round_index: int) -> Any:
    """One generation, its slot freed when it finishes."""
    name = f"burst {burst.begin} {stream} {round_index}"
    prompt = prompt_of(burst, stream, round_index)
    return request_of(burst.target, name, prompt, burst.tokens)


async def run(burst: Burst, stream: int) -> list[TimedGeneration]:
    """The generations of one stream."""
    target = burst.target
    client = GrpcClient(target, keeps_tokens=True) if burst.keeps_tokens else client_of(target)
    requests = [request(burst, stream, round_index) for round_index in range(burst.rounds)]
    generations = []
    async with client:
        await asyncio.sleep(max(0.0, burst.begin - time.time()))
        late = max(0.0, time.time() - burst.begin)
        for round_index, one in enumerate(requests):
            generation = await client.generate(one)
            check_whole(generation, burst.tokens)
            generation.late = late
            if burst.keeps_tokens:
                generation.prompt = prompt_of(burst, stream, round_index)
            generations.append(generation)
    return generations


async def main(burst: Burst) -> list[TimedGeneration]:
    """All streams of this process."""
    streams = range(burst.first, burst.first + burst.streams)
    generations = await asyncio.gather(*(run(burst, stream) for stream in streams))
    return [generation for stream in generations for generation in stream]


if __name__ == "__main__":
    answer(main, Burst)
