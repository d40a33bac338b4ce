"""The tensors of a program: its states and what updates them, the inputs and outputs of a step.

Shapes leave out the batch. A file records a dynamic extent as an expression such as ``s0 + 1``. Its
symbols have a value in each call. The expressions are a small language of their own, so that
reading one runs nothing::

    sum     = product { ("+" | "-") product }
    product = factor { ("*" | "//" | "%") factor }
    factor  = integer | symbol | "-" factor | "(" sum ")" | ("min" | "max") "(" sum { "," sum } ")"

An extent that this language cannot express, because it depends on the values of tensors, is
`UNKNOWN`.
"""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from functools import cached_property, lru_cache, reduce
from math import prod
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, model_validator

from inplace.protocol import AUDIO
from inplace.schema.files import Record

if TYPE_CHECKING:
    import torch


class Dtype(StrEnum):
    """Element types that a tensor of an engine may have, with PyTorch's names.

    Triton and TensorRT have fewer.
    """

    BOOL = "bool"
    INT8 = "int8"
    UINT8 = "uint8"
    INT16 = "int16"
    UINT16 = "uint16"
    INT32 = "int32"
    INT64 = "int64"
    FLOAT8_E4M3FN = "float8_e4m3fn"
    FLOAT8_E5M2 = "float8_e5m2"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"
    FLOAT64 = "float64"
    COMPLEX64 = "complex64"
    COMPLEX128 = "complex128"

    @cached_property
    def as_torch(self) -> "torch.dtype":
        """PyTorch's dtype."""
        import torch  # here: who only reads a manifest needs no PyTorch

        dtype: torch.dtype = getattr(torch, self.value)
        return dtype

    @classmethod
    def of(cls, dtype: "torch.dtype") -> Self:
        """The member for a PyTorch dtype; ValueError for a type that engines do not support."""
        return cls(str(dtype).removeprefix("torch."))


class Update(StrEnum):
    """How a step updates a state."""

    APPEND = "append"
    """Writes rows along one axis at the sequence's write index, and keeps the earlier ones."""
    RING = "ring"
    """Like ``append``, modulo the length of that axis: new rows overwrite the oldest."""
    REPLACE = "replace"
    """Rewrites the whole slot in each step."""


