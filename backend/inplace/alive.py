"""Liveness check: does every model of a server answer? ``python -m inplace.alive [URL]``.

The exit status is 0 if all do. A server reports a model as ready even if the process behind it
hangs or is gone. So each model of this backend is asked for one step, in a sequence of one request.
Where requests of a stream model wait for a slot, the step waits behind them; so it is followed by a
request that must be refused, which the same thread does between two steps. A generate proxy gets an
invalid request, which it refuses by itself. Every answer of the backend counts, also that all slots
are taken, but not that the engine failed. If a model has several instances, Triton chooses which
one is asked.
"""

import argparse
import queue
import secrets
import sys
import time
from contextlib import ExitStack
from typing import Any, Self

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput, model_config_pb2
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from inplace.errors import Code
from inplace.protocol import POSITION
from inplace.server.settings import GENERATE_PROXY, SERVE

BACKEND = "inplace"


TIMEOUT = 15.0
"""Default timeout in seconds."""


STEP_TIMEOUT = 2.0
"""Seconds for which the step is waited for once the request after it was refused."""


NO_POSITION = 1
"""A position that no new sequence has: a START with it is refused."""


def failures(url: str, timeout: float = TIMEOUT) -> dict[str, str]:
    """Ask every loaded model of this backend for a step.

    Args:
        url: ``host:port`` of the server's gRPC endpoint.
        timeout: seconds until all models must have answered.

    Returns:
        The models that did not answer, with the reason; ``"server"`` if it is the server itself.
    """
    deadline = time.monotonic() + timeout
    try:
        with InferenceServerClient(url) as client:
            index = client.get_model_repository_index(client_timeout=timeout).models
            ready = sorted({model.name for model in index if model.state == "READY"})
            configs = [
                client.get_model_config(name, client_timeout=timeout).config for name in ready
            ]
    except InferenceServerException as error:
        return {"server": str(error)}
    with ExitStack() as stack:
        # All requests are sent at once: one model may hang until the deadline.
        probes = {
            config.name: stack.enter_context(_Probe(url, config))
            for config in configs
            if config.backend == BACKEND
        }
        reasons = {name: probe.failure(deadline, timeout) for name, probe in probes.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def is_alive(error: str) -> bool:
    """Whether a model that answers with this error is alive.

    A failed engine is not: it may fail in every step.
    """
    return "INPLACE-" in error and f"INPLACE-{Code.ENGINE_FAILED}" not in error


class _Probe:
    """Requests to a model, on a stream: decoupled models answer only there, others there too."""

    def __init__(self, url: str, config: Any) -> None:
        self._client = InferenceServerClient(url)
        self._answers: queue.SimpleQueue[InferenceServerException | None] = queue.SimpleQueue()
        self._client.start_stream(lambda result, error: self._answers.put(error))
        try:
            for request in _requests(config):
                self._client.async_stream_infer(config.name, _inputs(config), **request)
        except InferenceServerException as error:  # the stream broke at once
            self._answers.put(error)

    def failure(self, deadline: float, timeout: float) -> str | None:
        """Why the model did not answer; None if it did."""
        refuses = False
        while True:
            try:
                error = self._answers.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return None if refuses else f"no answer within {timeout:g} s"
            if error is None or not _is_of_position(str(error)):
                return None if error is None or is_alive(str(error)) else str(error)
            refuses = True
            deadline = min(deadline, time.monotonic() + STEP_TIMEOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.stop_stream(cancel_requests=True)
        self._client.close()


def _is_of_position(error: str) -> bool:
    """Whether an error answers the request that must be refused."""
    return f"INPLACE-{Code.POSITION} " in error


def _requests(config: Any) -> list[dict[str, Any]]:
    """What tells the requests to a model apart, in order."""
    if _is_generate_proxy(config):
        return [{}]
    is_stream = config.model_transaction_policy.decoupled
    others = [{"parameters": {POSITION: NO_POSITION}}] if is_stream else []
    return [
        {
            "sequence_id": secrets.randbits(62) + 1,
            "sequence_start": True,
            "sequence_end": True,
            **each,
        }
        for each in ({}, *others)
    ]


def _is_generate_proxy(config: Any) -> bool:
    return SERVE in config.parameters and config.parameters[SERVE].string_value == GENERATE_PROXY


def _inputs(config: Any) -> list[InferInput]:
    """The inputs of the smallest step: zeros, without the texts."""
    inputs = []
    for spec in config.input:
        dtype = model_config_pb2.DataType.Name(spec.data_type).removeprefix("TYPE_")
        if dtype == "STRING":
            continue
        shape = [1, *(max(extent, 1) for extent in spec.dims)]
        tensor = InferInput(spec.name, shape, dtype)
        tensor.set_data_from_numpy(np.zeros(shape, triton_to_np_dtype(dtype)))
        inputs.append(tensor)
    return inputs


def main() -> int:
    """Print the models that do not answer to standard error; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m inplace.alive",
        description="Check that every model of a server answers.",
    )
    parser.add_argument(
        "url", nargs="?", default="127.0.0.1:8001", help="host:port of the gRPC endpoint"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT,
        help="seconds until every model must have answered",
    )
    arguments = parser.parse_args()
    reasons = failures(arguments.url, arguments.timeout)
    for name, reason in reasons.items():
        print(f"{name}: {reason}", file=sys.stderr)
    return 1 if reasons else 0


if __name__ == "__main__":
    sys.exit(main())
