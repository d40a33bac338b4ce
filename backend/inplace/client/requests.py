"""The requests of a client: as the caller makes them, and as Triton gets them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import index
from typing import Any, TypedDict, cast
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import InferInput, InferRequestedOutput, InferResult
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from inplace.client.errors import parse_error
from inplace.errors import RequestError
from inplace.parameters import (
    BY_NAME,
    MAX_SEQUENCE_ID_BYTES,
    Parameter,
    RequestKind,
    logprob_outputs,
    parse_parameters,
    prompt_outputs,
)
from inplace.protocol import (
    ALLOWED_TOKEN_IDS,
    BANNED_TOKEN_IDS,
    CHOICE,
    FETCH,
    FINISH_REASON,
    INPUT_IDS,
    JSON,
    LOGIT_BIAS,
    LOGITS,
    LOGPROBS,
    MAX_TOKENS,
    POSITIONS,
    PREFIX_REUSE,
    PROMPT_LOGPROBS,
    PROMPT_OUTPUTS,
    REQUESTS,
    RESTORE,
    REUSED_TOKENS,
    SNAPSHOT_EVERY,
    SNAPSHOT_STORE,
    STOP,
    STOP_TOKEN_IDS,
    TEXT,
    TEXT_OUTPUT,
    TOKEN_LOGPROBS,
    TOKENS,
    TOP_LOGPROBS,
    TOP_TOKENS,
)

Array = NDArray[np.generic]


ParameterArgument = (
    Parameter | Sequence[int] | Mapping[int, float] | Mapping[str, object] | Sequence[str]
)
"""A parameter as callers give it: token ids may be a sequence of integers, and their biases a
mapping; a JSON schema may be a mapping, and the texts of a choice a sequence."""


TOKEN_ID_PARAMETERS = frozenset({STOP_TOKEN_IDS, ALLOWED_TOKEN_IDS, BANNED_TOKEN_IDS})
"""The parameters that may be sequences of integers."""


UNSENT_IF_EMPTY = frozenset({STOP_TOKEN_IDS, BANNED_TOKEN_IDS, LOGIT_BIAS})
"""The parameters that ask for nothing where they are empty. `ALLOWED_TOKEN_IDS` would allow no
token; the server refuses that."""


ROUTING_HEADER = "inplace-sequence"
"""The gRPC metadata key with the correlation id: a router that hashes it sends all requests of a
sequence, and of its copies, to the same server."""


class GenerationOptions(TypedDict, total=False):
    """Parameters of a generation; the server has defaults for those that are left out.

    Attributes:
        temperature: 0 for greedy decoding, the server's default.
        top_k: keep only the ``top_k`` most likely tokens; 0 keeps all.
        top_p: of those, keep only the most likely ones that together reach this probability.
        seed: of the random numbers.
        min_p: of those, keep only tokens with at least this part of the largest probability.
        logprobs: return the log-probability of each token, and those of so many of the most likely
            ones.
        prompt_logprobs: return the log-probability of each token of the prompt, and those of so
            many of the most likely ones in its place.
        repetition_penalty: divides positive scores of tokens that the sequence has, and multiplies
            their negative scores.
        presence_penalty: subtracted from the scores of tokens that were generated.
        frequency_penalty: the same, as often as they were.
        num_generated: how many of the last tokens of the prompt count as generated.
        logit_bias: added to the scores of these tokens.
        allowed_token_ids: the only tokens that may be chosen.
        banned_token_ids: tokens that may not be chosen.
        min_tokens: the fewest tokens before one that ends the generation, and before a stop text.
        ignore_eos: continue after an end token.
        stop_token_ids: tokens that end the generation, also with ``ignore_eos``.
        json: a JSON schema that the text must be valid against.
        json_object: the text must be a JSON object.
        regex: an expression that the text must match as a whole.
        grammar: a grammar in Lark's notation that the text must follow.
        choice: the texts of which it must be one.
        stream_interval: minimum number of tokens of a response.
        add_special_tokens: put the tokenizer's special tokens around a text; where it begins a
            sequence, if absent.
        group: generations of one group share one place in the order in which slots are given; those
            of one client, if absent.
        cache_salt: where the generation begins a sequence: only sequences with the same one, and
            the same key, use each other's prefixes.
    """

    temperature: float
    top_k: int
    top_p: float
    seed: int
    min_p: float
    logprobs: int
    prompt_logprobs: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    num_generated: int
    logit_bias: Mapping[int, float]
    allowed_token_ids: Sequence[int]
    banned_token_ids: Sequence[int]
    min_tokens: int
    ignore_eos: bool
    stop_token_ids: Sequence[int]
    json: Mapping[str, object] | str
    json_object: bool
    regex: str
    grammar: str
    choice: Sequence[str]
    stream_interval: int
    add_special_tokens: bool
    group: str
    cache_salt: str


@dataclass(frozen=True)
class ModelMetadata:
    """What the client needs of a model's configuration.

    Attributes:
        decoupled: requests and responses go over gRPC streams.
        token_inputs: inputs whose first axis (without the batch axis) counts tokens. A request
            without any of them counts as one position.
        has_text: its generations return text beside tokens.
        step_outputs: the outputs of a step that names none: all that need no asking.
        streams_steps: a step may have several responses; the last one has a ``finish_reason``.
        reuses_prefixes: prompts use what earlier ones have computed.
        stores: the servers store sequences that have a key, for another server to go on with.
        snapshot_every: positions after which a living sequence is stored again; 0 if it is not.
    """

    decoupled: bool
    token_inputs: frozenset[str]
    has_text: bool
    step_outputs: tuple[str, ...] = ()
    streams_steps: bool = False
    reuses_prefixes: bool = False
    stores: bool = False
    snapshot_every: int = 0

    @classmethod
    def of(cls, config: Any) -> "ModelMetadata":
        """From Triton's ModelConfig message."""
        decoupled = config.model_transaction_policy.decoupled
        counts_requests = (
            POSITIONS in config.parameters and config.parameters[POSITIONS].string_value == REQUESTS
        )
        every = _text(config, SNAPSHOT_EVERY)
        names = [tensor.name for tensor in config.output]
        streams_steps = decoupled and counts_requests and FINISH_REASON in names
        generates = decoupled and not streams_steps
        asked = (LOGITS, TOKEN_LOGPROBS, TOP_LOGPROBS, TOP_TOKENS, *PROMPT_OUTPUTS)
        generated = (TOKENS, TEXT_OUTPUT, FINISH_REASON, REUSED_TOKENS) if generates else ()
        return cls(
            decoupled=decoupled,
            token_inputs=frozenset(
                tensor.name
                for tensor in config.input
                if not counts_requests and (tensor.allow_ragged_batch or tensor.name == INPUT_IDS)
            ),
            has_text=TEXT_OUTPUT in names,
            step_outputs=tuple(name for name in names if name not in (*generated, *asked)),
            streams_steps=streams_steps,
            reuses_prefixes=REUSED_TOKENS in generated
            and REUSED_TOKENS in names
            and PREFIX_REUSE in config.parameters
            and config.parameters[PREFIX_REUSE].string_value == "on",
            stores=bool(_text(config, SNAPSHOT_STORE)),
            snapshot_every=int(every) if every.isascii() and every.isdigit() else 0,
        )

    def num_positions(self, inputs: Mapping[str, Array]) -> int:
        """How many positions of its sequence a request takes."""
        return next(
            (array.shape[0] for name, array in inputs.items() if name in self.token_inputs), 1
        )


