"""The registry of request parameters.

The backend's parsers, the refusal of unknown names, the client, the generate proxy and the table in
docs/protocol.md read it. It imports neither PyTorch nor NumPy.
"""

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from typing import Any, Literal

from inplace.errors import Code, RequestError
from inplace.protocol import (
    ADD_SPECIAL_TOKENS,
    ALLOWED_TOKEN_IDS,
    BANNED_TOKEN_IDS,
    CACHE_SALT,
    CHOICE,
    FETCH,
    FORGET,
    FROM,
    GRAMMAR,
    GROUP,
    IGNORE_EOS,
    INPUT_IDS,
    JSON,
    JSON_OBJECT,
    LANGUAGE,
    LOGIT_BIAS,
    LOGITS,
    LOGPROBS,
    MAX_TOKENS,
    MIN_TOKENS,
    NUM_GENERATED,
    POSITION,
    PROMPT_LOGPROBS,
    PROMPT_OUTPUTS,
    REGEX,
    RESTORE,
    SAMPLE_RATE,
    SEQUENCE_KEY,
    STOP,
    STOP_TOKEN_IDS,
    STREAM,
    STREAM_INTERVAL,
    TASK,
    TEXT,
    TIMESTAMPS,
    TOKEN_LOGPROBS,
    TOP_LOGPROBS,
    TOP_TOKENS,
)

Parameter = bool | int | float | str
"""The value of a request parameter in Triton."""


Value = bool | int | float | str | tuple[int, ...] | tuple[tuple[int, float], ...] | tuple[str, ...]
"""The value of a request parameter after it was parsed."""


INT64_MAX = 2**63 - 1


MAX_COUNT = 2**31 - 1
"""Tokens; the largest value of the parameters that count tokens."""


MAX_KEY_LENGTH = 256
"""Characters of a ``sequence_key`` and of a ``group``."""


MAX_SEQUENCE_ID_BYTES = 128
"""Bytes of a correlation id that is a text, in UTF-8; Triton refuses more."""


MAX_STOP_TOKEN_IDS = 64
"""Token ids of ``stop_token_ids``."""


MAX_MASKED_TOKENS = 1024
"""Token ids of ``allowed_token_ids`` and of ``banned_token_ids``."""


MAX_BIASES, MAX_BIAS = 300, 100.0
"""Tokens of ``logit_bias``, and the largest absolute value of a bias."""


MAX_LOGPROBS = 20
"""The largest value of ``logprobs`` and of ``prompt_logprobs``."""


MAX_TEMPERATURE = 3.4028234663852886e38
"""The largest float32."""


MAX_GRAMMAR_BYTES = 65536
"""Bytes in UTF-8 of a parameter that says what the text must be."""


MAX_CHOICES = 1024
"""Texts of ``choice``."""


INTEGER = re.compile(r"[+-]?[0-9]{1,19}")


DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")


MAX_SHOWN_LENGTH = 200
"""Characters of a value in an error."""


class RequestKind(StrEnum):
    """What a request asks for; see docs/protocol.md.

    A request with ``max_tokens`` is a generation, and one with ``fetch`` but without ``max_tokens``
    fetches. An END without inputs and without START only ends, unless a schedule is for it. Any
    other request is a step.
    ``PROXY`` is a generation that the generate proxy starts.
    """

    STEP = "step"
    GENERATION = "generation"
    FETCH = "fetch"
    END = "end"
    PROXY = "proxy"


ANY = frozenset({RequestKind.STEP, RequestKind.GENERATION, RequestKind.FETCH, RequestKind.END})


STEPS = frozenset({RequestKind.STEP})


GENERATIONS = frozenset({RequestKind.GENERATION, RequestKind.PROXY})


STEPS_AND_GENERATIONS = STEPS | GENERATIONS


