"""Whether every model of a server still answers: ``python -m inplace.alive [URL]``, exit status 0 if so. For liveness probes.

A server says that a model is ready also when the process behind it hangs or is gone, so this asks each model of this backend for one
step, on a sequence that starts and ends with it, and each front for nothing, which it refuses by itself. Any answer of the backend will do,
one that every slot is taken too, but not that its engine failed. Of several instances of a model the one is asked that Triton chooses.
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

BACKEND, SERVE, FRONT = (
    "inplace",
    "serve",
    "front",
)  # as in `inplace.server.settings`, which takes seconds to import


FAILED = "INPLACE-ENGINE_FAILED"


TIMEOUT = 15.0


def failures(url: str, timeout: float = TIMEOUT) -> dict[str, str]:
    """Ask every loaded model of this backend for a step.

    Args:
        url: ``host:port`` of the server's gRPC endpoint.
        timeout: seconds until all must have answered.

    Returns:
        The models that did not answer, and why; ``"server"`` where it is the server itself.
    """
    until = time.monotonic() + timeout
    try:
        with InferenceServerClient(url) as client:
            index = client.get_model_repository_index(client_timeout=timeout).models
            ready = sorted({model.name for model in index if model.state == "READY"})
            configs = [
                client.get_model_config(name, client_timeout=timeout).config for name in ready
            ]
    except InferenceServerException as error:
        return {"server": str(error)}
    asked = [config for config in configs if config.backend == BACKEND]
    with ExitStack() as stack:
        questions = {
            config.name: stack.enter_context(_Question(url, config)) for config in asked
        }  # all at once: one may hang
        found = {name: question.failure(until, timeout) for name, question in questions.items()}
    return {name: why for name, why in found.items() if why is not None}


def _is_front(config: Any) -> bool:
    """It knows no sequences, and has no engine of its own."""
    return SERVE in config.parameters and config.parameters[SERVE].string_value == FRONT


def lives(error: str) -> bool:
    """Whether it is an answer of the backend to be refused so; that its engine failed is none, for it may fail for ever."""
    return "INPLACE-" in error and FAILED not in error


class _Question:
    """A step that a model is asked for, on a stream: a decoupled model answers nowhere else, others there too."""

    def __init__(self, url: str, config: Any) -> None:
        self._client = InferenceServerClient(url)
        self._answers: queue.SimpleQueue[InferenceServerException | None] = queue.SimpleQueue()
        self._client.start_stream(lambda result, error: self._answers.put(error))
        try:
            flags = (
                {}
                if _is_front(config)
                else {
                    "sequence_id": secrets.randbits(62) + 1,
                    "sequence_start": True,
                    "sequence_end": True,
                }
            )
            self._client.async_stream_infer(config.name, _inputs(config), **flags)
        except InferenceServerException as error:  # the stream broke at once
            self._answers.put(error)

    def failure(self, until: float, timeout: float) -> str | None:
        """Why the model did not answer; None if it did."""
        try:
            error = self._answers.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            return f"no answer within {timeout:g} s"
        return None if error is None or lives(str(error)) else str(error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.stop_stream(cancel_requests=True)
        self._client.close()


def _inputs(config: Any) -> list[InferInput]:
    """The smallest step: zeros; texts are left out."""
    found = []
    for spec in config.input:
        dtype = model_config_pb2.DataType.Name(spec.data_type).removeprefix("TYPE_")
        if dtype == "STRING":
            continue
        shape = [1, *(max(extent, 1) for extent in spec.dims)]
        tensor = InferInput(spec.name, shape, dtype)
        tensor.set_data_from_numpy(np.zeros(shape, triton_to_np_dtype(dtype)))
        found.append(tensor)
    return found


def main() -> int:
    """Entry point; says on standard error what did not answer."""
    parser = argparse.ArgumentParser(
        prog="python -m inplace.alive", description=__doc__.partition("\n")[0]
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
    found = failures(arguments.url, arguments.timeout)
    for name, why in found.items():
        print(f"{name}: {why}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
