"""``inplace::sample`` and ``inplace::argmax``: each row's next token.

A random token is chosen by Gumbel-max: the one with the largest ``score / temperature + noise``,
with a standard Gumbel number for each token of the vocabulary (Gumbel, 1954; arXiv:1611.01144).
That needs no cumulative sums, so a row can be split over programs in any way.

The random numbers are counter-based: Philox 4x32-10, with the seed as key and the position and the
token as counter. No generator has a state, so a token depends only on the scores, the parameters
and the position of its sequence: not on the row, the batch, or the chunks of the prompt.

CPU and GPU agree bit for bit. Logarithm and exponential are series of additions, multiplications
and divisions, which both round alike, and probabilities are summed as integers, so the order of the
sum does not matter (`inplace.kernels.gumbel`).
"""

import torch
from torch import Tensor

from inplace.kernels.gumbel import MIN_TEMPERATURE, gumbel_noise, top_k_top_p_mask, uniforms
from inplace.operators.library import LIBRARY, define

define(
    "sample",
    "(Tensor scores, Tensor temperature, Tensor top_k, Tensor top_p, Tensor seeds, "
    "Tensor positions) -> Tensor",
)


define("argmax", "(Tensor scores) -> Tensor")


@torch.library.impl(LIBRARY, "argmax", "CompositeExplicitAutograd")
def _argmax(scores: Tensor) -> Tensor:
    return scores.argmax(-1, keepdim=True)


@torch.library.register_fake("inplace::argmax", lib=LIBRARY)
def _argmax_fake(scores: Tensor) -> Tensor:
    return scores.new_empty((scores.shape[0], 1), dtype=torch.int64)


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
        row_temperature = temperature[row].clamp(min=MIN_TEMPERATURE)
        noise = gumbel_noise(
            uniforms(int(seeds[row]), int(positions[row]), scores.shape[1], scores.device)
        )
        kept = top_k_top_p_mask(scores[row], row_temperature, int(top_k[row]), top_p[row])
        noisy = scores[row] / row_temperature + noise
        out[row] = noisy.masked_fill(~kept, float("-inf")).argmax()
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
    """`sample` in a Triton-language kernel, without a synchronisation with the host."""
    from inplace.kernels import sample as kernels  # imports Triton

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

    A row with temperature 0 takes the token with the largest score, the first of equals. Any other
    row takes a random token, with a probability proportional to ``exp(score / temperature)`` among
    the tokens that are kept. ``top_k`` keeps a token if fewer than ``top_k`` tokens have a larger
    score. Of those, ``top_p`` keeps a token if the tokens with a larger score have together less
    than ``top_p`` of the probability. Tokens with equal scores are kept or dropped together, and
    the largest is always kept.

    Args:
        scores: float32 ``[rows, vocabulary]``.
        temperature: float32 ``[rows]``; values above 0 and below
            `inplace.kernels.gumbel.MIN_TEMPERATURE` count as that.
        top_k: int32 ``[rows]``; 0 keeps all.
        top_p: float32 ``[rows]``; 1 keeps all.
        seeds: int64 ``[rows]``.
        positions: int32 ``[rows]``: position of the chosen token in its sequence.

    Returns:
        int64 ``[rows, 1]``; the same on a CPU and on a GPU.
    """
    out = torch.ops.inplace.sample(scores, temperature, top_k, top_p, seeds, positions)
    assert isinstance(out, Tensor)
    return out


def argmax(scores: Tensor) -> Tensor:
    """The index of each row's largest score, the first of equals.

    ``[rows, n]`` to int64 ``[rows, 1]``.
    """
    out = torch.ops.inplace.argmax(scores)
    assert isinstance(out, Tensor)
    return out
