"""A model instance with an engine: how it is loaded, and its requests in Triton's types."""

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
from inplace.drivers.detokenizer import TOKENIZER_NAME, load_tokenizer
from inplace.drivers.reply import Outputs
from inplace.engines.gpus import use_gpu
from inplace.errors import Code, RequestError, backend_failure
from inplace.log_lines import log_line
from inplace.protocol import STOP, TEXT
from inplace.runtime.batcher import Answer
from inplace.runtime.instance import ModelInstance
from inplace.runtime.loading import check_engine
from inplace.runtime.observer import Observer
from inplace.runtime.requests import Request
from inplace.runtime.schedules import open_model
from inplace.schema.files import EngineFolder
from inplace.schema.served import Manifest
from inplace.schema.snapshots import SnapshotOptions
from inplace.server.addresses import Address, server_digest
from inplace.server.logs import instance_gpu
from inplace.server.messages import FLAG_END, FLAG_START, error_response, read_id
from inplace.server.model_config import check_model_config, model_tensors
from inplace.server.own_requests import Admission, ModelPlaces
from inplace.server.relay import StepRelay, StreamRelay, engine_owner
from inplace.server.reports import TritonMetrics
from inplace.server.routing import StepRouter, StreamRouter
from inplace.server.settings import Settings, num_instances
from inplace.server.stub import check_numpy
from inplace.server.trust import trusted_folders
from inplace.snapshots import (
    SnapshotStore,
    model_folder,
    open_bucket,
    read_secret,
    state_contract,
)

log = logging.getLogger("inplace")


TEXT_INPUTS = (TEXT, STOP)


NO_PARAMETERS = ("", "{}")


def open_engine(args: dict[str, str]) -> "_EngineModel | _RelayedModel":
    """Load the engine of a model instance, or connect to the instance that has it.

    Args:
        args: what Triton passes to ``initialize``.

    Raises:
        LoadError: it cannot be served, with the reason.
    """
    folder = Path(args["model_repository"]) / args["model_version"]
    manifest = Manifest.load(folder)
    trust = trusted_folders(os.getppid())
    settings = Settings.parse(args["model_config"], manifest)
    program, streams = manifest.interface, settings.serve == "stream"
    tensors = model_tensors(
        program,
        generates=streams and program.decoder_io is not None,
        has_tokenizer=manifest.has_file(TOKENIZER_NAME),
        streams=streams,
        optional=manifest.optional_inputs,
        prompt_logprobs=manifest.prompt_program is not None,
    )
    check_model_config(json.loads(args["model_config"]), tensors, settings.idle_timeout)
    has_texts = streams or (manifest.is_scheduled and manifest.has_file(TOKENIZER_NAME))
    if has_texts:
        check_numpy(Path("/proc/self/exe"), np.__version__)
    several = num_instances(args["model_config"]) > 1
    digest = manifest.model_dump_json()
    owner = engine_owner(args["model_instance_name"]) if several and settings.share_engine else ""
    if owner not in ("", args["model_instance_name"]):
        return _RelayedModel(
            args, settings, Address.of({**args, "model_instance_name": owner}, digest)
        )
    check_engine(EngineFolder(folder, trust), manifest)
    if settings.capacity is not None:
        manifest = manifest.at_capacity(settings.capacity)
    gpu = instance_gpu(args) if manifest.device == "cuda" else None
    load = partial(
        _open_on,
        gpu,
        folder,
        manifest,
        idle_timeout=settings.idle_timeout,
        trust=trust,
        call_rows=settings.call_rows,
        loop_calls=settings.loop_calls,
    )
    tokenizer = None
    if has_texts:
        tokenizer = load_tokenizer(EngineFolder(folder), manifest)
    if streams:
        thread = engine_thread()
        instance = thread.submit(load).result()
    else:
        instance = load()
    instance.is_forwarded = settings.is_forwarded
    store = None
    if settings.snapshots is not None:
        store = _open_store(args["model_name"], settings.snapshots, manifest)
    if settings.prefixes is not None:
        secret = store.salt_key if store is not None else None
        if secret is None and several:  # instances find the prefixes of each other
            secret = server_digest(os.getppid())
        instance.reuse_prefixes(settings.prefixes, secret)
    if settings.snapshots is not None and store is not None:
        instance.store_sequences(settings.snapshots, store)
    metrics = _start_reports(instance.observer, settings, args)
    log.info(
        log_line(
            "ready",
            slots=instance.manifest.slots,
            slot_bytes=instance.manifest.slot_bytes,
            arena_bytes=instance.arena.bytes,
            device=str(instance.arena.device),
        )
    )
    address = Address.of(args, digest) if several else None
    if streams:
        config = TokenizerConfig(tokenizer, settings.eos)
        driver = StreamDriver(instance, config, settings.max_waiting, thread)
        places = ModelPlaces(args, driver, instance.observer)
        router = StreamRouter(driver, address, places) if address is not None else None
        return _EngineModel(driver, metrics, places, router)
    steps = StepDriver(instance, tokenizer)
    places = ModelPlaces(args, steps, instance.observer)
    step_router = StepRouter(steps, address, places) if address is not None else None
    return _EngineModel(steps, metrics, places, step_router)


