"""The generate proxy of a stream model, for clients that cannot name a sequence (HTTP generate).

It is a model of its own. It starts a sequence of the stream model for each request.
"""

import json
import logging
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from inplace.errors import Code, RequestError, backend_failure
from inplace.log_lines import log_line
from inplace.parameters import (
    BY_NAME,
    MAX_COUNT,
    RequestKind,
    logprob_outputs,
    parse_parameters,
)
from inplace.protocol import (
    FETCH,
    FINISH_REASON,
    FOREIGN_PROMPTS,
    INPUT_IDS,
    LOGPROBS,
    MAX_TOKENS,
    POSITION,
    SEQUENCE_KEY,
    STREAM,
    STREAM_INTERVAL,
    TEXT,
    TOKENS,
)
from inplace.runtime.fairness import StartQueue, fairness_group
from inplace.schema.proxy import ProxyFile
from inplace.server.messages import (
    FLAG_END,
    FLAG_START,
    RecentResponses,
    error_response,
    read_id,
)
from inplace.server.model_config import LOGPROB_DIMS, check_model_config, proxy_tensors
from inplace.server.settings import forwarded_headers, matches

CANCEL_POLL_SECONDS = 0.03
"""Seconds between two checks whether the clients are still connected."""


MAX_STARTING, MAX_FETCHING = 16, 8
"""Maximum requests to the stream model that have no response yet: STARTs, and fetches.

Each of them occupies a thread of the Python backend until its first response. With 32 of them,
nothing that this process sends was delivered any more, not even an END (Triton 24.10).
"""


END_THREADS = 4
"""Threads that end sequences whose clients have left: an END is answered between two steps."""


SEQUENCE_PARAMETERS = frozenset(
    {SEQUENCE_KEY, POSITION, FETCH, "sequence_id", "sequence_start", "sequence_end"}
)
"""Parameters of clients that name their sequence; refused here."""


log = logging.getLogger("inplace")


class GenerateProxy:
    """Passes each request on to the stream model as a generation in a sequence of its own.

    Cancellation does not cross requests between models (BLS). So a thread asks whether clients
    have cancelled, and ends their sequences, which also ends the generations.

    Args:
        args: what Triton passes to ``initialize``.

    Raises:
        LoadError: ``proxy.json`` is missing or damaged, or config.pbtxt does not fit it.
    """

    def __init__(self, args: dict[str, str]) -> None:
        file = ProxyFile.load(Path(args["model_repository"]) / args["model_version"])
        tensors = proxy_tensors(has_tokenizer=file.has_tokenizer, has_logprobs=file.has_logprobs)
        check_model_config(json.loads(args["model_config"]), tensors)
        self._outputs = frozenset(tensor.name for tensor in tensors.outputs)
        self._model = file.model
        self._max_requests = file.max_requests
        self._is_forwarded = partial(matches, forwarded_headers(args["model_config"]))
        self._running: dict[int, _ProxiedRequest] = {}  # by sequence id
        self._responses = RecentResponses()
        self._starts: StartQueue[_ProxiedRequest] = StartQueue(MAX_STARTING)
        self._fetching = threading.BoundedSemaphore(MAX_FETCHING)
        self._end_threads = ThreadPoolExecutor(END_THREADS, "inplace-proxy-end")
        self._threads = ThreadPoolExecutor(file.max_requests, "inplace-proxy")
        self._closing = threading.Event()
        self._cancel_thread = threading.Thread(
            target=self._stop_cancelled, name="inplace-proxy-cancel", daemon=True
        )
        self._cancel_thread.start()
        # Nothing marks a warm-up request of Triton, but all come before those of clients.
        self._warmups_left = num_warmup_requests(json.loads(args["model_config"]))
        log.info(log_line("ready", generate_proxy_of=self._model))

    def execute(self, requests: Sequence[Any]) -> None:
        """Pass each request on, on a thread of its own."""
        for request in requests:
            if self._warmups_left:
                self._warmups_left -= 1
                _send_final(request.get_response_sender())
                continue
            proxied = _ProxiedRequest(
                self._model,
                request,
                self._outputs,
                self._is_forwarded,
                self._responses,
                self._starts,
                self._fetching,
            )
            if len(self._running) >= self._max_requests and not self._make_room(proxied):
                error = error_response(request, self._queue_full()).error()
                _send_final(request.get_response_sender(), error)
                continue
            self._running[proxied.sequence_id] = proxied
            self._threads.submit(self._run, proxied)

    def _make_room(self, proxied: "_ProxiedRequest") -> bool:
        """Refuse a request that waits, of a group with more of them than this one's."""
        rejected = self._starts.replaced_by(proxied)
        if rejected is None:
            return False
        rejected.stop(self._end_threads, self._queue_full())
        return True

    def _queue_full(self) -> RequestError:
        text = f"{self._max_requests} generations run or wait; send it again later"
        return RequestError(Code.QUEUE_FULL, text, retryable=True)

    def close(self) -> None:
        """End the generations that run, and wait until they have ended."""
        unloading = RequestError(
            Code.SHUTDOWN,
            "the model is being unloaded or the server is stopping; send it again when it is back, "
            "or to another server",
            retryable=True,
        )
        for proxied in list(self._running.values()):
            proxied.stop(self._end_threads, unloading)
        self._threads.shutdown()
        self._end_threads.shutdown()
        self._closing.set()
        self._cancel_thread.join()

    def _run(self, proxied: "_ProxiedRequest") -> None:
        try:
            proxied.run()
        finally:
            del self._running[proxied.sequence_id]

    def _stop_cancelled(self) -> None:
        while not self._closing.wait(CANCEL_POLL_SECONDS):
            for proxied in self._running.copy().values():  # other threads add and remove
                try:
                    if proxied.cancelled():
                        # Repeated until the generation has ended: an END may overtake its START.
                        proxied.stop(self._end_threads)
                except Exception:  # the other requests must still be checked
                    log.exception("a request could not be checked for cancellation")


