"""Tensors in files of their own: the values that states begin with, and weights of plans.

A complex tensor is written as pairs of real numbers, for which every reader has a type.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from inplace.schema.dtypes import Dtype
from inplace.schema.tensor_file import as_bytes, read_safetensors, write_safetensors


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
