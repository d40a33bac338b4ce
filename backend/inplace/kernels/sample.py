"""Each row's next token, the most likely or a random one: see `inplace.operators.sample`, whose arithmetic this repeats bit for bit.

Parts of a row in parallel, joined by whichever program finishes last, as in `inplace.kernels.argmax`. A greedy row does what argmax
does and no more. A sampled row adds noise to its scores on the way. Only where top-k or top-p drop tokens does the last program read
the row again: it takes the candidate with the largest noisy score, counts and weighs the tokens above it, and where it was dropped goes
on to the best candidate above it (dropped candidates are below the threshold, so nothing that is kept is passed over). That is the way
of FlashInfer's sorting-free samplers, but with one answer, whichever way it is found. A threshold is narrowed down, and only as far as a
decision needs it, where top-p is a share of what top-k keeps.

Compiled without contraction of multiplications and additions, which would round once where a CPU rounds twice.
"""

import triton
import triton.language as tl

from inplace.kernels.gumbel import ATANH, COLDEST, EXP2, LN2, LOG2E, LOWEST, PLANE, TWO_THIRDS, UNIT
from inplace.kernels.memory import Memory

MOST_PARTS = 32
"""Programs a row; where there are many rows there are enough programs with `FEW_PARTS`."""


FEW_PARTS, MANY_ROWS = 8, 9


SPAN = 4096
"""Scores the last program reads at a time."""


WARPS, REGISTERS = 8, 128
"""So that two programs fit an SM (nothing is spilled): most of them end before the part that needs the registers."""


_BLOCK = tl.constexpr(4 * PLANE)


_PLANE = tl.constexpr(PLANE)


_COLDEST = tl.constexpr(COLDEST)


_LN2, _LOG2E = tl.constexpr(LN2), tl.constexpr(LOG2E)


_TWO_THIRDS = tl.constexpr(TWO_THIRDS)


_A3, _A5, _A7, _A9 = (tl.constexpr(value) for value in ATANH)


_E1, _E2, _E3, _E4, _E5, _E6 = (tl.constexpr(value) for value in EXP2)


_UNIT, _LOWEST = tl.constexpr(UNIT), tl.constexpr(LOWEST)


_NOTHING = tl.constexpr(28.0)
"""e^-28 is less than a unit of weight."""


_FLOAT_MAX = tl.constexpr(3.4028234663852886e38)


_NOWHERE = tl.constexpr(2147483647)


@triton.jit
def _uniform(bits):
    return tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.9999999403953552)


@triton.jit
def _split(x):
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - _TWO_THIRDS) >> 23
    return exponent, (bits - (exponent << 23)).to(tl.float32, bitcast=True)


@triton.jit
def _logarithm(exponent, excess, fraction):
    ratio = tl.div_rn(excess, fraction + 1.0)
    square = ratio * ratio
    series = ((square * _A9 + _A7) * square + _A5) * square + _A3
    return exponent.to(tl.float32) * _LN2 + (2.0 * ratio) * (series * square + 1.0)


@triton.jit
def _gumbel(uniform):
    exponent, fraction = _split(1.0 - uniform)
    exponential = -_logarithm(exponent, tl.where(exponent == 0, -uniform, fraction - 1.0), fraction)
    exponent, fraction = _split(exponential)
    return -_logarithm(exponent, fraction - 1.0, fraction)


@triton.jit
def _weight(x):
    scaled = tl.maximum(x, _LOWEST) * _LOG2E
    whole = tl.floor(scaled + 0.5)
    part = scaled - whole
    series = ((((_E6 * part + _E5) * part + _E4) * part + _E3) * part + _E2) * part + _E1
    mantissa = ((series * part + 1.0) * 8388608.0).to(tl.int64)
    return (mantissa << (_UNIT - 23)) >> (-whole).to(tl.int64)


@triton.jit
def _key(value, bits, heat):
    """Score with noise; the token with the largest is chosen."""
    return tl.div_rn(value, tl.zeros_like(value) + heat) + _gumbel(_uniform(bits))


@triton.jit
def _better(best, where, value, column):
    better = value > best
    return tl.where(better, value, best), tl.where(better, column, where)


@triton.jit
def _best(best, where):
    """The largest of all lanes, the first of equals."""
    top = tl.max(best, 0)
    return top, tl.min(tl.where(best == top, where, _NOWHERE), 0)


@triton.jit
def _weighed(number, mass, value, pivot, top, heat):
    above = value > pivot
    weight = _weight(tl.div_rn(tl.where(above, value, top) - top, tl.zeros_like(value) + heat))
    return number + above.to(tl.int32), mass + tl.where(above, weight, 0)