ParameterType = Literal[
    "boolean",
    "integer",
    "number",
    "key",
    "name",
    "sequence id",
    "token ids",
    "token biases",
    "text",
    "texts",
    "JSON object",
]
"""``key`` is a text or an integer, whose digits are the text then; ``name`` is a text; ``sequence
id`` is a correlation id, for which the text of an integer is another id than the integer. ``token
ids`` is an integer, or a text of integers with commas between them; ``token biases`` is a text of
``token:bias`` with commas between them. ``text`` is a long text, ``texts`` a JSON array of texts,
and ``JSON object`` an object of JSON, each as a text."""


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """A request parameter.

    Attributes:
        name: its name in requests.
        type: its type. Integers, numbers and booleans may be sent as texts too.
        description: one line for the documentation.
        kinds: the requests that take it.
        default: the value where it is absent; None if that is not the same for all requests.
        minimum, maximum: of an integer or a number; None without a limit.
        limits: the values that are allowed, for errors and the documentation.
        max_items: the most token ids, or biases.
    """

    name: str
    type: ParameterType
    description: str
    kinds: frozenset[RequestKind] = STEPS_AND_GENERATIONS
    default: Value | None = None
    minimum: float | None = None
    maximum: float | None = None
    limits: str = ""
    max_items: int = 1

    def parse(self, value: object) -> Value:
        """The value of this parameter in a request.

        Raises:
            RequestError: BAD_PARAMETER, it has another type or is outside the limits.
        """
        parsed = _PARSERS[self.type](self, value)
        if parsed is None:
            raise self.refusal(value)
        return parsed

    def refusal(self, value: object, limits: str = "") -> RequestError:
        """The error for a value that is not allowed.

        Args:
            value: the value.
            limits: what is allowed, where one request has narrower limits.
        """
        given = f"is {show(value)}"
        if self.type == "key":  # a secret, which appears in no error
            given = (
                f"has {len(value)} characters"
                if isinstance(value, str)
                else f"is a {type(value).__name__}"
            )
        return RequestError(
            Code.BAD_PARAMETER,
            f"parameter {self.name!r} {given}; expected {limits or self.limits}",
        )


def show(value: object) -> str:
    """A value as an error text shows it: long ones are cut."""
    if isinstance(value, int) and abs(value) > 2**400:  # Python does not print the largest
        return "a number of more than 120 digits"
    shown = repr(value)
    return shown if len(shown) <= MAX_SHOWN_LENGTH else f"{shown[:MAX_SHOWN_LENGTH]}…"


_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def _parse_boolean(spec: ParameterSpec, value: object) -> bool | None:
    if isinstance(value, str):
        return _BOOLEANS.get(value.lower())
    return bool(value) if isinstance(value, int) and value in (0, 1) else None


