"""The front of a stream model: each request is a sequence of its own, for clients that cannot name one (Triton's HTTP generate).

Part of the border to Triton.
"""

import json
import logging
import secrets
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from inplace.errors import Code, RequestError, backend_failure
from inplace.protocol import FETCH, FINISH_REASON, MAX_TOKENS, POSITION, SEQUENCE_KEY
from inplace.runtime.observer import log_line
from inplace.schema.proxy import ProxyFile
from inplace.server.channel import FLAG_END, FLAG_START, refusal

PERIOD = 0.03
"""Seconds between two questions whether a client is still there."""


UNANSWERED, FETCHING = 16, 8
"""Requests to the stream model that have had no response yet, at most: generations to begin, and those that fetch what was said. With 32 of
them nothing that this process says was sent any more, nor any END: each holds one of the Python backend's threads until its first
response (Triton 24.10)."""


ENDERS = 4
"""Threads that end sequences whose clients have left: an END is answered between two steps."""


KEPT = 1.0
"""Seconds for which responses are kept. Triton's iterator of them is freed by a thread that does not hold Python's lock (24.10,
``SendCleanupId``), and with it, were it the last to know them, the arrays of its responses: two threads would count references at once."""


OWN = (SEQUENCE_KEY, POSITION, FETCH)
"""Parameters that only whoever names a sequence may set."""


log = logging.getLogger("inplace")


class GenerateProxy:
    """Starts a sequence of the stream model for each request, passes its generation on, and ends it.

    Cancellation does not cross requests that a backend makes, so a thread asks for it here and ends the sequence and thereby the
    generation.

    Args:
        args: what Triton hands to ``initialize``.

    Raises:
        LoadError: the front's file is missing or damaged.
    """

    def __init__(self, args: dict[str, str]) -> None:
        file = ProxyFile.load(Path(args["model_repository"]) / args["model_version"])
        self._model = file.model
        self._most = file.max_requests
        self._running: dict[int, _Relay] = {}
        self._kept = _Kept()
        self._turns = threading.BoundedSemaphore(UNANSWERED), threading.BoundedSemaphore(FETCHING)
        self._enders = ThreadPoolExecutor(ENDERS, thread_name_prefix="inplace-front-end")
        self._closing = threading.Event()
        self._pool = ThreadPoolExecutor(file.max_requests, thread_name_prefix="inplace-front")
        self._watch = threading.Thread(target=self._look, name="inplace-front-cancel", daemon=True)
        self._watch.start()
        log.info(log_line("ready", front_of=self._model))

    def execute(self, requests: Sequence[Any]) -> None:
        """Pass each request on, on a thread of its own."""
        for request in requests:
            if len(self._running) >= self._most:
                full = RequestError(
                    Code.QUEUE_FULL,
                    f"{self._most} generations run or wait; send it again later",
                    retryable=True,
                )
                request.get_response_sender().send(
                    refusal(request, full), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
                )
                continue
            relay = _Relay(self._model, request, self._kept, *self._turns)
            self._running[relay.sequence] = relay
            self._pool.submit(self._relay, relay)

    def close(self) -> None:
        """End what is running, and wait for it."""
        unloading = RequestError(
            Code.SHUTDOWN,
            "the model is being unloaded; send it again when it is back",
            retryable=True,
        )
        for relay in list(self._running.values()):
            relay.stop(self._enders, unloading)
        self._pool.shutdown()
        self._enders.shutdown()
        self._closing.set()
        self._watch.join()

    def _relay(self, relay: "_Relay") -> None:
        try:
            relay.run()
        finally:
            del self._running[relay.sequence]

    def _look(self) -> None:
        while not self._closing.wait(PERIOD):
            for relay in self._running.copy().values():  # other threads add and remove
                try:
                    if relay.cancelled():
                        relay.stop(
                            self._enders
                        )  # again at the next look, until the generation has ended: an END may overtake its START
                except Exception:  # one request that the server cannot speak of must not leave the others unwatched
                    log.exception("a request was not asked whether it is cancelled")