class Role(StrEnum):
    """What a tensor of a program carries; of an input, also who fills it: client or runtime."""

    TOKENS = "tokens"
    """From the client: any number of entries a request, packed along axis 0 over the rows.

    As the role of an output: int64, ``[n]`` a row in each call; negative numbers are not tokens.
    """
    ROW = "row"
    """From the client: one entry of fixed shape a request."""
    AUDIO = "audio"
    """From the client: mono samples, at most ``shape[0]``; the runtime adds zeros behind them.

    With a ``lead``, any number of samples of a stream, which the runtime cuts into chunks.
    """
    OPTION = "option"
    """From the client: the number of the value that the request's parameter of this name has.

    int64, ``[1]`` a row; 0 where the request does not have the parameter.
    """
    POSITIONS = "positions"
    """From the runtime, ``[tokens]``: each token's position in its sequence."""
    ROW_OFFSETS = "row_offsets"
    """From the runtime, ``[rows + 1]``: row r has tokens ``row_offsets[r]:row_offsets[r + 1]``."""
    LAST_TOKENS = "last_tokens"
    """From the runtime, ``[rows]``: the index of each row's last token on the packed axis."""
    SLOTS = "slots"
    """From the runtime, ``[rows]``: the slot of each row; -1 is a null row."""
    WRITE_INDICES = "write_indices"
    """From the runtime, ``[rows]``: cached length before the step, where the append starts."""
    NEXT_POSITIONS = "next_positions"
    """From the runtime, ``[rows]``: cached length after the step, the sampled token's position."""
    TEMPERATURE = "temperature"
    """From the runtime, ``[rows]``: a request's sampling parameter (`inplace.runtime.requests`).

    0 in a row that samples no token.
    """
    TOP_K = "top_k"
    """From the runtime, ``[rows]``: as ``temperature``."""
    TOP_P = "top_p"
    """From the runtime, ``[rows]``: as ``temperature``."""
    SEED = "seed"
    """From the runtime, ``[rows]``: as ``temperature``."""
    MIN_P = "min_p"
    """From the runtime, ``[rows]``: as ``temperature``."""
    NUM_LOGPROBS = "num_logprobs"
    """From the runtime, ``[rows]``: as ``temperature``; 1 more than the parameter ``logprobs``."""
    NUM_ADJUSTED = "num_adjusted"
    """From the runtime, ``[rows]``: how many scores of a row are adjusted; 0 for most rows.

    n scores and a mask are ``-1 - n``.
    """
    ADJUSTED_TOKENS = "adjusted_tokens"
    """From the runtime, ``[rows, entries]``: the tokens whose scores are adjusted."""
    ADJUSTMENTS = "adjustments"
    """From the runtime, ``[rows, 3, entries]``: how, see `inplace.operators.sample`."""
    FOLLOWING_TOKENS = "following_tokens"
    """From the runtime, ``[tokens]``: the token that its request feeds behind each token.

    0 behind the last one.
    """
    TOKEN_MASK = "token_mask"
    """From the runtime, ``[rows, words]``: the tokens that may be chosen, a bit for each."""
    VALID_LENGTHS = "valid_lengths"
    """From the runtime, ``[rows]``: how many entries each row has in the step.

    Its tokens in a packed program. In a rectangular one, the entries of the input that names this
    one as its ``length_input``, or 1. 0 in the padding of a captured step.
    """
    VALUE = "value"
    """An output, one of fixed shape a row."""
    LOGITS = "logits"
    """An output: the scores of the next token, ``[scores]`` a row."""
    TOKEN = "token"
    """An output: the next token, ``[1]`` a row."""
    TOKEN_LOGPROBS = "token_logprobs"
    """An output: the next token's log-probability, ``[1]`` a row."""
    TOP_LOGPROBS = "top_logprobs"
    """An output: those of the most likely tokens, ``[MAX_LOGPROBS]`` a row."""
    TOP_TOKENS = "top_tokens"
    """An output: these tokens, ``[MAX_LOGPROBS]`` a row."""
    PROMPT_TOKEN_LOGPROBS = "prompt_token_logprobs"
    """An output, ``[tokens]``: the log-probability of the token that follows each token.

    Of the last token of a request nothing follows, so its entry has no meaning.
    """
    PROMPT_RANKS = "prompt_ranks"
    """An output, int64, ``[tokens]``: the rank of that token; 1 is the most likely one."""
    PROMPT_TOP_LOGPROBS = "prompt_top_logprobs"
    """An output, ``[tokens, MAX_LOGPROBS]``: those of the most likely tokens behind each token.

    Fewer than ``MAX_LOGPROBS`` where the vocabulary has no more.
    """
    PROMPT_TOP_TOKENS = "prompt_top_tokens"
    """An output, int64, ``[tokens, MAX_LOGPROBS]``: these tokens."""
    DONE = "done"
    """An output, bool, ``[1]`` a row: the row's calls of this program have ended.

    The program must be at a fixed point then: called again, it changes no state of the row and
    produces no token.
    """
    ACCEPTED = "accepted"
    """An output, int64, ``[1]`` a row: how many entries of the call's ``tokens`` outputs count.

    The first ones do. A row that is done has 0.
    """


CLIENT_ROLES = frozenset({Role.TOKENS, Role.ROW, Role.AUDIO, Role.OPTION})


ENTRY_ROLES = CLIENT_ROLES - {Role.TOKENS}
"""The roles of inputs from the client that have one entry of fixed shape for a request."""


LOGPROB_ROLES = (Role.TOKEN_LOGPROBS, Role.TOP_LOGPROBS, Role.TOP_TOKENS)
"""The outputs of `inplace.operators.sample_with_options` besides the tokens, in its order. Outputs
of these roles are named like them."""


