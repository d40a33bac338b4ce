"""Tensors in safetensors files: the values that states begin with, and weights of plans.

The format has no complex numbers, so a complex tensor is written as pairs of real ones.
"""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inplace.errors import LoadError
from inplace.schema.dtypes import Dtype

_NAMES = {
    "BOOL": Dtype.BOOL,
    "I8": Dtype.INT8,
    "U8": Dtype.UINT8,
    "I16": Dtype.INT16,
    "U16": Dtype.UINT16,
    "I32": Dtype.INT32,
    "I64": Dtype.INT64,
    "F8_E4M3": Dtype.FLOAT8_E4M3FN,
    "F8_E5M2": Dtype.FLOAT8_E5M2,
    "F16": Dtype.FLOAT16,
    "BF16": Dtype.BFLOAT16,
    "F32": Dtype.FLOAT32,
    "F64": Dtype.FLOAT64,
}
"""The format's names of the element types."""

_HEADER_SIZE = 8
"""Bytes of the number before the header, which is the header's size."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as a safetensors file.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    real = {
        name: (torch.view_as_real(tensor) if tensor.is_complex() else tensor).detach().cpu()
        for name, tensor in tensors.items()
    }
    try:
        save_file({name: tensor.clone().contiguous() for name, tensor in real.items()}, path)
    except SafetensorError as error:  # a full disk, for example
        raise OSError(str(error)) from error


def read_tensors(content: memoryview, title: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, as views of its bytes.

    Complex tensors are returned as they were written: see `as_dtype`.

    Args:
        content: the whole file.
        title: what errors call it.

    Raises:
        LoadError: it is not a safetensors file.
    """
    try:
        size = int.from_bytes(content[:_HEADER_SIZE], "little")
        start = _HEADER_SIZE + size
        header = json.loads(bytes(content[_HEADER_SIZE:start]))
        data = memoryview(content)[start:]
        return {
            name: _tensor(data, entry) for name, entry in header.items() if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise LoadError(
            f"{title} cannot be read as a safetensors file ({error}); build the model again"
        ) from error


def as_dtype(tensor: Tensor, dtype: Dtype) -> Tensor:
    """A tensor that was read as it was before it was written; only complex types differ."""
    is_pair = dtype.as_torch.is_complex and tensor.is_floating_point() and tensor.dim() > 0
    return torch.view_as_complex(tensor) if is_pair and tensor.shape[-1] == 2 else tensor


def _tensor(data: memoryview, entry: Mapping[str, Any]) -> Tensor:
    dtype, shape = _NAMES[entry["dtype"]].as_torch, entry["shape"]
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end <= len(data) or begin % dtype.itemsize:
        raise ValueError(f"a tensor lies at {begin} to {end} of {len(data)} bytes")
    if any(extent < 0 for extent in shape) or prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"a tensor of the shape {shape} has {end - begin} bytes")
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data[begin:end], dtype=dtype).reshape(shape)
