"""The generations of a request: what each one is, and running them at the same time."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, cast

import numpy as np

from inplace.client import AsyncSequence, ClientError, GenerationOptions, Piece, PromptLogprob
from inplace.errors import RequestError
from inplace.openai.errors import ApiError, invalid_value, of_client
from inplace.openai.models import ServedModel
from inplace.openai.replicas import Replicas
from inplace.openai.schemas import SamplingRequest
from inplace.parameters import BY_NAME
from inplace.protocol import CACHE_SALT, INPUT_IDS, REUSED_TOKENS, STREAM_INTERVAL

DEFAULT_TEMPERATURE = 1.0
"""The temperature of a request that has none, as OpenAI has it."""

DEFAULT_MAX_TOKENS = 4096
"""The limit of a reply without one, for models whose sequences have no limit either."""

PASSED_ON = (
    "top_p",
    "top_k",
    "min_p",
    "min_tokens",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "ignore_eos",
)
"""Fields that are request parameters of the backend with the same name and limits."""

AFFINITY_TOKENS = 256
"""Tokens of a prompt by which its server is chosen, where there is no ``prompt_cache_key``."""

MIN_FORKED_TOKENS = 64
"""The shortest prompt that the choices of a request share: a shorter one is computed in a step."""

MAX_FORK_SECONDS = 1.0
"""For how long a sequence waits until its copies have begun."""

WHOLE_ANSWER_INTERVAL = 8
"""Tokens of a piece of an answer that is not streamed.

Each piece costs time here. But a server that sends none for the timeout of a sequence (60 s) counts
as lost, so they must not be long in coming.
"""

MAX_PIECES = 64
"""Pieces that may wait for a slow client; the backend joins what comes after them."""


@dataclass(frozen=True)
class GenerationRequest:
    """One generation.

    Attributes:
        index: of the choice.
        prompt: token ids.
        max_tokens: most tokens to generate.
        stop: texts that end it.
        options: how tokens are chosen.
        affinity, scope: see `Replicas.choose`.
        key: of its sequence; a random one if None.
        is_first: of the choices of its prompt.
        request_id: for logs and errors.
    """

    index: int
    prompt: list[int]
    max_tokens: int
    stop: tuple[str, ...]
    options: GenerationOptions
    affinity: bytes
    scope: bytes
    key: str | None
    is_first: bool
    request_id: str


def generation_requests(
    request: SamplingRequest,
    model: ServedModel,
    prompts: Sequence[list[int]],
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: bool = False,
    structure: Mapping[str, Any] | None = None,
    stop_token_ids: Sequence[int],
    group: str,
    key: str | None,
    request_id: str,
) -> list[GenerationRequest]:
    """The generations of a request: ``n`` of each prompt, which differ in their seeds.

    Args:
        request: what the client sent.
        model: the model.
        prompts: token ids.
        max_tokens: most tokens of each; None for as many as fit.
        logprobs: how many of the most likely tokens to return; None for no log-probabilities.
        prompt_logprobs: whether to return the same of the prompts' tokens.
        structure: request parameters that say what the text must be.
        stop_token_ids: tokens that end each of them.
        group: shares places in the queue with the requests of the same group.
        key: the ``sequence_key`` of those who may use what is computed; None if nobody may.
        request_id: for logs and errors.

    Raises:
        ApiError: a field has a value that is not allowed.
    """
    options = _options(request, logprobs, stop_token_ids) | {"group": group, **(structure or {})}
    if not request.stream:
        options[STREAM_INTERVAL] = WHOLE_ANSWER_INTERVAL
    if prompt_logprobs:
        options["prompt_logprobs"] = logprobs or 0
    scope = b""
    if request.cache_salt is not None:
        check_value(CACHE_SALT, request.cache_salt)
    if key is not None:
        scope = repr((model.name, key, request.cache_salt)).encode()
        if request.cache_salt is not None:
            options[CACHE_SALT] = request.cache_salt
    seed = request.seed if request.seed is not None else secrets.randbits(62)
    made: list[GenerationRequest] = []
    for prompt in prompts:
        cache_key = request.prompt_cache_key
        preferred = prompt[:AFFINITY_TOKENS] if cache_key is None else cache_key
        affinity = scope + repr(preferred).encode()
        for choice in range(request.n or 1):
            own = options | {"seed": _wrapped(seed + len(made))}
            made.append(
                GenerationRequest(
                    index=len(made),
                    prompt=prompt,
                    max_tokens=max_tokens or _most_tokens(model, prompt),
                    stop=request.stop_texts,
                    options=cast(GenerationOptions, own),
                    affinity=affinity,
                    scope=scope,
                    key=key,
                    is_first=choice == 0,
                    request_id=request_id,
                )
            )
    return made


def check_value(name: str, value: Any, field: str | None = None) -> None:
    """Refuse a value that the backend would refuse.

    Raises:
        ApiError: it is outside the limits of the request parameter ``name``.
    """
    try:
        BY_NAME[name].parse(value)
    except RequestError as error:
        raise invalid_value(str(error), field or name) from None


def _options(
    request: SamplingRequest, logprobs: int | None, stop_token_ids: Sequence[int]
) -> dict[str, Any]:
    temperature = DEFAULT_TEMPERATURE if request.temperature is None else request.temperature
    options: dict[str, Any] = {"temperature": temperature}
    check_value("temperature", temperature)
    if request.seed is not None:
        check_value("seed", request.seed)
    for name in PASSED_ON:
        value = getattr(request, name)
        if value is not None and value != BY_NAME[name].default:
            check_value(name, value)
            options[name] = value
    if request.logit_bias:
        check_value("logit_bias", ",".join(f"{k}:{v!r}" for k, v in request.logit_bias.items()))
        options["logit_bias"] = {int(token): bias for token, bias in request.logit_bias.items()}
    if ids := [*(request.stop_token_ids or ()), *stop_token_ids]:
        check_value("stop_token_ids", ",".join(map(str, ids)))
        options["stop_token_ids"] = ids
    if logprobs is not None:
        options["logprobs"] = logprobs
    return options


def _wrapped(seed: int) -> int:
    """A seed as a signed number of 64 bits."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def _most_tokens(model: ServedModel, prompt: list[int]) -> int:
    """As many tokens as fit; at least one, so that the backend refuses too long a prompt."""
    if model.capacity is None:
        return DEFAULT_MAX_TOKENS
    return max(1, model.capacity - len(prompt))


