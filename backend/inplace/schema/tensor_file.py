"""Files of tensors: safetensors, written piece by piece and read from memory.

The library ``safetensors`` reads a path, or copies every tensor. What is read here are views of the
very memory whose checksum was compared. A complex tensor is written as pairs of real numbers, for
which every reader has a type.
"""

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from typing_extensions import Buffer

from inplace.errors import LoadError
from inplace.schema.specs import Dtype

ALIGNMENT = 64
"""The tensors begin at a multiple of this many bytes."""

MAX_HEADER = 100_000_000
"""Bytes of a header, as in the library ``safetensors``."""

_DTYPES = {
    "BOOL": torch.bool,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def write_safetensors(
    file: IO[bytes], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors, one by one, so that no copy of all of them is held in memory.

    Args:
        file: where to write.
        tensors: by name; of any device.
        metadata: texts, by name.

    Raises:
        OSError: the file cannot be written.
        ValueError: safetensors has no such element type.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise ValueError(f"{name} is {tensor.dtype}, which a safetensors file cannot hold")
        end = begin + tensor.numel() * tensor.itemsize
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        file.write(flat_bytes(tensor.detach().cpu()).numpy().data)


def read_safetensors(content: Tensor, title: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of a safetensors file, as views of its content, and its metadata.

    Args:
        content: ``[bytes]`` uint8 on the CPU, the whole file (`as_bytes`).
        title: what errors call the file.

    Raises:
        LoadError: it is not a safetensors file.
    """
    try:
        size = int.from_bytes(content[:8].numpy().tobytes(), "little")
        if not 2 <= size <= min(content.numel() - 8, MAX_HEADER):
            raise ValueError(f"its header cannot have {size} bytes")
        header = json.loads(content[8 : 8 + size].numpy().tobytes())
        if not isinstance(header, dict):
            raise ValueError("its header is not an object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(
            isinstance(text, str) for text in metadata.values()
        ):
            raise ValueError("its metadata are not texts")
        data = content[8 + size :]
        return {name: _tensor(data, entry) for name, entry in header.items()}, metadata
    except (ValueError, TypeError, KeyError, RuntimeError, RecursionError) as error:
        raise LoadError(
            f"{title} cannot be read as a safetensors file ({error}); build the model again"
        ) from error


def flat_bytes(tensor: Tensor) -> Tensor:
    """The elements of a tensor in order, ``[bytes]`` uint8; a view of its memory where it can be.

    ``contiguous()`` is not enough: it leaves a single element any stride, and bytes of such a
    tensor have no view.
    """
    flat = tensor.reshape(-1)
    if flat.stride() != (1,):
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def as_bytes(content: Buffer) -> Tensor:
    """The memory of a buffer as a tensor, ``[bytes]`` uint8.

    The tensors that are read from it are views of this memory, so it must not be changed.
    """
    if not memoryview(content).nbytes:
        return torch.empty(0, dtype=torch.uint8)
    with warnings.catch_warnings():
        # PyTorch warns of tensors over read-only memory; nothing writes into these.
        warnings.simplefilter("ignore")
        return torch.frombuffer(content, dtype=torch.uint8)


def _tensor(data: Tensor, entry: Any) -> Tensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("an entry of its header is not a tensor")
    dtype, shape, offsets = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(
            type(number) is int and 0 <= number < 1 << 63 for number in numbers
        ):
            raise ValueError(f"{numbers} are not extents or offsets")
    begin, end = offsets
    if not begin <= end <= data.numel():
        raise ValueError(f"a tensor has the bytes {begin} to {end} of {data.numel()}")
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"a tensor of shape {shape} has {end - begin} bytes")
    part = data[begin:end]
    if part.storage_offset() % dtype.itemsize:
        part = part.clone()
    return part.view(dtype).view(shape)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as a safetensors file.

    Raises:
        OSError: it cannot be written.
    """
    real = {
        name: torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
        for name, tensor in tensors.items()
    }
    with path.open("wb") as file:
        write_safetensors(file, real)


def read_tensors(content: memoryview, title: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, as views of its bytes.

    Complex tensors are returned as they were written: see `as_dtype`.

    Args:
        content: the whole file.
        title: what errors call it.

    Raises:
        LoadError: it is not a safetensors file.
    """
    return read_safetensors(as_bytes(content), title)[0]


def as_dtype(tensor: Tensor, dtype: Dtype) -> Tensor:
    """A tensor that was read as it was before it was written; only complex types differ."""
    is_pair = dtype.as_torch.is_complex and tensor.is_floating_point() and tensor.dim() > 0
    if not is_pair or tensor.shape[-1] != 2:
        return tensor
    # PyTorch views pairs as complex numbers at even offsets only.
    return torch.view_as_complex(tensor.clone() if tensor.storage_offset() % 2 else tensor)
