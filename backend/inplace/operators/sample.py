"""``inplace::sample``: each row's next token, the most likely or a random one.

Random choice is a Gumbel-max: the token with the largest ``score / temperature + noise``, the noise standard Gumbel numbers made from
uniform ones, one for each token of the vocabulary (Gumbel, 1954; https://arxiv.org/abs/1611.01144). It needs no cumulative sums, so
the row can be split over programs in any way.

Uniform numbers are counter-based: Philox 4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC 2011) with the seed as key and the position and the token as counter. No generator has a state, so a token depends on its sequence's
scores, parameters and position, never on the row, the batch, or how the prompt was cut.

CPU and GPU agree bit for bit, not only nearly: logarithm and exponential are written out in additions, multiplications and divisions
that both round alike, and probabilities are summed as whole numbers, whose sum has no order.
"""

import torch
from torch import Tensor

from inplace.kernels.gumbel import COLDEST, gumbels, kept, uniforms
from inplace.operators.library import LIBRARY, define

define(
    "sample",
    "(Tensor scores, Tensor temperature, Tensor top_k, Tensor top_p, Tensor seeds, Tensor positions) -> Tensor",
)


@torch.library.impl(LIBRARY, "sample", "CompositeExplicitAutograd")
def _sample(
    scores: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    out = scores.argmax(-1, keepdim=True)
    for row in (temperature > 0).nonzero().flatten().tolist():
        heat = temperature[row].clamp(min=COLDEST)
        noise = gumbels(
            uniforms(int(seeds[row]), int(positions[row]), scores.shape[1], scores.device)
        )
        allowed = kept(scores[row], heat, int(top_k[row]), top_p[row])
        out[row] = (scores[row] / heat + noise).masked_fill(~allowed, float("-inf")).argmax()
    return out


@torch.library.impl(LIBRARY, "sample", "CUDA")
def _sample_on_gpu(
    scores: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """The same in a Triton-language kernel: nothing is read on the host."""
    from inplace.kernels import sample as kernels  # Triton exists on a GPU only

    rows, count = scores.shape
    out = torch.empty((rows, 1), dtype=torch.int64, device=scores.device)
    kernels.sample(
        scores=scores.contiguous(),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seeds=seeds,
        positions=positions,
        out=out,
        workspace=torch.empty(
            kernels.sample_workspace(rows) // 4, dtype=torch.float32, device=scores.device
        ),
        locks=torch.zeros(rows, dtype=torch.int32, device=scores.device),
        rows=rows,
        count=count,
    )
    return out


@torch.library.register_fake("inplace::sample", lib=LIBRARY)
def _sample_fake(
    scores: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    torch._check(
        scores.dim() == 2, lambda: f"scores must be [rows, vocabulary], got {tuple(scores.shape)}"
    )
    torch._check(
        scores.dtype == torch.float32, lambda: f"scores must be float32, got {scores.dtype}"
    )
    return scores.new_empty((scores.shape[0], 1), dtype=torch.int64)


def sample(
    scores: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """Each row's next token.

    A row with temperature 0 takes the largest score, the first of equals. Any other takes a random token, each with a probability
    proportional to ``exp(score / temperature)`` among those that are kept: a token is kept by ``top_k`` if fewer than ``top_k`` tokens
    have a larger score, and then by ``top_p`` if the tokens with a larger score have together less than ``top_p`` of the probability of
    what ``top_k`` kept. So tokens of one score are kept or dropped together, and the largest is always kept.

    Args:
        scores: float32 ``[rows, vocabulary]``.
        temperature: float32 ``[rows]``; above 0 and below `COLDEST` counts as `COLDEST`.
        top_k: int32 ``[rows]``; 0 keeps all.
        top_p: float32 ``[rows]``; 1 keeps all.
        seeds: int64 ``[rows]``.
        positions: int32 ``[rows]``: position of the token that is chosen, in its sequence.

    Returns:
        int64 ``[rows, 1]``; the same on a CPU and on a GPU.
    """
    out = torch.ops.inplace.sample(scores, temperature, top_k, top_p, seeds, positions)
    assert isinstance(out, Tensor)
    return out