def _open_store(model: str, options: SnapshotOptions, manifest: Manifest) -> SnapshotStore:
    """Open the store of a model's sequences.

    Raises:
        LoadError: it cannot be opened, or its secret cannot be read.
    """
    secret = read_secret(options.secret_file)
    return SnapshotStore(
        open_bucket(options.store, model_folder(secret, model)),
        secret,
        model,
        state_contract(manifest),
        slot_bytes=manifest.slot_bytes,
        seconds=options.seconds,
        quota_bytes=options.quota_bytes,
    )


def _open_on(gpu: int | None, *arguments: Any, **options: Any) -> ModelInstance:
    """Open a model on a GPU, which becomes the calling thread's; None for where it is now."""
    if gpu is not None:
        use_gpu(gpu)
    return open_model(*arguments, **options)


def _start_reports(observer: Observer, settings: Settings, args: dict[str, str]) -> TritonMetrics:
    for note in settings.notes:
        log.warning("%s", note)
    log.setLevel(settings.log_level)
    return TritonMetrics(observer.metrics, args)


class TritonChannel:
    """A `Channel` for one request of a decoupled model.

    Args:
        request: the request.
        on_final: called after the final response.
    """

    def __init__(self, request: Any, on_final: Callable[[], None] | None = None) -> None:
        self._request, self._sender = request, request.get_response_sender()
        self._on_final = on_final
        self.requested_outputs = frozenset(request.requested_output_names())

    def send(self, outputs: Outputs, *, final: bool) -> None:
        """Send a response with those of the outputs that the client requested."""
        tensors = [
            output_tensor(name, value)
            for name, value in outputs.items()
            if name in self.requested_outputs
        ]
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0
        self._sender.send(pb_utils.InferenceResponse(output_tensors=tensors), flags=flags)
        if final:
            self._finish()

    def send_error(self, error: RequestError) -> None:
        """Send an error as the final response."""
        try:
            self._sender.send(
                error_response(self._request, error),
                flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL,
            )
        finally:
            self._finish()

    def is_cancelled(self) -> bool:
        """Whether the client has cancelled or left.

        Must not be called after the final response: it crashes the server.
        """
        cancelled: bool = self._request.is_cancelled()
        return cancelled

    def _finish(self) -> None:
        on_final, self._on_final = self._on_final, None
        if on_final is not None:
            on_final()


