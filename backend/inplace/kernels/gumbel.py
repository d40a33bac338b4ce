"""The arithmetic of sampling: Philox numbers, Gumbel noise, probabilities, and what is kept.

Here in PyTorch, for the operator. `inplace.kernels.sample` repeats it in Triton language with these
constants, bit for bit: logarithm and exponential are series of additions, multiplications and
divisions, which a CPU and a GPU round alike.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)


PHILOX_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)


PHILOX_ROUNDS = 10


WORD_MASK = 0xFFFFFFFF


LANES = 256
"""Token ``1024 b + 256 w + l`` takes word w of the Philox counter ``256 b + l``.

Neighbouring tokens share no counter, so a block of scores is loaded in one piece.
"""


MIN_TEMPERATURE = 1e-6
"""Temperatures above 0 and below this count as this."""


LN2, LOG2E = 0.6931471805599453, 1.4426950408889634


TWO_THIRDS_BITS = 0x3F2AAAAB
"""Bits of the float 2/3."""


ATANH_SERIES = (1 / 3, 1 / 5, 1 / 7, 1 / 9)
"""Coefficients of ``atanh(r) / r - 1`` in r²."""


EXP2_SERIES = tuple(
    LN2**n / factorial for n, factorial in ((1, 1), (2, 2), (3, 6), (4, 24), (5, 120), (6, 720))
)
"""Coefficients of ``2^x - 1`` in x."""


WEIGHT_BITS = 40
"""A probability weight of 1 is the integer ``2^WEIGHT_BITS``: the sum of a million fits 63 bits."""


MIN_EXPONENT = -30.0
"""``e^x`` of a smaller x has the weight 0."""


MAX_LOGPROBS = 20
"""Most likely tokens that a row returns with their log-probabilities, beside the chosen one."""


def philox(counter: Sequence[Tensor | int], seed: int) -> tuple[Tensor, ...]:
    """Philox 4x32-10: four 32-bit words, as int64, from a counter of four words and a 64-bit key.

    Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    words = [torch.as_tensor(word, dtype=torch.int64) for word in counter]
    low, high = seed & WORD_MASK, seed >> 32 & WORD_MASK
    for _ in range(PHILOX_ROUNDS):
        upper, lower = zip(
            *(
                _product(word, factor)
                for word, factor in zip(words[::2], PHILOX_MULTIPLIERS, strict=True)
            ),
            strict=True,
        )
        words = [upper[1] ^ words[1] ^ low, lower[1], upper[0] ^ words[3] ^ high, lower[0]]
        low = low + PHILOX_KEY_INCREMENTS[0] & WORD_MASK
        high = high + PHILOX_KEY_INCREMENTS[1] & WORD_MASK
    return tuple(words)


def _product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Upper and lower 32 bits of a product of two words, computed within 63 bits."""
    lower = word * (factor & 0xFFFF)
    upper = word * (factor >> 16) + (lower >> 16)
    return upper >> 16, ((upper & 0xFFFF) << 16) | (lower & 0xFFFF)


def uniforms(seed: int, position: int, count: int, device: torch.device | None = None) -> Tensor:
    """The uniform numbers of a position, one for each token: float32 ``[count]``.

    They are above 0 and below 1; the resolution near 0 is 2⁻³².
    """
    blocks = -(-count // (4 * LANES))
    counter = torch.arange(blocks * LANES, device=device)
    words = torch.stack(philox((counter, 0, position & WORD_MASK, 0), seed))
    bits = words.view(4, blocks, LANES).transpose(0, 1).reshape(-1)[:count]
    return ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)


def _split_exponent(x: Tensor) -> tuple[Tensor, Tensor]:
    """Exponent e and fraction q of a positive float, ``x = q 2^e`` with q from 2/3 to 4/3."""
    bits = x.view(torch.int32)
    exponent = (bits - TWO_THIRDS_BITS) >> 23
    return exponent, (bits - (exponent << 23)).view(torch.float32)


def _log(exponent: Tensor, excess: Tensor, fraction: Tensor) -> Tensor:
    """``exponent ln 2 + ln(fraction)`` by ``ln q = 2 atanh((q - 1) / (q + 1))``.

    ``excess`` is q - 1.
    """
    ratio = excess / (fraction + 1.0)
    square = ratio * ratio
    a3, a5, a7, a9 = ATANH_SERIES
    series = ((square * a9 + a7) * square + a5) * square + a3
    return exponent.float() * LN2 + (2.0 * ratio) * (series * square + 1.0)


def gumbel_noise(uniform: Tensor) -> Tensor:
    """Standard Gumbel numbers ``-ln(-ln(1 - u))``.

    The largest, which decide, come from u near 0, where u has the finest resolution.
    """
    exponent, fraction = _split_exponent(1.0 - uniform)
    exponential = -_log(exponent, torch.where(exponent == 0, -uniform, fraction - 1.0), fraction)
    exponent, fraction = _split_exponent(exponential)
    return -_log(exponent, fraction - 1.0, fraction)


def exp_weights(x: Tensor) -> Tensor:
    """``e^x`` in units of ``2^-WEIGHT_BITS``, int64, for x up to 0."""
    scaled = x.clamp(min=MIN_EXPONENT) * LOG2E
    whole = (scaled + 0.5).floor()
    part = scaled - whole
    e1, e2, e3, e4, e5, e6 = EXP2_SERIES
    series = ((((e6 * part + e5) * part + e4) * part + e3) * part + e2) * part + e1
    mantissa = ((series * part + 1.0) * 2.0**23).long()
    return (mantissa << (WEIGHT_BITS - 23)) >> (-whole).long()


def log(x: Tensor) -> Tensor:
    """``ln x`` of positive floats."""
    exponent, fraction = _split_exponent(x)
    return _log(exponent, fraction - 1.0, fraction)


def log_mass(scores: Tensor, top: Tensor) -> Tensor:
    """``ln Σ exp(score - top)`` over the last axis, by weights whose sum has no order.

    Args:
        scores: float32 ``[rows, count]``.
        top: their largest, ``[rows, 1]``.

    Returns:
        float32 ``[rows, 1]``.
    """
    mass = exp_weights(scores - top).sum(-1, keepdim=True)
    return log(mass.float() * 2.0**-WEIGHT_BITS)


def min_p_mask(scores: Tensor, temperature: Tensor, min_p: Tensor) -> Tensor:
    """Which of a row's tokens have at least this part of the largest probability.

    Args:
        scores: float32 ``[count]``.
        temperature: float32 scalar.
        min_p: float32 scalar; 0 keeps all.

    Returns:
        bool ``[count]``.
    """
    if not min_p > 0:
        return torch.ones_like(scores, dtype=torch.bool)
    return ~((scores - scores.max()) / temperature < log(min_p))


def top_k_top_p_mask(scores: Tensor, temperature: Tensor, top_k: int, top_p: Tensor) -> Tensor:
    """Which of a row's tokens may be chosen, see `inplace.operators.sample`.

    Args:
        scores: float32 ``[count]``.
        temperature, top_p: float32 scalars.
        top_k: how many tokens to keep; 0 keeps all.

    Returns:
        bool ``[count]``.
    """
    threshold = scores.new_full((), float("-inf"))
    if 0 < top_k < len(scores):
        threshold = scores.topk(top_k).values[-1]
    if top_p < 1:
        ordered = scores[scores >= threshold].sort(descending=True).values
        weight = exp_weights((ordered - ordered[0]) / temperature)
        mass = weight.cumsum(0)
        share = top_p.double() * mass[-1].double()
        threshold = ordered[max(1, int(((mass - weight).double() < share).sum())) - 1]
    return scores >= threshold
