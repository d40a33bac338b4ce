"""Accumulators over raw gRPC, their stub processes and their settings."""

import contextlib
import os
import queue
import time
from collections.abc import Callable

import numpy as np
import psutil
from inplace.server.settings import IDLE_TIMEOUT
from inplace_builder.tools.tritonserver import TritonServer
from tritonclient.grpc import InferenceServerClient, InferInput, InferResult
from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.utils import InferenceServerException

SLOTS = 4
FORGOTTEN = "must specify the START flag"
"""Triton's error for a sequence that it does not know."""
BLANK = "(neither outputs nor an error text)"
"""Its answer over a stream for a request that it cancelled by itself."""

Answer = tuple[float, int] | str
"""Of an accumulator: its sum and how many values it holds; or the text of the error."""


def idle_after(config: pb.ModelConfig, seconds: float) -> None:
    config.sequence_batching.max_sequence_idle_microseconds = int(seconds * 1e6)
    config.parameters[IDLE_TIMEOUT].string_value = str(seconds)


def _value(value: float) -> list[InferInput]:
    tensor = InferInput("value", [1, 4], "FP32")
    tensor.set_data_from_numpy(np.full((1, 4), value, np.float32))
    return [tensor]


def _sum(result: InferResult) -> tuple[float, int]:
    return float(result.as_numpy("sum")[0, 0]), int(result.as_numpy("values")[0, 0])


def add(
    client: InferenceServerClient,
    model: str,
    sequence: int | str,
    value: float,
    *,
    start: bool = False,
    end: bool = False,
    timeout: float = 60.0,
    **parameters: str | int | bool,
) -> Answer:
    """One unary request."""
    try:
        result = client.infer(
            model,
            _value(value),
            sequence_id=sequence,
            sequence_start=start,
            sequence_end=end,
            client_timeout=timeout,
            parameters=parameters or None,
        )
    except InferenceServerException as error:
        return f"{error.status()} {error.message()}"
    return _sum(result)


class Stream:
    """One gRPC stream, on a connection of its own; a context manager that closes it."""

    def __init__(self, url: str) -> None:
        self.client = InferenceServerClient(url)
        self._answers: queue.SimpleQueue[
            tuple[InferResult | None, InferenceServerException | None]
        ] = queue.SimpleQueue()
        self.client.start_stream(lambda result, error: self._answers.put((result, error)))

    def send(
        self,
        model: str,
        sequence: int | str,
        value: float,
        *,
        start: bool = False,
        end: bool = False,
        **parameters: str | int | bool,
    ) -> None:
        self.client.async_stream_infer(
            model,
            _value(value),
            sequence_id=sequence,
            sequence_start=start,
            sequence_end=end,
            parameters=parameters or None,
        )

    def receive(self, timeout: float = 60.0) -> Answer:
        """The next answer. Raises queue.Empty where none comes."""
        result, error = self._answers.get(timeout=timeout)
        if result is None:
            return str(error)
        return _sum(result) if result.get_response().outputs else BLANK

    def drop(self) -> None:
        """Vanish: everything under way is cancelled."""
        self.client.stop_stream(cancel_requests=True)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()
        self.client.close()


def stubs(server: TritonServer, model: str) -> list[int]:
    """Process ids of the Python stubs in which this server runs a model."""
    assert server.process is not None
    outcome = []
    for child in psutil.Process(server.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended while we looked
            command = child.cmdline()
            if any("triton_python_backend_stub" in part for part in command[:1]) and any(
                f"/{model}/" in part for part in command
            ):
                outcome.append(child.pid)
    return outcome


def stub(server: TritonServer, model: str) -> int:
    (only,) = stubs(server, model)
    return only


def gone(process: int) -> bool:
    return not psutil.pid_exists(process)


def eventually(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)


def kill(process: int, signal: int) -> None:
    os.kill(process, signal)


def state(client: InferenceServerClient, model: str) -> str:
    """Of a model in the server's repository index: READY, UNLOADING, UNAVAILABLE."""
    return next(
        str(entry.state)
        for entry in client.get_model_repository_index().models
        if entry.name == model
    )
