"""``inplace::sample`` and ``inplace::argmax``: each row's next token.

A random token is chosen by Gumbel-max: the one with the largest ``score / temperature + noise``,
with a standard Gumbel number for each token of the vocabulary (Gumbel, 1954; arXiv:1611.01144).
That needs no cumulative sums, so a row can be split over programs in any way.

The random numbers are counter-based: Philox 4x32-10, with the seed as key and the position and the
token as counter. No generator has a state, so a token depends only on the scores, the parameters
and the position of its sequence: not on the row, the batch, or the chunks of the prompt.

``inplace::sample.options`` takes more for each row, and returns log-probabilities. It is one
operator, so that a step has one kernel for all of it; a row pays for the options that it uses:

- *Adjusted scores.* The score s of a listed token becomes s + bias; that is divided by a penalty
  where it is positive and multiplied by it elsewhere; then a number is subtracted. Logit bias,
  banned tokens (a bias of -inf) and the penalties of `inplace.runtime.sampling` are such
  adjustments.
- *A mask* has a bit for each token of the vocabulary; without it the score becomes -inf.
- *Min-p* keeps a token whose probability is at least this part of the largest one.
- *Log-probabilities* are those of the scores as the model gives them, before anything else.

CPU and GPU agree bit for bit. Logarithm and exponential are series of additions, multiplications
and divisions, which both round alike, and probabilities are summed as integers, so the order of the
sum does not matter (`inplace.kernels.gumbel`).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from inplace.kernels.gumbel import (
    MAX_LOGPROBS,
    MIN_TEMPERATURE,
    gumbel_noise,
    log_mass,
    min_p_mask,
    top_k_top_p_mask,
    uniforms,
)
from inplace.operators.library import LIBRARY, define
from inplace.schema.specs import MASK_BITS

_PARAMETERS = "Tensor temperature, Tensor top_k, Tensor top_p, Tensor seeds, Tensor positions"


_OPTIONS = (
    "Tensor min_p, Tensor num_logprobs, Tensor num_adjusted, Tensor adjusted_tokens, "
    "Tensor adjustments, Tensor token_mask"
)


define("sample", f"(Tensor scores, {_PARAMETERS}) -> Tensor")


define(
    "sample.options",
    f"(Tensor scores, {_PARAMETERS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)


define("argmax", "(Tensor scores) -> Tensor")


class _Parameters(NamedTuple):
    """The arguments of `sample` after the scores."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    seeds: Tensor
    positions: Tensor


class _Options(NamedTuple):
    """The further arguments of `sample_with_options`."""

    min_p: Tensor
    num_logprobs: Tensor
    num_adjusted: Tensor
    adjusted_tokens: Tensor
    adjustments: Tensor
    token_mask: Tensor


def _split(arguments: tuple[Tensor, ...]) -> tuple[_Parameters, _Options]:
    """The arguments of `sample_with_options` after the scores."""
    count = len(_Parameters._fields)
    return _Parameters(*arguments[:count]), _Options(*arguments[count:])


class SampledTokens(NamedTuple):
    """What `sample_with_options` returns.

    Attributes:
        tokens: int64 ``[rows, 1]``.
        token_logprobs: float32 ``[rows, 1]``, their log-probabilities.
        top_logprobs, top_tokens: float32 and int64 ``[rows, MAX_LOGPROBS]``: the most likely tokens
            in order, the first of equals first; -inf and -1 where no token is left.
    """

    tokens: Tensor
    token_logprobs: Tensor
    top_logprobs: Tensor
    top_tokens: Tensor


@torch.library.impl(LIBRARY, "argmax", "CompositeExplicitAutograd")
def _argmax(scores: Tensor) -> Tensor:
    return scores.argmax(-1, keepdim=True)


@torch.library.register_fake("inplace::argmax", lib=LIBRARY)
def _argmax_fake(scores: Tensor) -> Tensor:
    return scores.new_empty((scores.shape[0], 1), dtype=torch.int64)


@torch.library.impl(LIBRARY, "sample", "CompositeExplicitAutograd")
def _sample(scores: Tensor, *arguments: Tensor) -> Tensor:
    return _choose(scores, _Parameters(*arguments))


