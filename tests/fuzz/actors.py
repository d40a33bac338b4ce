"""Who sends the requests: victims, whose sequences must not suffer, and lanes that fire anything."""

import asyncio
import random
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import grpc
import numpy as np
from fuzz.damage import HARMLESS, REFUSED, damaged
from fuzz.wire import Array, Message, message, outputs
from google.protobuf import text_format
from inplace.errors import Code
from inplace.sampling import Parameter
from models import CAPACITY, VOCABULARY
from tritonclient.grpc import service_pb2_grpc

OURS = re.compile(r"INPLACE-(\w+) retryable=[01] sequence=.* request=.*: .{10,}", re.DOTALL)
TRITONS = re.compile(
    r"INVALID_ARGUMENT .+|NOT_FOUND (Request for unknown model|Unable to find shared memory region).*"
    r"|UNIMPLEMENTED string correlation ID cannot be longer than 128 characters",
    re.DOTALL,
)
"""Status and text of Triton's own validation."""
PATIENCE = 30.0
"""Seconds in which every request must have been answered."""

Results = dict[str, Array]


@dataclass
class Findings:
    """What came of the requests.

    Attributes:
        answers: how many of each kind: a code of ours, ``triton``, ``result``, ``cancelled``.
        says: one example of each of Triton's own errors, by status and its text without names and numbers.
        wrong: what must not happen, each with what was sent.
    """

    answers: Counter[str] = field(default_factory=Counter)
    says: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def complain(self, what: str, request: Message, how: list[str]) -> None:
        """Note what must not happen."""
        self.wrong.append(f"{what}\n  after {how}: {text_format.MessageToString(request, as_one_line=True)[:800]}")


class Server:
    """The server as raw gRPC shows it, and the judge of every answer."""

    def __init__(self, channel: grpc.aio.Channel, findings: Findings) -> None:
        self._infer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
        self.findings = findings

    async def send(self, request: Message, how: list[str], cancel_after: float | None = None) -> Results | str:
        """The outputs, or the text of the refusal."""
        call = self._infer(request, timeout=PATIENCE)
        try:
            if cancel_after is not None:
                await asyncio.sleep(cancel_after)
                call.cancel()
            answer = outputs(await call)
        except asyncio.CancelledError:
            self.findings.answers["cancelled"] += 1
            return "cancelled"
        except grpc.aio.AioRpcError as error:
            return self._refused(error, request, how)
        except (ValueError, KeyError) as error:
            self.findings.complain(f"a result that cannot be read: {error}", request, how)
            return "unreadable"
        self.findings.answers["result"] += 1
        if "next_token" in answer and not (answer["next_token"].shape == (1, 1) and 0 <= answer["next_token"].item() < VOCABULARY):
            self.findings.complain(f"no token: {answer}", request, how)
        return answer

    def _refused(self, error: grpc.aio.AioRpcError, request: Message, how: list[str]) -> str:
        text = error.details() or ""
        if (ours := OURS.search(text)) is not None and ours[1] in Code.__members__ and ours[1] != Code.ENGINE_FAILED:
            self.findings.answers[ours[1]] += 1
            return text
        if error.code() is grpc.StatusCode.CANCELLED:  # Triton cancels all that waits of a sequence with the one that was cancelled
            self.findings.answers["cancelled with its sequence"] += 1
            return "cancelled"
        if TRITONS.fullmatch(f"{error.code().name} {text}"):
            self.findings.answers["triton"] += 1
            self.findings.says.setdefault(re.sub(r"'.*|[^A-Za-z ]+", " ", text.partition("] ")[2] or text)[:30], text[:160])
            return text
        self.findings.complain(f"neither a result nor a clear error: {error.code()} {text!r}", request, how)
        return text


@dataclass(frozen=True)
class Accepted:
    """A request of a victim that was answered with a result, as it must be repeated alone."""

    start: bool
    end: bool
    tensors: Mapping[str, Array]
    parameters: Mapping[str, Parameter]
    answer: Results


class Victim:
    """A client whose sequence must say what it says alone, whatever it and others send besides.

    Args:
        model: ``llama`` or ``accumulator``.
        id: its correlation id, which nobody else uses.
        rng: of everything it sends; what it sends does not depend on answers.
    """

    def __init__(self, model: str, id: int | str, rng: random.Random) -> None:
        self.model, self.id, self.rng = model, id, rng
        self.accepted: list[Accepted] = []
        self._length = 0
        self._live = False
        refused = REFUSED if model == "llama" else {name: REFUSED[name] for name in REFUSED if name != "wrong_parameter"}
        self._refused, self._harmless = sorted(refused), sorted(HARMLESS)

    async def run(self, server: Server, requests: int) -> None:
        """Send so many requests, one after another; about a third are damaged and must be refused without a trace."""
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
        end = length + count == CAPACITY or rng.random() < 0.05
        tensors, parameters = self._tensors(count), self._parameters(length)
        request = message(self.model, tensors, self.id, start=start, end=end, parameters=parameters, id=f"good-{rng.random()}")
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
        if self.model == "llama":
            return {"input_ids": np.array([[self.rng.randrange(VOCABULARY) for _ in range(count)]], np.int64)}
        return {"value": np.array([[self.rng.uniform(-1, 1) for _ in range(4)]], np.float32)}

    def _parameters(self, length: int) -> dict[str, Parameter]:
        rng, found = self.rng, dict[str, Parameter]()
        if self.model != "llama":
            return found
        if rng.random() < 0.3:
            found["position"] = length
        if rng.random() < 0.2:
            found["logits"] = rng.choice((True, "true", "1"))
        if rng.random() < 0.4:
            found |= {"temperature": rng.choice(("0.7", "1", 1.5)), "seed": rng.getrandbits(62), "top_k": rng.choice((0, 1, 40))}
            found["top_p"] = rng.choice(("0.9", 1.0, "1"))
        return found


class Lane:
    """A client that fires at ids of others like it: good requests, damaged ones, and some that it cancels."""

    IDS = (1, 2, 3, 4, 5, "1", "2", "naïve ☃", "a" * 127, 2**62)

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    async def run(self, server: Server, requests: int) -> None:
        """Send so many, one after another."""
        rng = self.rng
        for _ in range(requests):
            sequence = rng.choice(self.IDS) if rng.random() < 0.99 else rng.getrandbits(62) | 1 << 61
            start, end = rng.random() < 0.35, rng.random() < 0.25
            model = "llama" if rng.random() < 0.8 else "accumulator"
            tensors: dict[str, Array] = {"value": np.ones((1, 4), np.float32)}
            if model == "llama":
                tensors = {"input_ids": np.array([[rng.randrange(VOCABULARY) for _ in range(rng.choice((1, 1, 2, 12)))]], np.int64)}
            request = message(model, tensors, sequence, start=start, end=end)
            how = damaged(request, rng) if rng.random() < 0.7 else []
            await server.send(request, how, cancel_after=rng.random() * 0.005 if rng.random() < 0.03 else None)
