"""One request as Triton takes it, and what must be known of a model to make it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import InferInput, InferRequestedOutput, InferResult
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from inplace.protocol import INPUT_IDS, MAX_TOKENS, TEXT_OUTPUT

Array = NDArray[np.generic]


Parameter = str | int | float | bool
"""A custom parameter. Numbers with a fraction travel as texts: Triton's gRPC endpoint takes no others."""


ROUTE = "inplace-sequence"
"""The gRPC metadata by whose hash a router sends every request of a sequence to the same server."""


@dataclass(frozen=True)
class ModelMetadata:
    """What the server's configuration says of a model.

    Attributes:
        streams: it is decoupled: requests and responses go over gRPC streams.
        tokens: inputs whose first axis (without the batch axis) counts tokens; a request without any counts as one position.
        speaks: its generations bring text beside tokens.
    """

    streams: bool
    tokens: frozenset[str]
    speaks: bool

    @classmethod
    def of(cls, config: Any) -> "ModelMetadata":
        """From Triton's ModelConfig message."""
        return cls(
            streams=config.model_transaction_policy.decoupled,
            tokens=frozenset(
                tensor.name
                for tensor in config.input
                if tensor.allow_ragged_batch or tensor.name == INPUT_IDS
            ),
            speaks=any(tensor.name == TEXT_OUTPUT for tensor in config.output),
        )

    def positions(self, inputs: Mapping[str, Array]) -> int:
        """How many positions of its sequence a request takes."""
        return next((array.shape[0] for name, array in inputs.items() if name in self.tokens), 1)


@dataclass(frozen=True)
class InferRequest:
    """One request.

    Attributes:
        sequence: the correlation id.
        start, end: the sequence flags.
        inputs: by name, without a batch axis.
        parameters: custom parameters, as `sent` makes them.
        outputs: names of the outputs wanted; all if empty.
        request: the request id.
    """

    sequence: int | str
    start: bool
    end: bool
    inputs: Mapping[str, Array]
    parameters: Mapping[str, str | int | bool]
    outputs: tuple[str, ...] = ()
    request: str = ""

    @property
    def generates(self) -> bool:
        """Whether tokens stream back."""
        return MAX_TOKENS in self.parameters

    @property
    def headers(self) -> dict[str, str]:
        """What a router before several servers finds the sequence's server by, see docs/operations.md."""
        return {ROUTE: quote(str(self.sequence))}

    def arguments(self, model: str) -> dict[str, Any]:
        """As tritonclient's ``infer`` and its streams take it."""
        tensors = []
        for name, array in self.inputs.items():
            tensor = InferInput(name, [1, *array.shape], np_to_triton_dtype(array.dtype))
            tensor.set_data_from_numpy(array[None])
            tensors.append(tensor)
        return {
            "model_name": model,
            "inputs": tensors,
            "outputs": [InferRequestedOutput(name) for name in self.outputs] or None,
            "sequence_id": self.sequence,
            "sequence_start": self.start,
            "sequence_end": self.end,
            "request_id": self.request,
            "parameters": dict(self.parameters) or None,
        }


def sent(parameters: Mapping[str, object]) -> dict[str, str | int | bool]:
    """Custom parameters as they travel: a number with a fraction, or one of more than 64 bits, as a text.

    Raises:
        TypeError: one is neither a text, a number nor a truth value.
    """
    found: dict[str, str | int | bool] = {}
    for name, given in parameters.items():
        value = given.item() if isinstance(given, np.generic) else given
        if isinstance(value, float) or (
            isinstance(value, int) and not -(1 << 63) <= value < 1 << 63
        ):
            found[name] = repr(value)
        elif isinstance(value, str | int):
            found[name] = value
        else:
            raise TypeError(
                f"parameter {name!r} is {given!r}; expected a text, a number or a truth value"
            )
    return found


def outputs_of(result: InferResult) -> dict[str, Array]:
    """A response's outputs by name, without a batch axis.

    Raises:
        InferenceServerException: there are none. Triton cancels the requests that wait behind a cancelled one of their sequence, and over a
            stream that is all it says.
    """
    if not result.get_response().outputs:
        text = "the server cancelled the request, with another one of its sequence that somebody else has cancelled"
        raise InferenceServerException(text, "StatusCode.CANCELLED")
    return {
        output.name: result.as_numpy(output.name)[0] for output in result.get_response().outputs
    }
