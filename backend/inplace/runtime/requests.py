"""Requests without Triton's types, and the checks that need only the program's description."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Self

import torch
from torch import Tensor

from inplace.errors import Code, RequestError
from inplace.parameters import (
    AUDIO_PARAMETERS,
    BASIC_SAMPLING_PARAMETERS,
    BY_NAME,
    SAMPLING_PARAMETERS,
    Parameter,
    RequestKind,
    digest,
    logprob_outputs,
)
from inplace.protocol import (
    ALLOWED_TOKEN_IDS,
    BANNED_TOKEN_IDS,
    CACHE_SALT,
    FORGET,
    FROM,
    INVALID_POSITION,
    LOGIT_BIAS,
    LOGPROBS,
    MAX_TOKENS,
    NUM_GENERATED,
    POSITION,
    PROMPT_LOGPROBS,
    RESTORE,
    SEQUENCE_KEY,
)
from inplace.runtime.audio import check_audio_parameters, read_audio, read_option
from inplace.runtime.fairness import fairness_group
from inplace.runtime.slots import SequenceId
from inplace.schema.programs import Program
from inplace.schema.schedule import Schedule
from inplace.schema.specs import Role, TensorSpec
from inplace.snapshots import Restored


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What the sampling operator gets for one row.

    The fields are named as the request parameters.

    Attributes:
        temperature: divides the scores; 0 takes the token with the largest score.
        top_k: keep this many of the largest scores; 0 keeps all.
        top_p: of those, keep the largest that together have this probability; 1 keeps all.
        seed: of the random numbers, which depend on it and on the token's position alone.
        min_p: of those, keep the tokens that have this part of the largest probability.
        logprobs: how many of the most likely tokens are returned with their log-probabilities,
            beside the chosen one; None for no log-probabilities at all.
        repetition_penalty: divides positive scores of tokens that the sequence has, and multiplies
            their negative scores (Keskar et al., arXiv:1909.05858, as transformers'
            ``RepetitionPenaltyLogitsProcessor``).
        presence_penalty, frequency_penalty: subtracted from the scores of tokens that were
            generated, the second as often as they were (as OpenAI defines them, and vLLM's
            ``apply_penalties``).
        logit_bias: tokens, and what is added to their scores.
        allowed_token_ids: the only tokens that may be chosen; empty for all.
        banned_token_ids: tokens that may not be chosen.
        num_generated: how many of the last tokens before the one that is chosen count as generated.
        min_tokens: before so many generated tokens none of ``end_token_ids`` may be chosen.
        end_token_ids: the tokens that would end the generation.
        structured: a grammar says which tokens may be chosen.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    logprobs: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    banned_token_ids: tuple[int, ...] = ()
    num_generated: int = 0
    min_tokens: int = 0
    end_token_ids: frozenset[int] = frozenset()
    structured: bool = False

    @property
    def num_logprobs(self) -> int:
        """The value of the role ``num_logprobs``."""
        return 0 if self.logprobs is None else self.logprobs + 1

    @property
    def counts_tokens(self) -> bool:
        """Whether the scores depend on the tokens so far."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @property
    def counts_generated(self) -> bool:
        """Whether the scores depend on which tokens were generated."""
        return (self.presence_penalty, self.frequency_penalty) != (0, 0)

    @property
    def adjusts(self) -> bool:
        """Whether any score is adjusted."""
        return bool(
            self.counts_tokens
            or self.logit_bias
            or self.allowed_token_ids
            or self.banned_token_ids
            or self.min_tokens
            or self.structured
        )

    @property
    def is_greedy(self) -> bool:
        """Whether the token with the largest score is taken, and nothing else is asked for."""
        return self.temperature == 0 and self.logprobs is None and not self.adjusts

    @property
    def outputs(self) -> frozenset[str]:
        """The names of the outputs with log-probabilities that it asks for."""
        return frozenset(logprob_outputs(self.logprobs))

    @classmethod
    def parse(cls, parameters: Mapping[str, Parameter], program: Program) -> Self:
        """Read the sampling parameters of a request; absent ones have their default.

        Args:
            parameters: the request's parameters; numbers may be texts.
            program: the program that chooses the token.

        Raises:
            RequestError: BAD_PARAMETER, one of them is not a number or out of range, or the program
                does not have it and its value is not what it is if absent. All are checked, also
                where the temperature is 0.
        """
        values: dict[str, Any] = {
            name: BY_NAME[name].parse(parameters[name])
            for name in SAMPLING_PARAMETERS
            if name in parameters
        }
        check_available(parameters, values, program)
        if not program.vocab_size:
            return cls()
        _check_vocabulary(parameters, values, program.vocab_size)
        if (most := values.get(LOGPROBS)) is not None and most > program.vocab_size:
            raise BY_NAME[LOGPROBS].refusal(most, f"at most {program.vocab_size} tokens")
        return cls(**values)