def _choose(scores: Tensor, parameters: _Parameters, min_p: Tensor | None = None) -> Tensor:
    """Each row's next token."""
    out = scores.argmax(-1, keepdim=True)
    temperature, top_k, top_p, seeds, positions = parameters
    for row in (temperature > 0).nonzero().flatten().tolist():
        row_temperature = temperature[row].clamp(min=MIN_TEMPERATURE)
        noise = gumbel_noise(
            uniforms(int(seeds[row]), int(positions[row]), scores.shape[1], scores.device)
        )
        kept = top_k_top_p_mask(scores[row], row_temperature, int(top_k[row]), top_p[row])
        if min_p is not None:
            kept &= min_p_mask(scores[row], row_temperature, min_p[row])
        noisy = scores[row] / row_temperature + noise
        out[row] = noisy.masked_fill(~kept, float("-inf")).argmax()
    return out


@torch.library.impl(LIBRARY, "sample.options", "CompositeExplicitAutograd")
def _sample_options(scores: Tensor, *arguments: Tensor) -> SampledTokens:
    parameters, options = _split(arguments)
    adjusted = scores
    if rows := options.num_adjusted.nonzero().flatten().tolist():
        adjusted = scores.clone()
        for row in rows:
            adjusted[row] = _adjusted_row(
                scores[row],
                int(options.num_adjusted[row]),
                options.adjusted_tokens[row],
                options.adjustments[row],
                options.token_mask[row],
            )
    tokens = _choose(adjusted, parameters, options.min_p)
    out = SampledTokens(
        tokens,
        scores.new_zeros(tokens.shape),
        scores.new_zeros((len(tokens), MAX_LOGPROBS)),
        tokens.new_zeros((len(tokens), MAX_LOGPROBS)),
    )
    for row in options.num_logprobs.nonzero().flatten().tolist():
        _put_logprobs(out, row, scores[row : row + 1], int(options.num_logprobs[row]) - 1)
    return out