def num_warmup_requests(config: Mapping[str, Any]) -> int:
    """How many requests Triton sends to an instance before it is ready (``model_warmup``)."""
    return sum(
        int(sample.get("batch_size", 0) or 1) * max(1, int(sample.get("count", 0)))
        for sample in config.get("model_warmup", ())
    )


class _ProxiedRequest:
    """One request, its sequence of the stream model, and its client, which may leave at any time.

    Args:
        model: the stream model.
        request: the client's request.
        outputs: the names of all outputs of the proxy.
        is_forwarded: whether a parameter is a header that the server forwards.
        responses: keeps the stream model's responses.
        starts: limits STARTs that have no response yet.
        fetching: limits fetches that have no response yet.

    Attributes:
        sequence_id: the correlation id of its sequence, chosen at random.
        group: what it shares its turn to start with; see `fairness_group`.
        proceed: set when it may start, or has been stopped.
    """

    def __init__(
        self,
        model: str,
        request: Any,
        outputs: frozenset[str],
        is_forwarded: Callable[[str], bool],
        responses: RecentResponses,
        starts: "StartQueue[_ProxiedRequest]",
        fetching: threading.Semaphore,
    ) -> None:
        self.sequence_id = secrets.randbits(63) or 1
        self._model, self._request, self._sender = model, request, request.get_response_sender()
        self._outputs, self._is_forwarded = outputs, is_forwarded
        self._requested = frozenset[str](request.requested_output_names())
        self.group = self._read_group()
        self.proceed = threading.Event()
        # Outputs of the next response, and its tokens: all of the generation, unless it streams.
        self._collected: dict[str, list[NDArray[Any]]] = {}
        self._num_collected, self._min_tokens = 0, MAX_COUNT
        self._responses, self._starts, self._fetching = responses, starts, fetching
        self._end_in_progress = threading.Lock()
        # Guards the flags below. The final response is sent under it too, so that `is_cancelled`
        # is never called after that: it crashes the server.
        self._lock = threading.Lock()
        self._started = self._stopped = self._ending = self._finished = False
        self._stop_error: RequestError | None = None

    def run(self) -> None:
        """Generate. Always sends a final response, and ends a sequence that was started."""
        error = None
        try:
            start = self._start_request()
            if self._acquire_start():
                error = self._generate(start)
            elif self._stop_error is not None:
                raise self._stop_error
        except RequestError as refused:
            error = error_response(self._request, refused).error()
        except Exception as failure:  # a defect; the client still gets a final response
            log.exception("a generation could not be passed on")
            error = error_response(self._request, backend_failure(failure, "send it again")).error()
        with self._lock:
            self._ending = True
        if self._started:
            with self._end_in_progress:
                self._end()
        # Last: after the final response the model may be unloaded, and a request of a model that
        # is being unloaded crashes the server (`inplace.server.own_requests`).
        with self._lock:
            self._finished = True
            _send_final(self._sender, error)

    def cancelled(self) -> bool:
        """Whether the client has cancelled or left before the final response."""
        with self._lock:
            return not self._finished and bool(self._request.is_cancelled())

    def stop(self, end_threads: ThreadPoolExecutor, error: RequestError | None = None) -> None:
        """Stop the generation, without waiting for it.

        Args:
            end_threads: end the sequence if it was started.
            error: the response if the sequence was not started.
        """
        with self._lock:
            self._stopped, self._stop_error = True, error
            self.proceed.set()
            if self._started and not self._ending and self._end_in_progress.acquire(blocking=False):
                end_threads.submit(self._end_early)

    def _end_early(self) -> None:
        try:
            self._end()
        finally:
            self._end_in_progress.release()

    def _acquire_start(self) -> bool:
        """Wait until the START may be sent; False if the request was stopped before."""
        self._starts.add(self)
        self.proceed.wait()
        with self._lock:
            self._started = not self._stopped
        if not self._started:
            self._starts.remove(self)
        return self._started

    def _generate(self, start: Any) -> Any:
        """Send the START and then fetches, and pass their responses on until the last.

        Each request has exactly one response: with more, Triton's iterator of responses can
        deadlock (docs/adr/0024-generate-proxy.md).

        Returns:
            The error that the stream model answered with, or None.
        """
        try:
            response = self._send(start)
        finally:
            self._starts.remove(self)
        while response is not None and not response.has_error():
            outputs = {tensor.name(): tensor for tensor in response.output_tensors()}
            last = FINISH_REASON not in outputs or bool(outputs[FINISH_REASON].as_numpy().item())
            self._pass_on(outputs, last=last)
            if last:
                return None
            with self._fetching:
                response = self._send(
                    self._model_request(inputs=[_no_tokens()], parameters={FETCH: True})
                )
        return None if response is None else response.error()

    def _pass_on(self, outputs: Mapping[str, Any], *, last: bool) -> None:
        """Collect outputs, and send them to the client once they are enough for a response."""
        if TOKENS in outputs:
            self._num_collected += outputs[TOKENS].as_numpy().shape[1]
        tensors = [tensor for name, tensor in outputs.items() if name in self._requested]
        complete = last or self._num_collected >= self._min_tokens
        if self._collected or not complete:
            for tensor in tensors:
                self._collected.setdefault(tensor.name(), []).append(tensor.as_numpy().copy())
        if not complete:
            return
        if self._collected:
            tensors = [
                pb_utils.Tensor(name, _joined(parts)) for name, parts in self._collected.items()
            ]
        if tensors:
            self._sender.send(pb_utils.InferenceResponse(output_tensors=tensors))
        self._collected, self._num_collected = {}, 0

    def _send(self, request: Any) -> Any:
        """Send a request to the stream model; returns its response, or None if it has none."""
        try:
            responses = self._responses.keep(list(request.exec(decoupled=True)))
        except Exception as error:  # Triton's own, if the model is not loaded
            raise RequestError(
                Code.SHUTDOWN,
                f"model {self._model!r} cannot be reached ({error}); "
                "send it again when the model is loaded",
                retryable=True,
            ) from None
        return responses[0] if responses else None

    def _start_request(self) -> Any:
        """The request to the stream model that starts the sequence and its generation.

        Raises:
            RequestError: BAD_PARAMETER or BAD_INPUT.
        """
        try:
            request_id = self._request.request_id()
            parameters = json.loads(self._request.parameters() or "{}")
            inputs = self._request.inputs()
        except ValueError as error:
            # UnicodeDecodeError is one: over HTTP, ids and parameters may be any bytes.
            raise RequestError(Code.BAD_PARAMETER, f"the request cannot be read: {error}") from None
        flags = self._request.flags()
        if read_id(self._request.correlation_id) not in (0, "") or flags & (FLAG_START | FLAG_END):
            raise RequestError(
                Code.BAD_PARAMETER,
                "this model takes no correlation id and no sequence flags: "
                "here each request has a sequence of its own",
            )
        _check_inputs(inputs)
        if refused := sorted(parameters.keys() & SEQUENCE_PARAMETERS):
            raise RequestError(
                Code.BAD_PARAMETER,
                f"parameters {refused} are for clients that name a sequence; "
                "here each request has a sequence of its own",
            )
        values = parse_parameters(parameters, RequestKind.PROXY, self._is_forwarded)
        if MAX_TOKENS not in values:
            raise RequestError(
                Code.BAD_PARAMETER,
                f"parameter {MAX_TOKENS!r} is missing; expected {BY_NAME[MAX_TOKENS].limits}",
            )
        if values.get(STREAM, STREAM_INTERVAL in values):
            interval = values.get(STREAM_INTERVAL, 1)
            assert isinstance(interval, int)
            self._min_tokens = interval
        if self._requested >= self._outputs:  # Triton names all of them where the client names none
            logprobs = values.get(LOGPROBS)
            assert logprobs is None or isinstance(logprobs, int)
            self._requested -= LOGPROB_DIMS.keys() - logprob_outputs(logprobs)
        # The backend reads numbers from texts too; a BLS request takes no float parameters. With
        # `stream_interval` a request of ours would stay unanswered and keep others from being sent.
        passed = {
            name: repr(value) if isinstance(value, float) else value
            for name, value in parameters.items()
            if name in values and name not in (STREAM, STREAM_INTERVAL)
        }
        return self._model_request(
            request_id=request_id,
            inputs=inputs,
            flags=FLAG_START,
            parameters={**passed, FETCH: True},
        )

    def _read_group(self) -> bytes:
        """The group of a request that may be refused later."""
        try:
            parameters = json.loads(self._request.parameters() or "{}")
            return fairness_group(self.sequence_id, parameters)
        except (ValueError, RequestError):
            return str(self.sequence_id).encode()

    def _model_request(self, **fields: Any) -> Any:
        names = {*self._requested, TOKENS, FINISH_REASON}
        return pb_utils.InferenceRequest(
            model_name=self._model,
            correlation_id=self.sequence_id,
            requested_output_names=list(names),
            **fields,
        )

    def _end(self) -> None:
        request = pb_utils.InferenceRequest(
            model_name=self._model,
            correlation_id=self.sequence_id,
            inputs=[_no_tokens()],
            requested_output_names=[],
            flags=FLAG_END,
        )
        try:
            for response in self._responses.keep(list(request.exec(decoupled=True))):
                if response.has_error():
                    reason = response.error().message()
                    log.debug(log_line("proxy", sequence=self.sequence_id, end_refused=reason))
        except Exception as error:  # the stream model is unloaded, and its sequences are gone
            log.info(log_line("proxy", sequence=self.sequence_id, not_ended=str(error)))