GREEDY = SamplingParams()


def check_available(
    parameters: Mapping[str, Parameter], values: Mapping[str, Any], program: Program
) -> None:
    """Refuse parameters that the program cannot use, unless they ask for nothing.

    Args:
        parameters: of the request.
        values: those of them that are fields of `SamplingParams`, parsed.
        program: the program that chooses the token.

    Raises:
        RequestError: BAD_PARAMETER.
    """
    if program.max_adjusted:
        return
    for name in sorted(values):
        if program.vocab_size and name in BASIC_SAMPLING_PARAMETERS:
            continue
        default = getattr(GREEDY, name)
        if values[name] != default:
            reason, engine = (
                ("was built without this parameter", "it again")
                if program.vocab_size
                else ("does not sample", "an engine that samples")
            )
            absent = default in (None, ())
            send = "leave it out" if absent else f"send {default} or leave it out"
            raise RequestError(
                Code.BAD_PARAMETER,
                f"parameter {name!r} is {parameters[name]!r}; this engine {reason}: {send}, or"
                f" build {engine}",
            )


def _check_vocabulary(
    parameters: Mapping[str, Parameter], values: Mapping[str, Any], vocab_size: int
) -> None:
    if values.get("top_k", 0) > vocab_size:
        limits = f"a whole number from 0 (all) to {vocab_size}, the size of the vocabulary"
        raise BY_NAME["top_k"].refusal(parameters["top_k"], limits)
    for name in (ALLOWED_TOKEN_IDS, BANNED_TOKEN_IDS):
        if any(token >= vocab_size for token in values.get(name, ())):
            raise BY_NAME[name].refusal(parameters[name], f"token ids below {vocab_size}")
    if any(token >= vocab_size for token, _ in values.get(LOGIT_BIAS, ())):
        raise BY_NAME[LOGIT_BIAS].refusal(parameters[LOGIT_BIAS], f"token ids below {vocab_size}")