def _text(config: Any, name: str) -> str:
    """A parameter of a ModelConfig message; empty without it."""
    return config.parameters[name].string_value if name in config.parameters else ""


Segment = list[int] | str
"""A part of a sequence's history: consecutive tokens, or a text."""


@dataclass(frozen=True)
class SequenceRequest:
    """A step or a generation as the caller asked for it; it becomes one or more `InferRequest`.

    Attributes:
        inputs: by name, without a batch axis.
        end: the sequence ends with it.
        parameters: custom parameters.
        outputs: names of the requested outputs; all if empty, ``logits`` only with the parameter.
        request_id: a random one if empty.
    """

    inputs: Mapping[str, Array]
    end: bool = False
    parameters: Mapping[str, ParameterArgument] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    request_id: str = ""

    def output_names(self, model: ModelMetadata) -> tuple[str, ...]:
        """The outputs to ask the server for."""
        if self.outputs or {MAX_TOKENS, FETCH} & self.parameters.keys():
            last = (FINISH_REASON,) if model.streams_steps else ()
            if model.reuses_prefixes and MAX_TOKENS in self.parameters:
                last = (REUSED_TOKENS,)
            names = dict.fromkeys((*self.outputs, *last))
            return tuple(name for name in names if name != TEXT_OUTPUT or model.has_text)
        logits = (LOGITS,) if self._asks_for_logits else ()
        return (
            model.step_outputs
            + logits
            + logprob_outputs(self.parameters.get(LOGPROBS))
            + prompt_outputs(self.parameters.get(PROMPT_LOGPROBS))
        )

    @property
    def _asks_for_logits(self) -> bool:
        try:
            return bool(BY_NAME[LOGITS].parse(self.parameters.get(LOGITS, False)))
        except RequestError:  # the request will not be sent
            return False

    @property
    def num_ids(self) -> int | None:
        """How many token ids it has; None if it has other inputs."""
        return len(self.inputs[INPUT_IDS]) if INPUT_IDS in self.inputs else None

    @property
    def segment(self) -> Segment | None:
        """What it adds to the history; None where its inputs cannot be replayed."""
        names = set(self.inputs) - {STOP}
        if names == {INPUT_IDS}:
            return [int(token) for token in self.inputs[INPUT_IDS]]
        return str(self.inputs[TEXT].item().decode()) if names == {TEXT} else None

    def with_prefix(self, tokens: Sequence[int]) -> "SequenceRequest":
        """The same request with tokens before its own."""
        return self._with_tokens([*tokens, *self.inputs[INPUT_IDS]])

    def without_first(self, count: int) -> "SequenceRequest":
        """The same request without so many of its tokens."""
        return self._with_tokens([*self.inputs[INPUT_IDS][count:]])

    def with_suffix(self, tokens: Sequence[int]) -> "SequenceRequest":
        """The same request with tokens after its own."""
        return self._with_tokens([*self.inputs[INPUT_IDS], *tokens])

    def _with_tokens(self, tokens: Sequence[int]) -> "SequenceRequest":
        return replace(
            self, inputs=dict(self.inputs) | {INPUT_IDS: np.array(tokens, dtype=np.int64)}
        )


