"""Writes the slots of a state on a GPU: ``inplace::update``, for any rank and dtype."""

from dataclasses import dataclass
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from inplace.kernels.memory import Memory, Pointer

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class UpdateSpec:
    """The static properties of one update.

    A slot of the state is ``[outer, extent, inner]`` elements; an append is along ``extent``.
    Without an append (``replace``) it is ``UpdateSpec(1, 1, elements of a slot)``.
    """

    outer: int
    extent: int
    inner: int
    ring: bool = False

    @classmethod
    def of(
        cls, state_shape: tuple[int, ...], axis: int, *, append: bool, ring: bool = False
    ) -> "UpdateSpec":
        """The spec of a state ``[slots, …]``.

        ``axis``, counted with the slot axis, is the one that an append is along.
        """
        if not append:
            return cls(1, 1, prod(state_shape[1:]))
        return cls(
            prod(state_shape[1:axis]),
            state_shape[axis],
            prod(state_shape[axis + 1 :]),
            ring,
        )


@triton.jit(do_not_specialize=["rows", "count", "blocks"])
def update_kernel(
    state, slots, value, row_offsets, write_indices, rows, count, blocks,
    OUTER: tl.constexpr, EXTENT: tl.constexpr, INNER: tl.constexpr, PACKED: tl.constexpr,
    APPEND: tl.constexpr, RING: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (unit, block of its elements).

    A unit is a token of packed values, otherwise the ``count`` entries of a row.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    unit, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    row = unit
    position = 0
    if PACKED:
        r = tl.arange(0, BLOCK_R)
        ends = tl.load(row_offsets + r + 1, mask=r < rows, other=2147483647)
        row = tl.sum((ends <= unit).to(tl.int32), 0)
        if row >= rows:
            return
        position = unit - tl.load(row_offsets + row)
    slot = tl.load(slots + row).to(tl.int64)
    if slot < 0:
        return
    if APPEND:
        position += tl.load(write_indices + row)
    size = count.to(tl.int64) * OUTER * INNER
    element = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    new = tl.load(value + unit * size + element, mask=element < size)
    o = element // (count.to(tl.int64) * INNER)
    c = element // INNER % count
    entry = position + c
    if RING:
        entry = entry % EXTENT
    to = ((slot * OUTER + o) * EXTENT + entry) * INNER + element % INNER
    tl.store(state + to, new, mask=(element < size) & (entry >= 0) & (entry < EXTENT))


def _as_integers(memory: Memory) -> Memory:
    """The same memory as integers of its element size, so that a NaN keeps its payload."""
    dtype = _INTEGERS.get(memory.dtype.itemsize)
    if dtype is None:
        raise ValueError(f"elements of {memory.dtype} are wider than 8 bytes")
    return memory.view(dtype) if isinstance(memory, Tensor) else Pointer(memory.data_ptr(), dtype)


def _block(size: int) -> int:
    return min(1024, max(32, 1 << (size - 1).bit_length()))


def update(
    spec: UpdateSpec,
    *,
    state: Memory,
    slots: Memory,
    value: Memory,
    row_offsets: Memory | None,
    write_indices: Memory | None,
    rows: int,
    units: int,
    pdl: bool = False,
) -> None:
    """Launch one step of ``inplace::update`` on the current stream.

    An entry beyond its slot is dropped without an error: the runtime has checked that rows fit.

    Args:
        spec: the static properties.
        state: ``[slots, outer, extent, inner]``, contiguous, elements of 1, 2, 4 or 8 bytes.
        slots: int32 ``[rows]``; a row with -1 writes nothing.
        value: contiguous, the state's element size: ``[rows, outer, units / rows, inner]``, or
            packed ``[units, outer, inner]``.
        row_offsets: int32 ``[rows + 1]`` where values are packed: row r owns
            ``value[row_offsets[r]:row_offsets[r + 1]]``; else None.
        write_indices: int32 ``[rows]``, where each row's append starts; None replaces whole slots.
        rows: rows of the step.
        units: entries of all rows together: packed tokens, or rows times the entries of a row.
        pdl: as in `inplace.kernels.attention.attention`.

    Raises:
        ValueError: elements wider than 8 bytes, or ``units`` is not a multiple of ``rows``.
    """
    if rows == 0 or units == 0:
        return
    packed = row_offsets is not None
    if not packed and units % rows:
        raise ValueError(f"{units} entries are not a multiple of {rows} rows")
    count = 1 if packed else units // rows
    size = spec.outer * count * spec.inner
    if size == 0:
        return
    blocks = triton.cdiv(size, _block(size))
    update_kernel[((units if packed else rows) * blocks,)](
        _as_integers(state), slots, _as_integers(value),
        slots if row_offsets is None else row_offsets,
        slots if write_indices is None else write_indices,
        rows, count, blocks, OUTER=spec.outer, EXTENT=spec.extent, INNER=spec.inner,
        PACKED=packed, APPEND=write_indices is not None, RING=spec.ring,
        BLOCK=_block(size), BLOCK_R=triton.next_power_of_2(rows),
        PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