class _Kept:
    """Responses of the last `KEPT` seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: deque[tuple[float, list[Any]]] = deque()

    def keep(self, responses: list[Any]) -> list[Any]:
        """Keep these, and let go of what is old enough."""
        now = monotonic()
        with self._lock:
            self._kept.append((now, responses))
            old = []
            while self._kept[0][0] < now - KEPT:
                old.append(self._kept.popleft())
        return responses  # what is old goes with this call, outside the lock


class _Relay:
    """One request on its way to the stream model and back. Its client may leave at any time, also while it waits for a thread."""

    def __init__(
        self,
        model: str,
        request: Any,
        kept: "_Kept",
        turn: threading.Semaphore,
        fetching: threading.Semaphore,
    ) -> None:
        self._kept = kept
        self._turn, self._fetching, self._ending = turn, fetching, threading.Lock()
        self.sequence = secrets.randbits(63) or 1
        self._model, self._request, self._sender = model, request, request.get_response_sender()
        self._border = threading.Lock()  # the final response and `is_cancelled` exclude each other: asking after it ends the server
        self._begun = self._stopped = self._done = False
        self._why: RequestError | None = None

    def run(self) -> None:
        """Pass the generation on; on every path a final response is sent, and a sequence that was begun is ended."""
        error = None
        try:
            asked = self._asked()
            if self._begin():
                error = self._pass_on(asked)
            elif self._why is not None:
                raise self._why
        except RequestError as refused:
            error = refusal(self._request, refused).error()
        except Exception as failure:  # a defect; whatever happens the client must hear of it
            log.exception("a generation could not be passed on")
            error = refusal(self._request, backend_failure(failure, "send it again")).error()
        try:
            with self._border:
                self._done = True
                if error is None:
                    self._sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                else:
                    self._sender.send(
                        pb_utils.InferenceResponse(error=error),
                        flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL,
                    )
        finally:
            if self._begun:
                self._end()

    def cancelled(self) -> bool:
        """Whether the client is gone before it was answered."""
        with self._border:
            return not self._done and bool(self._request.is_cancelled())

    def stop(self, enders: ThreadPoolExecutor, why: RequestError | None = None) -> None:
        """Never begin (and say why), or have the sequence ended and with it the generation; does not wait for that."""
        with self._border:
            self._stopped, self._why = True, why
            begun = self._begun
        if begun and self._ending.acquire(blocking=False):
            enders.submit(self._end_it)

    def _end_it(self) -> None:
        try:
            self._end()
        finally:
            self._ending.release()

    def _begin(self) -> bool:
        """Wait for its turn; whether it may begin, and has the turn."""
        self._turn.acquire()
        with self._border:
            self._begun = not self._stopped
        if not self._begun:
            self._turn.release()
        return self._begun

    def _pass_on(self, asked: Any) -> Any:
        """Pass responses on until the last; returns the error that was among them. Each is the one response of a request of its own."""
        wanted = self._request.requested_output_names()
        try:
            response = self._one(asked)
        finally:
            self._turn.release()
        while response is not None and not response.has_error():
            tensors = {tensor.name(): tensor for tensor in response.output_tensors()}
            if passed := [tensor for name, tensor in tensors.items() if name in wanted]:
                self._sender.send(pb_utils.InferenceResponse(output_tensors=passed))
            if FINISH_REASON not in tensors or tensors[FINISH_REASON].as_numpy().item():
                return None
            with self._fetching:
                response = self._one(self._to_model(inputs=[_nothing()], parameters={FETCH: True}))
        return None if response is None else response.error()

    def _one(self, asked: Any) -> Any:
        """The one response of a request; None where Triton has none for it."""
        try:
            found = self._kept.keep(list(asked.exec(decoupled=True)))
            return found[0] if found else None
        except Exception as error:  # Triton's own, when the model is not loaded
            text = f"model {self._model!r} could not be asked ({error}); send it again when it is loaded"
            raise RequestError(Code.SHUTDOWN, text, retryable=True) from None

    def _to_model(self, **more: Any) -> Any:
        names = {*self._request.requested_output_names(), FINISH_REASON}
        return pb_utils.InferenceRequest(
            model_name=self._model,
            correlation_id=self.sequence,
            requested_output_names=list(names),
            **more,
        )

    def _asked(self) -> Any:
        """The request to the stream model.

        Raises:
            RequestError: BAD_PARAMETER.
        """
        try:
            named = self._request.request_id()
            parameters = json.loads(self._request.parameters() or "{}")
        except (
            ValueError
        ) as error:  # UnicodeDecodeError among them: over HTTP they may be any bytes
            raise RequestError(Code.BAD_PARAMETER, f"the request cannot be read: {error}") from None
        if own := sorted(parameters.keys() & set(OWN)):
            raise RequestError(
                Code.BAD_PARAMETER,
                f"parameters {own} are for clients that name a sequence; here each request is one of its own",
            )
        if MAX_TOKENS not in parameters:
            raise RequestError(
                Code.BAD_PARAMETER,
                f"parameter {MAX_TOKENS!r} is missing; expected a whole number of at least 1",
            )
        passed = {
            name: repr(value) if isinstance(value, float) else value
            for name, value in parameters.items()
        }
        return self._to_model(
            request_id=named,
            inputs=self._request.inputs(),
            flags=FLAG_START,
            parameters={**passed, FETCH: True},
        )

    def _end(self) -> None:
        request = pb_utils.InferenceRequest(
            model_name=self._model,
            correlation_id=self.sequence,
            inputs=[_nothing()],
            requested_output_names=[],
            flags=FLAG_END,
        )
        try:
            for response in self._kept.keep(list(request.exec(decoupled=True))):
                if response.has_error():
                    log.debug(
                        log_line(
                            "front", sequence=self.sequence, refused=response.error().message()
                        )
                    )
        except Exception as error:  # the stream model is gone, and its sequences with it
            log.info(log_line("front", sequence=self.sequence, not_ended=str(error)))


def _nothing() -> Any:
    """For a request that brings nothing: Triton takes none without inputs."""
    return pb_utils.Tensor("input_ids", np.empty((1, 0), np.int64))
