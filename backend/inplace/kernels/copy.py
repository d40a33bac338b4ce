"""Copies slots of many states at once on a GPU.

A sequence of a model with 32 layers has 64 states. One launch for all of them costs the host what
one of them costs, and lets the device copy at its bandwidth.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from inplace.schema.specs import StateSpec, Update

BLOCK = 2048
"""Units that a program copies."""

_UNITS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}


@dataclass(frozen=True)
class CopySpec:
    """The static properties of a copy, of states of one shape.

    A slot is ``[outer, extent, inner]`` units. If the state appends, the positions are along
    ``extent`` and the first ones are copied; else the slot is ``[1, 1, inner]`` and copied whole.

    Attributes:
        unit: bytes of a unit: 1, 2, 4 or 8.
        appends: whether the state appends.
        outer, extent, inner: see above.
    """

    unit: int
    appends: bool
    outer: int
    extent: int
    inner: int

    @classmethod
    def of(cls, state: StateSpec) -> "CopySpec":
        """The spec of a state."""
        outer, extent, inner = 1, 1, prod(state.shape)
        appends = state.update is Update.APPEND and state.axis is not None
        if appends and state.axis is not None:
            outer = prod(state.shape[: state.axis])
            extent = state.shape[state.axis]
            inner = prod(state.shape[state.axis + 1 :])
        size = inner * state.dtype.as_torch.itemsize
        unit = next(unit for unit in _UNITS if size % unit == 0)
        return cls(unit, appends, outer, extent, size // unit)

    def used(self, length: int | None) -> int:
        """Entries of ``extent`` to copy where so many positions are used; None for all."""
        return length if self.appends and length is not None else self.extent


@triton.jit(do_not_specialize=["source", "target", "blocks"])
def copy_kernel(
    sources, targets, source, target, source_stride, target_stride, size, blocks,
    OUTER: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (state, entry of ``outer``, block of units)."""
    row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    state, outer = row // OUTER, row % OUTER
    unit = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    old = tl.multiple_of(tl.load(sources + state).to(tl.pointer_type(UNIT)), 16)
    new = tl.multiple_of(tl.load(targets + state).to(tl.pointer_type(UNIT)), 16)
    old += (source.to(tl.int64) * OUTER + outer) * source_stride
    new += (target.to(tl.int64) * OUTER + outer) * target_stride
    copied = tl.load(old + unit, mask=unit < size, eviction_policy="evict_first")
    tl.store(new + unit, copied, mask=unit < size)


def copy(
    spec: CopySpec,
    *,
    sources: Tensor,
    targets: Tensor,
    source: int = 0,
    target: int = 0,
    length: int,
    source_extent: int,
    target_extent: int,
) -> None:
    """Launch a copy of the first entries of a slot of each state, on the current stream.

    Args:
        spec: the static properties.
        sources: int64 ``[states]``, addresses of contiguous memory ``[slots, outer, source_extent,
            inner]``, multiples of 16.
        targets: the same of memory ``[slots, outer, target_extent, inner]``, which must not overlap
            the sources.
        source: slot to copy.
        target: slot to write.
        length: entries to copy.
        source_extent: entries of a slot.
        target_extent: entries of a slot.
    """
    size = length * spec.inner
    if not size:
        return
    blocks = triton.cdiv(size, BLOCK)
    copy_kernel[(len(sources) * spec.outer * blocks,)](
        sources, targets, source, target, source_extent * spec.inner, target_extent * spec.inner,
        size, blocks, OUTER=spec.outer, UNIT=_UNITS[spec.unit], BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip


def addresses(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """The addresses of tensors as `copy` takes them; the stream is not waited for."""
    host = torch.tensor([each.data_ptr() for each in tensors], dtype=torch.int64)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
