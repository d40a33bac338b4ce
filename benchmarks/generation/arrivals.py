"""Requests of different lengths that arrive at random times: one client process.

``python -m benchmarks.generation.arrivals JSON`` prints each `TimedGeneration`; those that are not
whole in time have an error.
"""

import asyncio
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import grpc

from benchmarks.generation.clients import (
    GrpcClient,
    OpenAIClient,
    Target,
    TimedGeneration,
    answer,
    check_whole,
    client_of,
    request_of,
)


@dataclass(frozen=True)
class Arrivals:
    """A load, and the part of it that a process of clients sends.

    Attributes:
        target: the model.
        rate: requests a second of all processes; they arrive as a Poisson process. None: all at
            once.
        count: requests of all processes.
        prompts: the shortest and the longest prompt; the logarithms of their tokens are uniform.
        tokens: of a generation.
        patience: seconds after the last arrival at which what is not answered is given up.
        part, parts: this process sends every ``parts``-th request from ``part`` on.
        begin: Unix time at which the load begins.
    """

    target: Target
    rate: float | None
    count: int
    prompts: tuple[int, int]
    tokens: int
    patience: float
    part: int = 0
    parts: int = 1
    begin: float = 0.0

    def schedule(self) -> Iterator[tuple[float, int]]:
        """The seconds after the beginning, and the tokens of the prompt, of each request.

        The same for each target.
        """
        draw = random.Random("arrivals")
        low, high = map(math.log, self.prompts)
        at = 0.0
        for _ in range(self.count):
            if self.rate is not None:
                at += draw.expovariate(self.rate)
            yield at, round(math.exp(draw.uniform(low, high)))

    @property
    def end(self) -> float:
        """Seconds after the beginning at which the load is given up."""
        return max(at for at, _ in self.schedule()) + self.patience


class Pool:
    """Clients that are free; another one is made where there is none."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._free: list[GrpcClient | OpenAIClient] = []

    def take(self) -> GrpcClient | OpenAIClient:
        """A client for one generation."""
        return self._free.pop() if self._free else client_of(self._target)

    def give_back(self, client: GrpcClient | OpenAIClient) -> None:
        """It may be taken again."""
        self._free.append(client)

    async def close(self) -> None:
        """Close those that are free."""
        for client in self._free:
            await client.close()


async def arrive(
    load: Arrivals, pool: Pool, number: int, at: float, length: int
) -> TimedGeneration:
    """One request, from when it is due."""
    due = load.begin + at
    prompt = load.target.prompt(f"arrivals {number}", length)
    request = request_of(load.target, f"arrivals {load.begin} {number}", prompt, load.tokens)
    await asyncio.sleep(max(0.0, due - time.time()))
    client = pool.take()
    left = load.begin + load.end - time.time()
    try:
        async with asyncio.timeout(left):
            generation = await client.generate(request)
        check_whole(generation, load.tokens)
        pool.give_back(client)
    except (TimeoutError, RuntimeError, OSError, grpc.RpcError) as error:
        await client.close()
        return TimedGeneration(due, [], error=str(error) or "not answered in time")
    generation.late, generation.sent = generation.sent - due, due
    return generation


async def main(load: Arrivals) -> list[TimedGeneration]:
    """The requests of this process."""
    pool = Pool(load.target)
    due = list(load.schedule())
    generations = await asyncio.gather(
        *(
            arrive(load, pool, number, *due[number])
            for number in range(load.part, load.count, load.parts)
        )
    )
    await pool.close()
    return generations


if __name__ == "__main__":
    answer(main, Arrivals)
