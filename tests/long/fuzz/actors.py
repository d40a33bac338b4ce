"""The clients: victims, whose sequences must not suffer, and lanes that send anything."""

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from fuzz.answers import Results, Streamed, Unary
from fuzz.damage import HARMLESS, NOT_FOR, REFUSED, damaged
from fuzz.web import Web, page
from fuzz.wire import Array, message, put
from inplace.errors import Code
from inplace.parameters import Parameter
from support.models import CAPACITY, VOCABULARY

Server = Unary | Streamed


@dataclass(frozen=True)
class Accepted:
    """A request of a victim that was answered with a result, as it must be repeated alone."""

    start: bool
    end: bool
    tensors: Mapping[str, Array]
    parameters: Mapping[str, Parameter]
    answer: Results


class Victim:
    """A client whose sequence must generate what it does alone, whatever others send.

    Args:
        model: ``llama``, ``accumulator`` or ``stream``.
        id: its correlation id, which no other client uses.
        rng: of everything it sends; what it sends does not depend on answers.
    """

    def __init__(self, model: str, id: int | str, rng: random.Random) -> None:
        self.model, self.id, self.rng = model, id, rng
        self.accepted: list[Accepted] = []
        self._length = 0
        self._live = False
        self._refused, self._harmless = sorted(set(REFUSED) - NOT_FOR[model]), sorted(HARMLESS)

    async def run(self, server: Server, requests: int) -> None:
        """Send requests one after another; about a third are damaged and must be refused."""
        for _ in range(requests):
            if self._live and self.rng.random() < 0.35:
                await self._send_damaged(server)
            else:
                await self._send_good(server)

    async def _send_damaged(self, server: Server) -> None:
        how = self.rng.choice(self._refused)
        request = message(self.model, self._tensors(1), self.id)
        REFUSED[how](request, self.rng)
        if not isinstance(await server.send(request, [how]), str):
            server.findings.complain("damaged and yet answered", request, [how])

    async def _send_good(self, server: Server) -> None:
        rng = self.rng
        start = not self._live or rng.random() < 0.02
        length = 0 if start else self._length
        count = min(rng.randint(1, 20) if start else rng.choice((1, 1, 1, 2, 9)), CAPACITY - length)
        tensors, parameters = self._tensors(count), self._parameters(length)
        if self.model == "stream" and length + count < CAPACITY and rng.random() < 0.5:
            parameters.pop("logits", None)
            generated = rng.randint(1, min(8, CAPACITY - length - count))
            parameters |= {
                "max_tokens": generated,
                "ignore_eos": True,
                "stream_interval": rng.choice((1, 1, 3, 100)),
            }
            count += generated
        end = length + count == CAPACITY or rng.random() < 0.05
        request = message(
            self.model,
            tensors,
            self.id,
            start=start,
            end=end,
            parameters=parameters,
            id=f"good-{rng.random()}",
        )
        how = [rng.choice(self._harmless)] if rng.random() < 0.2 else []
        for name in how:
            HARMLESS[name](request, rng)
        answer = await server.send(request, how)
        while start and isinstance(answer, str) and f"INPLACE-{Code.NO_FREE_SLOT} " in answer:
            await asyncio.sleep(0.05)
            answer = await server.send(request, how)
        if isinstance(answer, str):
            server.findings.complain(f"a good request was refused: {answer}", request, how)
        else:
            self.accepted.append(Accepted(start, end, tensors, parameters, answer))
        self._live, self._length = not end, length + count

    def _tensors(self, count: int) -> dict[str, Array]:
        if self.model != "accumulator":
            return {
                "input_ids": np.array(
                    [[self.rng.randrange(VOCABULARY) for _ in range(count)]], np.int64
                )
            }
        return {"value": np.array([[self.rng.uniform(-1, 1) for _ in range(4)]], np.float32)}

    def _parameters(self, length: int) -> dict[str, Parameter]:
        rng, result = self.rng, dict[str, Parameter]()
        if self.model == "accumulator":
            return result
        if rng.random() < 0.3:
            result["position"] = length
        if rng.random() < 0.2:
            result["logits"] = rng.choice((True, "true", "1"))
        if rng.random() < 0.4:
            result |= {
                "temperature": rng.choice(("0.7", "1", 1.5)),
                "seed": rng.getrandbits(62),
                "top_k": rng.choice((0, 1, 40)),
            }
            result["top_p"] = rng.choice(("0.9", 1.0, "1"))
        return result


class Surfer:
    """A client of good and damaged HTTP pages, which sometimes leaves before the answer."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    async def run(self, web: Web, requests: int) -> None:
        """Send so many, one after another."""
        for _ in range(requests):
            await web.send(
                page(self.rng, Lane.IDS),
                leave_after=self.rng.random() * 0.02 if self.rng.random() < 0.1 else None,
            )


class Lane:
    """A client that sends good and damaged requests to others' ids, and cancels some."""

    IDS = (1, 2, 3, 4, 5, "1", "2", "naïve ☃", "a" * 127, 2**62)

    def __init__(self, models: tuple[str, ...], rng: random.Random) -> None:
        self.models, self.rng = models, rng

    async def run(self, server: Server, requests: int) -> None:
        """Send so many, one after another."""
        rng = self.rng
        for _ in range(requests):
            sequence = (
                rng.choice(self.IDS) if rng.random() < 0.99 else rng.getrandbits(62) | 1 << 61
            )
            start, end = rng.random() < 0.35, rng.random() < 0.25
            model = rng.choice(self.models)
            tensors: dict[str, Array] = {"value": np.ones((1, 4), np.float32)}
            if model != "accumulator":
                tensors = {
                    "input_ids": np.array(
                        [[rng.randrange(VOCABULARY) for _ in range(rng.choice((1, 1, 2, 12)))]],
                        np.int64,
                    )
                }
            request = message(model, tensors, sequence, start=start, end=end)
            if model == "stream" and rng.random() < 0.5:
                put(request, "max_tokens", rng.choice((1, 3, 20, 1000)))
            how = (
                damaged(request, rng, over_stream=isinstance(server, Streamed))
                if rng.random() < 0.7
                else []
            )
            await server.send(
                request, how, cancel_after=rng.random() * 0.005 if rng.random() < 0.03 else None
            )
