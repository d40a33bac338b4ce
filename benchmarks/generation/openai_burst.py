"""`benchmarks.generation.burst` through the OpenAI front end: the same generations, as completions.

``python -m benchmarks.generation.openai_burst JSON`` prints, for each generation, when it was sent,
when its first text came and when it ended. It speaks HTTP by hand, so that it costs little.
"""

import asyncio
import json
import random
import sys
import time
from dataclasses import asdict
from typing import Any

from benchmarks.generation.burst import Burst, TimedGeneration


def request(burst: Burst, stream: int, round_index: int) -> bytes:
    """One completion, streamed, as bytes of HTTP."""
    draw = random.Random(f"{stream} {round_index}")
    body = {
        "model": burst.model,
        "prompt": draw.choices(range(burst.vocabulary), k=burst.prompt),
        "max_tokens": burst.tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    content = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + content


async def generation(burst: Burst, content: bytes) -> TimedGeneration:
    """Send a request and read its answer.

    Raises:
        RuntimeError: it is no stream with all tokens.
    """
    host, _, port = burst.url.rpartition(":")
    timed = TimedGeneration(time.time(), [])
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(content)
    first, last = 0.0, b""
    while (line := await reader.readline()) and not line.startswith(b"data: [DONE]"):
        if line.startswith(b"data: "):
            first, last = first or time.time(), line
    writer.close()
    usage: dict[str, Any] = json.loads(last.removeprefix(b"data: ") or b"{}").get("usage") or {}
    if usage.get("completion_tokens") != burst.tokens:
        raise RuntimeError(f"the answer ended with {last[:300]!r}; expected {burst.tokens} tokens")
    timed.responses = [(first, 1), (time.time(), burst.tokens - 1)]
    return timed


async def run(burst: Burst, stream: int) -> list[TimedGeneration]:
    """The generations of one stream."""
    contents = [request(burst, stream, round_index) for round_index in range(burst.rounds)]
    await asyncio.sleep(max(0.0, burst.begin - time.time()))
    return [await generation(burst, content) for content in contents]


async def main(burst: Burst) -> list[TimedGeneration]:
    """All streams of this process."""
    streams = range(burst.first, burst.first + burst.streams)
    generations = await asyncio.gather(*(run(burst, stream) for stream in streams))
    return [one for stream in generations for one in stream]


if __name__ == "__main__":
    result = asyncio.run(main(Burst(**json.loads(sys.argv[1]))))
    print(json.dumps([asdict(one) for one in result]))
