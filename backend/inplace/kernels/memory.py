"""The memory that kernels work on: tensors, or the addresses that a TensorRT plugin gets."""

from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor


class Memory(Protocol):
    """What Triton takes as a pointer: a tensor or a `Pointer`."""

    @property
    def dtype(self) -> torch.dtype:
        """The element type."""
        ...

    def data_ptr(self) -> int:
        """The address of the first element."""
        ...


@dataclass(frozen=True, slots=True)
class Pointer:
    """An address on the device with an element type."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        """The address."""
        return self.address


class _CudaArray:
    """An address with Numba's CUDA array interface, version 3; bfloat16 is declared as int16."""

    def __init__(self, address: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        kind = {
            torch.bfloat16: "<i2",
            torch.float16: "<f2",
            torch.float32: "<f4",
            torch.int32: "<i4",
            torch.int64: "<i8",
            torch.uint8: "|u1",
        }
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": shape,
            "typestr": kind[dtype],
            "strides": None,
            "version": 3,
        }


def as_tensor(memory: Memory, shape: tuple[int, ...]) -> Tensor:
    """A contiguous tensor of this shape over the memory, which must outlive it; no copy."""
    if isinstance(memory, Tensor):
        return memory.view(-1)[: prod(shape)].view(shape)
    array = _CudaArray(memory.data_ptr(), shape, memory.dtype)
    tensor: Tensor = torch.as_tensor(array, device="cuda")
    return tensor.view(memory.dtype)