def step_request(segment: Segment) -> SequenceRequest:
    """A step that feeds tokens or a text."""
    inputs = (
        {TEXT: np.array([segment.encode()], dtype=np.object_)}
        if isinstance(segment, str)
        else {INPUT_IDS: np.array(segment, dtype=np.int64)}
    )
    return SequenceRequest(inputs, outputs=("next_token",))


def generation_request(
    prompt: Sequence[int] | Array | str,
    max_tokens: int,
    stop: Sequence[str],
    text: bool,
    end: bool,
    request_id: str,
    options: GenerationOptions,
) -> SequenceRequest:
    """A generation; the arguments are those of `Sequence.generate`."""
    inputs: dict[str, Array] = {}
    if isinstance(prompt, str):
        inputs[TEXT] = np.array([prompt.encode()], dtype=np.object_)
    else:
        inputs[INPUT_IDS] = np.asarray(prompt, dtype=np.int64)
    if stop:
        inputs[STOP] = np.array([one.encode() for one in stop], dtype=np.object_)
    parameters: dict[str, ParameterArgument] = {MAX_TOKENS: max_tokens}
    parameters.update(cast(Mapping[str, ParameterArgument], options))
    texts = (TEXT_OUTPUT,) if text else ()
    outputs = (
        TOKENS,
        *texts,
        FINISH_REASON,
        *logprob_outputs(options.get("logprobs")),
        *prompt_outputs(options.get("prompt_logprobs")),
    )
    return SequenceRequest(inputs, end, parameters, outputs, request_id)


