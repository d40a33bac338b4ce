"""Triton-language kernels that choose tokens; `inplace.kernels.sample` launches them.

Several programs share a row. The last one to finish combines their results. A greedy row does what
`argmax` does and no more. A sampled row adds noise to its scores on the way. Only where top-k,
top-p or min-p drop tokens does the last program read the row again: it takes the candidate with the
largest noisy score, and counts and weighs the tokens above it. If the candidate is dropped, it
continues with the best candidate above it: dropped candidates are below the threshold, so no token
that is kept is passed over. FlashInfer's sorting-free samplers work this way; here the answer does
not depend on the path to it. Where top-p is a share of what top-k keeps, the threshold of top-k is
narrowed down by bisection, only as far as a decision needs it.

With options, a row may have adjusted scores and log-probabilities. The programs of such a row first
write its adjusted scores to scratch memory and go on with these. Each also finds the largest scores
of its part, which the last one merges. Rows that use no option do neither.

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
    MAX_LOGPROBS,
    MIN_EXPONENT,
    MIN_TEMPERATURE,
    TWO_THIRDS_BITS,
    WEIGHT_BITS,
)
from inplace.schema.specs import MASK_BITS

CANDIDATES = 32
"""Room for the largest scores of a split; a power of two from `MAX_LOGPROBS` on."""


_BLOCK = tl.constexpr(4 * LANES)


_MAX_LOGPROBS, _CANDIDATES = tl.constexpr(MAX_LOGPROBS), tl.constexpr(CANDIDATES)


_LANES = tl.constexpr(LANES)


_MIN_TEMPERATURE = tl.constexpr(MIN_TEMPERATURE)


_LN2, _LOG2E = tl.constexpr(LN2), tl.constexpr(LOG2E)


_TWO_THIRDS_BITS = tl.constexpr(TWO_THIRDS_BITS)


_A3, _A5, _A7, _A9 = (tl.constexpr(value) for value in ATANH_SERIES)


_E1, _E2, _E3, _E4, _E5, _E6 = (tl.constexpr(value) for value in EXP2_SERIES)


_WEIGHT_BITS, _MIN_EXPONENT = tl.constexpr(WEIGHT_BITS), tl.constexpr(MIN_EXPONENT)


_NEGLIGIBLE = tl.constexpr(28.0)
"""e^-28 is less than a unit of weight."""


_MASK_BITS = tl.constexpr(MASK_BITS)


_MASS_UNIT = tl.constexpr(2.0**-WEIGHT_BITS)


_FLOAT_MAX = tl.constexpr(3.4028234663852886e38)


_NO_INDEX = tl.constexpr(2147483647)


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
        best, best_index = _keep_larger(best, best_index, value, column)
    split_max, split_index = _first_max(best, best_index)
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
        _, chosen = _first_max(all_maxima, all_indices)
        tl.store(out + row, chosen.to(tl.int64))


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
def _keep_noisiest(best, index, v0, v1, v2, v3, c0, counter, seed, position, temperature):
    """Keep the larger noisy scores, of four tokens with one counter in each lane."""
    zeros = tl.zeros_like(index)
    b0, b1, b2, b3 = tl.philox(seed, counter, zeros, zeros + position, zeros)
    best, index = _keep_larger(best, index, _noisy_score(v0, b0, temperature), c0)
    best, index = _keep_larger(best, index, _noisy_score(v1, b1, temperature), c0 + _LANES)
    best, index = _keep_larger(best, index, _noisy_score(v2, b2, temperature), c0 + 2 * _LANES)
    best, index = _keep_larger(best, index, _noisy_score(v3, b3, temperature), c0 + 3 * _LANES)
    return best, index


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
                best, index = _keep_noisiest(
                    best, index,
                    tl.where(v0 > pivot, v0, float("-inf")),
                    tl.where(v1 > pivot, v1, float("-inf")),
                    tl.where(v2 > pivot, v2, float("-inf")),
                    tl.where(v3 > pivot, v3, float("-inf")),
                    c0, start // 4 + lane, seed, position, temperature,
                )  # fmt: skip
    _, chosen = _first_max(best, index)
    return tl.sum(number, 0), tl.sum(mass, 0), chosen


@triton.jit
def _best_kept(
    row_scores, count, chosen, top, temperature, k, p, min_log, seed, position,
    SCAN_BLOCK: tl.constexpr,
):  # fmt: skip
    """The best candidate that top-k, top-p and min-p keep, from the best of all.

    ``min_log`` is the logarithm of min-p: how much less than ``top`` a score may be, divided by the
    temperature.

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
    candidate_score = tl.load(row_scores + candidate)
    pivot = candidate_score
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
        unlikely = number_above < 0
        if min_log > float("-inf"):
            unlikely = tl.div_rn(candidate_score - top, temperature) < min_log
        if (number_above == 0) | (kept & (unlikely == 0)):
            done = True
        elif dropped | unlikely:
            candidate = next_candidate
            candidate_score = tl.load(row_scores + candidate)
            pivot = candidate_score
            scanned = False
        else:
            pivot = middle
    return candidate