@triton.jit
def _above(line, count, pivot, top, heat, seed, position, choose, SPAN: tl.constexpr):
    """Number and weight of the scores above the pivot, and with ``choose`` the best candidate among them."""
    QUARTER: tl.constexpr = SPAN // 4
    lane = tl.arange(0, QUARTER)
    place = lane // _PLANE * _BLOCK + lane % _PLANE
    number = tl.zeros((QUARTER,), tl.int32)
    mass = tl.zeros((QUARTER,), tl.int64)
    best = tl.full((QUARTER,), float("-inf"), tl.float32)
    where = tl.full((QUARTER,), _NOWHERE, tl.int32)
    for start in range(0, count, SPAN):
        c0 = start + place
        c1, c2, c3 = c0 + _PLANE, c0 + 2 * _PLANE, c0 + 3 * _PLANE
        v0 = tl.load(line + c0, mask=c0 < count, other=float("-inf"))
        v1 = tl.load(line + c1, mask=c1 < count, other=float("-inf"))
        v2 = tl.load(line + c2, mask=c2 < count, other=float("-inf"))
        v3 = tl.load(line + c3, mask=c3 < count, other=float("-inf"))
        if tl.max(tl.maximum(tl.maximum(v0, v1), tl.maximum(v2, v3)), 0) > pivot:
            number, mass = _weighed(number, mass, v0, pivot, top, heat)
            number, mass = _weighed(number, mass, v1, pivot, top, heat)
            number, mass = _weighed(number, mass, v2, pivot, top, heat)
            number, mass = _weighed(number, mass, v3, pivot, top, heat)
            if choose:
                nothing = tl.zeros((QUARTER,), tl.int32)
                b0, b1, b2, b3 = tl.philox(
                    seed, start // 4 + lane, nothing, nothing + position, nothing
                )
                best, where = _better(
                    best, where, tl.where(v0 > pivot, _key(v0, b0, heat), float("-inf")), c0
                )
                best, where = _better(
                    best, where, tl.where(v1 > pivot, _key(v1, b1, heat), float("-inf")), c1
                )
                best, where = _better(
                    best, where, tl.where(v2 > pivot, _key(v2, b2, heat), float("-inf")), c2
                )
                best, where = _better(
                    best, where, tl.where(v3 > pivot, _key(v3, b3, heat), float("-inf")), c3
                )
    _, chosen = _best(best, where)
    return tl.sum(number, 0), tl.sum(mass, 0), chosen


@triton.jit
def _filtered(line, count, chosen, top, heat, k, p, seed, position, SPAN: tl.constexpr):
    """The best candidate that top-k and top-p keep, from the best of all.

    ``least`` and ``most`` enclose the weight of what top-k keeps, which top-p is a share of: they are the weights above ``upper``,
    which at most k scores exceed, and above ``lower``, which more than k do. Halving that interval, where a decision needs it, ends with
    neighbours among the floats, between which nothing lies.
    """
    lower = tl.maximum(top - _NOTHING * heat, -_FLOAT_MAX)
    upper = top
    least = tl.zeros((), tl.int64)
    most = tl.zeros((), tl.int64)
    share = p.to(tl.float64)
    if p < 1.0:
        number, most, _ = _above(line, count, lower, top, heat, seed, position, False, SPAN)
        if number <= k:  # what is not above lower weighs nothing
            least = most
    else:
        share += float("inf")
        least += 1
        most += 1
    candidate = chosen
    pivot = tl.load(line + candidate)
    above = 0
    weight = tl.zeros((), tl.int64)
    following = chosen
    known = False
    done = False
    while not done:
        number, mass, better = _above(
            line, count, pivot, top, heat, seed, position, not known, SPAN
        )
        if not known:
            above, weight, following = number, mass, better
            known = True
        if p < 1.0:
            if number <= k:
                upper = tl.minimum(upper, pivot)
                least = tl.maximum(least, mass)
                if number == k:
                    most = mass
            else:
                lower = tl.maximum(lower, pivot)
                most = tl.minimum(most, mass)
        middle = lower * 0.5 + upper * 0.5
        if (middle <= lower) | (middle >= upper):
            least = most
        sure = (above < k) & (weight.to(tl.float64) < least.to(tl.float64) * share)
        wrong = (above >= k) | (weight.to(tl.float64) >= most.to(tl.float64) * share)
        if (above == 0) | sure:
            done = True
        elif wrong:
            candidate = following
            pivot = tl.load(line + candidate)
            known = False
        else:
            pivot = middle
    return candidate


