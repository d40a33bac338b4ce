"""What passes between the instances of a model: requests, responses and notices, as frames.

A frame is a header as JSON and the bytes of its tensors; nothing is unpickled.
"""

import json
import struct
from base64 import b64decode, b64encode
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from inplace.drivers import Arrival
from inplace.errors import Code, RequestError
from inplace.runtime.requests import Request
from inplace.schema.tensor_file import flat_bytes

LENGTHS = struct.Struct("<IQ")
"""Bytes of the header and of the tensors, in front of each frame."""


Frame = tuple[dict[str, Any], dict[str, Tensor]]
"""A header and tensors by name."""


def encode(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a frame."""
    records, body = [], bytearray()
    for name, tensor in tensors.items():
        records.append([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)])
        body += flat_bytes(tensor).numpy().tobytes()
    text = json.dumps({**header, "tensors": records}).encode()
    return LENGTHS.pack(len(text), len(body)) + text + body


def decode(received: bytearray) -> list[Frame]:
    """Take all whole frames off what was received."""
    frames: list[Frame] = []
    start = 0
    while len(received) - start >= LENGTHS.size:
        num_header, num_body = LENGTHS.unpack_from(received, start)
        body = start + LENGTHS.size + num_header
        if len(received) < body + num_body:
            break
        header = json.loads(received[start + LENGTHS.size : body])
        tensors: dict[str, Tensor] = {}
        for name, dtype, shape in header.pop("tensors"):
            empty = torch.empty(shape, dtype=getattr(torch, dtype))
            flat = empty.reshape(-1).view(torch.uint8)
            if flat.numel():
                flat.copy_(torch.frombuffer(received[body : body + flat.numel()], dtype=flat.dtype))
            tensors[name] = empty
            body += flat.numel()
        frames.append((header, tensors))
        start = body
    del received[:start]
    return frames


def request_frame(number: int, arrival: Arrival) -> bytes:
    """A request as a frame."""
    request, texts, channel = arrival
    refusal = request.refusal
    header = {
        "type": "request",
        "number": number,
        "sequence_id": request.sequence_id,
        "start": request.start,
        "end": request.end,
        "request_id": request.request_id,
        "parameters": dict(request.parameters),
        "arrival_time": request.arrival_time,
        "offered": request.offered,
        "outputs": sorted(channel.requested_outputs),
        "texts": {name: [b64encode(text).decode() for text in each] for name, each in texts.items()}
        if texts
        else {},
        "refusal": None if refusal is None else error_fields(refusal),
    }
    return encode(header, request.inputs)


def read_request(header: Mapping[str, Any], tensors: dict[str, Tensor]) -> Request:
    """The request of a frame."""
    return Request(
        sequence_id=header["sequence_id"],
        start=header["start"],
        end=header["end"],
        inputs=tensors,
        request_id=header["request_id"],
        parameters=header["parameters"],
        arrival_time=header["arrival_time"],
        requested_outputs=frozenset(header["outputs"]),
        refusal=None if header["refusal"] is None else read_error(header["refusal"]),
        offered=header["offered"],
    )


def read_texts(header: Mapping[str, Any]) -> dict[str, tuple[bytes, ...]]:
    """The inputs of BYTES of a frame with a request."""
    return {name: tuple(map(b64decode, each)) for name, each in header["texts"].items()}


def error_fields(error: RequestError) -> list[Any]:
    """An error as JSON has it."""
    return [error.code, str(error), error.retryable]


def read_error(fields: list[Any]) -> RequestError:
    """The error of these fields."""
    code, message, retryable = fields
    return RequestError(Code(code), message, retryable=retryable)
