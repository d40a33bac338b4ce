"""What a client asked for, free of Triton's types, and the checks that need nothing but the program's description."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from time import monotonic

from torch import Tensor

from inplace.errors import Code, RequestError
from inplace.protocol import POSITION, SEQUENCE_KEY
from inplace.runtime.sampling import GREEDY, Parameter, Sampling
from inplace.runtime.slots import SequenceId
from inplace.schema.served import Program
from inplace.schema.specs import Role, TensorSpec

SAMPLING = frozenset(field.name for field in fields(Sampling))
"""The parameters that say how a token is chosen."""


LONGEST_KEY = 256
"""Characters a ``sequence_key`` may have."""


@dataclass(slots=True)
class Request:
    """One request of one sequence.

    Attributes:
        sequence: the correlation id.
        start, end: the sequence flags.
        inputs: host tensors by input name, still with the batch axis of 1.
        id: the client's request id, for error texts and logs.
        parameters: the request's custom parameters.
        received: when it arrived here, in monotonic seconds.
    """

    sequence: SequenceId
    start: bool
    end: bool
    inputs: Mapping[str, Tensor]
    id: str = ""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    received: float = field(default_factory=monotonic)

    def flag(self, name: str) -> bool:
        """A boolean parameter; False where the client sent none.

        Raises:
            RequestError: BAD_PARAMETER, it is neither true nor false.
        """
        value = self.parameters.get(name, False)
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "1", "false", "0"):
            return str(value).lower() in ("true", "1")
        raise RequestError(
            Code.BAD_PARAMETER, f"parameter {name!r} is {value!r}; expected true or false"
        )

    def position(self) -> int | None:
        """The parameter ``position``: the cached length the client believes in; None where it sent none.

        Raises:
            RequestError: BAD_PARAMETER, it is no whole number of at least 0.
        """
        value = self.parameters.get(POSITION)
        if value is None:
            return None
        if isinstance(value, bool) or not (str(value).isascii() and str(value).isdigit()):
            raise RequestError(
                Code.BAD_PARAMETER,
                f"parameter 'position' is {value!r}; expected a whole number of at least 0",
            )
        return int(value)

    @property
    def goes_on(self) -> bool:
        """Whether it names a position other than 0, which no START can mean that wants a fresh slot."""
        return self.parameters.get(POSITION, 0) not in (0, "0")

    def key(self) -> bytes | None:
        """SHA-256 of the parameter ``sequence_key``, a text or a whole number (the same as its digits); None where none was sent.

        The key itself is kept nowhere, and appears in no error text.

        Raises:
            RequestError: BAD_PARAMETER, it is neither, is empty or is longer than `LONGEST_KEY`.
        """
        value = self.parameters.get(SEQUENCE_KEY)
        if value is None:
            return None
        expected = f"expected a text of 1 to {LONGEST_KEY} characters, or a whole number"
        if isinstance(value, bool | float):
            raise RequestError(
                Code.BAD_PARAMETER,
                f"parameter 'sequence_key' is a {type(value).__name__}; {expected}",
            )
        text = str(value)
        if not 1 <= len(text) <= LONGEST_KEY:
            raise RequestError(
                Code.BAD_PARAMETER,
                f"parameter 'sequence_key' has {len(text)} characters; {expected}",
            )
        return hashlib.sha256(text.encode(errors="surrogatepass")).digest()

    def sampling(self, program: Program) -> Sampling:
        """How the request wants its next token chosen.

        Raises:
            RequestError: BAD_PARAMETER, see `Sampling.parse`; or the program says the most likely token only, and the request has a
                temperature above 0.
        """
        if not SAMPLING & self.parameters.keys():
            return GREEDY
        if program.vocab_size:
            return Sampling.parse(self.parameters, program.vocab_size)
        temperature = self.parameters.get("temperature")
        if (
            temperature is not None
            and Sampling.parse({"temperature": temperature}, 0).temperature > 0
        ):
            raise RequestError(
                Code.BAD_PARAMETER,
                f"parameter 'temperature' is {temperature!r}; this engine samples nothing: send 0 or leave it out, or build one that does",
            )
        return GREEDY


@dataclass(slots=True)
class ValidatedRequest:
    """A request and what could be found out about it without looking at its sequence.

    Attributes:
        request: what was asked.
        key: digest of its ``sequence_key``.
        inputs: the checked tensors, without a batch axis.
        tokens: how many tokens they bring.
        said: how many tokens beyond them must fit at least.
        position: the number of tokens that the client believes in.
        sampling: how its next token is chosen.
        wanted: the outputs to compute.
        refusal: why it is refused; its START and END take effect all the same.
    """

    request: Request
    key: bytes | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: int = 0
    said: int = 0
    position: int | None = None
    sampling: Sampling = GREEDY
    wanted: frozenset[str] = frozenset()
    refusal: RequestError | None = None


def checked_inputs(program: Program, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """The client's tensors without their batch axis, and how many tokens they bring (1 for a rectangular program).

    Raises:
        RequestError: MISSING_INPUT, BAD_DTYPE, BAD_SHAPE, EMPTY_INPUT or VALUE_RANGE.
    """
    checked: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for spec in program.client_inputs:
        tensor = inputs.get(spec.name)
        if tensor is None:
            raise RequestError(
                Code.MISSING_INPUT,
                f"input {spec.name!r} is missing; this model takes {[s.name for s in program.client_inputs]}",
            )
        checked[spec.name] = _checked(spec, tensor)
        if spec.role is Role.TOKENS:
            counts[spec.name] = checked[spec.name].shape[0]
    if len(set(counts.values())) > 1:
        raise RequestError(
            Code.BAD_SHAPE,
            f"inputs of one request must bring the same number of tokens, got {counts}",
        )
    return checked, next(iter(counts.values()), 1)


def _checked(spec: TensorSpec, tensor: Tensor) -> Tensor:
    if tensor.dtype != spec.dtype.as_torch:
        raise RequestError(
            Code.BAD_DTYPE,
            f"input {spec.name!r} is {str(tensor.dtype).removeprefix('torch.')}; expected {spec.dtype}",
        )
    shape, tokens = tensor.shape, spec.role is Role.TOKENS
    rest, extents = (spec.shape[1:], shape[2:]) if tokens else (spec.shape, shape[1:])
    if len(shape) < 1 + tokens or shape[0] != 1 or extents != rest:
        wanted = [1, *("tokens" if extent == -1 else extent for extent in spec.shape)]
        raise RequestError(
            Code.BAD_SHAPE, f"input {spec.name!r} has the shape {list(shape)}; expected {wanted}"
        )
    tensor = tensor[0]
    if tokens and tensor.shape[0] == 0:
        raise RequestError(Code.EMPTY_INPUT, f"input {spec.name!r} is empty; send at least 1 token")
    if spec.minimum is not None or spec.maximum is not None:
        low, high = (
            (tensor.item(),) * 2
            if tensor.numel() == 1
            else (bound.item() for bound in tensor.aminmax())
        )
        above = spec.minimum is None or low >= spec.minimum  # in these words NaN is outside
        below = spec.maximum is None or high <= spec.maximum
        if not (above and below):
            wrong = high if above else low
            raise RequestError(
                Code.VALUE_RANGE,
                f"input {spec.name!r} holds {wrong}; expected values from {spec.minimum} to {spec.maximum}",
            )
    return tensor