@dataclass(frozen=True)
class Part:
    """A piece of a choice.

    Attributes:
        index: of the choice.
        piece: the piece.
        prompt: the log-probabilities of the prompt's tokens, with the first piece.
        cached_tokens: tokens of the prompt that earlier requests had computed, with the last piece
            of its first choice.
    """

    index: int
    piece: Piece
    prompt: Sequence[PromptLogprob] = ()
    cached_tokens: int = 0


class Generations:
    """Generations that run at the same time: an asynchronous iterator of their parts.

    Inside its block; leaving that cancels those that still run. The choices of a long prompt share
    it: the first one's sequence computes it, and those of the others begin as copies
    (docs/adr/0048-openai-front-end.md).

    Args:
        replicas: the servers.
        model: the model.
        generations: what to generate; the choices of a prompt one after the other.
    """

    def __init__(
        self, replicas: Replicas, model: ServedModel, generations: Sequence[GenerationRequest]
    ) -> None:
        self._replicas, self._model, self._generations = replicas, model, generations
        self._pieces: asyncio.Queue[Part | Exception] = asyncio.Queue(MAX_PIECES)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        for first, *others in self._by_prompt():
            if others and self._forks(first):
                self._tasks.append(asyncio.create_task(self._run_forked(first, others)))
            else:
                self._tasks += [asyncio.create_task(self._run(each)) for each in (first, *others)]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

    async def __aiter__(self) -> AsyncIterator[Part]:
        running = len(self._generations)
        while running:
            result = await self._pieces.get()
            if isinstance(result, Exception):
                raise result
            running -= bool(result.piece.finish_reason)
            yield result

    def _by_prompt(self) -> list[list[GenerationRequest]]:
        """The choices of each prompt."""
        prompts: list[list[GenerationRequest]] = []
        for generation in self._generations:
            if generation.is_first:
                prompts.append([])
            prompts[-1].append(generation)
        return prompts

    def _forks(self, generation: GenerationRequest) -> bool:
        asks_for_prompt = "prompt_logprobs" in generation.options
        is_long = len(generation.prompt) >= MIN_FORKED_TOKENS
        return self._model.forks and is_long and not asks_for_prompt

    async def _run(self, generation: GenerationRequest) -> None:
        async with self._reporting(), self._sequence(generation) as sequence:
            await self._generate(sequence, generation, generation.prompt)

    async def _run_forked(
        self, first: GenerationRequest, others: Sequence[GenerationRequest]
    ) -> None:
        """Generate the choices of a prompt, all but whose last token is computed once.

        The sequence may have no other request while copies of it begin. Where they have to wait for
        slots, it goes on after a while, so that requests which hold slots do not wait for each
        other; those copies then compute the prompt themselves.
        """
        async with self._reporting(), self._sequence(first) as sequence:
            cached = await self._prefill(sequence, first)
            copies = [await sequence.fork() for _ in others]
            begun = [asyncio.Event() for _ in others]
            last = first.prompt[-1:]
            async with asyncio.TaskGroup() as group:
                for each, copied, event in zip(others, copies, begun, strict=True):
                    group.create_task(self._run_copy(copied, each, event))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(MAX_FORK_SECONDS):
                        await asyncio.gather(*(event.wait() for event in begun))
                async with self._reporting():
                    await self._generate(sequence, first, last, cached=cached)

    async def _run_copy(
        self, copied: AsyncSequence, generation: GenerationRequest, begun: asyncio.Event
    ) -> None:
        try:
            async with self._reporting(), self._replicas.copied(copied) as sequence:
                last = generation.prompt[-1:]
                await self._generate(sequence, generation, last, begun=begun)
        finally:
            begun.set()

    async def _prefill(self, sequence: AsyncSequence, generation: GenerationRequest) -> int:
        """Compute a prompt but for its last token; returns how many tokens were there already."""
        names = ("group", CACHE_SALT)
        options = cast(Mapping[str, str], generation.options)
        reused = (REUSED_TOKENS,) if generation.scope else ()
        outputs = await sequence.step(
            {INPUT_IDS: np.array(generation.prompt[:-1], dtype=np.int64)},
            parameters={name: options[name] for name in names if name in options},
            outputs=("next_token", *reused),
            request_id=f"{generation.request_id}-prompt",
        )
        return int(outputs[REUSED_TOKENS].item()) if reused else 0

    async def _generate(
        self,
        sequence: AsyncSequence,
        generation: GenerationRequest,
        prompt: list[int],
        *,
        cached: int | None = None,
        begun: asyncio.Event | None = None,
    ) -> None:
        """Run a generation to its end.

        Args:
            sequence: what it continues.
            generation: the generation.
            prompt: what of its prompt the sequence does not have.
            cached: tokens of the prompt that earlier requests had computed; None if the server
                tells.
            begun: is set when it has begun.
        """
        options = dict(cast(dict[str, Any], generation.options))
        if len(prompt) < len(generation.prompt):
            options.pop(CACHE_SALT, None)
        if begun is not None:  # the first token is waited for
            options.pop(STREAM_INTERVAL, None)
        running = sequence.generate(
            prompt,
            generation.max_tokens,
            stop=generation.stop,
            end=True,
            request_id=f"{generation.request_id}-{generation.index}",
            **cast(GenerationOptions, options),
        )
        first = True
        async for piece in running:
            if begun is not None:
                begun.set()
            if piece.finish_reason in ("cancelled", "ended"):
                raise ApiError(503, "the server ended the generation", code="server_gone")
            logprobs = running.prompt_logprobs if first else ()
            first = False
            own = 0
            if generation.is_first and piece.finish_reason:
                own = running.reused_tokens if cached is None else cached
            await self._pieces.put(Part(generation.index, piece, logprobs, own))
        # the last token was not fed
        tokens = generation.prompt + running.tokens[:-1]
        self._replicas.computed(generation.scope, tokens, sequence.server)

    def _sequence(
        self, generation: GenerationRequest
    ) -> contextlib.AbstractAsyncContextManager[AsyncSequence]:
        return self._replicas.sequence(
            self._model.name,
            generation.affinity,
            key=generation.key,
            scope=generation.scope,
            prompt=generation.prompt,
        )

    @contextlib.asynccontextmanager
    async def _reporting(self) -> AsyncIterator[None]:
        """Hands an error inside the block to the iterator."""
        try:
            yield
        except ClientError as error:
            await self._pieces.put(of_client(error))
        except Exception as error:
            await self._pieces.put(error)
