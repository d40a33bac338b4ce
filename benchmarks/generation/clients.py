"""Clients that generate from a server and take the times: raw gRPC, or HTTP by hand.

They do as little as they can while tokens arrive: what came is read when all of it is there. They
import nothing that takes long.
"""

import asyncio
import json
import random
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc


@dataclass(frozen=True)
class Target:
    """A model on a server.

    Attributes:
        api: ``grpc`` for a stream model of Inplace; ``openai`` for its front end, of which only
            text is asked; ``vllm`` for vLLM's OpenAI server, of which only token ids are.
        url: ``host:port``.
        model: its name there.
        vocabulary: prompts are of tokens below this.
    """

    api: Literal["grpc", "openai", "vllm"]
    url: str
    model: str
    vocabulary: int

    def prompt(self, seed: str, length: int) -> list[int]:
        """Random tokens, the same for the same seed."""
        return random.Random(seed).choices(range(self.vocabulary), k=length)


@dataclass
class TimedGeneration:
    """One generation in Unix seconds.

    Attributes:
        sent: when it was sent.
        responses: the time and the number of tokens of each response.
        late: seconds after the moment at which it should have been sent.
        error: why it was not answered whole; empty if it was.
        prompt, tokens: empty where they are not kept.
    """

    sent: float
    responses: list[tuple[float, int]]
    late: float = 0.0
    error: str = ""
    prompt: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


def grpc_request(target: Target, name: str, prompt: list[int], tokens: int) -> Any:
    """One generation; its slot is free when it finishes."""
    ids = np.array(prompt, np.int64)
    message = pb.ModelInferRequest(model_name=target.model)
    message.inputs.add(name="input_ids", datatype="INT64", shape=[1, len(ids)])
    message.raw_input_contents.append(ids.tobytes())
    message.outputs.add(name="tokens")
    message.parameters["max_tokens"].int64_param = tokens
    message.parameters["ignore_eos"].bool_param = True
    message.parameters["sequence_id"].string_param = name
    message.parameters["sequence_start"].bool_param = True
    message.parameters["sequence_end"].bool_param = True
    return message