def _send_final(sender: Any, error: Any = None) -> None:
    """Send the final response: Triton's error, or nothing."""
    final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
    if error is None:
        sender.send(flags=final)
    else:
        sender.send(pb_utils.InferenceResponse(error=error), flags=final)


def _no_tokens() -> Any:
    """An input without tokens: Triton takes no request without inputs."""
    return pb_utils.Tensor(INPUT_IDS, np.empty((1, 0), np.int64))


def _check_inputs(inputs: Sequence[Any]) -> None:
    """Refuse the names that other backends have for a prompt.

    They are inputs of the proxy only to be refused here: Triton answers a request without inputs
    itself, and does not say what is missing.

    Raises:
        RequestError: BAD_INPUT.
    """
    names = [tensor.name() for tensor in inputs]
    if foreign := [name for name in names if name in FOREIGN_PROMPTS]:
        raise RequestError(
            Code.BAD_INPUT,
            f"{foreign} is not what this model calls its prompt: send the text as {TEXT!r}, or its"
            f" token ids as {INPUT_IDS!r}",
        )


def _joined(parts: list[NDArray[Any]]) -> NDArray[Any]:
    """The outputs of all responses as one: tokens and texts are joined, of reasons the last."""
    if parts[0].dtype != np.object_:
        return np.concatenate(parts, axis=1)
    texts = b"".join(part.item() for part in parts)
    return np.array([[texts]], dtype=np.object_)
