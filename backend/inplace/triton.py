"""The border to Triton: the only module, with `inplace.triton_reports`, that knows the Python backend's types."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton_python_backend_utils as pb_utils
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from inplace.arena import Arena
from inplace.drivers import Answer, StepDriver
from inplace.engines import load_engine
from inplace.errors import Code, LoadError, RequestError
from inplace.instance import ModelInstance
from inplace.manifest import Manifest
from inplace.observer import Observer, line
from inplace.requests import Request
from inplace.settings import Settings
from inplace.triton_reports import TritonMetrics, log_to_triton

FLAG_START, FLAG_END = 1, 2

STATUS = {Code.NO_FREE_SLOT: "UNAVAILABLE", Code.UNKNOWN_SEQUENCE: "NOT_FOUND", Code.ENGINE_FAILED: "INTERNAL"}
"""Triton's status for an error, INVALID_ARG for the others; by name, for the stub adds its types only after this import."""

log = logging.getLogger("inplace")


class TritonPythonModel:
    """What Triton's Python backend looks for in model.py: one object a model instance."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine beside the model's config.pbtxt; a model that cannot be served fails to load with the reason."""
        self._log = log_to_triton(args["model_instance_name"])
        folder = Path(args["model_repository"]) / args["model_version"]
        try:
            manifest = Manifest.load(folder)
            settings = Settings.parse(args["model_config"], manifest)
            arena = Arena(manifest.states, manifest.slots, torch.device(manifest.engine.device))
            engine = load_engine(folder, manifest, arena)
        except LoadError as error:
            self._log.stop()
            raise pb_utils.TritonModelException(f"INPLACE-LOAD: {error}") from error
        for note in settings.notes:
            log.warning("%s", note)
        log.setLevel(settings.log_level)
        instance = ModelInstance(manifest, arena, engine, settings.idle_timeout)
        self._observer = instance.observer
        self._metrics = TritonMetrics(self._observer.numbers, args)
        self._driver = StepDriver(instance)
        device = manifest.engine.device
        log.info(line("ready", slots=manifest.slots, slot_bytes=manifest.slot_bytes, arena_bytes=arena.bytes, device=device))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer a batch of requests; each with its own result or its own error."""
        parsed: list[Request | RequestError] = [_parse(request) for request in requests]
        valid = [request for request in parsed if isinstance(request, Request)]
        answers = iter(self._driver.run(valid))
        return [
            _response(request, next(answers) if isinstance(found, Request) else found, self._observer)
            for request, found in zip(requests, parsed, strict=True)
        ]

    def finalize(self) -> None:
        """The model is unloaded; what lives in it is lost."""
        self._driver.close()
        log.info(line("unloaded", live=len(self._driver.instance.table)))
        self._metrics.close()
        self._log.stop()


def _parse(request: Any) -> Request | RequestError:
    flags = request.flags()
    try:
        parameters = json.loads(request.parameters() or "{}")
        inputs = {tensor.name(): _tensor(tensor) for tensor in request.inputs()}
    except (ValueError, RuntimeError) as error:
        return RequestError(Code.BAD_PARAMETER, f"the request cannot be read: {error}")
    return Request(
        sequence=request.correlation_id(),
        start=bool(flags & FLAG_START),
        end=bool(flags & FLAG_END),
        inputs=inputs,
        id=request.request_id(),
        parameters=parameters,
    )


def _tensor(tensor: Any) -> Tensor:
    """The request's own memory as a tensor, not copied."""
    found: Tensor = from_dlpack(tensor.to_dlpack())
    return found


def _response(request: Any, answer: Answer, observer: Observer) -> Any:
    if isinstance(answer, RequestError):
        observer.refused(request.correlation_id(), request.request_id(), answer, end=bool(request.flags() & FLAG_END))
        text = answer.wire(request.correlation_id(), request.request_id())
        return pb_utils.InferenceResponse(
            error=pb_utils.TritonError(text, getattr(pb_utils.TritonError, STATUS.get(answer.code, "INVALID_ARG")))
        )
    asked = set(request.requested_output_names())
    return pb_utils.InferenceResponse(
        output_tensors=[pb_utils.Tensor.from_dlpack(name, tensor) for name, tensor in answer.items() if name in asked]
    )
