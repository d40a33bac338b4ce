"""What clients see when one engine of a model ends while all generate."""

import asyncio
import os
import re
import signal
import time
import urllib.request
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from inplace_builder.tools.tritonserver import TritonServer
from tritonclient.grpc import service_pb2_grpc

from benchmarks.generation.burst import Burst, prompt_of, request

SILENCE = 5.0
"""Seconds without a response after which a generation counts as lost."""

ATTEMPTS = 30
"""How often a new sequence is begun, each time with another id."""


@dataclass
class Asked:
    """One generation: its prompt, its tokens, and the error that ended it."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    error: str = ""


def by_engine(server: TritonServer, model: str, metric: str) -> dict[str, tuple[float, int]]:
    """A metric, and the process of each engine, by its GPU; on the CPU by the instance's name."""
    url = f"http://{server.host}:{server.ports.metrics}/metrics"
    with urllib.request.urlopen(url, timeout=10) as page:
        text = page.read().decode()
    found: dict[str, tuple[float, int]] = {}
    for labels, value in re.findall(rf"^{metric}{{([^}}]*)}} (\S+)$", text, re.MULTILINE):
        of = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if of["model"] == model:
            name = f"GPU {of['gpu']}" if of["gpu"] else of["instance"]
            found[name] = found.get(name, (0.0, 0))[0] + float(value), int(of["process"])
    return found


async def generate(
    stub: Any, burst: Burst, stream: int, name: str, tokens: int, begun: asyncio.Semaphore
) -> Asked:
    """Begin a sequence and generate; it does not end. ``begun`` is released at its first token."""
    message = request(burst, stream, 0)
    message.parameters["sequence_id"].string_param = name
    message.parameters["sequence_end"].bool_param = False
    message.parameters["max_tokens"].int64_param = tokens
    asked = Asked(prompt_of(burst, stream, 0))
    await _collect(stub, message, asked, begun)
    return asked


async def go_on(stub: Any, burst: Burst, name: str, tokens: int) -> Asked:
    """Generate further tokens of a sequence, and end it."""
    message = request(burst, 0, 0)
    message.inputs[0].shape[:] = [1, 0]
    message.raw_input_contents[0] = b""
    message.parameters["sequence_id"].string_param = name
    message.parameters["sequence_start"].bool_param = False
    message.parameters["max_tokens"].int64_param = tokens
    asked = Asked([])
    await _collect(stub, message, asked, asyncio.Semaphore(0))
    return asked


async def _collect(stub: Any, message: Any, asked: Asked, begun: asyncio.Semaphore) -> None:
    call = stub.ModelStreamInfer()
    released = False
    try:
        await call.write(message)
        final = False
        while not final:
            response = await asyncio.wait_for(call.read(), SILENCE)
            if response is grpc.aio.EOF or response.error_message:
                asked.error = getattr(response, "error_message", "") or "the stream was closed"
                break
            answer = response.infer_response
            asked.tokens += np.frombuffer(answer.raw_output_contents[0], np.int64).tolist()
            final = answer.parameters["triton_final_response"].bool_param
            if not released:
                begun.release()
                released = True
    except (grpc.aio.AioRpcError, TimeoutError) as error:
        asked.error = str(error) or f"no response for {SILENCE:g} s"
    if not released:
        begun.release()
    call.cancel()


async def measured(
    server: TritonServer, model: str, burst: Burst, streams: int, tokens: int
) -> tuple[dict[str, Any], list[Asked]]:
    """Kill the process of the last engine while so many sequences generate.

    Args:
        server: has the model on several GPUs.
        model: its name.
        burst: whose prompts are used.
        streams: sequences that generate at the same time.
        tokens: of each.

    Returns:
        What happened, and the generations that were completed.
    """
    async with grpc.aio.insecure_channel(server.grpc_url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        begun = asyncio.Semaphore(0)
        run = f"killed {time.time()}"
        names = [f"{run} {stream}" for stream in range(streams)]
        engines = by_engine(server, model, "inplace_slots")
        victim = max(engines)
        running = [
            asyncio.create_task(generate(stub, burst, stream, name, tokens, begun))
            for stream, name in enumerate(names)
        ]
        for _ in names:
            await begun.acquire()
        os.kill(engines[victim][1], signal.SIGKILL)
        asked = await asyncio.gather(*running)
        survived = [index for index, each in enumerate(asked) if len(each.tokens) == tokens]
        further = await asyncio.gather(*(go_on(stub, burst, names[i], 8) for i in survived))
        new, attempts = [], 0
        for stream in range(streams, 2 * streams):
            for attempt in range(ATTEMPTS):
                attempts += 1
                name = f"{run} {stream} {attempt}"
                one = await generate(stub, burst, stream, name, 8, asyncio.Semaphore(0))
                if not one.error:
                    new.append(one)
                    await go_on(stub, burst, name, 1)
                    break
    errors = sorted({each.error for each in asked if each.error})
    for index, each in zip(survived, further, strict=True):
        asked[index].tokens += each.tokens
    result = {
        "killed": victim,
        "sequences": streams,
        "went_on": len(survived),
        "then_continued": sum(len(each.tokens) == 8 for each in further),
        "lost": streams - len(survived),
        "errors_of_lost": errors[:4],
        "new": streams,
        "new_served": len(new),
        "new_attempts": attempts,
    }
    return result, [asked[index] for index in survived] + new
