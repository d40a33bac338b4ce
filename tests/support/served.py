"""A tiny Llama that generates, and an accumulator, over raw gRPC and HTTP."""

import json
import queue
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from inplace_builder.served.options import BuildOptions
from inplace_builder.tools.tritonserver import TritonServer
from transformers import LlamaForCausalLM
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput

MODEL = "llama_stream"
SLOTS, CAPACITY, CHUNK = 8, 256, 16
OPTIONS = BuildOptions(
    slots=SLOTS,
    max_rows=SLOTS,
    capacity=CAPACITY,
    chunk=CHUNK,
    serve="stream",
    prompt_logprobs=True,
)
OUTPUTS = ("tokens", "text_output", "finish_reason")
Parameter = str | int | bool


@dataclass(frozen=True)
class Served:
    server: TritonServer
    llama: LlamaForCausalLM

    @property
    def generate_url(self) -> str:
        """Of HTTP generations, which the generate proxy serves."""
        port = self.server.ports.http
        return f"http://127.0.0.1:{port}/v2/models/{MODEL}_generate/generate_stream"

    def events(self, **body: object) -> list[dict[str, Any]]:
        """The events of one HTTP generate_stream request."""
        body = {"stream": True, **body}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self.generate_url, json.dumps(body).encode()), timeout=60
            ) as page:
                lines = page.read().decode().splitlines()
        except urllib.error.HTTPError as error:  # refused before the first event
            lines = error.read().decode().splitlines()
        return [json.loads(line.removeprefix("data: ")) for line in lines if line]


@dataclass
class Answer:
    """All responses of one request, or its error's text."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    reason: str = ""
    step: Any = None
    error: str = ""


class Stream:
    """One gRPC stream, one request at a time."""

    def __init__(self, served: Served, model: str = MODEL) -> None:
        self._model = model
        self._client = InferenceServerClient(served.server.grpc_url)
        self._answers: queue.Queue[Any] = queue.Queue()
        self._client.start_stream(lambda result, error: self._answers.put((result, error)))

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.stop_stream()
        self._client.close()

    def ask(
        self,
        sequence: int | str,
        ids: list[int] | str,
        *,
        stop: tuple[str, ...] = (),
        start: bool = True,
        end: bool = False,
        **parameters: Parameter,
    ) -> Answer:
        inputs = [bytes_input("text", [ids])] if isinstance(ids, str) else [ids_input(ids)]
        if stop:
            inputs.append(bytes_input("stop", list(stop)))
        names = OUTPUTS if "max_tokens" in parameters else ("next_token",)
        return self.send(inputs, names, sequence, start, end, parameters)

    def send(
        self,
        inputs: list[InferInput],
        names: tuple[str, ...],
        sequence: int | str,
        start: bool,
        end: bool,
        parameters: dict[str, Parameter],
    ) -> Answer:
        self._client.async_stream_infer(
            self._model,
            inputs,
            outputs=[InferRequestedOutput(name) for name in names],
            sequence_id=sequence,
            sequence_start=start,
            sequence_end=end,
            parameters=dict(parameters) or None,
        )
        answer = Answer()
        while True:
            result, error = self._answers.get(timeout=60)
            if error is not None:
                answer.error = error.message()
                return answer
            for output in result.get_response().outputs:
                value = result.as_numpy(output.name)[0]
                if output.name == "tokens":
                    answer.tokens += value.tolist()
                elif output.name == "text_output":
                    answer.text += value[0].decode()
                elif output.name == "finish_reason":
                    answer.reason = value[0].decode()
                elif output.name == "next_token":
                    answer.step = int(value[0])
                else:
                    answer.step = value.tolist()
            if result.get_response().parameters["triton_final_response"].bool_param:
                return answer


def ids_input(ids: list[int]) -> InferInput:
    tensor = InferInput("input_ids", [1, len(ids)], "INT64")
    tensor.set_data_from_numpy(np.array([ids], dtype=np.int64).reshape(1, len(ids)))
    return tensor


def bytes_input(name: str, texts: list[str]) -> InferInput:
    tensor = InferInput(name, [1, len(texts)], "BYTES")
    tensor.set_data_from_numpy(np.array([[text.encode() for text in texts]], dtype=object))
    return tensor