@dataclass(frozen=True)
class InferRequest:
    """One request as Triton gets it.

    Attributes:
        sequence_id: the correlation id.
        start: the sequence flag START.
        end: the sequence flag END.
        inputs: by name, without a batch axis.
        parameters: custom parameters, from `encode_parameters`.
        outputs: names of the requested outputs; all if empty.
        request_id: the request id.
        route: the id that a router hashes, if it is another one: a copy of a sequence goes to the
            server of that sequence.

    Raises:
        ValueError: the request id has a NUL byte.
    """

    sequence_id: int | str
    start: bool
    end: bool
    inputs: Mapping[str, Array]
    parameters: Mapping[str, str | int | bool]
    outputs: tuple[str, ...] = ()
    request_id: str = ""
    route: int | str | None = None

    def __post_init__(self) -> None:
        check_no_nul("the request id", self.request_id)

    @property
    def generates(self) -> bool:
        """Whether it is a generation, with a stream of responses."""
        return MAX_TOKENS in self.parameters

    @property
    def restores(self) -> bool:
        """Whether the server is asked to restore the sequence, if it is not live there."""
        return RESTORE in self.parameters

    @property
    def headers(self) -> dict[str, str]:
        """The gRPC metadata for a router in front of several servers, see docs/operations.md."""
        route = self.sequence_id if self.route is None else self.route
        return {ROUTING_HEADER: quote(str(route))}

    def arguments(self, model: str) -> dict[str, Any]:
        """The arguments of tritonclient's ``infer`` and of its streams."""
        tensors = []
        for name, array in self.inputs.items():
            tensor = InferInput(name, [1, *array.shape], np_to_triton_dtype(array.dtype))
            tensor.set_data_from_numpy(array[None])
            tensors.append(tensor)
        return {
            "model_name": model,
            "inputs": tensors,
            "outputs": [InferRequestedOutput(name) for name in self.outputs] or None,
            "sequence_id": self.sequence_id,
            "sequence_start": self.start,
            "sequence_end": self.end,
            "request_id": self.request_id,
            "parameters": dict(self.parameters) or None,
        }


def encode_parameters(parameters: Mapping[str, object]) -> dict[str, str | int | bool]:
    """Parameters as gRPC carries them.

    Floats, integers of more than 64 bits, sequences of integers, biases, JSON schemas and choices
    become texts.

    Raises:
        TypeError: a value is neither a string, a number, a boolean nor, where the parameter takes
            them, a sequence of integers or a mapping of them to numbers.
    """
    encoded: dict[str, str | int | bool] = {}
    for name, given in parameters.items():
        value = given.item() if isinstance(given, np.generic) else given
        if isinstance(value, float) or (
            isinstance(value, int) and not -(1 << 63) <= value < 1 << 63
        ):
            encoded[name] = repr(value)
        elif isinstance(value, str | int):
            encoded[name] = value
        elif (text := _list_text(name, value)) is None:
            raise TypeError(
                f"parameter {name!r} is {given!r}; expected a string, a number or a boolean"
            )
        elif text or name not in UNSENT_IF_EMPTY:
            encoded[name] = text
    return encoded


def _list_text(name: str, value: object) -> str | None:
    """Token ids, their biases, a schema or texts as one text; None for anything else."""
    try:
        if name in TOKEN_ID_PARAMETERS and isinstance(value, Sequence | np.ndarray):
            return ",".join(str(index(token)) for token in value)
        if name == JSON and isinstance(value, Mapping):
            return json.dumps(dict(value), ensure_ascii=False)
        if name == CHOICE and isinstance(value, Sequence):
            return json.dumps(list(value), ensure_ascii=False)
        if name == LOGIT_BIAS and isinstance(value, Mapping):
            return ",".join(f"{index(token)}:{float(bias)!r}" for token, bias in value.items())
    except TypeError:  # a token is not an integer, or JSON has no such value
        return None
    return None


