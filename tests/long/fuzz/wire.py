"""Requests as they travel: protobuf messages, which a client library would not let one damage."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from inplace.parameters import Parameter
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import deserialize_bytes_tensor, np_to_triton_dtype

Array = NDArray[np.generic]
Message = Any
"""A ``ModelInferRequest``; tritonclient has no types."""


def message(
    model: str,
    tensors: Mapping[str, Array],
    sequence: int | str,
    *,
    start: bool = False,
    end: bool = False,
    parameters: Mapping[str, Parameter] | None = None,
    id: str = "",
) -> Message:
    """A request of one sequence as a good client sends it; tensors with their batch axis."""
    request: Message = pb.ModelInferRequest(model_name=model, id=id)
    for name, array in tensors.items():
        request.inputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
        request.raw_input_contents.append(array.tobytes())
    for name, value in (
        {"sequence_id": sequence, "sequence_start": start, "sequence_end": end}
        | dict(parameters or {})
    ).items():
        put(request, name, value)
    return request


def put(request: Message, name: str, value: Parameter) -> None:
    """Set a parameter, in the protobuf field that fits the value."""
    parameter = request.parameters[name]
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, str):
        parameter.string_param = value
    elif isinstance(value, float):
        parameter.double_param = value
    elif -(1 << 63) <= value < 1 << 63:
        parameter.int64_param = value
    else:
        parameter.uint64_param = value


def outputs(response: pb.ModelInferResponse) -> dict[str, Array]:
    """The tensors of a response.

    Raises:
        ValueError: the response does not have the bytes that it declares.
    """
    if len(response.outputs) != len(response.raw_output_contents):
        raise ValueError(
            f"{len(response.outputs)} outputs, {len(response.raw_output_contents)} contents"
        )
    return {
        output.name: _array(output, content)
        for output, content in zip(response.outputs, response.raw_output_contents, strict=True)
    }


def _array(output: Any, content: bytes) -> Array:
    if output.datatype == "BYTES":
        texts: Array = deserialize_bytes_tensor(content)
        return texts.reshape(output.shape)
    kinds = {"INT64": np.int64, "INT32": np.int32, "FP32": np.float32}
    return np.frombuffer(content, kinds[output.datatype]).reshape(output.shape)