def read_request(
    request: Any, texts: dict[str, tuple[bytes, ...]] | None = None
) -> Request | RequestError:
    """Convert a request of Triton.

    Args:
        request: its tensors are not copied.
        texts: if given, the inputs of BYTES are stored here, by name.

    Returns:
        The request, with a ``refusal`` if only its sequence could be read; or the BAD_PARAMETER
        error to answer it with.
    """
    flags = request.flags()
    start, end = bool(flags & FLAG_START), bool(flags & FLAG_END)
    try:
        sequence_id = request.correlation_id()
    except ValueError as error:
        return _unreadable(error)
    inputs: dict[str, Tensor] = {}
    try:
        request_id = request.request_id()
        parameters = request.parameters()
        for tensor in request.inputs():
            name = tensor.name()
            if texts is not None and name in TEXT_INPUTS:
                texts[name] = tuple(tensor.as_numpy().reshape(-1).tolist())
            else:
                inputs[name] = from_dlpack(tensor.to_dlpack())
        return Request(
            sequence_id=sequence_id,
            start=start,
            end=end,
            inputs=inputs,
            request_id=request_id,
            parameters=json.loads(parameters) if parameters not in NO_PARAMETERS else {},
            requested_outputs=frozenset(request.requested_output_names()),
        )
    except (ValueError, RuntimeError, RecursionError) as error:
        # UnicodeDecodeError is a ValueError: over HTTP, ids and names may be any bytes.
        return Request(sequence_id, start, end, {}, refusal=_unreadable(error))


def _unreadable(error: Exception) -> RequestError:
    return RequestError(Code.BAD_PARAMETER, f"the request cannot be read: {error}")


@lru_cache(maxsize=1024)
def _packed_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a packed tensor of this shape."""
    return torch.empty(shape, device="meta").stride()


def output_tensor(name: str, value: Tensor | str) -> Any:
    """An output in Triton's type; a text is one element of BYTES, ``[1, 1]``."""
    if isinstance(value, str):
        return pb_utils.Tensor(name, np.array([[value.encode()]], dtype=np.object_))
    # Triton compares strides also where an extent is 1, for which PyTorch takes any as contiguous.
    packed = value.contiguous().as_strided(value.shape, _packed_strides(value.shape))
    return pb_utils.Tensor.from_dlpack(name, torch.to_dlpack(packed))  # type: ignore[attr-defined]  # torch does not list it


class _StepRequests:
    """Passes the requests of a step model on, and answers them before it returns.

    Args:
        run: answers requests, in order.
        places: of this instance in Triton.
        observer: of this instance.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Request]], list[Answer]],
        places: ModelPlaces,
        observer: Observer,
    ) -> None:
        self._run, self._places, self._observer = run, places, observer

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer the requests of one call of Triton's."""
        admissions = [self._places.admit(request) for request in requests]
        parsed = [
            read_request(request) if admission == "serve" else admission
            for request, admission in zip(requests, admissions, strict=True)
        ]
        try:
            answers = iter(
                self._run([request for request in parsed if isinstance(request, Request)])
            )
            return [
                self._response(request, next(answers) if isinstance(result, Request) else result)
                for request, result in zip(requests, parsed, strict=True)
            ]
        finally:
            for request, admission in zip(requests, admissions, strict=True):
                if admission == "serve":
                    self._places.answered(read_id(request.correlation_id))

    def _response(self, request: Any, answer: Answer | Admission) -> Any:
        if isinstance(answer, str):
            return pb_utils.InferenceResponse(output_tensors=[])
        if isinstance(answer, RequestError):
            _report_refusal(self._observer, request, answer)
            return error_response(request, answer)
        requested = request.requested_output_names()
        return pb_utils.InferenceResponse(
            output_tensors=[
                output_tensor(name, tensor) for name, tensor in answer.items() if name in requested
            ]
        )