def check_parameters(request: InferRequest) -> None:
    """Check the parameters of a request before it is sent, as the backend does.

    Raises:
        RefusedError: BAD_PARAMETER, with the text that the backend would answer.
    """
    kind = RequestKind.GENERATION if request.generates else RequestKind.STEP
    try:
        if not request.generates and BY_NAME[FETCH].parse(request.parameters.get(FETCH, False)):
            kind = RequestKind.FETCH
        parse_parameters(request.parameters, kind)
    except RequestError as error:
        text = error.wire(request.sequence_id, request.request_id)
        raise parse_error(
            InferenceServerException(text, "StatusCode.INVALID_ARGUMENT"),
            request.sequence_id,
            request.request_id,
        ) from None


def check_no_nul(name: str, text: str) -> None:
    """Refuse a text with a NUL byte: Triton would cut it there.

    Raises:
        ValueError: it has one.
    """
    if "\0" in text:
        raise ValueError(
            f"{name} has a NUL byte, at which Triton would cut it: use hexadecimal digits for bytes"
        )


def check_sequence_id(sequence_id: int | str) -> None:
    """Refuse a correlation id that Triton would refuse, cut or change.

    Raises:
        ValueError: it is 0, empty, too large or too long, or has a NUL byte.
    """
    if isinstance(sequence_id, str):
        check_no_nul("the correlation id", sequence_id)
        num_bytes = len(sequence_id.encode(errors="surrogatepass"))
        if not 1 <= num_bytes <= MAX_SEQUENCE_ID_BYTES:
            raise ValueError(
                f"the correlation id has {num_bytes} bytes; expected 1 to {MAX_SEQUENCE_ID_BYTES}"
            )
    elif not 1 <= sequence_id < 1 << 63:
        raise ValueError(
            f"the correlation id is {sequence_id}; expected an integer from 1 to 2^63 - 1, or a"
            " text"
        )


def decode_outputs(result: InferResult) -> dict[str, Array]:
    """The outputs of a response by name, without a batch axis.

    Raises:
        InferenceServerException: there are none. When a request of a sequence is cancelled, Triton
            cancels the requests that are queued after it, and over a stream it sends nothing else.
    """
    if not result.get_response().outputs:
        raise InferenceServerException(
            "the server cancelled the request, because another client cancelled an earlier request "
            "of the same sequence",
            "StatusCode.CANCELLED",
        )
    return {
        output.name: result.as_numpy(output.name)[0] for output in result.get_response().outputs
    }


def join_outputs(
    outputs: Mapping[str, Array], more: Mapping[str, Array]
) -> tuple[dict[str, Array], bool]:
    """The outputs of a step that has one more response, and whether that is the last one.

    What both have are tokens, or their text.
    """
    joined = dict(outputs)
    for name, array in more.items():
        if name not in joined or name == FINISH_REASON:
            joined[name] = array
        elif name == TEXT_OUTPUT:
            text = decode_text(joined, name) + decode_text(more, name)
            joined[name] = np.array([text.encode()], dtype=np.object_)
        else:
            joined[name] = np.concatenate([joined[name], array])
    return joined, bool(decode_text(joined, FINISH_REASON))


def decode_tokens(outputs: Mapping[str, Array]) -> list[int]:
    """The tokens of a response of a generation."""
    return [int(token) for token in outputs[TOKENS].reshape(-1)]


def decode_text(outputs: Mapping[str, Array], name: str) -> str:
    """The text of an output; empty where there is none."""
    if name not in outputs or not outputs[name].size:
        return ""
    value = outputs[name].reshape(-1)[0]
    return value.decode() if isinstance(value, bytes) else str(value)
