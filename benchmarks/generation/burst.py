"""Streams that begin at one moment and generate a fixed number of times: one client process.

``python -m benchmarks.generation.burst JSON`` prints, for each generation, when it was sent, and
when how many tokens arrived. It speaks raw gRPC.
"""

import asyncio
import json
import random
import sys
import time
from dataclasses import asdict, dataclass, field
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
        keeps_tokens: whether prompts and generated tokens are returned.
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
    keeps_tokens: bool = False


@dataclass
class TimedGeneration:
    """One generation in Unix seconds; ``responses`` has the time and the tokens of each.

    ``prompt`` and ``tokens`` are empty where they are not kept.
    """

    sent: float
    responses: list[tuple[float, int]]
    prompt: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


def prompt_of(burst: Burst, stream: int, round_index: int) -> list[int]:
    """Random tokens, the same in every run."""
    source = random.Random(f"{stream} {round_index}")
    return source.choices(range(burst.vocabulary), k=burst.prompt)


def request(burst: Burst, stream: int, round_index: int) -> Any:
    """One generation, its slot freed when it finishes."""
    ids = np.array(prompt_of(burst, stream, round_index), np.int64)
    message = pb.ModelInferRequest(model_name=burst.model)
    message.inputs.add(name="input_ids", datatype="INT64", shape=[1, len(ids)])
    message.raw_input_contents.append(ids.tobytes())
    message.outputs.add(name="tokens")
    message.parameters["max_tokens"].int64_param = burst.tokens
    message.parameters["ignore_eos"].bool_param = True
    message.parameters["sequence_id"].string_param = f"burst {burst.begin} {stream} {round_index}"
    message.parameters["sequence_start"].bool_param = True
    message.parameters["sequence_end"].bool_param = True
    return message


async def run(burst: Burst, stub: Any, stream: int) -> list[TimedGeneration]:
    """The generations of one stream."""
    generations = []
    call = stub.ModelStreamInfer()
    messages = [request(burst, stream, round_index) for round_index in range(burst.rounds)]
    await asyncio.sleep(max(0.0, burst.begin - time.time()))
    for round_index, message in enumerate(messages):
        prompt = prompt_of(burst, stream, round_index) if burst.keeps_tokens else []
        generation = TimedGeneration(time.time(), [], prompt)
        await call.write(message)
        final = False
        while not final:
            response = await call.read()
            if response is grpc.aio.EOF or response.error_message:
                raise RuntimeError(
                    getattr(response, "error_message", "the server closed the stream")
                )
            infer_response = response.infer_response
            generation.responses.append((time.time(), infer_response.outputs[0].shape[1]))
            if burst.keeps_tokens:
                raw = infer_response.raw_output_contents[0]
                generation.tokens += np.frombuffer(raw, np.int64).tolist()
            final = infer_response.parameters["triton_final_response"].bool_param
        if sum(tokens for _, tokens in generation.responses) != burst.tokens:
            raise RuntimeError(
                f"stream {stream} received {generation.responses}; expected {burst.tokens} tokens"
            )
        generations.append(generation)
    await call.done_writing()
    return generations


async def main(burst: Burst) -> list[TimedGeneration]:
    """All streams of this process."""
    async with grpc.aio.insecure_channel(burst.url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        streams = range(burst.first, burst.first + burst.streams)
        generations = await asyncio.gather(*(run(burst, stub, stream) for stream in streams))
    return [generation for stream in generations for generation in stream]


if __name__ == "__main__":
    print(
        json.dumps(
            [
                asdict(generation)
                for generation in asyncio.run(main(Burst(**json.loads(sys.argv[1]))))
            ]
        )
    )