PROMPT_LOGPROB_ROLES = (
    Role.PROMPT_TOKEN_LOGPROBS,
    Role.PROMPT_RANKS,
    Role.PROMPT_TOP_LOGPROBS,
    Role.PROMPT_TOP_TOKENS,
)
"""The outputs for each fed token of the program `inplace.schema.schedule.PROMPT_LOGPROBS`. They are
named like their roles."""


PACKED_ROLES = frozenset(
    {Role.TOKENS, Role.POSITIONS, Role.FOLLOWING_TOKENS, *PROMPT_LOGPROB_ROLES}
)
"""The roles of tensors of a packed program that have an entry for each token."""


OUTPUT_ROLES = frozenset(
    {
        Role.VALUE,
        Role.LOGITS,
        Role.TOKEN,
        Role.TOKENS,
        Role.DONE,
        Role.ACCEPTED,
        *LOGPROB_ROLES,
        *PROMPT_LOGPROB_ROLES,
    }
)
"""The roles of outputs that the runtime sends."""


JOINED_ROLES = frozenset({Role.TOKENS, Role.ACCEPTED})
"""The roles of outputs that a schedule joins over its calls."""


INPUT_ROLES = frozenset(Role) - (OUTPUT_ROLES - {Role.TOKENS})
"""The roles of inputs."""


SCHEDULED_ROLES = ENTRY_ROLES | {Role.SLOTS, Role.VALID_LENGTHS}
"""The roles of inputs that a program may have which a schedule calls.

Positions are not among them: how often a program has been called, only the program knows. It keeps
that in a state.
"""


SAMPLING_ROLES = (Role.TEMPERATURE, Role.TOP_K, Role.TOP_P, Role.SEED, Role.NEXT_POSITIONS)
"""The inputs of `inplace.operators.sample` besides the scores, in its order."""


SAMPLING_OPTION_ROLES = (
    Role.MIN_P,
    Role.NUM_LOGPROBS,
    Role.NUM_ADJUSTED,
    Role.ADJUSTED_TOKENS,
    Role.ADJUSTMENTS,
    Role.TOKEN_MASK,
)
"""The further inputs of `inplace.operators.sample_with_options`, in its order. A program has all of
them or none, and with them the outputs of `LOGPROB_ROLES`."""


MASK_BITS = 32
"""Tokens of a word of `Role.TOKEN_MASK`."""


