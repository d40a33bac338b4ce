"""The sampling kernel in Triton's interpreter; `tests/unit/test_sample.py` runs this file."""

import pytest
import torch
from inplace.kernels import sample as kernels
from inplace.operators.sample import _sample_on_gpu, sample
from torch import Tensor

from support.long import long_except

pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim > 0:DeprecationWarning"
)  # Triton's own


@pytest.fixture
def few_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer programs: each is slow to interpret, and most of 32 would have nothing to do."""
    monkeypatch.setattr(kernels, "MAX_SPLITS", 4)
    monkeypatch.setattr(kernels, "MIN_SPLITS", 2)


def parameters(rows: int) -> list[Tensor]:
    """Parameters of greedy rows, and of rows with and without top-k and top-p.

    Seeds and positions are from their whole range.
    """
    top_k = torch.tensor([0, 0, 9, 0, 5, 1])
    top_p = torch.tensor([1.0, 1.0, 1.0, 0.8, 0.9, 1.0])
    temperature = torch.tensor([0.0, 1.0, 0.7, 1.3, 2.0, 0.1])
    pick = torch.arange(rows) % 6
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,))
    return [
        temperature[pick],
        top_k[pick].int(),
        top_p[pick],
        seeds,
        torch.randint(0, 2**31 - 1, (rows,)).int(),
    ]


@pytest.mark.parametrize(
    ("rows", "count"), long_except([(6, 7)], [(6, 1), (6, 7), (9, 1500), (6, 5000)])
)
@pytest.mark.usefixtures("few_splits")
def test_the_kernel_chooses_the_operator_s_tokens(rows: int, count: int) -> None:
    torch.manual_seed(count)
    scores = torch.randn(rows, count) * 3
    sampling = parameters(rows)
    assert torch.equal(_sample_on_gpu(scores, *sampling), sample(scores, *sampling))
    tied = (scores * 2).round() / 2  # many tokens of one score, at the thresholds too
    assert torch.equal(_sample_on_gpu(tied, *sampling), sample(tied, *sampling))


def test_with_as_many_parts_as_on_a_gpu() -> None:
    torch.manual_seed(0)
    scores, sampling = torch.randn(3, 5000), [part[-3:] for part in parameters(6)]
    assert torch.equal(_sample_on_gpu(scores, *sampling), sample(scores, *sampling))


@pytest.mark.usefixtures("few_splits")
def test_every_rank_of_a_threshold() -> None:
    torch.manual_seed(0)
    ranks, row = torch.arange(10), torch.ones(10)
    for scores, top_p in [
        (torch.randn(1, 10) * 2, row),
        ((torch.randn(1, 10) * 2).round(), (1 + ranks) / 11),
    ]:
        sampling = [3 * row, ranks.int(), top_p, ranks * 7, ranks.int()]
        repeated = scores.expand(10, 10).contiguous()
        assert torch.equal(_sample_on_gpu(repeated, *sampling), sample(repeated, *sampling))


@pytest.mark.parametrize(
    "odd", long_except([float("-inf")], [float("-inf"), float("inf"), float("nan")])
)
@pytest.mark.usefixtures("few_splits")
def test_odd_scores_end(odd: float) -> None:
    """The kernel ends and chooses a token, whatever the scores are."""
    scores = torch.randn(6, 50)
    scores[:, ::2] = odd
    tokens = _sample_on_gpu(scores, *parameters(6))
    assert bool(((tokens >= 0) & (tokens < 50)).all())
    if odd == float("-inf"):
        assert bool((tokens % 2 == 1).all())
    scores[:] = odd
    assert bool((_sample_on_gpu(scores, *parameters(6)) >= 0).all())
