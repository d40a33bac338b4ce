"""Each row's next token: the index of the largest score, or a random token.

`sample` computes what `inplace.operators.sample` defines, bit for bit.
"""

from dataclasses import dataclass

import triton

from inplace.kernels.gumbel import LANES
from inplace.kernels.memory import Memory
from inplace.kernels.sample_kernels import CANDIDATES, argmax_kernel, sample_kernel

MAX_SPLITS = 32
"""Programs that share a row."""


MIN_SPLITS, MANY_ROWS = 8, 9
"""With `MANY_ROWS` rows or more, `MIN_SPLITS` programs a row are enough to fill the GPU."""


ARGMAX_BLOCK = 1024
"""Scores that a program of `argmax` reads at a time."""


SCAN_BLOCK = 4096
"""Scores that the last program of a row reads at a time."""


WARPS, REGISTERS = 8, 128
"""So that two programs fit a multiprocessor, without spills.

Most programs end before the part that needs the registers.
"""


def argmax_workspace(rows: int) -> int:
    """Bytes of scratch memory that `argmax` needs for so many rows."""
    return rows * MAX_SPLITS * 8


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
    """Launch ``inplace::argmax`` on the current stream.

    Args:
        scores: ``[rows, count]``, a floating dtype; NaN is never the largest.
        out: int64 ``[rows, 1]``; the first index where several scores are largest.
        workspace: `argmax_workspace` bytes, as float32.
        locks: int32 ``[rows]``, zero before the first launch and after every one.
        rows, count: extents.
        pdl: as in `inplace.kernels.linear.linear`.
    """
    split_size = triton.cdiv(triton.cdiv(count, MAX_SPLITS), ARGMAX_BLOCK) * ARGMAX_BLOCK
    launch = {"PDL": pdl, **({"launch_pdl": True} if pdl else {})}
    argmax_kernel[(rows, MAX_SPLITS)](
        scores, out, workspace, locks, count, split_size,
        BLOCK=ARGMAX_BLOCK, SPLITS=MAX_SPLITS, num_warps=4, **launch,
    )  # fmt: skip


@dataclass(frozen=True)
class SampleOptions:
    """What ``inplace::sample.options`` takes and returns beside ``inplace::sample``.

    Attributes:
        min_p, num_logprobs, num_adjusted: ``[rows]``, float32, int32 and int32.
        adjusted_tokens: int32 ``[rows, max_adjusted]``.
        adjustments: float32 ``[rows, 3, max_adjusted]``.
        token_mask: int32 ``[rows, words]``; a bit for each score.
        max_adjusted: extent.
        token_logprobs: float32 ``[rows, 1]``; written where ``num_logprobs`` is not 0.
        top_logprobs, top_tokens: float32 and int64 ``[rows, MAX_LOGPROBS]``; so many entries are
            written as are asked for.
        candidates: `candidates_workspace` bytes, as float32.
        adjusted_scores: `adjusted_workspace` bytes, as float32.
    """

    min_p: Memory
    num_logprobs: Memory
    num_adjusted: Memory
    adjusted_tokens: Memory
    adjustments: Memory
    token_mask: Memory
    max_adjusted: int
    token_logprobs: Memory
    top_logprobs: Memory
    top_tokens: Memory
    candidates: Memory
    adjusted_scores: Memory


def sample_workspace(rows: int) -> int:
    """Bytes of scratch memory that `sample` needs for so many rows."""
    return rows * MAX_SPLITS * 16


def candidates_workspace(rows: int) -> int:
    """Bytes of scratch memory for the largest scores of all splits."""
    return rows * MAX_SPLITS * CANDIDATES * 8


def adjusted_workspace(rows: int, count: int) -> int:
    """Bytes of scratch memory for adjusted scores."""
    return rows * count * 4


def sample(
    *,
    scores: Memory,
    temperature: Memory,
    top_k: Memory,
    top_p: Memory,
    seeds: Memory,
    positions: Memory,
    out: Memory,
    workspace: Memory,
    locks: Memory,
    rows: int,
    count: int,
    options: SampleOptions | None = None,
    pdl: bool = False,
) -> None:
    """Launch ``inplace::sample`` on the current stream, or ``inplace::sample.options``.

    Args:
        scores: float32 ``[rows, count]``.
        temperature, top_k, top_p, seeds, positions: ``[rows]``, float32, int32, float32, int64 and
            int32.
        out: int64 ``[rows, 1]``.
        workspace: `sample_workspace` bytes, as float32.
        locks: int32 ``[rows]``, zero before the first launch and after every one.
        rows, count: extents.
        options: None for ``inplace::sample``.
        pdl: as in `inplace.kernels.linear.linear`.
    """
    splits, block = MAX_SPLITS if rows < MANY_ROWS else MIN_SPLITS, 4 * LANES
    split_size = triton.cdiv(triton.cdiv(count, splits), block) * block
    compiled = {"num_warps": WARPS, "maxnreg": REGISTERS, "enable_fp_fusion": False}
    launch = {"PDL": pdl, **compiled, **({"launch_pdl": True} if pdl else {})}
    memory = (scores, temperature, top_k, top_p, seeds, positions, out, workspace, locks)
    own = (None,) * 11 if options is None else _memory(options)
    sample_kernel[(rows, splits)](
        *memory, count, split_size, *own, SPLITS=splits, SCAN_BLOCK=SCAN_BLOCK,
        MAX_ADJUSTED=0 if options is None else options.max_adjusted, **launch,
    )  # fmt: skip


def _memory(options: SampleOptions) -> tuple[Memory, ...]:
    """The tensors of the options, in the order of the kernel."""
    return (
        options.min_p,
        options.num_logprobs,
        options.num_adjusted,
        options.adjusted_tokens,
        options.adjustments,
        options.token_mask,
        options.token_logprobs,
        options.top_logprobs,
        options.top_tokens,
        options.candidates,
        options.adjusted_scores,
    )
