"""The border to Triton: with the other ``triton_*`` modules the only one that knows the Python backend's types."""

import json
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import triton_python_backend_utils as pb_utils
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from inplace.drivers import (
    Arrival,
    StepDriver,
    StreamDriver,
    TokenizerConfig,
    engine_thread,
)
from inplace.drivers.detokenizer import load_tokenizer
from inplace.errors import Code, LoadError, RequestError, backend_failure
from inplace.protocol import STOP, TEXT
from inplace.runtime.batcher import Answer
from inplace.runtime.instance import ModelInstance
from inplace.runtime.observer import Observer, log_line
from inplace.runtime.requests import Request
from inplace.schema.served import Manifest
from inplace.server.channel import FLAG_END, FLAG_START, TritonChannel, output, readable, refusal
from inplace.server.generate_proxy import GenerateProxy
from inplace.server.reports import TritonMetrics, log_to_triton
from inplace.server.settings import Settings, served
from inplace.server.stub import check_numpy, end_with_server

TEXTS = (TEXT, STOP)


NO_PARAMETERS = ("", "{}")


log = logging.getLogger("inplace")


class Served(Protocol):
    """A loaded model."""

    def execute(self, requests: Sequence[Any]) -> list[Any] | None:
        """Answer a batch of requests; None where they are answered later."""

    def close(self) -> None:
        """Stop; whoever waits is answered."""


class TritonPythonModel:
    """What Triton's Python backend looks for in model.py: one object a model instance."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine beside the model's config.pbtxt; a model that cannot be served fails to load with the reason."""
        self._log = log_to_triton(args["model_instance_name"])
        self._guard = end_with_server()
        try:
            self._served: Served = (
                GenerateProxy(args) if served(args["model_config"]) == "front" else _engine(args)
            )
        except LoadError as error:
            self._log.stop()
            raise pb_utils.TritonModelException(f"INPLACE-LOAD: {error}") from error

    def execute(self, requests: Sequence[Any]) -> list[Any] | None:
        """Answer a batch of requests; each with its own result or its own error."""
        return self._served.execute(requests)

    def finalize(self) -> None:
        """The model is unloaded; what lives in it is lost."""
        self._served.close()
        self._log.stop()


def _engine(args: dict[str, str]) -> Served:
    folder = Path(args["model_repository"]) / args["model_version"]
    manifest = Manifest.load(folder)
    settings = Settings.parse(args["model_config"], manifest)
    manifest = manifest if settings.capacity is None else manifest.at_capacity(settings.capacity)
    if settings.serve == "stream":
        check_numpy(Path("/proc/self/exe"), np.__version__)
    tokenizer = load_tokenizer(folder) if settings.serve == "stream" else None
    load = partial(ModelInstance.open, folder, manifest, idle_timeout=settings.idle_timeout)
    thread = engine_thread() if settings.serve == "stream" else None
    instance = load() if thread is None else thread.submit(load).result()
    for note in settings.notes:
        log.warning("%s", note)
    log.setLevel(settings.log_level)
    metrics = TritonMetrics(instance.observer.metrics, args)
    device = manifest.engine.device
    log.info(
        log_line(
            "ready",
            slots=manifest.slots,
            slot_bytes=manifest.slot_bytes,
            arena_bytes=instance.arena.bytes,
            device=device,
        )
    )
    if thread is None:
        return _Steps(StepDriver(instance), metrics)
    return _Streams(
        StreamDriver(
            instance, TokenizerConfig(tokenizer, settings.eos), settings.max_waiting, thread
        ),
        metrics,
    )


class _Steps:
    """Answers inside the server's call."""

    def __init__(self, driver: StepDriver, metrics: TritonMetrics) -> None:
        self._driver, self._metrics = driver, metrics
        self._observer = driver.instance.observer

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        parsed = [_parse(request) for request in requests]
        answers = iter(
            self._driver.run([request for request in parsed if isinstance(request, Request)])
        )
        return [
            _response(
                request, next(answers) if isinstance(found, Request) else found, self._observer
            )
            for request, found in zip(requests, parsed, strict=True)
        ]

    def close(self) -> None:
        self._driver.close()
        log.info(log_line("unloaded", live=len(self._driver.instance.table)))
        self._metrics.close()


class _Streams:
    """Hands requests over and returns; they are answered from other threads."""

    def __init__(self, driver: StreamDriver, metrics: TritonMetrics) -> None:
        self._driver, self._metrics = driver, metrics

    def execute(self, requests: Sequence[Any]) -> None:
        self._driver.submit(self._arrived(requests))

    def _arrived(self, requests: Sequence[Any]) -> Iterator[Arrival]:
        for request in requests:
            channel = TritonChannel(request)
            texts: dict[str, tuple[bytes, ...]] = {}
            try:
                parsed = _parse(request, texts)
            except Exception as error:  # a defect: its client must hear of it, and the others of this call must not
                log.exception("a request could not be taken")
                channel.send_error(backend_failure(error))
                continue
            if isinstance(parsed, Request):
                yield parsed, texts, channel
            else:
                _tell(self._driver.instance.observer, request, parsed)
                channel.send_error(parsed)

    def close(self) -> None:
        live = len(self._driver.instance.table)
        self._driver.close()
        log.info(log_line("unloaded", live=live))
        self._metrics.close()


def _parse(
    request: Any, texts: dict[str, tuple[bytes, ...]] | None = None
) -> Request | RequestError:
    """The request without Triton's types; where ``texts`` is given, its inputs of BYTES are put there."""
    flags = request.flags()
    inputs: dict[str, Tensor] = {}
    try:
        sequence, named = request.correlation_id(), request.request_id()
        sent = request.parameters()
        parameters = json.loads(sent) if sent not in NO_PARAMETERS else {}
        for tensor in request.inputs():
            name = tensor.name()
            if texts is not None and name in TEXTS:
                texts[name] = tuple(tensor.as_numpy().reshape(-1).tolist())
            else:
                inputs[name] = _tensor(tensor)
    except (
        ValueError,
        RuntimeError,
    ) as error:  # UnicodeDecodeError among them: over HTTP ids and names may be any bytes
        return RequestError(Code.BAD_PARAMETER, f"the request cannot be read: {error}")
    return Request(
        sequence_id=sequence,
        start=bool(flags & FLAG_START),
        end=bool(flags & FLAG_END),
        inputs=inputs,
        request_id=named,
        parameters=parameters,
    )


def _tensor(tensor: Any) -> Tensor:
    """The request's own memory as a tensor, not copied."""
    found: Tensor = from_dlpack(tensor.to_dlpack())
    return found


def _response(request: Any, answer: Answer, observer: Observer) -> Any:
    if isinstance(answer, RequestError):
        _tell(observer, request, answer)
        return refusal(request, answer)
    asked = request.requested_output_names()
    return pb_utils.InferenceResponse(
        output_tensors=[output(name, tensor) for name, tensor in answer.items() if name in asked]
    )


def _tell(observer: Observer, request: Any, error: RequestError) -> None:
    end = bool(request.flags() & FLAG_END)
    observer.request_refused(
        readable(request.correlation_id), str(readable(request.request_id)), error, end=end
    )