def _parse_integer(spec: ParameterSpec, value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    if isinstance(value, str) and not INTEGER.fullmatch(value):
        return None
    number = int(value)
    return number if _is_within(spec, number) else None


def _parse_number(spec: ParameterSpec, value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and not DECIMAL.fullmatch(value):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer beyond the range of floats
        return None
    return number if _is_within(spec, number) else None


def _parse_key(spec: ParameterSpec, value: object) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    if isinstance(value, int) and abs(value) > 10**MAX_KEY_LENGTH:
        return None
    text = str(value)
    fits = 1 <= len(text) <= MAX_KEY_LENGTH
    return text if fits and "\0" not in text else None  # Triton cuts texts at a NUL byte


def _parse_name(spec: ParameterSpec, value: object) -> str | None:
    return value if isinstance(value, str) and 1 <= len(value) <= MAX_KEY_LENGTH else None


def _parse_sequence_id(spec: ParameterSpec, value: object) -> int | str | None:
    if isinstance(value, str):
        size = len(value.encode(errors="surrogatepass"))
        return value if 1 <= size <= MAX_SEQUENCE_ID_BYTES and "\0" not in value else None
    return None if isinstance(value, bool) else _parse_integer(spec, value)


def _parse_token_ids(spec: ParameterSpec, value: object) -> tuple[int, ...] | None:
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    parts = value.split(",", spec.max_items) if isinstance(value, str) else [value]
    if len(parts) > spec.max_items:
        return None
    ids = [_parse_integer(spec, part.strip() if isinstance(part, str) else part) for part in parts]
    return None if None in ids else tuple(each for each in ids if each is not None)


def _parse_token_biases(spec: ParameterSpec, value: object) -> tuple[tuple[int, float], ...] | None:
    if not isinstance(value, str):
        return None
    pairs = [part.strip().partition(":") for part in value.split(",", spec.max_items)]
    if len(pairs) > spec.max_items:
        return None
    if not all(INTEGER.fullmatch(token) and DECIMAL.fullmatch(bias) for token, _, bias in pairs):
        return None
    biases = {int(token): float(bias) for token, _, bias in pairs}
    fits = all(0 <= token <= INT64_MAX and _is_within(spec, bias) for token, bias in biases.items())
    return tuple(biases.items()) if fits and len(biases) == len(pairs) else None


def _parse_text(spec: ParameterSpec, value: object) -> str | None:
    if not isinstance(value, str) or not value or "\0" in value or not _is_unicode(value):
        return None
    return value if len(value.encode()) <= MAX_GRAMMAR_BYTES else None


def _is_unicode(text: str) -> bool:
    """Whether it has no half of a surrogate pair, for which UTF-8 has no bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse_json(spec: ParameterSpec, value: object) -> Any:
    """The value of a text of JSON; None if it is too long or not well-formed."""
    text = _parse_text(spec, value)
    try:
        return None if text is None else json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _parse_json_object(spec: ParameterSpec, value: object) -> str | None:
    parsed = _parse_json(spec, value)
    if not isinstance(parsed, dict):
        return None
    # written again: each name once
    written = json.dumps(parsed, ensure_ascii=False, separators=(",", ":"))
    return written if _is_unicode(written) else None


def _parse_texts(spec: ParameterSpec, value: object) -> tuple[str, ...] | None:
    texts = _parse_json(spec, value)
    if not isinstance(texts, list) or not 1 <= len(texts) <= spec.max_items:
        return None
    fits = all(
        isinstance(text, str) and text and "\0" not in text and _is_unicode(text) for text in texts
    )
    return tuple(texts) if fits and len(set(texts)) == len(texts) else None


def _is_within(spec: ParameterSpec, number: float) -> bool:
    low_fits = spec.minimum is None or number >= spec.minimum  # False for NaN
    return low_fits and (spec.maximum is None or number <= spec.maximum)


_PARSERS: dict[ParameterType, Callable[[ParameterSpec, object], Value | None]] = {
    "boolean": _parse_boolean,
    "integer": _parse_integer,
    "number": _parse_number,
    "key": _parse_key,
    "name": _parse_name,
    "sequence id": _parse_sequence_id,
    "token ids": _parse_token_ids,
    "token biases": _parse_token_biases,
    "text": _parse_text,
    "texts": _parse_texts,
    "JSON object": _parse_json_object,
}


def _boolean(
    name: str, description: str, kinds: frozenset[RequestKind], default: bool | None = False
) -> ParameterSpec:
    return ParameterSpec(name, "boolean", description, kinds, default, limits="true or false")


def _number(
    name: str, description: str, default: float, minimum: float, maximum: float, limits: str = ""
) -> ParameterSpec:
    limits = limits or f"a number from {minimum:g} to {maximum:g}"
    return ParameterSpec(
        name, "number", description, default=default, minimum=minimum, maximum=maximum,
        limits=limits,
    )  # fmt: skip


def _token_ids(
    name: str, description: str, kinds: frozenset[RequestKind], max_items: int
) -> ParameterSpec:
    limits = f"a token id, or a text of at most {max_items} token ids with commas between them"
    return ParameterSpec(
        name, "token ids", description, kinds, minimum=0, maximum=INT64_MAX, limits=limits,
        max_items=max_items,
    )  # fmt: skip


def _count(name: str, description: str, default: int | None) -> ParameterSpec:
    return ParameterSpec(
        name,
        "integer",
        description,
        GENERATIONS,
        default,
        1,
        MAX_COUNT,
        f"a whole number of at least 1 and at most {MAX_COUNT}",
    )


def _key(name: str, description: str, kinds: frozenset[RequestKind]) -> ParameterSpec:
    limits = f"a text of 1 to {MAX_KEY_LENGTH} characters without a NUL byte, or a whole number"
    return ParameterSpec(name, "key", description, kinds, limits=limits)


def _name(name: str, description: str, limits: str) -> ParameterSpec:
    return ParameterSpec(name, "name", description, STEPS, limits=limits)


def _text(name: str, description: str, what: str) -> ParameterSpec:
    limits = f"{what} of at most {MAX_GRAMMAR_BYTES} bytes of UTF-8, without a NUL byte"
    return ParameterSpec(name, "text", description, GENERATIONS, limits=limits)


REGISTRY: tuple[ParameterSpec, ...] = (
    _key(SEQUENCE_KEY, "Set at START; later requests without the same key are refused.", ANY),
    ParameterSpec(
        POSITION,
        "integer",
        "How many tokens the client believes the sequence has; another number is refused.",
        frozenset({RequestKind.STEP, RequestKind.GENERATION, RequestKind.END}),
        minimum=0,
        maximum=INT64_MAX,
        limits="a whole number of at least 0 and below 2^63",
    ),
    _key(
        GROUP,
        "The requests of one group share one place in the order of the queue for slots.",
        ANY | {RequestKind.PROXY},
    ),
    ParameterSpec(
        FROM,
        "sequence id",
        "With START: begin as a copy of this sequence, whose `sequence_key` the request carries.",
        frozenset({RequestKind.STEP, RequestKind.GENERATION}),
        minimum=1,
        maximum=INT64_MAX,
        limits=f"a correlation id: a whole number above 0 and below 2^63, or a text of 1 to"
        f" {MAX_SEQUENCE_ID_BYTES} bytes without a NUL byte",
    ),
    _boolean(
        RESTORE,
        "With START, `sequence_key` and `position`: go on with a sequence that another server has"
        " stored, if it is not live.",
        frozenset({RequestKind.STEP, RequestKind.GENERATION}),
    ),
    _key(
        CACHE_SALT,
        "With START: only sequences with the same salt and key use each other's prefixes.",
        frozenset({RequestKind.STEP, RequestKind.GENERATION}),
    ),
    _boolean(
        FORGET,
        "With END: no later prompt uses what the sequence has computed.",
        frozenset({RequestKind.STEP, RequestKind.GENERATION, RequestKind.END}),
    ),
    ParameterSpec(
        "temperature",
        "number",
        "Scores are divided by it; with 0 the most likely token is chosen.",
        default=0.0,
        minimum=0.0,
        maximum=MAX_TEMPERATURE,
        limits="a finite number of at least 0",
    ),
    ParameterSpec(
        "top_k",
        "integer",
        "Keeps the `top_k` tokens with the largest scores, and those equal to the last of them.",
        default=0,
        minimum=0,
        limits="a whole number from 0 (all) to the size of the vocabulary",
    ),
    ParameterSpec(
        "top_p",
        "number",
        "Keeps a token if those with larger scores have together less than this probability.",
        default=1.0,
        minimum=math.ulp(0.0),
        maximum=1.0,
        limits="a number above 0, at most 1 (all)",
    ),
    ParameterSpec(
        "seed",
        "integer",
        "Seed of the random numbers.",
        default=0,
        minimum=-(2**63),
        maximum=INT64_MAX,
        limits="a whole number from -2^63 to 2^63 - 1 (a larger one arrives as a floating-point"
        " number)",
    ),
    _number(
        "min_p",
        "Of those, keeps the tokens that have at least this part of the largest probability.",
        0.0,
        0.0,
        1.0,
        "a number from 0 (all) to 1",
    ),
    ParameterSpec(
        LOGPROBS,
        "integer",
        "Return the log-probability of each token, and those of so many of the most likely ones.",
        minimum=0,
        maximum=MAX_LOGPROBS,
        limits=f"a whole number from 0 (only of the chosen token) to {MAX_LOGPROBS}",
    ),
    ParameterSpec(
        PROMPT_LOGPROBS,
        "integer",
        "Return the log-probability and the rank of each token that the request feeds, and so many"
        " of the most likely tokens in its place.",
        frozenset({RequestKind.STEP, RequestKind.GENERATION}),
        minimum=0,
        maximum=MAX_LOGPROBS,
        limits=f"a whole number from 0 (only of the fed tokens) to {MAX_LOGPROBS}",
    ),
    _number(
        "repetition_penalty",
        "Divides the positive scores of tokens that the sequence has, and multiplies their negative"
        " ones.",
        1.0,
        0.01,
        100.0,
    ),
    _number(
        "presence_penalty",
        "Subtracted from the scores of tokens that were generated.",
        0.0,
        -2.0,
        2.0,
    ),
    _number(
        "frequency_penalty",
        "Subtracted from the scores of tokens that were generated, as often as they were.",
        0.0,
        -2.0,
        2.0,
    ),
    ParameterSpec(
        NUM_GENERATED,
        "integer",
        "How many of the last tokens before the first one that is chosen count as generated.",
        default=0,
        minimum=0,
        maximum=MAX_COUNT,
        limits="a whole number from 0 to the number of the sequence's tokens",
    ),
    ParameterSpec(
        LOGIT_BIAS,
        "token biases",
        "Added to the scores of single tokens.",
        minimum=-MAX_BIAS,
        maximum=MAX_BIAS,
        max_items=MAX_BIASES,
        limits=f"a text of at most {MAX_BIASES} different token ids, each with a colon and a number"
        f" from {-MAX_BIAS:g} to {MAX_BIAS:g}, with commas between them",
    ),
    _token_ids(
        ALLOWED_TOKEN_IDS,
        "The only tokens that may be chosen.",
        STEPS_AND_GENERATIONS,
        MAX_MASKED_TOKENS,
    ),
    _token_ids(
        BANNED_TOKEN_IDS,
        "Tokens that may not be chosen.",
        STEPS_AND_GENERATIONS,
        MAX_MASKED_TOKENS,
    ),
    _boolean(
        ADD_SPECIAL_TOKENS,
        "Put the tokenizer's special tokens around `text`; true where the text begins a sequence.",
        STEPS_AND_GENERATIONS,
        default=None,
    ),
    _boolean(
        LOGITS,
        "Return the output `logits`; true where it is among the requested outputs.",
        STEPS,
        default=None,
    ),
    ParameterSpec(
        SAMPLE_RATE,
        "integer",
        "Samples of the audio in a second; required with audio. Another rate than the model's is"
        " refused.",
        frozenset({RequestKind.STEP, RequestKind.END}),
        minimum=1,
        maximum=MAX_COUNT,
        limits=f"a whole number of at least 1 and at most {MAX_COUNT}",
    ),
    _name(LANGUAGE, "The language of the audio.", "the code of a language that the model has"),
    _name(TASK, "What to do with the audio.", "a task that the model has, such as `transcribe`"),
    _boolean(TIMESTAMPS, "Add tokens with times, as the model makes them.", STEPS, default=None),
    _count(MAX_TOKENS, "The most tokens to generate; makes the request a generation.", None),
    ParameterSpec(
        MIN_TOKENS,
        "integer",
        "The fewest tokens before one that ends the generation, and before a stop text.",
        GENERATIONS,
        0,
        0,
        MAX_COUNT,
        limits="a whole number from 0 to `max_tokens`",
    ),
    _boolean(IGNORE_EOS, "Continue after an end token of the model.", GENERATIONS),
    _token_ids(
        STOP_TOKEN_IDS,
        "Tokens that end the generation, beside the end tokens of the model.",
        GENERATIONS,
        MAX_STOP_TOKEN_IDS,
    ),
    ParameterSpec(
        JSON,
        "JSON object",
        "The text must be JSON that is valid against this schema.",
        GENERATIONS,
        limits=f"a JSON schema: the text of a JSON object of at most {MAX_GRAMMAR_BYTES} bytes of"
        " UTF-8, without halves of surrogate pairs",
    ),
    _boolean(JSON_OBJECT, "The text must be a JSON object.", GENERATIONS),
    _text(REGEX, "The text must match this regular expression as a whole.", "an expression"),
    _text(GRAMMAR, "The text must be one of this grammar, in Lark's notation.", "a grammar"),
    ParameterSpec(
        CHOICE,
        "texts",
        "The text must be one of these.",
        GENERATIONS,
        max_items=MAX_CHOICES,
        limits=f"the text of a JSON array of 1 to {MAX_CHOICES} different texts that are not empty"
        " and without NUL characters or halves of surrogate pairs, at most"
        f" {MAX_GRAMMAR_BYTES} bytes of UTF-8",
    ),
    _count(STREAM_INTERVAL, "The fewest tokens of a response, except the last.", 1),
    _boolean(
        FETCH,
        "Buffer the tokens of a generation; without `max_tokens`, return those since the last"
        " response.",
        frozenset({RequestKind.GENERATION, RequestKind.FETCH}),
    ),
    _boolean(
        STREAM,
        "Answer with many responses instead of one; true where `stream_interval` is given.",
        frozenset({RequestKind.PROXY}),
        default=None,
    ),
)
"""All parameters, in the order of the documentation."""


BY_NAME: Mapping[str, ParameterSpec] = {spec.name: spec for spec in REGISTRY}


GRAMMAR_PARAMETERS = frozenset({JSON, JSON_OBJECT, REGEX, GRAMMAR, CHOICE})
"""Parameters that say what the text of a generation must be; a request has one of them at most."""


OPTIONS = frozenset({LANGUAGE, TASK, TIMESTAMPS})
"""Parameters whose values each model lists for itself."""


AUDIO_PARAMETERS = OPTIONS | {SAMPLE_RATE}


BASIC_SAMPLING_PARAMETERS = frozenset({"temperature", "top_k", "top_p", "seed"})
"""Parameters of every engine that samples."""


SAMPLING_PARAMETERS = BASIC_SAMPLING_PARAMETERS | {
    "min_p",
    LOGPROBS,
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    NUM_GENERATED,
    LOGIT_BIAS,
    ALLOWED_TOKEN_IDS,
    BANNED_TOKEN_IDS,
}
"""Parameters that say how a token is chosen, of any request that chooses one."""


TRITON_PARAMETERS = frozenset(
    {
        "id",
        "priority",
        "timeout",
        "binary_data_output",
        "sequence_id",
        "sequence_start",
        "sequence_end",
    }
)
"""Names that Triton takes for itself.

Its endpoints keep most of them; HTTP generate passes on all, and gRPC ``binary_data_output``
(Triton 24.10).
"""


TRITON_PREFIX = "triton_"
"""Names that begin so are Triton's."""


def is_tritons(name: str) -> bool:
    """Whether Triton itself uses a parameter of this name."""
    return name in TRITON_PARAMETERS or name.startswith(TRITON_PREFIX)


def forwards_nothing(name: str) -> bool:
    """The rule for names of headers where the operator forwards none."""
    return False


def parse_parameters(
    parameters: Mapping[str, object],
    kind: RequestKind,
    is_forwarded: Callable[[str], bool] = forwards_nothing,
) -> dict[str, Value]:
    """Check the parameters of a request and return the values of those in the registry.

    Args:
        parameters: by name, as they arrived.
        kind: what the request asks for.
        is_forwarded: whether a name is that of a header which the server forwards.

    Raises:
        RequestError: BAD_PARAMETER, a name is unknown or not for such a request, or a
            value is not allowed.
    """
    values: dict[str, Value] = {}
    for name, value in parameters.items():
        spec = BY_NAME.get(name)
        if spec is None:
            if is_tritons(name) or is_forwarded(name):
                continue
            raise unknown_parameter(name, kind)
        value = spec.parse(value)
        # A boolean that is false asks for nothing; only without `stream` are there many responses.
        if kind not in spec.kinds and (value is not False or name == STREAM):
            raise _misplaced(spec, kind)
        values[name] = value
    return values


def logprob_outputs(logprobs: object) -> tuple[str, ...]:
    """The names of the outputs that a value of the parameter ``logprobs`` asks for.

    Args:
        logprobs: how many of the most likely tokens, a number or its text; None if the parameter is
            absent.
    """
    if logprobs is None:
        return ()
    top = () if logprobs in (0, "0") else (TOP_LOGPROBS, TOP_TOKENS)
    return (TOKEN_LOGPROBS, *top)


def prompt_outputs(number: object) -> tuple[str, ...]:
    """The same of the parameter ``prompt_logprobs``: those of `PROMPT_OUTPUTS`."""
    if number is None:
        return ()
    return PROMPT_OUTPUTS[:3] if number in (0, "0") else PROMPT_OUTPUTS


def digest(value: object) -> bytes:
    """SHA-256 of a value's text: what stands for a key or a group, which may be secret."""
    return sha256(str(value).encode(errors="surrogatepass")).digest()


def known_names(kind: RequestKind) -> list[str]:
    """The names of the parameters that such a request takes."""
    return [spec.name for spec in REGISTRY if kind in spec.kinds]


def unknown_parameter(name: str, kind: RequestKind) -> RequestError:
    """The error for a parameter that is not in the registry."""
    names = [spec.name for spec in REGISTRY]
    close = difflib.get_close_matches(name[:MAX_SHOWN_LENGTH], names, 1)
    question = f", did you mean {close[0]!r}?" if close else ";"
    if name in (INPUT_IDS, TEXT, STOP):
        question = f", {name!r} is the name of an input;"
    return RequestError(
        Code.BAD_PARAMETER,
        f"parameter {show(name)} is unknown{question} {_SINGULAR[kind]} takes {known_names(kind)}",
    )


def _misplaced(spec: ParameterSpec, kind: RequestKind) -> RequestError:
    kinds = [
        _PLURAL[each]
        for each in RequestKind
        if each in spec.kinds
        # requests of the proxy are generations
        and not (each is RequestKind.PROXY and RequestKind.GENERATION in spec.kinds)
    ]
    return RequestError(
        Code.BAD_PARAMETER,
        f"parameter {spec.name!r} belongs to {' and '.join(kinds)}; {_REASONS[kind]}: leave it out",
    )


_SINGULAR = {
    RequestKind.STEP: "a step",
    RequestKind.GENERATION: "a generation",
    RequestKind.FETCH: "a request that fetches",
    RequestKind.END: "an END without inputs",
    RequestKind.PROXY: "a request of the generate proxy",
}


_PLURAL = {
    RequestKind.STEP: "steps",
    RequestKind.GENERATION: "generations",
    RequestKind.FETCH: "requests that fetch",
    RequestKind.END: "ENDs without inputs",
    RequestKind.PROXY: "requests of the generate proxy",
}


_REASONS = {
    RequestKind.STEP: f"this request is a step, because it has no {MAX_TOKENS!r}",
    RequestKind.GENERATION: f"this request is a generation, because it has {MAX_TOKENS!r}",
    RequestKind.FETCH: "this request fetches tokens of a running generation",
    RequestKind.END: "this request is an END without inputs",
    RequestKind.PROXY: "here each request is a generation in a sequence of its own",
}
