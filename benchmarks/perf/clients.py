"""The load generator's clients: one process of them, as raw gRPC.

It prints what it measured as one line of JSON. perf_analyzer does the same where it runs; this one
runs wherever ``tritonclient`` does. It imports nothing that takes long.
"""

import asyncio
import itertools
import json
import secrets
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import triton_to_np_dtype

Mode = Literal["unary", "stream", "generate"]


@dataclass(frozen=True)
class Load:
    """What one process of clients does.

    Attributes:
        url: the server's gRPC endpoint.
        model: its name there.
        mode: ``unary`` steps, steps over a ``stream`` of each client, or to ``generate``.
        sequences: clients, each with one live sequence at a time.
        begin: Unix time at which all processes begin.
        seconds: how long they measure, after ``warm_up`` seconds that they do not.
        input_data: a file in perf_analyzer's format; one inner list is one sequence.
        rate: requests a second of all these clients together; None sends the next request when the
            last is answered.
        max_tokens: tokens of a generation.
        output: the output that a step asks for.
        parameters: of every request.
    """

    url: str
    model: str
    mode: Mode
    sequences: int
    begin: float
    seconds: float
    input_data: str
    rate: float | None = None
    max_tokens: int = 64
    warm_up: float = 1.0
    output: str = "next_token"
    parameters: dict[str, int] = field(default_factory=dict)


@dataclass
class Measured:
    """Seconds, of everything that was answered in the measured time.

    Attributes:
        latencies: from when a request was due until its (last) response.
        first: from a generation's request until its first token.
        gaps: between two responses of a generation, divided by the tokens of the later one; one
            entry a token.
        tokens: how many were returned.
        refused: requests that were answered with an error; the first text.
    """

    latencies: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    refused: int = 0
    error: str = ""


class Client:
    """One live sequence at a time, from the lists of the input file in order."""

    def __init__(
        self,
        load: Load,
        number: int,
        stub: Any,
        sequences: list[list[dict[str, Any]]],
        measured: Measured,
    ) -> None:
        self.load, self.number, self.stub, self.measured = load, number, stub, measured
        self.sequences = sequences[number % len(sequences) :] + sequences[: number % len(sequences)]
        offset = time.time() - time.perf_counter()
        self.begin = load.begin - offset  # by the clock that is measured with
        self.since = self.begin + load.warm_up
        self.until = self.since + load.seconds

    async def run(self) -> None:
        """Sequence after sequence until the time is over; the last one is ended."""
        await asyncio.sleep(max(0.0, self.begin - time.perf_counter()))
        due = self._due()
        if self.load.mode == "unary":
            for request in self._requests():
                await self._one(next(due), self._answered(request))
        else:
            await self._over_stream(due)

    def _due(self) -> Iterator[float | None]:
        """When each request is due; None: at once."""
        if self.load.rate is None:
            return itertools.repeat(None)
        between = self.load.sequences / self.load.rate
        return (
            self.begin + (count + self.number / self.load.sequences) * between
            for count in itertools.count()
        )

    def _requests(self) -> Iterator[Any]:
        for sequence in itertools.cycle(self.sequences):
            name = secrets.token_hex(8)
            for count, item in enumerate(sequence):
                over = time.perf_counter() > self.until
                if over and count == 0:
                    return
                yield self._request(
                    item, name, start=count == 0, end=count == len(sequence) - 1 or over
                )
                if over:
                    return

    def _request(self, item: dict[str, Any], sequence: str, *, start: bool, end: bool) -> Any:
        request = pb.ModelInferRequest(model_name=self.load.model)
        for name, tensor in item.items():
            datatype = tensor.get("datatype", "INT64")
            request.inputs.add(name=name, datatype=datatype, shape=[1, *tensor["shape"]])
            content = np.array(tensor["content"], triton_to_np_dtype(datatype))
            request.raw_input_contents.append(content.tobytes())
        request.outputs.add(name="tokens" if self.load.mode == "generate" else self.load.output)
        for name, value in self.load.parameters.items():
            request.parameters[name].int64_param = value
        if self.load.mode == "generate":
            request.outputs.add(name="finish_reason")
            request.parameters["max_tokens"].int64_param = self.load.max_tokens
            request.parameters["ignore_eos"].bool_param = True
        request.parameters["sequence_id"].string_param = sequence
        request.parameters["sequence_start"].bool_param = start
        request.parameters["sequence_end"].bool_param = end
        return request

    async def _answered(self, request: Any) -> AsyncIterator[int]:
        """One token, when it is answered."""
        await self.stub.ModelInfer(request, timeout=120)
        yield 1

    async def _over_stream(self, due: Iterator[float | None]) -> None:
        call = self.stub.ModelStreamInfer()
        for request in self._requests():
            await self._one(next(due), self._streamed(call, request))
        await call.done_writing()

    async def _streamed(self, call: Any, request: Any) -> AsyncIterator[int]:
        """The tokens of each answer, up to the final one."""
        await call.write(request)
        while True:
            response = await call.read()
            if response is grpc.aio.EOF:
                raise ValueError("the server closed the stream")
            if response.error_message:
                raise ValueError(response.error_message)
            infer_response = response.infer_response
            yield sum(
                output.shape[1]
                for output in infer_response.outputs
                if output.name in ("tokens", "next_token")
            )
            if infer_response.parameters["triton_final_response"].bool_param:
                return

    async def _one(self, due: float | None, answers: AsyncIterator[int]) -> None:
        """Wait until it is due, send it, and take the times of its answers."""
        if due is not None:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
        begin = last = due if due is not None else time.perf_counter()
        seen: list[tuple[float, int]] = []
        try:
            async for tokens in answers:
                seen.append((time.perf_counter(), tokens))
        except (grpc.aio.AioRpcError, ValueError) as error:
            self.measured.refused += 1
            self.measured.error = self.measured.error or str(error)
            await asyncio.sleep(0.01)
            return
        if not (self.since <= seen[-1][0] <= self.until):
            return
        self.measured.latencies.append(seen[-1][0] - begin)
        for at, tokens in seen:
            self.measured.tokens += tokens
            if last == begin:
                self.measured.first.append(at - begin)
            elif tokens:
                self.measured.gaps += [(at - last) / tokens] * tokens
            last = at


async def drive(load: Load) -> Measured:
    """Run the clients of this process."""
    with open(load.input_data) as file:  # noqa: PTH123
        sequences = json.load(file)["data"]
    measured = Measured()
    async with grpc.aio.insecure_channel(load.url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        await asyncio.gather(
            *(
                Client(load, number, stub, sequences, measured).run()
                for number in range(load.sequences)
            )
        )
    return measured


if __name__ == "__main__":
    print(json.dumps(asdict(asyncio.run(drive(Load(**json.loads(sys.argv[1])))))))
