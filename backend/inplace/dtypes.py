"""The element types of an engine's tensors."""

from enum import StrEnum
from typing import Self

import torch


class Dtype(StrEnum):
    """Element types a tensor of an engine may have; the values are PyTorch's names."""

    BOOL = "bool"
    INT8 = "int8"
    UINT8 = "uint8"
    INT32 = "int32"
    INT64 = "int64"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"
    FLOAT64 = "float64"

    @property
    def as_torch(self) -> torch.dtype:
        """The same type as PyTorch has it."""
        return _TORCH[self.value]

    @classmethod
    def of(cls, dtype: torch.dtype) -> Self:
        """The member for a PyTorch dtype; ValueError for a type no engine may use."""
        return cls(str(dtype).removeprefix("torch."))


_TORCH: dict[str, torch.dtype] = {dtype.value: getattr(torch, dtype.value) for dtype in Dtype}
