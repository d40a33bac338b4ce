"""From a request of a stream model to a `StreamRequest`: all checks that need no sequence.

Runs on the server's threads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from tokenizers import Tokenizer
from torch import Tensor

from inplace.drivers.detokenizer import Detokenizer, TokenizerError, encode, special_tokens
from inplace.drivers.generation import GenerationLimits, GenerationState, decode_utf8
from inplace.drivers.queues import StreamRequest
from inplace.drivers.reply import BufferedReply, Channel, Reply, ScheduleReply
from inplace.errors import Code, RequestError
from inplace.grammars import MAX_GENERATED, GrammarCompiler, GrammarSource
from inplace.parameters import BY_NAME, GRAMMAR_PARAMETERS, RequestKind, parse_parameters
from inplace.protocol import (
    ADD_SPECIAL_TOKENS,
    FETCH,
    FINISH_REASON,
    MAX_TOKENS,
    MIN_TOKENS,
    NUM_GENERATED,
    PROMPT_OUTPUTS,
    REUSED_TOKENS,
    STOP,
    STOP_TOKEN_IDS,
    TEXT,
    TEXT_OUTPUT,
    TOKENS,
)
from inplace.runtime.audio import check_audio_parameters
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request, SamplingParams, ValidatedRequest, check_available
from inplace.runtime.schedules import ScheduledInstance
from inplace.schema.programs import Program
from inplace.schema.specs import JOINED_ROLES, LOGPROB_ROLES, Role

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
        self._input_names = instance.program.input_names
        self._runs_at_end = isinstance(instance, ScheduledInstance) and instance.runs_at_end
        self._token_outputs = tuple(
            spec.name for spec in instance.program.outputs if spec.role in JOINED_ROLES
        )
        self._text_output = text_output(instance.program)
        self._special_tokens: dict[str, int] = {}
        self._first_tokens: list[int] = []
        self._step_outputs = frozenset(spec.name for spec in instance.program.outputs)
        self._step_outputs |= {REUSED_TOKENS}
        self._generation_outputs = frozenset({TOKENS, FINISH_REASON, REUSED_TOKENS})
        if instance.program.max_adjusted:
            self._generation_outputs |= {role.value for role in LOGPROB_ROLES}
        if instance.prompt_engine is not None:
            self._step_outputs |= set(PROMPT_OUTPUTS)
            self._generation_outputs |= set(PROMPT_OUTPUTS)
        if (tokenizer := tokenizer_config.tokenizer) is not None:
            self._special_tokens = special_tokens(tokenizer)
            self._first_tokens = first_tokens(tokenizer)
            self._generation_outputs |= {TEXT_OUTPUT}
        self._special_ids = frozenset(self._special_tokens.values())
        self.grammars = None
        if tokenizer is not None and instance.program.max_adjusted:
            self.grammars = GrammarCompiler(
                tokenizer, instance.program.vocab_size, tokenizer_config.eos_token_ids
            )

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
        try:
            if request.refusal is not None:
                raise request.refusal
            kind = self._kind(request, texts)
            parse_parameters(request.parameters, kind, self._instance.is_forwarded)
            if kind is RequestKind.END:
                check_audio_parameters(self._instance.program, request.parameters)
                request.forgets()
                return StreamRequest(
                    replace(unvalidated, position=request.position()), Reply(channel)
                )
            self._check_outputs(kind, channel.requested_outputs)
            if kind is RequestKind.FETCH:
                _check_fetch(request, texts)
                return StreamRequest(unvalidated, Reply(channel), is_fetch=True)
            generates = kind is RequestKind.GENERATION
            self._check_texts(request, texts, generates=generates)
            request = self.tokenize_text(request, texts)
            limits = self._parse_limits(request, texts) if generates else None
            source = self._parse_grammar(request) if generates else None
        except RequestError as error:
            return StreamRequest(replace(unvalidated, refusal=error), Reply(channel))
        # A generation without START may continue from the last generated token alone.
        continues = generates and not request.begins_empty
        validated = self._instance.validate(
            replace(request, requested_outputs=channel.requested_outputs), allow_empty=continues
        )
        if validated.refusal is None and self._text_output is not None:
            return self._make_schedule(validated, self._text_output, channel)
        if limits is None or validated.refusal is not None:
            return StreamRequest(validated, Reply(channel))
        generation = self._make_generation(
            validated, limits, channel, structured=source is not None
        )
        if source is not None and generation.validated.refusal is None:
            assert self.grammars is not None
            generation.grammar = self.grammars.compile(source)
        return generation

    def _parse_grammar(self, request: Request) -> GrammarSource | None:
        """What the text of a generation must be; None if it may be anything."""
        if not GRAMMAR_PARAMETERS & request.parameters.keys():
            return None
        source = GrammarSource.parse(request.parameters)
        if source is not None and self.grammars is None:
            names = sorted(GRAMMAR_PARAMETERS & request.parameters.keys())
            reason = (
                "was built without a tokenizer"
                if self._tokenizer_config.tokenizer is None
                else "was built without masks of tokens"
            )
            raise RequestError(
                Code.BAD_PARAMETER,
                f"this model {reason} and cannot follow a grammar: leave {names} out, or build it"
                f" again",
            )
        spec = BY_NAME[NUM_GENERATED]
        generated = spec.parse(request.parameters.get(NUM_GENERATED, 0))
        assert isinstance(generated, int)
        if source is not None and generated > MAX_GENERATED:
            raise spec.refusal(generated, f"at most {MAX_GENERATED} with a grammar")
        return source

    def _kind(self, request: Request, texts: Mapping[str, tuple[bytes, ...]]) -> RequestKind:
        generates, fetches = request.kind is RequestKind.GENERATION, request.flag(FETCH)
        if (generates or fetches) and self._decoder_io is None:
            name = MAX_TOKENS if generates else FETCH
            raise RequestError(
                Code.BAD_PARAMETER,
                f"this model is not a language model and cannot generate: leave {name!r} out",
            )
        if generates:
            return RequestKind.GENERATION
        empty = not texts and all(tensor.numel() == 0 for tensor in request.inputs.values())
        if request.end and not request.start and empty and not self._runs_at_end:
            return RequestKind.END
        return RequestKind.FETCH if fetches else RequestKind.STEP

    def _check_outputs(self, kind: RequestKind, requested: frozenset[str]) -> None:
        """Refuse a request that names an output which a request of its kind does not have.

        Triton passes on a request that names no outputs as if it named all of the model's.

        Raises:
            RequestError: BAD_OUTPUT.
        """
        if self._decoder_io is None or requested >= self._step_outputs | self._generation_outputs:
            return
        expected = self._step_outputs if kind is RequestKind.STEP else self._generation_outputs
        if unavailable := sorted(requested - expected):
            name, other = (
                ("step", f"with {MAX_TOKENS!r} it would be a generation")
                if kind is RequestKind.STEP
                else ("generation", f"without {MAX_TOKENS!r} it would be a step")
            )
            raise RequestError(
                Code.BAD_OUTPUT,
                f"a {name} has no outputs {unavailable}; it has {sorted(expected)} ({other})",
            )

    def _check_texts(
        self, request: Request, texts: Mapping[str, tuple[bytes, ...]], *, generates: bool
    ) -> None:
        """Refuse inputs of BYTES that the request does not use.

        Raises:
            RequestError: BAD_INPUT.
        """
        used = () if self._decoder_io is None else (TEXT, STOP) if generates else (TEXT,)
        if unused := sorted(texts.keys() - set(used)):
            expected = [*self._input_names, *used]
            raise RequestError(
                Code.BAD_INPUT,
                f"the inputs {unused} are not used by this request; it takes {expected}"
                + ("" if generates else f" (with {MAX_TOKENS!r} it would be a generation)"),
            )
        if TEXT not in texts:
            check_no_special_tokens(request)

    def _parse_limits(
        self, request: Request, texts: Mapping[str, tuple[bytes, ...]]
    ) -> GenerationLimits:
        limits = GenerationLimits.parse(request, texts, self._special_tokens)
        if MIN_TOKENS in request.parameters:
            values = {MIN_TOKENS: limits.min_tokens}
            check_available(request.parameters, values, self._instance.program)
        if limits.stop and self._tokenizer_config.tokenizer is None:
            raise RequestError(
                Code.BAD_PARAMETER,
                "this model was built without a tokenizer and cannot find stop texts: leave 'stop'"
                " out",
            )
        vocab_size = self._instance.program.vocab_size
        ids = limits.stop_token_ids - self._special_ids
        if vocab_size and any(token >= vocab_size for token in ids):
            given = request.parameters[STOP_TOKEN_IDS]
            raise BY_NAME[STOP_TOKEN_IDS].refusal(given, f"token ids below {vocab_size}")
        return limits

    def _make_schedule(
        self, validated: ValidatedRequest, text_from: str, channel: Channel
    ) -> StreamRequest:
        names, tokenizer = self._token_outputs, self._tokenizer_config.tokenizer
        make_detokenizer = None
        if tokenizer is not None and TEXT_OUTPUT in channel.requested_outputs:
            make_detokenizer = partial(Detokenizer, tokenizer, special=self._special_ids)
        ends = validated.request.end
        reply = ScheduleReply(channel, names, text_from, make_detokenizer, ends=ends)
        return StreamRequest(validated, reply)

    def _make_generation(
        self,
        validated: ValidatedRequest,
        limits: GenerationLimits,
        channel: Channel,
        *,
        structured: bool,
    ) -> StreamRequest:
        assert self._decoder_io is not None
        ids_name, token_name = self._decoder_io
        tokenizer = self._tokenizer_config.tokenizer
        detokenizer = stop_detokenizer = None
        if tokenizer is not None and (limits.stop or TEXT_OUTPUT in channel.requested_outputs):
            prompt = validated.inputs[ids_name].tolist()
            try:
                made = Detokenizer(tokenizer, prompt, self._special_ids)
            except TokenizerError as error:
                refusal = RequestError(Code.VALUE_RANGE, f"the prompt has no text: {error}")
                return StreamRequest(replace(validated, refusal=refusal), Reply(channel))
            if limits.stop:  # the engine loop needs the text of every token
                stop_detokenizer = made
            else:
                detokenizer = made
        reply_type = BufferedReply if validated.request.flag(FETCH) else Reply
        generation = GenerationState(limits, self._tokenizer_config.eos_token_ids, stop_detokenizer)
        params = validated.sampling_params
        if structured:  # not `GREEDY`, which has no `num_generated`
            program = self._instance.program
            params = replace(validated.request.sampling_params(program), structured=True)
        params = self._with_end_tokens(params, generation)
        return StreamRequest(
            replace(
                validated,
                sampling_params=params,
                max_new_tokens=limits.max_tokens,
                min_new_tokens=1,
                requested_outputs=params.outputs | {token_name},
            ),
            reply_type(channel, limits.stream_interval, detokenizer, params.logprobs),
            generation,
        )

    def _with_end_tokens(
        self, params: SamplingParams, generation: GenerationState
    ) -> SamplingParams:
        """The parameters with the tokens that may not be chosen at first."""
        min_tokens, vocab_size = generation.limits.min_tokens, self._instance.program.vocab_size
        ends = frozenset(token for token in generation.end_token_ids if token < vocab_size)
        if not min_tokens or not ends:
            return params
        return replace(params, min_tokens=min_tokens, end_token_ids=ends)

    def tokenize_text(self, request: Request, texts: Mapping[str, tuple[bytes, ...]]) -> Request:
        """The request with the token ids of its text, if it has one."""
        if self._decoder_io is None or TEXT not in texts:
            return request
        ids_name = self._decoder_io[0]
        if ids_name in request.inputs:
            raise RequestError(
                Code.BAD_PARAMETER,
                f"inputs {ids_name!r} and {TEXT!r} are both given; send one of them",
            )
        asked = ADD_SPECIAL_TOKENS in request.parameters
        ids = tokenize(
            self._tokenizer_config.tokenizer,
            texts[TEXT],
            self._instance.manifest.capacity,
            add_special_tokens=request.flag(ADD_SPECIAL_TOKENS) if asked else request.begins_empty,
            first_tokens=self._first_tokens,
        )
        return replace(request, inputs=dict(request.inputs) | {ids_name: ids})


def text_output(program: Program) -> str | None:
    """Of a schedule's outputs of the role ``tokens``, the one whose tokens are text."""
    names = [spec.name for spec in program.outputs if spec.role is Role.TOKENS]
    return TOKENS if TOKENS in names else next(iter(names), None)


