"""Random numbers and Gumbel noise of sampling: constants, Philox and what both the operator and the kernel compute with them."""

from collections.abc import Sequence

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)


WEYL = (0x9E3779B9, 0xBB67AE85)
"""Philox's constants: of a round, and what a round adds to the key."""


ROUNDS = 10


WORD = 0xFFFFFFFF


PLANE = 256
"""Tokens ``1024 b + 256 w + l`` have word w of the counter ``256 b + l``: neighbours share no counter, so a block loads in one piece."""


COLDEST = 1e-6
"""Smallest temperature above 0; a lower one counts as this one."""


LN2, LOG2E = 0.6931471805599453, 1.4426950408889634


TWO_THIRDS = 0x3F2AAAAB
"""Bits of the float 2/3."""


ATANH = (1 / 3, 1 / 5, 1 / 7, 1 / 9)


EXP2 = tuple(
    LN2**n / factorial for n, factorial in ((1, 1), (2, 2), (3, 6), (4, 24), (5, 120), (6, 720))
)
"""Coefficients of the series of ``atanh(r) / r - 1`` in r² and of ``2^x - 1`` in x."""


UNIT = 40
"""A weight of 1 is ``2^UNIT``: the sum of a million fits 63 bits, and what is smaller than one unit is nothing."""


LOWEST = -30.0
"""Exponents below give the weight 0."""


def philox(counter: Sequence[Tensor | int], seed: int) -> tuple[Tensor, ...]:
    """Philox 4x32-10: four words of 32 bits, as int64, from a counter of four words and a key of 64 bits."""
    words = [torch.as_tensor(word, dtype=torch.int64) for word in counter]
    low, high = seed & WORD, seed >> 32 & WORD
    for _ in range(ROUNDS):
        above, below = zip(
            *(_product(word, factor) for word, factor in zip(words[::2], MULTIPLIERS, strict=True)),
            strict=True,
        )
        words = [above[1] ^ words[1] ^ low, below[1], above[0] ^ words[3] ^ high, below[0]]
        low, high = low + WEYL[0] & WORD, high + WEYL[1] & WORD
    return tuple(words)


def _product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Upper and lower 32 bits of a product of two words, without leaving 63 bits."""
    below = word * (factor & 0xFFFF)
    above = word * (factor >> 16) + (below >> 16)
    return above >> 16, ((above & 0xFFFF) << 16) | (below & 0xFFFF)


def uniforms(seed: int, position: int, count: int, device: torch.device | None = None) -> Tensor:
    """The uniform numbers of a step, one for each token: float32 ``[count]``, above 0 and below 1, of a resolution of 2⁻³² near 0."""
    blocks = -(-count // (4 * PLANE))
    counter = torch.arange(blocks * PLANE, device=device)
    words = torch.stack(philox((counter, 0, position & WORD, 0), seed))
    bits = words.view(4, blocks, PLANE).transpose(0, 1).reshape(-1)[:count]
    return ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Exponent e and fraction q of a positive float, ``x = q 2^e``, q from 2/3 to 4/3."""
    bits = x.view(torch.int32)
    exponent = (bits - TWO_THIRDS) >> 23
    return exponent, (bits - (exponent << 23)).view(torch.float32)


def _logarithm(exponent: Tensor, excess: Tensor, fraction: Tensor) -> Tensor:
    """``exponent ln 2 + ln(fraction)`` by ``ln q = 2 atanh((q - 1) / (q + 1))``; the excess is q - 1."""
    ratio = excess / (fraction + 1.0)
    square = ratio * ratio
    series = ((square * ATANH[3] + ATANH[2]) * square + ATANH[1]) * square + ATANH[0]
    return exponent.float() * LN2 + (2.0 * ratio) * (series * square + 1.0)


def gumbels(uniform: Tensor) -> Tensor:
    """Standard Gumbel numbers ``-ln(-ln(1 - u))``; the largest ones, which decide, come from u near 0, where u is finest."""
    exponent, fraction = _split(1.0 - uniform)
    exponential = -_logarithm(
        exponent, torch.where(exponent == 0, -uniform, fraction - 1.0), fraction
    )
    exponent, fraction = _split(exponential)
    return -_logarithm(exponent, fraction - 1.0, fraction)


def weights(x: Tensor) -> Tensor:
    """``e^x`` in units of ``2^-UNIT``, int64, for x up to 0."""
    scaled = x.clamp(min=LOWEST) * LOG2E
    whole = (scaled + 0.5).floor()
    part = scaled - whole
    series = (
        (((EXP2[5] * part + EXP2[4]) * part + EXP2[3]) * part + EXP2[2]) * part + EXP2[1]
    ) * part + EXP2[0]
    mantissa = ((series * part + 1.0) * 2.0**23).long()
    return (mantissa << (UNIT - 23)) >> (-whole).long()


def kept(scores: Tensor, temperature: Tensor, top_k: int, top_p: Tensor) -> Tensor:
    """Which of a row's tokens may be chosen, as `sample` says; bool, of the scores' shape."""
    threshold = scores.new_full((), float("-inf"))
    if 0 < top_k < len(scores):
        threshold = scores.topk(top_k).values[-1]
    if top_p < 1:
        ordered = scores[scores >= threshold].sort(descending=True).values
        weight = weights((ordered - ordered[0]) / temperature)
        mass = weight.cumsum(0)
        enough = top_p.double() * mass[-1].double()
        threshold = ordered[max(1, int(((mass - weight).double() < enough).sum())) - 1]
    return scores >= threshold
