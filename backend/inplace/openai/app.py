"""The ASGI application: its routes, and what each of them does."""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from inplace.client.recordings import Samples
from inplace.drivers.detokenizer import TokenizerError
from inplace.openai.audio import TranscriptionRequest, decode, read_form, words
from inplace.openai.chat import chat_prompt
from inplace.openai.errors import ApiError, invalid_value
from inplace.openai.gate import Gate, error_response
from inplace.openai.generations import (
    GenerationRequest,
    Generations,
    Part,
    check_value,
    generation_requests,
)
from inplace.openai.keys import Keys
from inplace.openai.limits import Limits, check_counts, read_body
from inplace.openai.metrics import Metrics
from inplace.openai.models import ServedModel, SpeechModel
from inplace.openai.page import ChatPage
from inplace.openai.replicas import Replicas
from inplace.openai.responses import Answer, ChatAnswer, CompletionAnswer
from inplace.openai.schemas import ChatRequest, CompletionRequest, SamplingRequest
from inplace.openai.streaming import DONE, EventStream, event, until_disconnect
from inplace.openai.structure import structure_of
from inplace.openai.workers import Worker

DEFAULT_COMPLETION_TOKENS = 16
"""``max_tokens`` of a completion without one, as OpenAI has it."""


class Application:
    """The routes over some servers and models.

    Args:
        replicas: the servers.
        models: by name.
        limits: of requests.
        metrics: where requests are counted.
        shared_key: the ``sequence_key`` of requests without an API key, where the operator lets
            them share what they compute.
    """

    def __init__(
        self,
        replicas: Replicas,
        models: Mapping[str, ServedModel | SpeechModel],
        limits: Limits,
        metrics: Metrics,
        shared_key: str,
    ) -> None:
        self._replicas, self._models = replicas, models
        self._limits, self._metrics = limits, metrics
        self._shared_key = shared_key

    @property
    def routes(self) -> list[Route]:
        """Paths and what answers them."""
        return [
            Route("/", ChatPage().get),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/v1/models", self.list_models),
            Route("/v1/models/{model:path}", self.get_model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/audio/transcriptions", self.transcribe, methods=["POST"]),
        ]

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Connect to the servers while the application runs."""
        await self._replicas.start()
        try:
            yield
        finally:
            await self._replicas.close()

    async def health(self, request: Request) -> Response:
        """Whether a server is ready."""
        ready = self._replicas.ready
        return JSONResponse({"ready": any(ready.values())}, 200 if any(ready.values()) else 503)

    async def metrics(self, request: Request) -> Response:
        """What was counted."""
        text = self._metrics.text(self._replicas.ready)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def list_models(self, request: Request) -> Response:
        """The models."""
        return JSONResponse({"object": "list", "data": [*map(_card, self._models.values())]})

    async def get_model(self, request: Request) -> Response:
        """One model."""
        return JSONResponse(_card(self._any_model(request.path_params["model"])))

    async def chat(self, request: Request) -> Response:
        """A chat's next message."""
        body = await read_body(request, ChatRequest, self._limits)
        model = self._model(body.model)
        structure = structure_of(body, model)
        choices = body.n or 1
        check_counts(self._limits, choices=choices, prompts=1)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        if logprobs:
            check_value("logprobs", logprobs, "top_logprobs")
        max_tokens = body.max_completion_tokens or body.max_tokens
        field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        _check_max_tokens(getattr(body, field), field)
        tools = (body.tools or ()) if structure.format is not None else ()
        prompt = await asyncio.to_thread(chat_prompt, model, body.messages, tools)
        generations = generation_requests(
            body,
            model,
            [prompt],
            max_tokens=max_tokens,
            logprobs=logprobs,
            structure=structure.options,
            stop_token_ids=() if body.ignore_eos or model.turn_end is None else (model.turn_end,),
            group=_group(request),
            key=self._sequence_key(request, model),
            request_id=request.state.request_id,
        )
        answer = ChatAnswer(
            request.state.request_id,
            model.name,
            model.tokenizer,
            prompt,
            choices,
            structure=structure,
            logprobs=logprobs is not None,
        )
        return await self._answer(request, body, model, generations, answer)

    async def complete(self, request: Request) -> Response:
        """What follows prompts."""
        body = await read_body(request, CompletionRequest, self._limits)
        model = self._model(body.model)
        texts = _prompts(body)
        choices = body.n or 1
        check_counts(self._limits, choices=choices, prompts=len(texts))
        if body.logprobs is not None:
            check_value("logprobs", body.logprobs)
        _check_max_tokens(body.max_tokens, "max_tokens")
        prompts = await asyncio.to_thread(_token_ids, model, texts, body.add_special_tokens)
        generations = generation_requests(
            body,
            model,
            prompts,
            max_tokens=body.max_tokens or DEFAULT_COMPLETION_TOKENS,
            logprobs=body.logprobs,
            prompt_logprobs=bool(body.echo) and body.logprobs is not None,
            stop_token_ids=(),
            group=_group(request),
            key=self._sequence_key(request, model),
            request_id=request.state.request_id,
        )
        echoes = [
            (each if isinstance(each, str) else _decode(model, each)) if body.echo else ""
            for each in texts
            for _ in range(choices)
        ]
        answer = CompletionAnswer(
            request.state.request_id,
            model.name,
            model.tokenizer,
            sum(map(len, prompts)),
            len(generations),
            echoes=echoes,
            logprobs=body.logprobs is not None,
        )
        return await self._answer(request, body, model, generations, answer)

    async def transcribe(self, request: Request) -> Response:
        """The words of a recording."""
        form, content = await read_form(request, self._limits.audio_bytes)
        model = self._any_model(form.model)
        if not isinstance(model, SpeechModel):
            raise invalid_value(f"{form.model!r} is not a speech model", "model")
        rate = model.format.rate
        samples = await asyncio.to_thread(decode, content, rate, self._limits.audio_seconds)
        pieces = self._words(request, model, samples, form)
        usage = {"type": "duration", "seconds": math.ceil(len(samples) / rate)}
        if form.stream:
            events = _transcript_events(pieces, usage)
            first = await until_disconnect(request.receive, _next(events))
            return self._gone() if first is None else EventStream(events, first)
        text = await until_disconnect(request.receive, _joined(pieces))
        if text is None:
            return self._gone()
        if form.response_format == "text":
            return PlainTextResponse(text)
        return JSONResponse({"text": text, "usage": usage})

    async def _words(
        self, request: Request, model: SpeechModel, samples: Samples, form: TranscriptionRequest
    ) -> AsyncGenerator[str, None]:
        options = {"group": _group(request)}
        if form.language is not None:
            options["language"] = form.language
        request_id: str = request.state.request_id
        async with self._replicas.sequence(model.name, request_id.encode()) as sequence:
            async for piece in words(sequence, samples, model.format, options, request_id):
                yield piece

    async def _answer(
        self,
        request: Request,
        body: SamplingRequest,
        model: ServedModel,
        generations: list[GenerationRequest],
        answer: Answer,
    ) -> Response:
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            events = self._events(request, model, generations, answer, usage=usage)
            first = await until_disconnect(request.receive, _next(events))
            return self._gone() if first is None else EventStream(events, first)
        whole = await until_disconnect(
            request.receive, self._whole(request, model, generations, answer)
        )
        return self._gone() if whole is None else JSONResponse(whole)

    async def _pieces(
        self,
        request: Request,
        model: ServedModel,
        generations: list[GenerationRequest],
        answer: Answer,
    ) -> AsyncGenerator[Part, None]:
        """The parts of all generations, counted."""
        try:
            async with Generations(self._replicas, model, generations) as pieces:
                async for part in pieces:
                    yield part
        finally:
            usage = answer.usage
            self._metrics.prompt_tokens.inc(usage["prompt_tokens"])
            self._metrics.cached_tokens.inc(answer.cached_tokens)
            self._metrics.generated_tokens.inc(usage["completion_tokens"])
            if request.state.use is not None:
                request.state.use.spend_tokens(usage["total_tokens"])

    async def _whole(
        self,
        request: Request,
        model: ServedModel,
        generations: list[GenerationRequest],
        answer: Answer,
    ) -> dict[str, Any]:
        async with contextlib.aclosing(self._pieces(request, model, generations, answer)) as pieces:
            async for part in pieces:
                answer.add(part)
        return answer.whole()

    async def _events(
        self,
        request: Request,
        model: ServedModel,
        generations: list[GenerationRequest],
        answer: Answer,
        *,
        usage: bool,
    ) -> AsyncIterator[bytes]:
        first = True
        async with contextlib.aclosing(self._pieces(request, model, generations, answer)) as pieces:
            async for part in pieces:
                if first and part.piece.tokens:
                    first = False
                    seconds = time.monotonic() - request.state.begin
                    self._metrics.first_token_seconds.observe(seconds)
                if events := b"".join(event(one) for one in answer.chunks(part, usage=usage)):
                    yield events
        if usage:
            yield event(answer.usage_chunk())
        yield DONE

    def _sequence_key(self, request: Request, model: ServedModel) -> str | None:
        """The key of those who may use what is computed for a request; None if nobody may."""
        if not model.reuses_prefixes:
            return None
        own: str | None = request.state.sequence_key
        return own or (self._shared_key if model.reuses_without_key else None)

    def _gone(self) -> Response:
        """What nobody reads."""
        self._metrics.disconnected.inc()
        return Response(status_code=499)

    def _model(self, name: str) -> ServedModel:
        model = self._any_model(name)
        if isinstance(model, SpeechModel):
            raise invalid_value(
                f"{name!r} is a speech model: send a recording to /v1/audio/transcriptions", "model"
            )
        return model

    def _any_model(self, name: str) -> ServedModel | SpeechModel:
        if name not in self._models:
            raise ApiError(
                404,
                f"there is no model {name!r}; there are {', '.join(sorted(self._models))}",
                param="model",
                code="model_not_found",
            )
        return self._models[name]


def create_app(
    replicas: Replicas,
    models: Mapping[str, ServedModel | SpeechModel],
    *,
    limits: Limits | None = None,
    keys: Keys | None = None,
    hosts: Collection[str] = (),
    worker: Worker | None = None,
) -> Starlette:
    """The application.

    Args:
        replicas: the servers; connected while the application runs.
        models: what they serve.
        limits: of requests.
        keys: the API keys; None lets everyone in who calls the server by a name of its own.
        hosts: such names, beside those of the loopback interface.
        worker: the process.
    """
    limits, worker = limits or Limits(), worker or Worker()
    in_flight, _ = worker.running("requests")
    metrics = Metrics(worker, in_flight)
    front_end = Application(replicas, models, limits, metrics, worker.secret)
    gate = Middleware(
        Gate, keys=keys, limits=limits, metrics=metrics, in_flight=in_flight, hosts=hosts
    )
    return Starlette(
        routes=front_end.routes,
        middleware=[gate],
        exception_handlers={
            ApiError: _answer_error,
            HTTPException: _answer_http_error,
            Exception: _answer_failure,
        },
        lifespan=front_end.lifespan,
    )


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own errors: no such path, or not this method."""
    assert isinstance(error, HTTPException)
    text = {
        404: f"there is no {request.url.path}; docs/openai.md lists what there is",
        405: f"{request.url.path} does not take {request.method}",
    }.get(error.status_code, error.detail)
    return error_response(ApiError(error.status_code, text, code="not_found"))


async def _answer_failure(request: Request, error: Exception) -> Response:
    """A defect; the log has its trace."""
    return error_response(ApiError(500, "the front end failed; its log says why"))


async def _joined(pieces: AsyncGenerator[str, None]) -> str:
    async with contextlib.aclosing(pieces):
        return "".join([piece async for piece in pieces])


async def _transcript_events(
    pieces: AsyncGenerator[str, None], usage: dict[str, Any]
) -> AsyncIterator[bytes]:
    texts = []
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            texts.append(piece)
            yield event({"type": "transcript.text.delta", "delta": piece})
    done = {"type": "transcript.text.done", "text": "".join(texts), "usage": usage}
    yield event(done)


async def _next(events: AsyncIterator[bytes]) -> bytes:
    return await anext(events)


def _card(model: ServedModel | SpeechModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "inplace",
        "max_model_len": model.capacity,
    }


def _group(request: Request) -> str:
    """The group in the backend's queue: that of the key, so that keys share the places."""
    use = request.state.use
    return "openai" if use is None else f"openai-{use.record.name}"


def _check_max_tokens(value: int | None, field: str) -> None:
    if value is not None:
        check_value("max_tokens", value, field)


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    """The prompts of a completion, each a text or token ids."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if prompt and isinstance(prompt[0], int):
        return [[token for token in prompt if isinstance(token, int)]]
    if not prompt:
        raise invalid_value("the prompt is empty", "prompt")
    return [each for each in prompt if not isinstance(each, int)]


def _token_ids(
    model: ServedModel, prompts: list[str | list[int]], add_special_tokens: bool | None
) -> list[list[int]]:
    """The token ids of prompts."""
    special = add_special_tokens is not False
    made = []
    for prompt in prompts:
        ids = prompt
        if isinstance(ids, str):
            try:
                ids = model.tokenizer.encode(ids, add_special_tokens=special)
            except TokenizerError as error:
                raise invalid_value(str(error), "prompt") from error
        if not ids:
            raise invalid_value("a prompt has no tokens", "prompt")
        # the other ids that are not tokens are refused by the server, which knows the vocabulary
        if not all(0 <= token < 1 << 63 for token in ids):
            raise invalid_value("a token id is negative or too large", "prompt")
        made.append(ids)
    return made


def _decode(model: ServedModel, ids: list[int]) -> str:
    try:
        return model.tokenizer.decode(ids)
    except (TokenizerError, OverflowError) as error:
        raise invalid_value(f"the prompt has no text: {error}", "prompt") from error