def _adjusted_row(
    row: Tensor, number: int, tokens: Tensor, adjustments: Tensor, mask: Tensor
) -> Tensor:
    """The scores of a row with adjustments, and with the mask if the number is negative."""
    tokens = tokens[: number if number >= 0 else -1 - number].long()
    bias, penalty, subtrahend = adjustments[:, : len(tokens)]
    values = row[tokens] + bias
    values = torch.where(values > 0, values / penalty, values * penalty) - subtrahend
    out = row.scatter(0, tokens, values)
    if number >= 0:
        return out
    column = torch.arange(len(row), dtype=torch.int32, device=row.device)
    allowed = (mask[column // MASK_BITS] >> (column % MASK_BITS)) & 1
    return out.masked_fill_(allowed == 0, float("-inf"))


def _put_logprobs(out: SampledTokens, row: int, scores: Tensor, number: int) -> None:
    """Put the log-probabilities of a row: of its token and of the ``number`` most likely ones."""
    top, lowest = scores.max(-1, keepdim=True).values, float("-inf")
    log_sum = log_mass(scores, top)
    out.token_logprobs[row] = (scores[0, out.tokens[row]] - top - log_sum)[0]
    ordered, order = scores[0].sort(descending=True, stable=True)
    count = min(number, len(ordered))
    out.top_logprobs[row, :number], out.top_tokens[row, :number] = lowest, -1
    out.top_logprobs[row, :count] = (ordered[:count] - top - log_sum)[0]
    out.top_tokens[row, :count] = order[:count].masked_fill(ordered[:count] == lowest, -1)


@torch.library.impl(LIBRARY, "sample", "CUDA")
def _sample_on_gpu(scores: Tensor, *arguments: Tensor) -> Tensor:
    """`sample` in a Triton-language kernel, without a synchronisation with the host."""
    return _launch(scores, _Parameters(*arguments))


@torch.library.impl(LIBRARY, "sample.options", "CUDA")
def _sample_options_on_gpu(scores: Tensor, *arguments: Tensor) -> SampledTokens:
    from inplace.kernels import sample as kernels  # imports Triton

    parameters, given = _split(arguments)
    rows, count = scores.shape
    logprobs = scores.new_zeros((rows, 1))
    top_logprobs = scores.new_zeros((rows, MAX_LOGPROBS))
    top_tokens = scores.new_zeros((rows, MAX_LOGPROBS), dtype=torch.int64)
    options = kernels.SampleOptions(
        given.min_p,
        given.num_logprobs,
        given.num_adjusted,
        given.adjusted_tokens.contiguous(),
        given.adjustments.contiguous(),
        given.token_mask.contiguous(),
        given.adjusted_tokens.shape[1],
        logprobs,
        top_logprobs,
        top_tokens,
        scores.new_empty(kernels.candidates_workspace(rows) // 4),
        scores.new_empty(kernels.adjusted_workspace(rows, count) // 4),
    )
    return SampledTokens(_launch(scores, parameters, options), logprobs, top_logprobs, top_tokens)


def _launch(scores: Tensor, parameters: _Parameters, options: Any = None) -> Tensor:
    """Launch the kernel; the tokens."""
    from inplace.kernels import sample as kernels  # imports Triton

    rows, count = scores.shape
    out = torch.empty((rows, 1), dtype=torch.int64, device=scores.device)
    kernels.sample(
        scores=scores.contiguous(),
        **parameters._asdict(),
        out=out,
        workspace=torch.empty(
            kernels.sample_workspace(rows) // 4, dtype=torch.float32, device=scores.device
        ),
        locks=torch.zeros(rows, dtype=torch.int32, device=scores.device),
        rows=rows,
        count=count,
        options=options,
    )
    return out


def _check_scores(scores: Tensor) -> None:
    torch._check(
        scores.dim() == 2, lambda: f"scores must be [rows, vocabulary], got {tuple(scores.shape)}"
    )
    torch._check(
        scores.dtype == torch.float32, lambda: f"scores must be float32, got {scores.dtype}"
    )


@torch.library.register_fake("inplace::sample", lib=LIBRARY)
def _sample_fake(scores: Tensor, *arguments: Tensor) -> Tensor:
    _check_scores(scores)
    return scores.new_empty((scores.shape[0], 1), dtype=torch.int64)


@torch.library.register_fake("inplace::sample.options", lib=LIBRARY)
def _sample_options_fake(scores: Tensor, *arguments: Tensor) -> SampledTokens:
    _check_scores(scores)
    rows = scores.shape[0]
    return SampledTokens(
        scores.new_empty((rows, 1), dtype=torch.int64),
        scores.new_empty((rows, 1)),
        scores.new_empty((rows, MAX_LOGPROBS)),
        scores.new_empty((rows, MAX_LOGPROBS), dtype=torch.int64),
    )


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


def sample_with_options(
    scores: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    min_p: Tensor,
    num_logprobs: Tensor,
    num_adjusted: Tensor,
    adjusted_tokens: Tensor,
    adjustments: Tensor,
    token_mask: Tensor,
) -> SampledTokens:
    """Each row's next token, as `sample`, from scores that may be adjusted; and log-probabilities.

    Args:
        scores, temperature, top_k, top_p, seeds, positions: as in `sample`.
        min_p: float32 ``[rows]``; of what `sample` keeps, a token is kept if its probability is at
            least this part of the largest; 0 keeps all.
        num_logprobs: int32 ``[rows]``; 0 asks for no log-probabilities, n + 1 for those of the
            chosen token and of the n most likely ones, at most `MAX_LOGPROBS`.
        num_adjusted: int32 ``[rows]``; how many entries the next two have; ``-1 - n`` for n
            entries and a mask.
        adjusted_tokens: int32 ``[rows, entries]``; different tokens.
        adjustments: float32 ``[rows, 3, entries]``: bias, penalty and subtrahend of each.
        token_mask: int32 ``[rows, words]``, read only in rows with a mask: token t may be chosen if
            bit t % 32 of word t // 32 is set.

    Returns:
        The same on a CPU and on a GPU; log-probabilities only of rows that ask for them.
    """
    return SampledTokens(
        *torch.ops.inplace.sample.options(
            scores,
            temperature,
            top_k,
            top_p,
            seeds,
            positions,
            min_p,
            num_logprobs,
            num_adjusted,
            adjusted_tokens,
            adjustments,
            token_mask,
        )
    )


def argmax(scores: Tensor) -> Tensor:
    """The index of each row's largest score, the first of equals.

    Args:
        scores: ``[rows, n]`` floating point.

    Returns:
        int64 ``[rows, 1]``.
    """
    out = torch.ops.inplace.argmax(scores)
    assert isinstance(out, Tensor)
    return out
