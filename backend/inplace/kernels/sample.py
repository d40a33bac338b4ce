"""Each row's next token: the index of the largest score, or a random token.

`sample` computes what `inplace.operators.sample` defines, bit for bit.

Several programs share a row. The last one to finish combines their results. A greedy row does what
`argmax` does and no more. A sampled row adds noise to its scores on the way. Only where top-k or
top-p drop tokens does the last program read the row again: it takes the candidate with the largest
noisy score, and counts and weighs the tokens above it. If the candidate is dropped, it continues
with the best candidate above it: dropped candidates are below the threshold, so no token that is
kept is passed over. FlashInfer's sorting-free samplers work this way; here the answer does not
depend on the path to it. Where top-p is a share of what top-k keeps, the threshold of top-k is
narrowed down by bisection, only as far as a decision needs it.

The kernel is compiled without fusing multiplications and additions, which would round once where a
CPU rounds twice.
"""

import triton
import triton.language as tl

from inplace.kernels.gumbel import (
    ATANH_SERIES,
    EXP2_SERIES,
    LANES,
    LN2,
    LOG2E,
    MIN_EXPONENT,
    MIN_TEMPERATURE,
    TWO_THIRDS_BITS,
    WEIGHT_BITS,
)
from inplace.kernels.memory import Memory

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


_BLOCK = tl.constexpr(4 * LANES)


_LANES = tl.constexpr(LANES)


_MIN_TEMPERATURE = tl.constexpr(MIN_TEMPERATURE)


_LN2, _LOG2E = tl.constexpr(LN2), tl.constexpr(LOG2E)


_TWO_THIRDS_BITS = tl.constexpr(TWO_THIRDS_BITS)


_A3, _A5, _A7, _A9 = (tl.constexpr(value) for value in ATANH_SERIES)


_E1, _E2, _E3, _E4, _E5, _E6 = (tl.constexpr(value) for value in EXP2_SERIES)


_WEIGHT_BITS, _MIN_EXPONENT = tl.constexpr(WEIGHT_BITS), tl.constexpr(MIN_EXPONENT)


_NEGLIGIBLE = tl.constexpr(28.0)
"""e^-28 is less than a unit of weight."""


_FLOAT_MAX = tl.constexpr(3.4028234663852886e38)


_NO_INDEX = tl.constexpr(2147483647)