def tokenize(
    tokenizer: Tokenizer | None,
    encoded: tuple[bytes, ...],
    capacity: int | None,
    *,
    add_special_tokens: bool,
    first_tokens: Sequence[int] = (),
) -> Tensor:
    """The token ids of a request's text, ``[1, tokens]``, int64.

    Args:
        tokenizer: of the model.
        encoded: the elements of the request's text input.
        capacity: positions of a sequence; None if unlimited.
        add_special_tokens: add the tokens that begin a text, unless it begins with them already.
        first_tokens: these tokens, see `first_tokens`.

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
    try:
        ids = encode(tokenizer, decode_utf8(TEXT, text), add_special_tokens=add_special_tokens)
    except TokenizerError as error:
        raise RequestError(Code.VALUE_RANGE, f"input {TEXT!r} has no token ids: {error}") from None
    first = list(first_tokens)
    if add_special_tokens and first and ids[: 2 * len(first)] == first + first:
        ids = ids[len(first) :]  # a rendered chat template begins with them
    if not ids:
        raise RequestError(Code.EMPTY_INPUT, f"input {TEXT!r} has no tokens; send at least 1")
    return torch.tensor([ids])


def first_tokens(tokenizer: Tokenizer) -> list[int]:
    """The tokens that the tokenizer puts before a text; for most, one beginning-of-text token."""
    for probe in ("a", "0", " a", "\N{LATIN SMALL LETTER E WITH ACUTE}"):
        try:
            plain = encode(tokenizer, probe, add_special_tokens=False)
            whole = encode(tokenizer, probe, add_special_tokens=True)
        except TokenizerError:  # it has no tokens for this text
            continue
        for place in range(len(whole) - len(plain) + 1):
            if plain and whole[place : place + len(plain)] == plain:
                return list(whole[:place])
    return []


def _check_fetch(request: Request, texts: Mapping[str, tuple[bytes, ...]]) -> None:
    if request.start or request.end:
        raise RequestError(
            Code.BAD_PARAMETER,
            f"{FETCH!r} without {MAX_TOKENS!r} fetches tokens of a running generation: send neither"
            f" START nor END",
        )
    filled = [name for name, tensor in request.inputs.items() if tensor.numel()]
    if unused := sorted([*texts, *filled]):
        raise RequestError(
            Code.BAD_INPUT,
            f"the inputs {unused} are not used by this request, which fetches tokens: send an empty"
            f" 'input_ids'",
        )


def check_no_special_tokens(request: Request) -> None:
    """Refuse a request without text that asks for the tokenizer's special tokens.

    Raises:
        RequestError: BAD_PARAMETER.
    """
    if request.flag(ADD_SPECIAL_TOKENS):
        raise RequestError(
            Code.BAD_PARAMETER,
            f"parameter {ADD_SPECIAL_TOKENS!r} is for requests with the input {TEXT!r}: put the"
            f" special tokens into 'input_ids', or leave it out",
        )
