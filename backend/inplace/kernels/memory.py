"""The memory that kernels work on, and what they load from it.

On the host it is a tensor, or the address that a TensorRT plugin gets. Kernels load vectors with
their rotation, cached positions, and weights that are read once.
"""

from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
import triton
import triton.language as tl
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


@triton.jit
def load_rotated(
    vectors, d, present, cos, sin, known, DIM: tl.constexpr, ROTARY: tl.constexpr
):  # fmt: skip
    """Load vectors and apply the rotary embedding (arXiv:2104.09864, component i with i + half).

    The first ``ROTARY`` components are rotated, in fp32, and rounded once.

    ``vectors``: pointers ``[n, 1]``; ``d``: ``[1, BLOCK_D]``; ``cos`` and ``sin``: pointers
    ``[n, 1]`` or ``[1, 1]``. ``present`` and ``known`` mask them. Returns ``[n, BLOCK_D]``, zero
    where masked.
    """
    inside = present & (d < DIM)
    x = tl.load(vectors + d, mask=inside, other=0.0)
    if ROTARY > 0:
        half: tl.constexpr = ROTARY // 2
        partner = tl.where(d < half, d + half, d - half)
        y = tl.load(vectors + partner, mask=inside & (d < ROTARY), other=0.0).to(tl.float32)
        c = tl.load(cos + d, mask=known & (d < ROTARY), other=1.0).to(tl.float32)
        s = tl.load(sin + d, mask=known & (d < ROTARY), other=0.0).to(tl.float32)
        x = (x.to(tl.float32) * c + y * tl.where(d < half, -s, s)).to(x.dtype)
    return x


@triton.jit
def quantized(x, scale):
    """What a cache of 8-bit floats rounds: ``x / scale``, at most 448 and at least -448.

    With the rounding of the store this is `inplace.operators.float8.quantize_heads`: NaN stays NaN.
    """
    wide = x.to(tl.float32)
    ratio = tl.div_rn(wide, tl.broadcast_to(scale, wide.shape))
    return tl.clamp(ratio, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_cached(
    state, j, lower, upper, ring_first, capacity,
    BOUNDED: tl.constexpr, RING: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Load ``WIDTH`` elements of positions ``j`` of one slot and head, ``[len(j), BLOCK]``.

    ``STRIDE``: elements from position to position.

    ``BOUNDED``: positions from ``upper`` on are not loaded and are zero. Their memory may hold NaN,
    and 0 x NaN is NaN. ``RING``: position ``lower`` is at entry ``ring_first``.
    """
    d = tl.arange(0, BLOCK)
    entry = j
    if RING:  # the visible positions wrap around at most once
        entry = ring_first + (j - lower)
        entry = tl.where(entry >= capacity, entry - capacity, entry)
    at = state + entry[:, None] * STRIDE + d[None, :]
    if BOUNDED:
        loaded = tl.load(at, mask=(j < upper)[:, None] & (d < WIDTH)[None, :], other=0.0)
    elif WIDTH == BLOCK:
        loaded = tl.load(at)
    else:
        loaded = tl.load(at, mask=(d < WIDTH)[None, :], other=0.0)
    return loaded


@triton.jit
def load_weights(rows, k, inside, inputs):
    """Load a tile of weights. Each is read once, so none should stay in the L2 cache."""
    return tl.load(rows + k, mask=inside & (k < inputs), other=0.0, eviction_policy="evict_first")


@triton.jit
def keep_in_registers(x):
    """Return ``x``, which the compiler then takes for computed here.

    Triton copies an operand of `tl.dot` to shared memory right after its load and waits for it
    there. That would serialise loads that can be in flight together. Not for Triton's interpreter,
    which has no inline assembly.
    """
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;",
        "=r,r",
        [x],
        dtype=x.dtype,
        is_pure=False,
        pack=32 // x.dtype.primitive_bitwidth,
    )
