"""From a request of a stream model to a `StreamRequest`: all checks that need no sequence.

Runs on the server's threads.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from tokenizers import Tokenizer
from torch import Tensor

from inplace.drivers.detokenizer import CONTEXT_TOKENS, Detokenizer
from inplace.drivers.generation import GenerationLimits, GenerationState, decode_utf8
from inplace.drivers.reply import BufferedReply, Channel, Reply
from inplace.drivers.sequence_queues import StreamRequest
from inplace.errors import Code, RequestError
from inplace.protocol import FETCH, MAX_TOKENS, TEXT, TEXT_OUTPUT
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request, ValidatedRequest

MAX_BYTES_PER_POSITION = 64
"""A text with more bytes for each position of a sequence is refused without tokenizing it."""


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer and the end tokens of a language model.

    Attributes:
        tokenizer: None if the model takes and returns token ids only.
        eos_token_ids: tokens that end a generation.
    """

    tokenizer: Tokenizer | None = None
    eos_token_ids: frozenset[int] = frozenset()


class RequestParser:
    """Parses requests. Thread-safe.

    Args:
        instance: the model instance.
        tokenizer_config: for generations.
    """

    def __init__(self, instance: ModelInstance, tokenizer_config: TokenizerConfig) -> None:
        self._instance, self._tokenizer_config = instance, tokenizer_config
        self._decoder_io = instance.program.decoder_io

    def parse(
        self, request: Request, texts: Mapping[str, tuple[bytes, ...]], channel: Channel
    ) -> StreamRequest:
        """Parse a request.

        A refused one is returned too, with its ``refusal``: its START and END take effect, after
        the earlier requests of its sequence.

        Args:
            request: the request without its texts.
            texts: its inputs of BYTES by name.
            channel: sends its responses.

        Raises:
            RequestError: its ``sequence_key`` is invalid, so it must change nothing.
        """
        key_digest = request.key_digest()
        unvalidated = ValidatedRequest(request, key_digest)
        generates = MAX_TOKENS in request.parameters
        empty = not texts and all(tensor.numel() == 0 for tensor in request.inputs.values())
        if request.end and not request.start and not generates and empty:
            return StreamRequest(unvalidated, Reply(channel))
        try:
            if not generates and request.flag(FETCH):
                _check_fetch(request)
                return StreamRequest(unvalidated, Reply(channel), is_fetch=True)
            if generates:
                self._check_can_generate()
            request = self._tokenize_text(request, texts)
            limits = self._parse_limits(request, texts) if generates else None
        except RequestError as error:
            return StreamRequest(replace(unvalidated, refusal=error), Reply(channel))
        validated = self._instance.validate(request)
        if limits is None or validated.refusal is not None:
            return StreamRequest(validated, Reply(channel))
        return self._make_generation(validated, limits, channel)

    def _check_can_generate(self) -> None:
        if self._decoder_io is None:
            raise RequestError(
                Code.BAD_PARAMETER,
                f"this model is not a language model and cannot generate: leave {MAX_TOKENS!r} out",
            )

    def _parse_limits(
        self, request: Request, texts: Mapping[str, tuple[bytes, ...]]
    ) -> GenerationLimits:
        limits = GenerationLimits.parse(request, texts)
        if limits.stop and self._tokenizer_config.tokenizer is None:
            raise RequestError(
                Code.BAD_PARAMETER,
                "this model was built without a tokenizer and cannot find stop texts: leave 'stop'"
                " out",
            )
        return limits

    def _make_generation(
        self, validated: ValidatedRequest, limits: GenerationLimits, channel: Channel
    ) -> StreamRequest:
        assert self._decoder_io is not None
        ids_name, token_name = self._decoder_io
        tokenizer = self._tokenizer_config.tokenizer
        detokenizer = stop_detokenizer = None
        if tokenizer is not None and (limits.stop or TEXT_OUTPUT in channel.requested_outputs):
            context = validated.inputs[ids_name][-CONTEXT_TOKENS:].tolist()
            if limits.stop:  # the engine loop needs the text of every token
                stop_detokenizer = Detokenizer(tokenizer, context)
            else:
                detokenizer = Detokenizer(tokenizer, context)
        reply_type = BufferedReply if validated.request.flag(FETCH) else Reply
        return StreamRequest(
            replace(validated, min_new_tokens=1, requested_outputs=frozenset((token_name,))),
            reply_type(channel, limits.stream_interval, detokenizer),
            GenerationState(limits, self._tokenizer_config.eos_token_ids, stop_detokenizer),
        )

    def _tokenize_text(self, request: Request, texts: Mapping[str, tuple[bytes, ...]]) -> Request:
        """The request with the token ids of its text, if it has one."""
        if self._decoder_io is None or TEXT not in texts:
            return request
        ids_name = self._decoder_io[0]
        if ids_name in request.inputs:
            raise RequestError(
                Code.BAD_PARAMETER,
                f"inputs {ids_name!r} and {TEXT!r} are both given; send one of them",
            )
        # A START with a position continues a live sequence or is refused: its text begins nothing.
        begins = request.start and not request.continues_sequence
        ids = tokenize(
            self._tokenizer_config.tokenizer,
            texts[TEXT],
            self._instance.manifest.capacity,
            add_special_tokens=begins,
        )
        return replace(request, inputs={ids_name: ids})


def tokenize(
    tokenizer: Tokenizer | None,
    encoded: tuple[bytes, ...],
    capacity: int | None,
    *,
    add_special_tokens: bool,
) -> Tensor:
    """The token ids of a request's text, ``[1, tokens]``, int64.

    Args:
        tokenizer: of the model.
        encoded: the elements of the request's text input.
        capacity: positions of a sequence; None if unlimited.
        add_special_tokens: add the tokens that begin a text.

    Raises:
        RequestError: BAD_SHAPE, VALUE_RANGE, CAPACITY or EMPTY_INPUT; BAD_PARAMETER without a
            tokenizer.
    """
    if tokenizer is None:
        raise RequestError(
            Code.BAD_PARAMETER, "this model was built without a tokenizer: send 'input_ids'"
        )
    if len(encoded) != 1:
        raise RequestError(Code.BAD_SHAPE, f"input {TEXT!r} holds {len(encoded)} texts; expected 1")
    [text] = encoded
    if capacity is not None and len(text) > (max_bytes := MAX_BYTES_PER_POSITION * capacity):
        raise RequestError(
            Code.CAPACITY,
            f"input {TEXT!r} has {len(text)} bytes, more than {max_bytes}: it does not fit"
            f" {capacity} positions",
        )
    ids = tokenizer.encode(decode_utf8(TEXT, text), add_special_tokens=add_special_tokens).ids
    if not ids:
        raise RequestError(Code.EMPTY_INPUT, f"input {TEXT!r} has no tokens; send at least 1")
    return torch.tensor([ids])


def _check_fetch(request: Request) -> None:
    if request.start or request.end:
        raise RequestError(
            Code.BAD_PARAMETER,
            f"{FETCH!r} without {MAX_TOKENS!r} fetches tokens of a running generation: send neither"
            f" START nor END",
        )
