"""Clients of the OpenAI front end: those that behave, and those that leave in every way."""

import asyncio
import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from support.openai_bodies import check
from support.served import MODEL

BEHAVIOURS = {
    "reads all of an answer": 4,
    "reads all of a stream": 4,
    "reads a stream slowly": 1,
    "leaves a stream": 4,
    "resets a stream": 2,
    "leaves before the answer": 3,
    "leaves within its body": 1,
    "sends no JSON": 1,
    "sends no HTTP": 1,
}
"""What a client does, and how often."""

RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: the connection ends with RST."""


@dataclass
class Tally:
    """What all clients have seen."""

    begun: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)


class Client:
    """One client, which does one thing after the other.

    Args:
        port: of the front end.
        seed: of what it does.
        until: the time (`time.monotonic`) at which it begins nothing more.
        tally: where it counts.
    """

    def __init__(self, port: int, seed: str, until: float, tally: Tally) -> None:
        self._port, self._until, self._tally = port, until, tally
        self._draw = random.Random(seed)
        self._actions: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
            "reads all of an answer": lambda: self._read(stream=False),
            "reads all of a stream": lambda: self._read(stream=True),
            "reads a stream slowly": lambda: self._read(stream=True, pause=0.02),
            "leaves a stream": self._leave_stream,
            "resets a stream": lambda: self._leave_stream(reset=True),
            "leaves before the answer": lambda: self._leave(self._request(stream=False)),
            "leaves within its body": lambda: self._leave(self._request(stream=True)[:-7]),
            "sends no JSON": self._send_no_json,
            "sends no HTTP": lambda: self._leave(self._draw.randbytes(200) + b"\r\n\r\n"),
        }

    async def run(self) -> None:
        """Live."""
        names, weights = list(BEHAVIOURS), list(BEHAVIOURS.values())
        while time.monotonic() < self._until:
            [name] = self._draw.choices(names, weights)
            self._tally.begun[name] += 1
            try:
                await asyncio.wait_for(self._actions[name](), 120)
            except (AssertionError, OSError, TimeoutError, ValueError) as error:
                self._tally.wrong.append(f"{name}: {type(error).__name__} {error}"[:500])

    def _request(self, *, stream: bool) -> bytes:
        tokens = self._draw.randint(1, 60)
        options = {
            "model": MODEL,
            "max_tokens": tokens,
            "temperature": self._draw.choice([0, 1]),
            "n": self._draw.choice([1, 1, 1, 3]),
            "ignore_eos": True,
            "stream": stream,
        }
        text = " ".join(
            self._draw.choices(["the", "Work", "é", "</s>"], k=self._draw.randint(1, 9))
        )
        if self._draw.random() < 0.5:
            messages = [{"role": "user", "content": text}]
            return post("/v1/chat/completions", json.dumps(options | {"messages": messages}))
        return post("/v1/completions", json.dumps(options | {"prompt": text}))

    async def _read(self, *, stream: bool, pause: float = 0.0) -> None:
        await self._answered(self._request(stream=stream), pause)

    async def _send_no_json(self) -> None:
        await self._answered(post("/v1/chat/completions", self._draw.randbytes(50)))

    async def _answered(self, content: bytes, pause: float = 0.0) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(content)
        parts = []
        while part := await reader.read(256 if pause else 1 << 16):
            parts.append(part)
            await asyncio.sleep(pause)
        writer.close()
        status, body = parsed(b"".join(parts))
        self._tally.statuses[status] += 1
        check(status, body, may_be_full=True)
        if status == 200 and not isinstance(body, str):
            self._tally.tokens += body["usage"]["completion_tokens"]

    async def _leave_stream(self, *, reset: bool = False) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(self._request(stream=True))
        await reader.read(self._draw.randint(1, 2000))
        if reset:
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        writer.close()

    async def _leave(self, content: bytes) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(content)
        await writer.drain()
        await asyncio.sleep(self._draw.choice([0.0, 0.01, 0.2]))
        writer.close()


def post(path: str, body: str | bytes) -> bytes:
    """A request as bytes."""
    content = body.encode() if isinstance(body, str) else body
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + content


def parsed(answer: bytes) -> tuple[int, Any]:
    """The status, and the JSON or the text of an answer.

    Raises:
        ValueError: it is not a whole answer.
    """
    head, _, body = answer.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in head.lower():
        parts = []
        while True:
            size, _, body = body.partition(b"\r\n")
            if not (length := int(size, 16)):
                break
            parts.append(body[:length])
            body = body[length + 2 :]
        body = b"".join(parts)
    status = int(head.split(b" ", 2)[1])
    is_json = b"content-type: application/json" in head.lower()
    return status, json.loads(body) if is_json else body.decode()