@dataclass(slots=True)
class Request:
    """One request of one sequence.

    Attributes:
        sequence_id: the correlation id.
        start, end: the sequence flags.
        inputs: host tensors by input name, with the batch axis of 1.
        request_id: the client's request id, for errors and logs.
        parameters: the request's parameters.
        arrival_time: when it arrived at the backend, in monotonic seconds.
        requested_outputs: the names of the outputs that the client asked for; None for those that
            need no asking.
        refusal: why the request could not be read; its START and END take effect all the same.
        offered: another instance of the model may take it: it is refused where it would wait for a
            slot, and a refusal that another instance might not share is not counted.
        restored: the sequence that it goes on with, once that was read from the store.
    """

    sequence_id: SequenceId
    start: bool
    end: bool
    inputs: Mapping[str, Tensor]
    request_id: str = ""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    arrival_time: float = field(default_factory=monotonic)
    requested_outputs: frozenset[str] | None = None
    refusal: RequestError | None = None
    offered: bool = False
    restored: Restored | None = None

    def may_succeed_elsewhere(self, error: RequestError) -> bool:
        """Whether another instance of the model might admit a START that this one refused so.

        It may have a free slot, or have the sequence to copy or to continue.
        """
        if not self.offered or not self.start:
            return False
        match error.code:
            case Code.NO_FREE_SLOT:
                return True
            case Code.UNKNOWN_SEQUENCE:
                return FROM in self.parameters
            case Code.POSITION | Code.NO_SNAPSHOT:
                return self.continues_sequence
            case _:
                return False

    @property
    def kind(self) -> RequestKind:
        """A generation or a step."""
        return RequestKind.GENERATION if MAX_TOKENS in self.parameters else RequestKind.STEP

    def flag(self, name: str) -> bool:
        """A boolean parameter; False if absent.

        Raises:
            RequestError: BAD_PARAMETER, it is neither true nor false.
        """
        return name in self.parameters and bool(BY_NAME[name].parse(self.parameters[name]))

    def position(self) -> int | None:
        """The parameter ``position``: the sequence's length as the client knows it; None if absent.

        Raises:
            RequestError: BAD_PARAMETER, it is not a whole number of at least 0.
        """
        if POSITION not in self.parameters:
            return None
        position = BY_NAME[POSITION].parse(self.parameters[POSITION])
        assert isinstance(position, int)
        return position

    @property
    def continues_sequence(self) -> bool:
        """Whether its position is not 0, so that even a START continues a live sequence.

        With ``from`` the position is that of the other sequence.
        """
        if FROM in self.parameters:
            return False
        try:
            return self.position() not in (None, 0)
        except RequestError:  # it is refused; then it must not reset a sequence either
            return True

    @property
    def may_go_on_elsewhere(self) -> bool:
        """Whether another server may answer it with what is stored of its sequence.

        An END that is refused here, and may, leaves that: its client sends it again.
        """
        try:
            position = self.position()
        except RequestError:
            return False
        return position is not None and 0 < position < INVALID_POSITION

    @property
    def asks_to_restore(self) -> bool:
        """Whether it has the parameter ``restore``; also where that is refused."""
        try:
            return self.flag(RESTORE)
        except RequestError:
            return False

    def restores(self) -> bool:
        """The parameter ``restore``: whether the sequence may come from the store.

        Raises:
            RequestError: BAD_PARAMETER, the request has no START, no key or no position above 0.
        """
        if not self.flag(RESTORE):
            return False
        if not self.start or SEQUENCE_KEY not in self.parameters or not self.continues_sequence:
            raise RequestError(
                Code.BAD_PARAMETER,
                f"parameter {RESTORE!r} belongs to a START with {SEQUENCE_KEY!r}, a {POSITION!r}"
                f" above 0 and without {FROM!r}: send these, or leave it out",
            )
        return True

    @property
    def begins_empty(self) -> bool:
        """Whether it is a START whose sequence, if it is admitted, holds nothing before it."""
        return self.start and FROM not in self.parameters and not self.continues_sequence

    def source(self) -> SequenceId | None:
        """The parameter ``from``: the sequence that it begins as a copy of; None if absent.

        Raises:
            RequestError: BAD_PARAMETER, it is not a correlation id or the sequence's own, or the
                request has no START.
        """
        if FROM not in self.parameters:
            return None
        source = BY_NAME[FROM].parse(self.parameters[FROM])
        assert isinstance(source, int | str)
        if not self.start:
            raise RequestError(
                Code.BAD_PARAMETER, f"parameter {FROM!r} belongs to a START: leave it out"
            )
        if source == self.sequence_id:
            raise BY_NAME[FROM].refusal(source, "the id of another sequence")
        return source

    def cache_salt(self) -> str:
        """The parameter ``cache_salt``; empty if absent.

        Raises:
            RequestError: BAD_PARAMETER, it is not a key, or the request is not a START of a
                sequence of its own.
        """
        if CACHE_SALT not in self.parameters:
            return ""
        salt = BY_NAME[CACHE_SALT].parse(self.parameters[CACHE_SALT])
        if not self.start or FROM in self.parameters:
            raise RequestError(
                Code.BAD_PARAMETER,
                f"parameter {CACHE_SALT!r} belongs to a START without {FROM!r}: leave it out",
            )
        return str(salt)

    def forgets(self) -> bool:
        """The parameter ``forget``: whether nothing of the sequence is kept after its end.

        Raises:
            RequestError: BAD_PARAMETER, it is true and the request has no END.
        """
        if not self.flag(FORGET):
            return False
        if not self.end:
            raise RequestError(
                Code.BAD_PARAMETER, f"parameter {FORGET!r} belongs to an END: leave it out"
            )
        return True

    def key_digest(self) -> bytes | None:
        """SHA-256 of the parameter ``sequence_key``; None if absent.

        A whole number is the same key as the text of its digits. The key itself is not kept and
        appears in no error.

        Raises:
            RequestError: BAD_PARAMETER, it is neither text nor a whole number, or is empty or too
                long.
        """
        if SEQUENCE_KEY not in self.parameters:
            return None
        return digest(BY_NAME[SEQUENCE_KEY].parse(self.parameters[SEQUENCE_KEY]))

    def fairness_group(self) -> bytes:
        """The group that it waits in (`inplace.runtime.fairness`)."""
        return fairness_group(self.sequence_id, self.parameters)

    def prompt_logprobs(self, program: Program | None) -> int | None:
        """The parameter ``prompt_logprobs``; None if absent.

        Args:
            program: the program with log-probabilities of fed tokens; None if there is none.

        Raises:
            RequestError: BAD_PARAMETER, there is none, or it is not a number or out of range.
        """
        if PROMPT_LOGPROBS not in self.parameters:
            return None
        given = self.parameters[PROMPT_LOGPROBS]
        number = BY_NAME[PROMPT_LOGPROBS].parse(given)
        assert isinstance(number, int)
        if program is None:
            raise RequestError(
                Code.BAD_PARAMETER,
                f"parameter {PROMPT_LOGPROBS!r} is {given!r}; this engine was built without"
                f" log-probabilities of fed tokens: leave it out, or build a language model with"
                f" --prompt-logprobs",
            )
        if number > program.vocab_size:
            raise BY_NAME[PROMPT_LOGPROBS].refusal(given, f"at most {program.vocab_size} tokens")
        return number

    def sampling_params(self, program: Program) -> SamplingParams:
        """How its next token is chosen; greedy if it has no sampling parameter.

        Raises:
            RequestError: BAD_PARAMETER, as `SamplingParams.parse`; or a step has penalties for
                generated tokens without their number.
        """
        if not SAMPLING_PARAMETERS & self.parameters.keys():
            return GREEDY
        params = SamplingParams.parse(self.parameters, program)
        is_step = self.kind is RequestKind.STEP
        if is_step and params.counts_generated and NUM_GENERATED not in self.parameters:
            raise RequestError(
                Code.BAD_PARAMETER,
                f"'presence_penalty' and 'frequency_penalty' of a step need {NUM_GENERATED!r}: only"
                f" the client knows which tokens were generated; send how many of the last ones"
                f" were",
            )
        return params