def openai_request(target: Target, prompt: list[int], tokens: int) -> bytes:
    """One completion, streamed, as bytes of HTTP."""
    body = {
        "model": target.model,
        "prompt": prompt,
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if target.api == "vllm":
        body["return_token_ids"] = True
    content = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def request_of(target: Target, name: str, prompt: list[int], tokens: int) -> Any:
    """What a client of this target sends for a generation; gRPC needs a name of its own."""
    if target.api == "grpc":
        return grpc_request(target, name, prompt, tokens)
    return openai_request(target, prompt, tokens)


class GrpcClient:
    """One stream of Inplace's protocol, for one generation at a time.

    Args:
        target: the model.
        keeps_tokens: whether generations have their tokens.
    """

    def __init__(self, target: Target, *, keeps_tokens: bool = False) -> None:
        self._keeps_tokens = keeps_tokens
        self._channel = grpc.aio.insecure_channel(target.url)
        self._call = service_pb2_grpc.GRPCInferenceServiceStub(self._channel).ModelStreamInfer()
        self._whole = True

    async def generate(self, request: Any) -> TimedGeneration:
        """Send a request and read its answer.

        Raises:
            RuntimeError: the server refused it.
        """
        generation = TimedGeneration(time.time(), [])
        self._whole, final = False, False
        await self._call.write(request)
        while not final:
            response = await self._call.read()
            if response is grpc.aio.EOF or response.error_message:
                raise RuntimeError(
                    getattr(response, "error_message", "the server closed the stream")
                )
            infer_response = response.infer_response
            generation.responses.append((time.time(), infer_response.outputs[0].shape[1]))
            if self._keeps_tokens:
                raw = infer_response.raw_output_contents[0]
                generation.tokens += np.frombuffer(raw, np.int64).tolist()
            final = infer_response.parameters["triton_final_response"].bool_param
        self._whole = True
        return generation

    async def close(self) -> None:
        """End the stream, and cancel what is not generated whole."""
        if self._whole:
            await self._call.done_writing()
        else:
            self._call.cancel()
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class OpenAIClient:
    """One connection of OpenAI's protocol, for one completion at a time.

    Args:
        target: the model.
        keeps_tokens: whether generations have their tokens, of a server that sends their ids.
    """

    def __init__(self, target: Target, *, keeps_tokens: bool = False) -> None:
        self._target, self._keeps_tokens = target, keeps_tokens
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def generate(self, request: bytes) -> TimedGeneration:
        """Send a request and read its answer.

        Raises:
            RuntimeError: it is not a whole stream.
        """
        if self._streams is None:
            host, _, port = self._target.url.rpartition(":")
            self._streams = await asyncio.open_connection(host, int(port), limit=1 << 20)
        reader, writer = self._streams
        sent = time.time()
        writer.write(request)
        await self._begin(reader)
        events = []
        while (line := await reader.readline()) != b"0\r\n":  # the last chunk of the body
            if line.startswith(b"data: "):
                events.append((time.time(), line))
            elif not line:
                raise RuntimeError("the server closed the connection")
        await reader.readline()
        tokens = token_ids(events) if self._keeps_tokens else []
        return TimedGeneration(sent, responses_of(events), tokens=tokens)

    async def _begin(self, reader: asyncio.StreamReader) -> None:
        """Read the head of an answer, and where it is an error the answer."""
        status = await reader.readline()
        length = 0
        while (line := await reader.readline()).strip():
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        if status.split()[1:2] != [b"200"]:
            raise RuntimeError(f"{status!r}: {await reader.readexactly(length)!r}")

    async def close(self) -> None:
        """Close the connection."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def responses_of(events: list[tuple[float, bytes]]) -> list[tuple[float, int]]:
    """The times and tokens of the events of a completion, with usage at its end.

    Tokens are counted by their ids, where events have them; else by the spaces of the text, as the
    tokenizer of `benchmarks.generation.sources` has it, and the rest is put to the last text.

    Raises:
        RuntimeError: an event is an error, or the stream is not whole.
    """
    responses: list[tuple[float, int]] = []
    total = 0
    for at, line in events:
        if line.startswith(b"data: [DONE]"):
            break
        body = json.loads(line.removeprefix(b"data: "))
        if "error" in body:
            raise RuntimeError(str(body["error"]))
        if usage := body.get("usage"):
            total = usage["completion_tokens"]
        for choice in body.get("choices", ()):
            ids, text = choice.get("token_ids"), choice.get("text")
            tokens = len(ids) if ids is not None else (text or "").count(" ")
            if tokens or text:
                responses.append((at, tokens))
    else:
        raise RuntimeError(f"the stream ended early: {[line for _, line in events[-2:]]}")
    if responses and (missing := total - sum(tokens for _, tokens in responses)):
        at, tokens = responses[-1]
        responses[-1] = (at, tokens + missing)
    return responses


def token_ids(events: list[tuple[float, bytes]]) -> list[int]:
    """The tokens of the events of a completion, of a server that sends their ids."""
    found: list[int] = []
    for _, line in events:
        if line.startswith(b"data: {"):
            for choice in json.loads(line.removeprefix(b"data: ")).get("choices", ()):
                found += choice.get("token_ids") or ()
    return found


def client_of(target: Target, *, keeps_tokens: bool = False) -> GrpcClient | OpenAIClient:
    """A client of a target."""
    kind = GrpcClient if target.api == "grpc" else OpenAIClient
    return kind(target, keeps_tokens=keeps_tokens)


def check_whole(generation: TimedGeneration, tokens: int) -> None:
    """RuntimeError if it has not all tokens."""
    if sum(count for _, count in generation.responses) != tokens:
        raise RuntimeError(f"{generation.responses} arrived; expected {tokens} tokens")


def answer(run: Callable[[Any], Coroutine[Any, Any, list[TimedGeneration]]], load: Any) -> None:
    """Run the part of a load that a process of clients was given, and print what it measured.

    Args:
        run: the load.
        load: its dataclass; the process's argument has the fields as JSON.
    """
    given = json.loads(sys.argv[1])
    given["target"] = Target(**given["target"])
    result = asyncio.run(run(load(**given)))
    print(json.dumps([asdict(generation) for generation in result]))
