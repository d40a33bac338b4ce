"""From a request of a stream model to a job: everything that can be checked in the server's thread."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tokenizers import Tokenizer

from inplace.drivers.generation import GenerationLimits, GenerationState, tokenized
from inplace.drivers.reply import BufferedReply, Channel, Reply
from inplace.drivers.sequence_queues import StreamRequest
from inplace.drivers.text import CONTEXT, Detokenizer
from inplace.errors import Code, RequestError
from inplace.protocol import FETCH, MAX_TOKENS, TEXT, TEXT_OUTPUT
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request, ValidatedRequest


@dataclass(frozen=True)
class TokenizerConfig:
    """What turns a model's tokens into generations.

    Attributes:
        tokenizer: for text; None serves token ids alone.
        eos: end tokens.
    """

    tokenizer: Tokenizer | None = None
    eos: frozenset[int] = frozenset()


class RequestParser:
    """Checks requests and makes jobs of them. Safe to call from any thread.

    Args:
        instance: the model instance.
        language: for generations.
    """

    def __init__(self, instance: ModelInstance, language: TokenizerConfig) -> None:
        self._instance, self._language = instance, language
        self._names = instance.program.decoder_io

    def job(
        self, request: Request, texts: Mapping[str, tuple[bytes, ...]], channel: Channel
    ) -> StreamRequest:
        """A request's job; one that is refused later, in its turn, has the reason with it.

        Args:
            request: what was asked.
            texts: its inputs of BYTES, by name.
            channel: its way back.

        Raises:
            RequestError: its key cannot be read: it changes nothing, whatever flags it has.
        """
        key = request.key_digest()
        generates = MAX_TOKENS in request.parameters
        bare = not texts and all(tensor.numel() == 0 for tensor in request.inputs.values())
        if request.end and not request.start and not generates and bare:
            return StreamRequest(ValidatedRequest(request, key), Reply(channel))
        try:
            if not generates and request.flag(FETCH):
                if request.start or request.end:
                    raise RequestError(
                        Code.BAD_PARAMETER,
                        f"{FETCH!r} without {MAX_TOKENS!r} asks for what was said: send neither START nor END",
                    )
                return StreamRequest(ValidatedRequest(request, key), Reply(channel), fetches=True)
            if generates and self._names is None:
                raise RequestError(
                    Code.BAD_PARAMETER,
                    f"this model is no language model and generates nothing: leave {MAX_TOKENS!r} out",
                )
            request = self._with_ids(request, texts)
            limits = GenerationLimits.parse(request, texts) if generates else None
            if limits is not None and limits.stops and self._language.tokenizer is None:
                raise RequestError(
                    Code.BAD_PARAMETER,
                    "this model was built without a tokenizer: it knows no stop texts",
                )
        except RequestError as error:
            return StreamRequest(ValidatedRequest(request, key, refusal=error), Reply(channel))
        checked = self._instance.validate(request)
        if limits is None or checked.refusal is not None:
            return StreamRequest(checked, Reply(channel))
        return self._generation(checked, limits, channel)

    def _generation(
        self, checked: ValidatedRequest, limits: GenerationLimits, channel: Channel
    ) -> StreamRequest:
        assert self._names is not None
        detokenizer = stopper = None
        tokenizer = self._language.tokenizer
        if tokenizer is not None and (limits.stops or TEXT_OUTPUT in channel.wanted):
            made = Detokenizer(tokenizer, checked.inputs[self._names[0]][-CONTEXT:].tolist())
            detokenizer, stopper = (None, made) if limits.stops else (made, None)
        checked = replace(checked, min_new_tokens=1, requested_outputs=frozenset((self._names[1],)))
        kind = BufferedReply if checked.request.flag(FETCH) else Reply
        return StreamRequest(
            checked,
            kind(channel, limits.interval, detokenizer),
            GenerationState(limits, self._language.eos, stopper),
        )

    def _with_ids(self, request: Request, texts: Mapping[str, tuple[bytes, ...]]) -> Request:
        """The request with the token ids of its text."""
        if self._names is None or TEXT not in texts:
            return request
        if self._names[0] in request.inputs:
            raise RequestError(
                Code.BAD_PARAMETER,
                f"inputs {self._names[0]!r} and {TEXT!r} are both given; send one of them",
            )
        begins = (
            request.start and not request.continues_sequence
        )  # a START that names a position goes on with a live sequence or is refused
        ids = tokenized(
            self._language.tokenizer, texts[TEXT], self._instance.manifest.capacity, start=begins
        )
        return replace(request, inputs={self._names[0]: ids})