@triton.jit
def argmax_kernel(
    scores, out, workspace, locks, count, split_size,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (row, split of its scores)."""
    row, split = tl.program_id(0), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row_scores = scores + row.to(tl.int64) * count
    lane = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_index = tl.zeros((BLOCK,), tl.int32)
    begin = split * split_size
    end = tl.minimum(begin + split_size, count)
    for start in range(begin, end, BLOCK):
        column = start + lane
        value = tl.load(row_scores + column, mask=column < end, other=float("-inf")).to(tl.float32)
        larger = value > best
        best = tl.where(larger, value, best)
        best_index = tl.where(larger, column, best_index)
    split_max = tl.max(best, 0)
    split_index = tl.min(tl.where(best == split_max, best_index, 2147483647), 0)
    maxima = workspace + row * 2 * SPLITS
    indices = maxima + SPLITS
    tl.store(maxima + split, split_max)
    tl.store(indices + split, split_index.to(tl.float32, bitcast=True))
    tl.debug_barrier()
    arrived = tl.atomic_add(locks + row, 1, sem="acq_rel")
    if arrived == SPLITS - 1:
        tl.store(locks + row, 0)
        splits = tl.arange(0, SPLITS)
        all_maxima = tl.load(maxima + splits, volatile=True)
        all_indices = tl.load(indices + splits, volatile=True).to(tl.int32, bitcast=True)
        tl.store(
            out + row,
            tl.min(tl.where(all_maxima == tl.max(all_maxima, 0), all_indices, 2147483647), 0).to(
                tl.int64
            ),
        )


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


@triton.jit
def _uniform(bits):
    """As `inplace.kernels.gumbel.uniforms`."""
    return tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.9999999403953552)


@triton.jit
def _split_exponent(x):
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - _TWO_THIRDS_BITS) >> 23
    return exponent, (bits - (exponent << 23)).to(tl.float32, bitcast=True)


@triton.jit
def _log(exponent, excess, fraction):
    ratio = tl.div_rn(excess, fraction + 1.0)
    square = ratio * ratio
    series = ((square * _A9 + _A7) * square + _A5) * square + _A3
    return exponent.to(tl.float32) * _LN2 + (2.0 * ratio) * (series * square + 1.0)


@triton.jit
def _gumbel_noise(uniform):
    exponent, fraction = _split_exponent(1.0 - uniform)
    exponential = -_log(exponent, tl.where(exponent == 0, -uniform, fraction - 1.0), fraction)
    exponent, fraction = _split_exponent(exponential)
    return -_log(exponent, fraction - 1.0, fraction)


@triton.jit
def _exp_weight(x):
    scaled = tl.maximum(x, _MIN_EXPONENT) * _LOG2E
    whole = tl.floor(scaled + 0.5)
    part = scaled - whole
    series = ((((_E6 * part + _E5) * part + _E4) * part + _E3) * part + _E2) * part + _E1
    mantissa = ((series * part + 1.0) * 8388608.0).to(tl.int64)
    return (mantissa << (_WEIGHT_BITS - 23)) >> (-whole).to(tl.int64)


@triton.jit
def _noisy_score(value, bits, temperature):
    """The score with noise; the token with the largest is chosen."""
    return tl.div_rn(value, tl.zeros_like(value) + temperature) + _gumbel_noise(_uniform(bits))


@triton.jit
def _keep_larger(best, index, value, column):
    """The larger of each lane, and where it is."""
    larger = value > best
    return tl.where(larger, value, best), tl.where(larger, column, index)


@triton.jit
def _first_max(best, index):
    """The largest of all lanes, the first of equals."""
    maximum = tl.max(best, 0)
    return maximum, tl.min(tl.where(best == maximum, index, _NO_INDEX), 0)


@triton.jit
def _count_above(number, mass, value, pivot, top, temperature):
    """Add the number and weight of the values above the pivot."""
    above = value > pivot
    weight = _exp_weight(
        tl.div_rn(tl.where(above, value, top) - top, tl.zeros_like(value) + temperature)
    )
    return number + above.to(tl.int32), mass + tl.where(above, weight, 0)


@triton.jit
def _scan_above(
    row_scores, count, pivot, top, temperature, seed, position, choose, SCAN_BLOCK: tl.constexpr
):
    """Number and weight of the scores above the pivot; with ``choose`` also their best candidate.

    ``top`` is the row's largest score.
    """
    QUARTER: tl.constexpr = SCAN_BLOCK // 4
    lane = tl.arange(0, QUARTER)
    first_column = lane // _LANES * _BLOCK + lane % _LANES
    number = tl.zeros((QUARTER,), tl.int32)
    mass = tl.zeros((QUARTER,), tl.int64)
    best = tl.full((QUARTER,), float("-inf"), tl.float32)
    index = tl.full((QUARTER,), _NO_INDEX, tl.int32)
    for start in range(0, count, SCAN_BLOCK):
        c0 = start + first_column
        c1, c2, c3 = c0 + _LANES, c0 + 2 * _LANES, c0 + 3 * _LANES
        v0 = tl.load(row_scores + c0, mask=c0 < count, other=float("-inf"))
        v1 = tl.load(row_scores + c1, mask=c1 < count, other=float("-inf"))
        v2 = tl.load(row_scores + c2, mask=c2 < count, other=float("-inf"))
        v3 = tl.load(row_scores + c3, mask=c3 < count, other=float("-inf"))
        if tl.max(tl.maximum(tl.maximum(v0, v1), tl.maximum(v2, v3)), 0) > pivot:
            number, mass = _count_above(number, mass, v0, pivot, top, temperature)
            number, mass = _count_above(number, mass, v1, pivot, top, temperature)
            number, mass = _count_above(number, mass, v2, pivot, top, temperature)
            number, mass = _count_above(number, mass, v3, pivot, top, temperature)
            if choose:
                zeros = tl.zeros((QUARTER,), tl.int32)
                b0, b1, b2, b3 = tl.philox(seed, start // 4 + lane, zeros, zeros + position, zeros)
                best, index = _keep_larger(
                    best, index,
                    tl.where(v0 > pivot, _noisy_score(v0, b0, temperature), float("-inf")), c0,
                )  # fmt: skip
                best, index = _keep_larger(
                    best, index,
                    tl.where(v1 > pivot, _noisy_score(v1, b1, temperature), float("-inf")), c1,
                )  # fmt: skip
                best, index = _keep_larger(
                    best, index,
                    tl.where(v2 > pivot, _noisy_score(v2, b2, temperature), float("-inf")), c2,
                )  # fmt: skip
                best, index = _keep_larger(
                    best, index,
                    tl.where(v3 > pivot, _noisy_score(v3, b3, temperature), float("-inf")), c3,
                )  # fmt: skip
    _, chosen = _first_max(best, index)
    return tl.sum(number, 0), tl.sum(mass, 0), chosen


@triton.jit
def _top_k_top_p(
    row_scores, count, chosen, top, temperature, k, p, seed, position, SCAN_BLOCK: tl.constexpr
):
    """The best candidate that top-k and top-p keep, from the best of all.

    ``min_mass`` and ``max_mass`` bound the weight of what top-k keeps, of which top-p is a share.
    They are the weights above ``upper``, which at most k scores exceed, and above ``lower``, which
    more than k scores exceed. The interval is halved where a decision needs it. Halving ends at
    neighbouring floats, with nothing between them.
    """
    lower = tl.maximum(top - _NEGLIGIBLE * temperature, -_FLOAT_MAX)
    upper = top
    min_mass = tl.zeros((), tl.int64)
    max_mass = tl.zeros((), tl.int64)
    share = p.to(tl.float64)
    if p < 1.0:
        number, max_mass, _ = _scan_above(
            row_scores, count, lower, top, temperature, seed, position, False, SCAN_BLOCK
        )
        if number <= k:  # scores that are not above lower weigh nothing
            min_mass = max_mass
    else:
        share += float("inf")
        min_mass += 1
        max_mass += 1
    candidate = chosen
    pivot = tl.load(row_scores + candidate)
    number_above = 0
    mass_above = tl.zeros((), tl.int64)
    next_candidate = chosen
    scanned = False
    done = False
    while not done:
        number, mass, best_above = _scan_above(
            row_scores, count, pivot, top, temperature, seed, position, not scanned, SCAN_BLOCK
        )
        if not scanned:
            number_above, mass_above, next_candidate = number, mass, best_above
            scanned = True
        if p < 1.0:
            if number <= k:
                upper = tl.minimum(upper, pivot)
                min_mass = tl.maximum(min_mass, mass)
                if number == k:
                    max_mass = mass
            else:
                lower = tl.maximum(lower, pivot)
                max_mass = tl.minimum(max_mass, mass)
        middle = lower * 0.5 + upper * 0.5
        if (middle <= lower) | (middle >= upper):
            min_mass = max_mass
        kept = (number_above < k) & (mass_above.to(tl.float64) < min_mass.to(tl.float64) * share)
        dropped = (number_above >= k) | (
            mass_above.to(tl.float64) >= max_mass.to(tl.float64) * share
        )
        if (number_above == 0) | kept:
            done = True
        elif dropped:
            candidate = next_candidate
            pivot = tl.load(row_scores + candidate)
            scanned = False
        else:
            pivot = middle
    return candidate


@triton.jit
def sample_kernel(
    scores, temperature, top_k, top_p, seeds, positions, out, workspace, locks, count, split_size,
    SPLITS: tl.constexpr, SCAN_BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (row, split of its scores)."""
    row, split = tl.program_id(0), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row_scores = scores + row.to(tl.int64) * count
    row_temperature = tl.load(temperature + row)
    random = row_temperature > 0.0
    row_temperature = tl.maximum(row_temperature, _MIN_TEMPERATURE)
    seed, position = tl.load(seeds + row), tl.load(positions + row)
    lane = tl.arange(0, _LANES)
    top = tl.full((_LANES,), float("-inf"), tl.float32)
    top_index = tl.zeros((_LANES,), tl.int32)
    best = tl.full((_LANES,), float("-inf"), tl.float32)
    best_index = tl.zeros((_LANES,), tl.int32)
    begin = split * split_size
    end = tl.minimum(begin + split_size, count)
    for start in range(begin, end, _BLOCK):
        c0 = start + lane
        c1, c2, c3 = c0 + _LANES, c0 + 2 * _LANES, c0 + 3 * _LANES
        v0 = tl.load(row_scores + c0, mask=c0 < end, other=float("-inf"))
        v1 = tl.load(row_scores + c1, mask=c1 < end, other=float("-inf"))
        v2 = tl.load(row_scores + c2, mask=c2 < end, other=float("-inf"))
        v3 = tl.load(row_scores + c3, mask=c3 < end, other=float("-inf"))
        top, top_index = _keep_larger(top, top_index, v0, c0)
        top, top_index = _keep_larger(top, top_index, v1, c1)
        top, top_index = _keep_larger(top, top_index, v2, c2)
        top, top_index = _keep_larger(top, top_index, v3, c3)
        if random:
            zeros = tl.zeros((_LANES,), tl.int32)
            b0, b1, b2, b3 = tl.philox(seed, start // 4 + lane, zeros, zeros + position, zeros)
            best, best_index = _keep_larger(
                best, best_index, _noisy_score(v0, b0, row_temperature), c0
            )
            best, best_index = _keep_larger(
                best, best_index, _noisy_score(v1, b1, row_temperature), c1
            )
            best, best_index = _keep_larger(
                best, best_index, _noisy_score(v2, b2, row_temperature), c2
            )
            best, best_index = _keep_larger(
                best, best_index, _noisy_score(v3, b3, row_temperature), c3
            )
    results = workspace + row * 4 * SPLITS
    value, index = _first_max(top, top_index)
    tl.store(results + split, value)
    tl.store(results + SPLITS + split, index.to(tl.float32, bitcast=True))
    if random:
        value, index = _first_max(best, best_index)
        tl.store(results + 2 * SPLITS + split, value)
        tl.store(results + 3 * SPLITS + split, index.to(tl.float32, bitcast=True))
    tl.debug_barrier()
    arrived = tl.atomic_add(locks + row, 1, sem="acq_rel")
    if arrived == SPLITS - 1:
        tl.store(locks + row, 0)
        splits = tl.arange(0, SPLITS)
        all_top = tl.load(results + splits, volatile=True)
        row_top = tl.max(all_top, 0)
        if random:
            all_best = tl.load(results + 2 * SPLITS + splits, volatile=True)
            _, chosen = _first_max(
                all_best,
                tl.load(results + 3 * SPLITS + splits, volatile=True).to(tl.int32, bitcast=True),
            )
            k, p = tl.load(top_k + row), tl.load(top_p + row)
            if (k <= 0) | (k > count):
                k = count
            if (k < count) | (p < 1.0):
                chosen = _top_k_top_p(
                    row_scores, count, chosen, row_top, row_temperature, k, p, seed, position,
                    SCAN_BLOCK,
                )  # fmt: skip
        else:
            _, chosen = _first_max(
                all_top,
                tl.load(results + SPLITS + splits, volatile=True).to(tl.int32, bitcast=True),
            )
        tl.store(out + row, chosen.to(tl.int64))


def sample_workspace(rows: int) -> int:
    """Bytes of scratch memory that `sample` needs for so many rows."""
    return rows * MAX_SPLITS * 16


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
    pdl: bool = False,
) -> None:
    """Launch ``inplace::sample`` on the current stream.

    Args:
        scores: float32 ``[rows, count]``.
        temperature, top_k, top_p, seeds, positions: ``[rows]``, float32, int32, float32, int64 and
            int32.
        out: int64 ``[rows, 1]``.
        workspace: `sample_workspace` bytes, as float32.
        locks: int32 ``[rows]``, zero before the first launch and after every one.
        rows, count: extents.
        pdl: as in `inplace.kernels.linear.linear`.
    """
    splits, block = MAX_SPLITS if rows < MANY_ROWS else MIN_SPLITS, 4 * LANES
    split_size = triton.cdiv(triton.cdiv(count, splits), block) * block
    options = {"num_warps": WARPS, "maxnreg": REGISTERS, "enable_fp_fusion": False}
    launch = {"PDL": pdl, **options, **({"launch_pdl": True} if pdl else {})}
    memory = (scores, temperature, top_k, top_p, seeds, positions, out, workspace, locks)
    sample_kernel[(rows, splits)](
        *memory, count, split_size, SPLITS=splits, SCAN_BLOCK=SCAN_BLOCK, **launch
    )
