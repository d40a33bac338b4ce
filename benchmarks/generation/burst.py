"""Streams that all begin at one moment and generate a fixed number of times: one process of clients, as raw gRPC.

``python -m benchmarks.generation.burst JSON`` prints, for each generation, when it was sent and when how many tokens came.
"""

import asyncio
import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc


@dataclass(frozen=True)
class Burst:
    """What one process of clients does.

    Attributes:
        url, model: the server's gRPC endpoint, and the stream model there.
        first, streams: numbers of its streams; each has prompts of its own.
        begin: Unix time at which all streams of all processes begin.
        rounds: generations of each stream, one after the other.
        prompt, tokens: tokens of a prompt, and of a generation.
        vocabulary: prompts are of tokens below this.
    """

    url: str
    model: str
    first: int
    streams: int
    begin: float
    rounds: int
    prompt: int
    tokens: int
    vocabulary: int


@dataclass
class Heard:
    """One generation: Unix times, in seconds; ``responses`` is when each came and how many tokens it had."""

    sent: float
    responses: list[tuple[float, int]]


def request(burst: Burst, stream: int, turn: int) -> Any:
    """One generation, its slot freed when it finishes."""
    ids = np.array(
        random.Random(f"{stream} {turn}").choices(range(burst.vocabulary), k=burst.prompt), np.int64
    )
    message = pb.ModelInferRequest(model_name=burst.model)
    message.inputs.add(name="input_ids", datatype="INT64", shape=[1, len(ids)])
    message.raw_input_contents.append(ids.tobytes())
    message.outputs.add(name="tokens")
    message.parameters["max_tokens"].int64_param = burst.tokens
    message.parameters["ignore_eos"].bool_param = True
    message.parameters["sequence_id"].string_param = f"burst {burst.begin} {stream} {turn}"
    message.parameters["sequence_start"].bool_param = True
    message.parameters["sequence_end"].bool_param = True
    return message


async def run(burst: Burst, stub: Any, stream: int) -> list[Heard]:
    """The generations of one stream."""
    found = []
    call = stub.ModelStreamInfer()
    messages = [request(burst, stream, turn) for turn in range(burst.rounds)]
    await asyncio.sleep(max(0.0, burst.begin - time.time()))
    for message in messages:
        heard = Heard(time.time(), [])
        await call.write(message)
        final = False
        while not final:
            response = await call.read()
            if response is grpc.aio.EOF or response.error_message:
                raise RuntimeError(
                    getattr(response, "error_message", "the server closed the stream")
                )
            answer = response.infer_response
            heard.responses.append((time.time(), answer.outputs[0].shape[1]))
            final = answer.parameters["triton_final_response"].bool_param
        if sum(tokens for _, tokens in heard.responses) != burst.tokens:
            raise RuntimeError(
                f"stream {stream} was sent {heard.responses}, which are not {burst.tokens} tokens"
            )
        found.append(heard)
    await call.done_writing()
    return found


async def main(burst: Burst) -> list[Heard]:
    """All streams of this process."""
    async with grpc.aio.insecure_channel(burst.url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        streams = range(burst.first, burst.first + burst.streams)
        found = await asyncio.gather(*(run(burst, stub, stream) for stream in streams))
    return [heard for stream in found for heard in stream]


if __name__ == "__main__":
    print(
        json.dumps([asdict(heard) for heard in asyncio.run(main(Burst(**json.loads(sys.argv[1]))))])
    )