class _StreamRequests:
    """Passes the requests of a stream model on; other threads answer them.

    Args:
        submit: takes requests that came together, each with its channel.
        places: of this instance in Triton.
        observer: of this instance.
    """

    def __init__(
        self,
        submit: Callable[[Iterable[Arrival]], None],
        places: ModelPlaces,
        observer: Observer,
    ) -> None:
        self._submit, self._places, self._observer = submit, places, observer

    def execute(self, requests: Sequence[Any]) -> None:
        """Take the requests of one call of Triton's."""
        self._submit(self._read(requests))

    def _read(self, requests: Sequence[Any]) -> Iterator[Arrival]:
        for request in requests:
            admission = self._places.admit(request)
            if admission == "acknowledge":
                TritonChannel(request).send({}, final=True)
                continue
            if isinstance(admission, RequestError):
                self._refuse(request, TritonChannel(request), admission)
                continue
            sequence_id = read_id(request.correlation_id)
            channel = TritonChannel(request, partial(self._places.answered, sequence_id))
            texts: dict[str, tuple[bytes, ...]] = {}
            try:
                parsed = read_request(request, texts)
            except Exception as error:  # a defect; the other requests of the batch go on
                log.exception("a request could not be read")
                channel.send_error(backend_failure(error))
                continue
            if isinstance(parsed, Request):
                yield parsed, texts, channel
            else:
                self._refuse(request, channel, parsed)

    def _refuse(self, request: Any, channel: TritonChannel, error: RequestError) -> None:
        _report_refusal(self._observer, request, error)
        channel.send_error(error)


class _EngineModel:
    """A model whose engine this instance has.

    Args:
        driver: has the sequences.
        metrics: of this instance.
        places: of this instance in Triton.
        router: passes requests on to other instances; None if there are none.
    """

    def __init__(
        self,
        driver: StepDriver | StreamDriver,
        metrics: TritonMetrics,
        places: ModelPlaces,
        router: StepRouter | StreamRouter | None,
    ) -> None:
        self._driver, self._metrics, self._places = driver, metrics, places
        self._router = router
        observer = driver.instance.observer
        self._requests: _StepRequests | _StreamRequests
        if isinstance(driver, StepDriver):
            run = router.run if isinstance(router, StepRouter) else driver.run
            self._requests = _StepRequests(run, places, observer)
        else:
            submit = router.submit if isinstance(router, StreamRouter) else driver.submit
            self._requests = _StreamRequests(submit, places, observer)

    def execute(self, requests: Sequence[Any]) -> list[Any] | None:
        return self._requests.execute(requests)

    def close(self) -> None:
        instance = self._driver.instance
        live = len(instance.table)
        self._places.close()
        self._driver.close()
        if self._router is not None:
            self._router.close()
        if instance.snapshots is not None:
            instance.snapshots.close()
        log.info(log_line("unloaded", live=live))
        self._metrics.close()


class _RelayedModel:
    """A model whose engine another instance has (`inplace.server.relay`).

    Args:
        args: what Triton passes to ``initialize``.
        settings: of the deployment.
        owner: where the instance with the engine listens.
    """

    def __init__(self, args: dict[str, str], settings: Settings, owner: Address) -> None:
        observer = Observer()
        self._metrics = _start_reports(observer, settings, args)
        self._relay: StepRelay | StreamRelay
        self._requests: _StepRequests | _StreamRequests
        if settings.serve == "stream":
            streams = self._relay = StreamRelay(owner, observer)
            places = ModelPlaces(args, streams, observer)
            self._requests = _StreamRequests(streams.submit, places, observer)
        else:
            steps = self._relay = StepRelay(owner, observer)
            places = ModelPlaces(args, steps, observer)
            self._requests = _StepRequests(steps.run, places, observer)
        self._places = places
        self._relay.start(places)
        log.info(log_line("ready", engine=engine_owner(args["model_instance_name"])))

    def execute(self, requests: Sequence[Any]) -> list[Any] | None:
        return self._requests.execute(requests)

    def close(self) -> None:
        self._places.close()
        self._relay.close()
        log.info(log_line("unloaded"))
        self._metrics.close()


def _report_refusal(observer: Observer, request: Any, error: RequestError) -> None:
    observer.request_refused(
        read_id(request.correlation_id),
        str(read_id(request.request_id)),
        error,
        end=bool(request.flags() & FLAG_END),
    )