@dataclass(slots=True)
class ValidatedRequest:
    """A request and everything that is known of it without its sequence.

    Attributes:
        request: the request.
        key_digest: digest of its ``sequence_key``.
        inputs: the validated tensors, without the batch axis.
        num_tokens: how many tokens they have.
        max_new_tokens: the most tokens that are generated after them.
        min_new_tokens: how many generated tokens must fit after them.
        position: the parameter ``position``; None if absent.
        source: the parameter ``from``; None if absent.
        cache_salt: the parameter ``cache_salt``; empty if absent.
        sampling_params: how its next token is chosen.
        prompt_logprobs: of how many of the most likely tokens it asks the log-probabilities, in the
            place of each of its own; None for no log-probabilities of its own tokens.
        requested_outputs: names of the outputs to compute.
        refusal: why it is refused; its START and END take effect all the same.
        schedule: what it runs, in an engine with schedules; known once its sequence is.
        only_ends: it is an END that has nothing to compute.
    """

    request: Request
    key_digest: bytes | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    num_tokens: int = 0
    max_new_tokens: int = 0
    min_new_tokens: int = 0
    position: int | None = None
    source: SequenceId | None = None
    cache_salt: str = ""
    sampling_params: SamplingParams = GREEDY
    prompt_logprobs: int | None = None
    requested_outputs: frozenset[str] = frozenset()
    refusal: RequestError | None = None
    schedule: Schedule | None = None
    only_ends: bool = False


NO_PARAMETERS: Mapping[str, Parameter] = {}


