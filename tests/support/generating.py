"""Generations over raw gRPC streams, without a client library."""

import queue
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput, InferResult
from tritonclient.utils import InferenceServerException

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from support.engines import Engines

CAPACITY, ENDLESS = 8000, 7900
"""Of the models of `long_stream`, and tokens of a generation that outlasts a test."""
# as `support.streams.prompt`, which imports PyTorch
PROMPT = random.Random(1).choices(range(512), k=20)
SOON = 4.0
"""Seconds; without other load a slot is free within 0.2."""
Parameter = str | int | bool
OUTPUTS = {True: ("tokens", "finish_reason"), False: ("next_token",)}
"""What is asked for, by whether the request is a generation."""


@dataclass
class Output:
    """What one or more responses of a generation brought.

    Attributes:
        tokens: in order.
        reason: why it finished; empty while it runs.
        error: the text of an error.
    """

    tokens: list[int]
    reason: str = ""
    error: str = ""

    @property
    def finished(self) -> bool:
        return bool(self.reason or self.error)


class GrpcStream:
    """One gRPC stream on a connection of its own; a context manager that drops it."""

    def __init__(
        self,
        url: str,
        model: str,
        client: InferenceServerClient | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.client, self.model = client or InferenceServerClient(url), model
        self._answers: queue.SimpleQueue[
            tuple[InferResult | None, InferenceServerException | None]
        ] = queue.SimpleQueue()
        self.client.start_stream(
            lambda result, error: self._answers.put((result, error)), headers=headers
        )

    def send(
        self,
        sequence: int | str,
        ids: list[int],
        max_tokens: int = 0,
        *,
        start: bool = False,
        end: bool = False,
        **parameters: Parameter,
    ) -> None:
        """A generation, where ``max_tokens`` is given, else a step."""
        tensor = InferInput("input_ids", [1, len(ids)], "INT64")
        tensor.set_data_from_numpy(np.array([ids], dtype=np.int64))
        if max_tokens:
            parameters = {"max_tokens": max_tokens, "ignore_eos": True, **parameters}
        outputs = [InferRequestedOutput(name) for name in OUTPUTS[bool(max_tokens)]]
        self.client.async_stream_infer(
            self.model,
            [tensor],
            sequence_id=sequence,
            sequence_start=start,
            sequence_end=end,
            outputs=outputs,
            parameters=parameters or None,
        )

    def receive(self, timeout: float = 60.0) -> Output:
        """The next response. Raises queue.Empty where none comes."""
        result, error = self._answers.get(timeout=timeout)
        if result is None:
            return Output([], error=str(error))
        if (step := result.as_numpy("next_token")) is not None:
            return Output(step[0].tolist(), reason="step")
        if (tokens := result.as_numpy("tokens")) is None:
            return Output([], reason="step")  # of an END that brings nothing
        return Output(tokens[0].tolist(), result.as_numpy("finish_reason")[0, 0].decode())

    @property
    def num_pending(self) -> int:
        """How many responses have arrived and were not received yet."""
        return self._answers.qsize()

    def collect(self, tokens: int = 1 << 60, timeout: float = 60.0) -> Output:
        """One request's responses, until there are so many tokens or it is over."""
        collected = Output([])
        while len(collected.tokens) < tokens and not collected.finished:
            generated = self.receive(timeout)
            collected = Output(
                collected.tokens + generated.tokens, generated.reason, generated.error
            )
        return collected

    def request(self, *arguments: object, **parameters: object) -> Output:
        """`send` and `collect`."""
        self.send(*arguments, **parameters)  # type: ignore[arg-type]
        return self.collect()

    def drop(self) -> None:
        """Vanish: everything under way is cancelled."""
        self.client.stop_stream(cancel_requests=True)

    def __enter__(self) -> "GrpcStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()
        self.client.close()


def seconds_until(true: Callable[[], bool], limit: float = 60.0) -> float:
    begin = time.monotonic()
    while not true():
        assert time.monotonic() - begin < limit
        time.sleep(0.005)
    return time.monotonic() - begin


def long_stream(engines: "Engines", slots: int) -> tuple["LlamaForCausalLM", Path]:
    """A random Llama, and a stream model of it whose sequences have room for `ENDLESS` tokens."""
    # Not above: a client that tests kill imports this module, and should start quickly.
    from inplace_builder.served.decoder import build_decoder
    from inplace_builder.served.options import BuildOptions
    from transformers import LlamaForCausalLM

    from support.vocabulary import llama_with_tokenizer

    def save(folder: Path) -> None:
        llama_with_tokenizer(folder, max_position_embeddings=CAPACITY)

    source = engines.get("long-llama", save)
    options = BuildOptions(slots=slots, max_rows=slots, capacity=CAPACITY, chunk=32, serve="stream")
    path = engines.get(
        f"long-stream-{slots}", lambda path: build_decoder(source, path / "long", options)
    )
    return LlamaForCausalLM.from_pretrained(source).eval(), path / "long"
