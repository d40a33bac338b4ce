"""The element types of an engine's tensors."""

from enum import StrEnum
from typing import Self

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

    @property
    def as_torch(self) -> torch.dtype:
        """PyTorch's dtype."""
        return _TORCH[self.value]

    @classmethod
    def of(cls, dtype: torch.dtype) -> Self:
        """The member for a PyTorch dtype; ValueError for a type that engines do not support."""
        return cls(str(dtype).removeprefix("torch."))


_TORCH: dict[str, torch.dtype] = {dtype.value: getattr(torch, dtype.value) for dtype in Dtype}