def validate_inputs(
    program: Program,
    inputs: Mapping[str, Tensor],
    parameters: Mapping[str, Parameter] = NO_PARAMETERS,
    *,
    allow_empty: bool = False,
    last: bool = False,
) -> tuple[dict[str, Tensor], int]:
    """The client's tensors without their batch axis, and the number of their tokens.

    A request of a rectangular program has one token.

    Args:
        program: the program.
        inputs: by name.
        parameters: of the request.
        allow_empty: whether an input of tokens may have none.
        last: the request is the last of its sequence (`TensorSpec.shorter`).

    Raises:
        RequestError: BAD_INPUT, MISSING_INPUT, BAD_DTYPE, BAD_SHAPE, EMPTY_INPUT, VALUE_RANGE,
            CAPACITY or BAD_PARAMETER.
    """
    if unknown := sorted(inputs.keys() - set(program.input_names)):
        raise RequestError(
            Code.BAD_INPUT,
            f"the inputs {unknown} are not used by this request; it takes"
            f" {list(program.input_names)}",
        )
    if AUDIO_PARAMETERS & parameters.keys():
        check_audio_parameters(program, parameters)
    validated: dict[str, Tensor] = {}
    num_tokens: dict[str, int] = {}
    for spec in program.client_inputs:
        if spec.role is Role.AUDIO:
            audio, length = read_audio(spec, inputs, parameters, last=last)
            validated[spec.name] = audio
            if spec.length_input is not None:
                validated[spec.length_input] = length
            continue
        if spec.role is Role.OPTION:
            validated[spec.name] = read_option(spec, parameters)
            continue
        tensor = inputs.get(spec.name)
        if tensor is None:
            raise RequestError(
                Code.MISSING_INPUT,
                f"input {spec.name!r} is missing; this model takes {list(program.input_names)}",
            )
        if spec.length_input is not None:
            tensor, validated[spec.length_input] = _pad(spec, tensor, last=last)
        validated[spec.name] = _validate_tensor(spec, tensor, allow_empty=allow_empty)
        if spec.role is Role.TOKENS:
            num_tokens[spec.name] = validated[spec.name].shape[0]
    if len(set(num_tokens.values())) > 1:
        raise RequestError(
            Code.BAD_SHAPE,
            f"inputs of one request must have the same number of tokens, got {num_tokens}",
        )
    return validated, next(iter(num_tokens.values()), 1)


def _validate_tensor(spec: TensorSpec, tensor: Tensor, *, allow_empty: bool) -> Tensor:
    if tensor.dtype != spec.dtype.as_torch:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise RequestError(Code.BAD_DTYPE, f"input {spec.name!r} is {dtype}; expected {spec.dtype}")
    shape, has_tokens = tensor.shape, spec.role is Role.TOKENS
    rest, extents = (spec.shape[1:], shape[2:]) if has_tokens else (spec.shape, shape[1:])
    if len(shape) < 1 + has_tokens or shape[0] != 1 or extents != rest:
        expected = [1, *("tokens" if extent == -1 else extent for extent in spec.shape)]
        raise RequestError(
            Code.BAD_SHAPE,
            f"input {spec.name!r} has the shape {list(shape)}; expected {expected}",
        )
    tensor = tensor[0]
    if has_tokens and tensor.shape[0] == 0:
        if allow_empty:
            return tensor
        raise RequestError(Code.EMPTY_INPUT, f"input {spec.name!r} is empty; send at least 1 token")
    _check_values(spec, tensor)
    return tensor


def _pad(spec: TensorSpec, tensor: Tensor, *, last: bool) -> tuple[Tensor, Tensor]:
    """An input that may be shorter, with zeros up to its whole length; and its own length."""
    whole, shape = spec.shape[0], tensor.shape
    fits = len(shape) == 1 + len(spec.shape) and shape[0] == 1 and shape[2:] == spec.shape[1:]
    if not fits or not 1 <= shape[1] < whole:
        return tensor, torch.tensor(whole)  # whole, or refused later
    if spec.shorter == "last" and not last:
        raise RequestError(
            Code.BAD_SHAPE,
            f"input {spec.name!r} has {shape[1]} entries, a request has {whole}: only the last one,"
            f" with END, may have fewer",
        )
    _check_values(spec, tensor)  # the padding may be outside the limits
    padding = tensor.new_zeros(1, whole - shape[1], *shape[2:])
    return torch.cat([tensor, padding], 1), torch.tensor(shape[1])


def _check_values(spec: TensorSpec, tensor: Tensor) -> None:
    if spec.minimum is None and spec.maximum is None:
        return
    if tensor.numel() == 1:
        low = high = tensor.item()
    else:
        low, high = (bound.item() for bound in tensor.aminmax())
    low_fits = spec.minimum is None or low >= spec.minimum  # False for NaN
    high_fits = spec.maximum is None or high <= spec.maximum
    if not (low_fits and high_fits):
        raise RequestError(
            Code.VALUE_RANGE,
            f"input {spec.name!r} holds {high if low_fits else low}; expected values from"
            f" {spec.minimum} to {spec.maximum}",
        )
