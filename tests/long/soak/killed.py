"""A client that is killed: ``python -m soak.killed URL MODEL SEQUENCE`` generates until then."""

import asyncio
import sys

from soak.line import Line

PROMPT = [1, 2, 3]
MAX_TOKENS = 90


async def main(url: str, model: str, sequence: str) -> None:
    """Generate one token after another, with a line of output once tokens arrive."""
    line = Line(url, model)
    parameters = {"max_tokens": MAX_TOKENS, "ignore_eos": True}
    while True:
        async for _ in line.ask(line.request(PROMPT, sequence, start=True, parameters=parameters)):
            print("generating", flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