@triton.jit
def _sample(
    scores, temperature, top_k, top_p, seeds, positions, out, workspace, locks, count, part,
    PARTS: tl.constexpr, SPAN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, mine = tl.program_id(0), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    line = scores + row.to(tl.int64) * count
    heat = tl.load(temperature + row)
    random = heat > 0.0
    heat = tl.maximum(heat, _COLDEST)
    seed, position = tl.load(seeds + row), tl.load(positions + row)
    lane = tl.arange(0, _PLANE)
    top = tl.full((_PLANE,), float("-inf"), tl.float32)
    place = tl.zeros((_PLANE,), tl.int32)
    best = tl.full((_PLANE,), float("-inf"), tl.float32)
    where = tl.zeros((_PLANE,), tl.int32)
    first = mine * part
    last = tl.minimum(first + part, count)
    for start in range(first, last, _BLOCK):
        c0 = start + lane
        c1, c2, c3 = c0 + _PLANE, c0 + 2 * _PLANE, c0 + 3 * _PLANE
        v0 = tl.load(line + c0, mask=c0 < last, other=float("-inf"))
        v1 = tl.load(line + c1, mask=c1 < last, other=float("-inf"))
        v2 = tl.load(line + c2, mask=c2 < last, other=float("-inf"))
        v3 = tl.load(line + c3, mask=c3 < last, other=float("-inf"))
        top, place = _better(top, place, v0, c0)
        top, place = _better(top, place, v1, c1)
        top, place = _better(top, place, v2, c2)
        top, place = _better(top, place, v3, c3)
        if random:
            nothing = tl.zeros((_PLANE,), tl.int32)
            b0, b1, b2, b3 = tl.philox(
                seed, start // 4 + lane, nothing, nothing + position, nothing
            )
            best, where = _better(best, where, _key(v0, b0, heat), c0)
            best, where = _better(best, where, _key(v1, b1, heat), c1)
            best, where = _better(best, where, _key(v2, b2, heat), c2)
            best, where = _better(best, where, _key(v3, b3, heat), c3)
    tops = workspace + row * 4 * PARTS
    value, index = _best(top, place)
    tl.store(tops + mine, value)
    tl.store(tops + PARTS + mine, index.to(tl.float32, bitcast=True))
    if random:
        value, index = _best(best, where)
        tl.store(tops + 2 * PARTS + mine, value)
        tl.store(tops + 3 * PARTS + mine, index.to(tl.float32, bitcast=True))
    tl.debug_barrier()
    arrived = tl.atomic_add(locks + row, 1, sem="acq_rel")
    if arrived == PARTS - 1:
        tl.store(locks + row, 0)
        parts = tl.arange(0, PARTS)
        joined = tl.load(tops + parts, volatile=True)
        highest = tl.max(joined, 0)
        if random:
            keys = tl.load(tops + 2 * PARTS + parts, volatile=True)
            _, chosen = _best(
                keys, tl.load(tops + 3 * PARTS + parts, volatile=True).to(tl.int32, bitcast=True)
            )
            k, p = tl.load(top_k + row), tl.load(top_p + row)
            if (k <= 0) | (k > count):
                k = count
            if (k < count) | (p < 1.0):
                chosen = _filtered(line, count, chosen, highest, heat, k, p, seed, position, SPAN)
        else:
            _, chosen = _best(
                joined, tl.load(tops + PARTS + parts, volatile=True).to(tl.int32, bitcast=True)
            )
        tl.store(out + row, chosen.to(tl.int64))


def sample_workspace(rows: int) -> int:
    """Bytes of scratch memory for this many rows."""
    return rows * MOST_PARTS * 16


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
    """Launch on the current stream.

    Args:
        scores: float32 ``[rows, count]``.
        temperature, top_k, top_p, seeds, positions: ``[rows]``, float32, int32, float32, int64 and int32.
        out: int64 ``[rows, 1]``.
        workspace: `sample_workspace` bytes, as float32.
        locks: int32 ``[rows]``, zero before the first launch and after every one.
        rows, count: extents.
        pdl: as in ``linear``.
    """
    parts, block = MOST_PARTS if rows < MANY_ROWS else FEW_PARTS, 4 * PLANE
    part = triton.cdiv(triton.cdiv(count, parts), block) * block
    options = {"num_warps": WARPS, "maxnreg": REGISTERS, "enable_fp_fusion": False}
    launch = {"PDL": pdl, **options, **({"launch_pdl": True} if pdl else {})}
    memory = (scores, temperature, top_k, top_p, seeds, positions, out, workspace, locks)
    _sample[(rows, parts)](*memory, count, part, PARTS=parts, SPAN=SPAN, **launch)
