"""Index of each row's largest score: parts of the row in parallel, joined by whichever program finishes last."""

import triton
import triton.language as tl

from inplace.kernels.memory import Memory

PARTS = 32
"""Programs a row."""


BLOCK = 1024


@triton.jit
def _argmax(
    scores,
    out,
    workspace,
    locks,
    count,
    part,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    row, mine = tl.program_id(0), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    line = scores + row.to(tl.int64) * count
    lane = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = tl.zeros((BLOCK,), tl.int32)
    first = mine * part
    last = tl.minimum(first + part, count)
    for start in range(first, last, BLOCK):
        column = start + lane
        value = tl.load(line + column, mask=column < last, other=float("-inf")).to(tl.float32)
        better = value > best
        best = tl.where(better, value, best)
        where = tl.where(better, column, where)
    top = tl.max(best, 0)
    place = tl.min(tl.where(best == top, where, 2147483647), 0)
    values = workspace + row * 2 * PARTS
    places = values + PARTS
    tl.store(values + mine, top)
    tl.store(places + mine, place.to(tl.float32, bitcast=True))
    tl.debug_barrier()
    arrived = tl.atomic_add(locks + row, 1, sem="acq_rel")
    if arrived == PARTS - 1:
        tl.store(locks + row, 0)
        parts = tl.arange(0, PARTS)
        tops = tl.load(values + parts, volatile=True)
        spots = tl.load(places + parts, volatile=True).to(tl.int32, bitcast=True)
        tl.store(
            out + row, tl.min(tl.where(tops == tl.max(tops, 0), spots, 2147483647), 0).to(tl.int64)
        )


def argmax_workspace(rows: int) -> int:
    """Bytes of scratch memory for this many rows."""
    return rows * PARTS * 8


def argmax(
    *,
    scores: Memory,
    out: Memory,
    workspace: Memory,
    locks: Memory,
    rows: int,
    count: int,
    pdl: bool = False,
) -> None:
    """Launch on the current stream.

    Args:
        scores: ``[rows, count]``, a floating dtype; NaN is never the largest.
        out: int64 ``[rows, 1]``; the first index where several scores are largest.
        workspace: `argmax_workspace` bytes, as float32.
        locks: int32 ``[rows]``, zero before the first launch and after every one.
        rows, count: extents.
        pdl: as in ``linear``.
    """
    part = triton.cdiv(triton.cdiv(count, PARTS), BLOCK) * BLOCK
    launch = {"PDL": pdl, **({"launch_pdl": True} if pdl else {})}
    _argmax[(rows, PARTS)](
        scores, out, workspace, locks, count, part, BLOCK=BLOCK, PARTS=PARTS, num_warps=4, **launch
    )