@triton.jit
def _allowed(token_mask, token, present):
    """Whether the bits of tokens are set in a mask."""
    word = tl.load(token_mask + token // _MASK_BITS, mask=present, other=0)
    return (word >> (token % _MASK_BITS)) & 1 != 0


@triton.jit
def _adjust(
    row_scores, adjusted, begin, end, number, tokens, adjustments, token_mask,
    MAX_ADJUSTED: tl.constexpr,
):  # fmt: skip
    """Write the adjusted scores of a split; with a negative number those of the mask."""
    lane = tl.arange(0, _BLOCK)
    for start in range(begin, end, _BLOCK):
        column = start + lane
        value = tl.load(row_scores + column, mask=column < end)
        if number < 0:
            value = tl.where(_allowed(token_mask, column, column < end), value, float("-inf"))
        tl.store(adjusted + column, value, mask=column < end)
    tl.debug_barrier()
    count = tl.minimum(tl.where(number < 0, -1 - number, number), MAX_ADJUSTED)
    for start in range(0, count, _BLOCK):
        entry = start + lane
        token = tl.load(tokens + entry, mask=entry < count, other=-1)
        mine = (token >= begin) & (token < end)
        bias = tl.load(adjustments + entry, mask=mine, other=0.0)
        penalty = tl.load(adjustments + MAX_ADJUSTED + entry, mask=mine, other=1.0)
        subtrahend = tl.load(adjustments + 2 * MAX_ADJUSTED + entry, mask=mine, other=0.0)
        value = tl.load(row_scores + token, mask=mine, other=0.0) + bias
        value = tl.where(value > 0.0, tl.div_rn(value, penalty), value * penalty) - subtrahend
        if number < 0:
            value = tl.where(_allowed(token_mask, token, mine), value, float("-inf"))
        tl.store(adjusted + token, value, mask=mine)
    tl.debug_barrier()


@triton.jit
def _next_largest(value, index, last, last_index):
    """Where the value is not behind ``last`` in descending order: the first is next."""
    behind = (value < last) | ((value == last) & (index > last_index))
    return tl.where(behind, value, float("-inf"))


@triton.jit
def _store_largest(row_scores, begin, end, number, candidates):
    """Store the largest scores of a split in order, and their tokens."""
    lane = tl.arange(0, _BLOCK)
    last = tl.full((), float("inf"), tl.float32)
    last_index = tl.full((), -1, tl.int32)
    for rank in range(0, number):
        best = tl.full((_BLOCK,), float("-inf"), tl.float32)
        index = tl.full((_BLOCK,), _NO_INDEX, tl.int32)
        for start in range(begin, end, _BLOCK):
            column = start + lane
            value = tl.load(row_scores + column, mask=column < end, other=float("-inf"))
            best, index = _keep_larger(
                best, index, _next_largest(value, column, last, last_index), column
            )
        last, last_index = _first_max(best, index)
        tl.store(candidates + rank, last)
        tl.store(candidates + _CANDIDATES + rank, last_index.to(tl.float32, bitcast=True))


@triton.jit
def _store_logprobs(
    row_scores, count, chosen, number, candidates, token_logprob, top_logprobs, top_tokens,
    SPLITS: tl.constexpr, SCAN_BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the log-probability of the chosen token, and of the most likely ones in order."""
    lane = tl.arange(0, SPLITS * _CANDIDATES)
    rank_of, split = lane % _CANDIDATES, lane // _CANDIDATES
    present = rank_of < tl.maximum(number - 1, 1)
    place = candidates + split * 2 * _CANDIDATES + rank_of
    value = tl.load(place, mask=present, other=float("-inf"), volatile=True)
    index = tl.load(place + _CANDIDATES, mask=present, other=0.0, volatile=True)
    index = index.to(tl.int32, bitcast=True)
    top = tl.max(value, 0)
    _, mass, _ = _scan_above(
        row_scores, count, float("-inf"), top, tl.full((), 1.0, tl.float32), 0, 0, False, SCAN_BLOCK
    )
    exponent, fraction = _split_exponent(mass.to(tl.float32) * _MASS_UNIT)
    log_mass = _log(exponent, fraction - 1.0, fraction)
    tl.store(token_logprob, tl.load(row_scores + chosen) - top - log_mass)
    last = tl.full((), float("inf"), tl.float32)
    last_index = tl.full((), -1, tl.int32)
    for rank in range(0, number - 1):
        last, last_index = _first_max(_next_largest(value, index, last, last_index), index)
        tl.store(top_logprobs + rank, last - top - log_mass)
        token = tl.where(last > float("-inf"), last_index, -1)
        tl.store(top_tokens + rank, token.to(tl.int64))


@triton.jit
def sample_kernel(
    scores, temperature, top_k, top_p, seeds, positions, out, workspace, locks, count, split_size,
    min_p, num_logprobs, num_adjusted, adjusted_tokens, adjustments, token_mask,
    token_logprobs, top_logprobs, top_tokens, candidates, adjusted_scores,
    SPLITS: tl.constexpr, SCAN_BLOCK: tl.constexpr, MAX_ADJUSTED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (row, split of its scores).

    ``MAX_ADJUSTED`` is 0 without options; what belongs to them is not read then.
    """
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
    raw_scores = row_scores
    wanted = 0
    min_log = float("-inf")
    if MAX_ADJUSTED > 0:
        wanted = tl.load(num_logprobs + row)
        candidates += row * SPLITS * 2 * _CANDIDATES
        if wanted > 0:
            _store_largest(
                raw_scores, begin, end, tl.maximum(wanted - 1, 1),
                candidates + split * 2 * _CANDIDATES,
            )  # fmt: skip
        number = tl.load(num_adjusted + row)
        if number != 0:
            row_scores = adjusted_scores + row.to(tl.int64) * count
            _adjust(
                raw_scores, row_scores, begin, end, number,
                adjusted_tokens + row * MAX_ADJUSTED, adjustments + row * 3 * MAX_ADJUSTED,
                token_mask + row * tl.cdiv(count, _MASK_BITS), MAX_ADJUSTED,
            )  # fmt: skip
        row_min_p = tl.load(min_p + row)
        if row_min_p > 0.0:
            exponent, fraction = _split_exponent(row_min_p)
            min_log = _log(exponent, fraction - 1.0, fraction)
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
            best, best_index = _keep_noisiest(
                best, best_index, v0, v1, v2, v3, c0, start // 4 + lane, seed, position,
                row_temperature,
            )  # fmt: skip
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
            if (k < count) | (p < 1.0) | (min_log > float("-inf")):
                chosen = _best_kept(
                    row_scores, count, chosen, row_top, row_temperature, k, p, min_log, seed,
                    position, SCAN_BLOCK,
                )  # fmt: skip
        else:
            _, chosen = _first_max(
                all_top,
                tl.load(results + SPLITS + splits, volatile=True).to(tl.int32, bitcast=True),
            )
        tl.store(out + row, chosen.to(tl.int64))
        if MAX_ADJUSTED > 0:  # noqa: SIM102  what it excludes is not compiled
            if wanted > 0:
                _store_logprobs(
                    raw_scores, count, chosen, wanted, candidates, token_logprobs + row,
                    top_logprobs + row * _MAX_LOGPROBS, top_tokens + row * _MAX_LOGPROBS,
                    SPLITS, SCAN_BLOCK,
                )  # fmt: skip