def mask_words(vocab_size: int) -> int:
    """Words of a mask of so many tokens."""
    return -(-vocab_size // MASK_BITS)


WORD = 4
"""8-bit floats in a word: TensorRT has those of weights and states as words of 32 bits."""


def in_words(shape: Sequence[Any]) -> tuple[Any, ...]:
    """The shape of 8-bit floats as words; their last extent is a multiple of `WORD`."""
    return (*shape[:-1], shape[-1] // WORD)


INITIAL_FILE = "initial.safetensors"
"""The file with the tensors that fresh slots hold, by name; each of its state's ``shape``."""


class StateSpec(Record):
    """One state tensor of a model.

    Attributes:
        name: the state's name, and the name of the graph input that it is bound to.
        shape: shape of one slot, without the slot axis.
        dtype: element type.
        update: how a step updates it.
        axis: for ``append`` and ``ring``, the axis of ``shape`` that grows; None for ``replace``.
        fill: the value that a fresh slot holds, if it is the same everywhere.
        initial: the name of the tensor of `INITIAL_FILE` with what a fresh slot holds; None for
            ``fill``.
        scale: the name of the state with the scales of this one. Reserved: this version loads no
            engine that has one. Constant scales are a part of the graph.
        reset: whether a slot is refilled when a sequence starts. False only if the program
            provably never reads what the sequence has not written itself.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Dtype
    update: Update
    axis: int | None = None
    fill: int | float = 0.0  # a whole number is exact beyond 2**53
    initial: str | None = None
    scale: str | None = None
    reset: bool = True

    @model_validator(mode="after")
    def _axis_fits(self) -> Self:
        if (self.axis is None) != (self.update is Update.REPLACE):
            raise ValueError(
                f"state {self.name}: an axis belongs to append and ring, not to replace"
            )
        if self.axis is not None and not 0 <= self.axis < len(self.shape):
            raise ValueError(
                f"state {self.name}: axis {self.axis} is outside its shape {self.shape}"
            )
        if any(extent < 1 for extent in self.shape):
            raise ValueError(f"state {self.name}: every extent of {self.shape} must be at least 1")
        return self

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot of this state."""
        return prod(self.shape) * self.dtype.as_torch.itemsize

    def used_shape(self, length: int | None) -> tuple[int, ...]:
        """The shape of what a sequence uses of a slot.

        Args:
            length: positions of the sequence; None if not known, then it uses all of the slot.
        """
        if self.update is not Update.APPEND or self.axis is None or length is None:
            return self.shape
        used = min(length, self.shape[self.axis])
        return (*self.shape[: self.axis], used, *self.shape[self.axis + 1 :])


class TensorSpec(Record):
    """One input or output of a program.

    Attributes:
        name: name of the graph's placeholder (inputs), and of the server's tensor if clients see
            it.
        role: what it carries.
        dtype: element type.
        shape: shape for one request; -1, only first and only with the role ``tokens``, is the
            number of tokens.
        minimum, maximum: inclusive limits of the values that a client may send; None is no limit.
        sample_rate: of the role ``audio``: samples in a second.
        choices: of the role ``option``: the values of the parameter, in the order of their
            numbers. The first is the default, or empty if the parameter has no value for it.
        on_request: an output that is sent only if the request has a parameter of its name with
            the value true.
        argmax_of: the output whose largest value this integer output is the index of.
        sampled_from: the output with the scores that `inplace.operators.sample` samples this
            integer output from.
        shorter: of an input of the role ``row`` or ``audio``: which requests may have fewer entries
            along its first axis, at least 1: none, only those with END, or any. The runtime pads
            them with zeros.
        length_input: the input of the role ``valid_lengths`` that says how many entries count.
        lead: of the role ``audio``, with a ``length_input``: a request has any number of samples of
            its sequence's stream, which begins with so many zeros. The runtime cuts the stream into
            chunks of ``shape[0]`` samples and runs the schedule for each. With END the last one is
            shorter.
    """

    name: str
    role: Role
    dtype: Dtype
    shape: tuple[int, ...] = ()
    minimum: int | None = None
    maximum: int | None = None
    sample_rate: int | None = None
    choices: tuple[str, ...] = ()
    on_request: bool = False
    argmax_of: str | None = None
    sampled_from: str | None = None
    shorter: Literal["never", "last", "any"] = "never"
    length_input: str | None = None
    lead: int | None = None

    @model_validator(mode="after")
    def _check_shorter(self) -> Self:
        shorter, has_length = self.shorter != "never", self.length_input is not None
        fits = shorter == has_length or (shorter and self.role is Role.AUDIO)  # zeros are silence
        if not fits or (shorter and (self.role not in (Role.ROW, Role.AUDIO) or not self.shape)):
            raise ValueError(
                f"input {self.name}: an input that may be shorter has the role row or audio, an "
                f"axis of entries and, unless it is audio, a length_input; got {self.role}, "
                f"{list(self.shape)}, {self.shorter}, {self.length_input}"
            )
        return self

    @model_validator(mode="after")
    def _check_speech(self) -> Self:
        is_audio, is_option = self.role is Role.AUDIO, self.role is Role.OPTION
        if self.lead is not None and not (
            is_audio and self.length_input and self.shape and 0 <= self.lead < self.shape[0]
        ):
            raise ValueError(
                f"{self.name}: a lead belongs to the role audio with a length_input, and is less "
                f"than a chunk; got {self.lead}"
            )
        if is_audio and (self.name, self.dtype, len(self.shape)) != (AUDIO, Dtype.FLOAT32, 1):
            raise ValueError(
                f"input {self.name} of the role audio must be {AUDIO!r}, float32 with one axis; "
                f"got {self.dtype} {list(self.shape)}"
            )
        if is_audio != (self.sample_rate is not None):
            raise ValueError(f"{self.name}: the role audio has a sample rate, and no other role")
        if is_option and (self.dtype, self.shape) != (Dtype.INT64, (1,)):
            raise ValueError(
                f"input {self.name} of the role option must be int64 [1]; got {self.dtype} "
                f"{list(self.shape)}"
            )
        if is_option != bool(self.choices) or len(set(self.choices)) != len(self.choices):
            raise ValueError(
                f"{self.name}: different choices belong to the role option, and only to it; got "
                f"{list(self.choices)}"
            )
        return self


AliasKind = Literal["operator", "plugin", "kv_cache_update", "copy", "user"]
"""The mechanism that updates a state.

- ``operator``: an ``inplace::`` operator of a PyTorch graph mutates the bound tensor.
- ``plugin``: a TensorRT plugin with an aliased output.
- ``kv_cache_update``: TensorRT's own cache layer.
- ``user``: an operator or plugin of the user's own.
- ``copy``: not in place; the engine writes a second buffer and the runtime swaps the two.
"""


ROW_IS_SLOT_KINDS = frozenset({"kv_cache_update", "copy"})
"""Kinds that update slot r from row r: row r of a step must be slot r."""


class Alias(Record):
    """An output that shares its memory with an input.

    Attributes:
        output: the output's name.
        input: the name of the state.
        kind: the mechanism.
    """

    output: str
    input: str
    kind: AliasKind

    def __str__(self) -> str:
        return f"{self.output}@{self.input}@{self.kind}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The inverse of ``str``; ValueError if the text is not an alias."""
        parts = text.split("@")
        if len(parts) != 3:
            raise ValueError(f"alias {text!r} is not output@input@kind")
        return cls.model_validate(dict(zip(("output", "input", "kind"), parts, strict=True)))


class Lowering(Record):
    """How one state's update was lowered, and why.

    Attributes:
        state: the state's name.
        kind: the chosen mechanism.
        reason: why it was chosen.
        refused: mechanisms tried before it, each as ``kind: reason``.
    """

    state: str
    kind: AliasKind
    reason: str
    refused: tuple[str, ...] = ()


UNKNOWN = "?"
"""An extent that only the graph computes."""

MAX_EXTENT_LENGTH = 2000
"""Characters of an expression."""

MAX_EXTENT_DEPTH = 50
"""Parentheses and signs inside one another."""

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
}

_FUNCTIONS = ("max", "min")

_TOKEN = re.compile(r" *(?:(\d{1,19})|([A-Za-z_][A-Za-z0-9_]{0,63})|(//|[-+*%(),]))", re.ASCII)

Expression = int | str | tuple[Any, ...]
"""A parsed expression: an integer, a symbol, or an operation and its operands."""


@lru_cache(maxsize=4096)
def parse_extent(text: str) -> Expression:
    """Parse an expression.

    Raises:
        ValueError: it is not an expression of this language.
    """
    if len(text) > MAX_EXTENT_LENGTH:
        raise ValueError(f"an extent has {len(text)} characters, more than {MAX_EXTENT_LENGTH}")
    parser = _ExtentParser(text)
    expression = parser.sum(0)
    if parser.token != ("end", ""):
        raise ValueError(f"the extent {text!r} is not an expression")
    return expression


def extent_symbols(text: str) -> frozenset[str]:
    """The names of the symbols in an expression.

    Raises:
        ValueError: it is not an expression.
    """
    return frozenset() if text == UNKNOWN else frozenset(_symbols(parse_extent(text)))


def evaluate_extent(extent: int | str, known: Mapping[str, Any]) -> Any:
    """Evaluate an extent.

    Args:
        extent: an integer or an expression.
        known: the values of the symbols: integers or `torch.SymInt`.

    Raises:
        ValueError: it is not an expression, is `UNKNOWN`, has an unknown symbol or divides by zero.
    """
    if isinstance(extent, int):
        return extent
    if extent == UNKNOWN:
        raise ValueError("the extent depends on values of tensors")
    try:
        return _evaluate(parse_extent(extent), known)
    except KeyError as error:
        raise ValueError(f"{error.args[0]} in the extent {extent} is not known") from None
    except ZeroDivisionError:
        raise ValueError(f"the extent {extent} divides by zero") from None


def _checked_extent(extent: int | str) -> int | str:
    if isinstance(extent, str) and extent != UNKNOWN:
        parse_extent(extent)
    return extent


Extent = Annotated[int | str, AfterValidator(_checked_extent)]
"""A field of a record that is an extent."""


class _ExtentParser:
    """Parses an extent by recursive descent; ``token`` is the next one, as (kind, text)."""

    def __init__(self, text: str) -> None:
        self._text, self._position = text.rstrip(" "), 0
        self.token = self._next()

    def _next(self) -> tuple[str, str]:
        if self._position == len(self._text):
            return "end", ""
        match = _TOKEN.match(self._text, self._position)
        if match is None:
            raise ValueError(f"the extent {self._text!r} is not an expression")
        self._position = match.end()
        kinds = ("integer", "symbol", "operator")
        return next((kind, text) for kind, text in zip(kinds, match.groups(), strict=True) if text)

    def _take(self, *operators: str) -> str | None:
        """The next token if it is one of these operators, which is then consumed."""
        kind, text = self.token
        if kind != "operator" or text not in operators:
            return None
        self.token = self._next()
        return text

    def _expect(self, text: str) -> None:
        if self._take(text) is None:
            raise ValueError(f"the extent {self._text!r} lacks {text!r}")

    def sum(self, depth: int) -> Expression:
        if depth > MAX_EXTENT_DEPTH:
            raise ValueError(f"an extent is nested more than {MAX_EXTENT_DEPTH} deep")
        value = self._product(depth)
        while sign := self._take("+", "-"):
            value = (sign, value, self._product(depth))
        return value

    def _product(self, depth: int) -> Expression:
        value = self._factor(depth)
        while sign := self._take("*", "//", "%"):
            value = (sign, value, self._factor(depth))
        return value

    def _factor(self, depth: int) -> Expression:
        if depth > MAX_EXTENT_DEPTH:
            raise ValueError(f"an extent is nested more than {MAX_EXTENT_DEPTH} deep")
        if self._take("-"):
            return ("-", 0, self._factor(depth + 1))
        if self._take("("):
            value = self.sum(depth + 1)
            self._expect(")")
            return value
        kind, text = self.token
        if kind not in ("integer", "symbol"):
            raise ValueError(f"the extent {self._text!r} is not an expression")
        self.token = self._next()
        if kind == "integer":
            return int(text)
        if text in _FUNCTIONS and self._take("("):
            operands = [self.sum(depth + 1)]
            while self._take(","):
                operands.append(self.sum(depth + 1))
            self._expect(")")
            return (text, *operands)
        return text


def _symbols(expression: Expression) -> set[str]:
    if isinstance(expression, str):
        return {expression}
    if isinstance(expression, int):
        return set()
    return set().union(*map(_symbols, expression[1:]))


def _evaluate(expression: Expression, known: Mapping[str, Any]) -> Any:
    if isinstance(expression, int):
        return expression
    if isinstance(expression, str):
        return known[expression]
    name, *operands = expression
    return reduce(
        _OPERATORS.get(name) or _function(name), (_evaluate(part, known) for part in operands)
    )


def _function(name: str) -> Callable[[Any, Any], Any]:
    """PyTorch's function, which takes symbols too."""
    import torch  # as in `Dtype.as_torch`

    return torch.sym_max if name == "max" else torch.sym_min
