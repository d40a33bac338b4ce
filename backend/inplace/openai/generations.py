"""The generations of a request: what each one is, and running them at the same time."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, cast

from inplace.client import ClientError, GenerationOptions, Piece, PromptLogprob
from inplace.errors import RequestError
from inplace.openai.errors import ApiError, invalid_value, of_client
from inplace.openai.models import ServedModel
from inplace.openai.replicas import Replicas
from inplace.openai.schemas import SamplingRequest
from inplace.parameters import BY_NAME

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

MAX_PIECES = 64
"""Pieces that may wait for a slow client; the backend joins what comes after them."""


@dataclass(frozen=True)
class Generation:
    """One generation.

    Attributes:
        index: of the choice.
        prompt: token ids.
        max_tokens: most tokens to generate.
        stop: texts that end it.
        options: how tokens are chosen.
        affinity: see `Replicas.choose`.
        request_id: for logs and errors.
    """

    index: int
    prompt: list[int]
    max_tokens: int
    stop: tuple[str, ...]
    options: GenerationOptions
    affinity: bytes
    request_id: str


def generations_of(
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
    request_id: str,
) -> list[Generation]:
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
        request_id: for logs and errors.

    Raises:
        ApiError: a field has a value that is not allowed.
    """
    options = _options(request, logprobs, stop_token_ids) | {"group": group, **(structure or {})}
    if prompt_logprobs:
        options["prompt_logprobs"] = logprobs or 0
    seed = request.seed if request.seed is not None else secrets.randbits(62)
    made: list[Generation] = []
    for prompt in prompts:
        key = request.prompt_cache_key
        affinity = repr(prompt[:AFFINITY_TOKENS] if key is None else key).encode()
        for _ in range(request.n or 1):
            own = options | {"seed": _wrapped(seed + len(made))}
            made.append(
                Generation(
                    index=len(made),
                    prompt=prompt,
                    max_tokens=max_tokens or _most_tokens(model, prompt),
                    stop=request.stop_texts,
                    options=cast(GenerationOptions, own),
                    affinity=affinity,
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
    """

    index: int
    piece: Piece
    prompt: Sequence[PromptLogprob] = ()


class Generations:
    """Generations that run at the same time: an asynchronous iterator of their parts.

    Inside its block; leaving that cancels those that still run.

    Args:
        replicas: the servers.
        model: the name of the model.
        generations: what to generate.
    """

    def __init__(self, replicas: Replicas, model: str, generations: Sequence[Generation]) -> None:
        self._replicas, self._model, self._generations = replicas, model, generations
        self._pieces: asyncio.Queue[Part | Exception] = asyncio.Queue(MAX_PIECES)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._run(each)) for each in self._generations]
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

    async def _run(self, generation: Generation) -> None:
        try:
            async with self._replicas.sequence(self._model, generation.affinity) as sequence:
                running = sequence.generate(
                    generation.prompt,
                    generation.max_tokens,
                    stop=generation.stop,
                    end=True,
                    request_id=f"{generation.request_id}-{generation.index}",
                    **generation.options,
                )
                first = True
                async for piece in running:
                    if piece.finish_reason in ("cancelled", "ended"):
                        raise ApiError(503, "the server ended the generation", code="server_gone")
                    prompt = running.prompt_logprobs if first else ()
                    first = False
                    await self._pieces.put(Part(generation.index, piece, prompt))
        except ClientError as error:
            await self._pieces.put(of_client(error))
        except Exception as error:
            await self._pieces.put(error)
