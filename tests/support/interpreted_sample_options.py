"""The sampling kernel with options in Triton's interpreter, for `test_sampling_options.py`."""

import pytest
import torch
from inplace.kernels import sample as kernels
from inplace.operators.sample import _sample_options_on_gpu, sample_with_options
from inplace.schema.specs import mask_words
from torch import Tensor

from support.long import long_except

pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim > 0:DeprecationWarning"
)  # Triton's own


NAN = float("nan")


@pytest.fixture(autouse=True)
def few_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer programs: each is slow to interpret, and most of 32 would have nothing to do."""
    monkeypatch.setattr(kernels, "MAX_SPLITS", 4)
    monkeypatch.setattr(kernels, "MIN_SPLITS", 2)


def arguments(rows: int, count: int, entries: int) -> list[Tensor]:
    """Rows without options, with each of them alone, and with several."""
    pick = torch.arange(rows) % 6
    tokens = torch.stack([torch.randperm(count)[:entries] for _ in range(rows)]).int()
    values = [torch.randn(rows, entries) * 3, torch.rand(rows, entries) + 0.5]
    values[0][:, 1:][torch.rand(rows, entries - 1) > 0.8] = float("-inf")
    return [
        torch.tensor([0.0, 1.0, 0.7, 1.3, 2.0, 0.0])[pick],
        torch.tensor([0, 0, 9, 0, 5, 1])[pick].int(),
        torch.tensor([1.0, 1.0, 1.0, 0.8, 0.9, 1.0])[pick],
        torch.randint(-(2**63), 2**63 - 1, (rows,)),
        torch.randint(0, 2**31 - 1, (rows,)).int(),
        torch.tensor([0.0, 0.3, 0.05, 0.0, 1.0, 0.5])[pick],
        torch.tensor([1, 0, 6, 21, 3, 0])[pick].int(),
        torch.tensor([0, entries, -1 - entries, 1, -1, -2])[pick].int(),
        tokens,
        torch.stack([*values, torch.rand(rows, entries)], 1),
        torch.randint(-(2**31), 2**31, (rows, mask_words(count))).int() | 1,
    ]


@pytest.mark.parametrize(
    ("rows", "count", "entries", "tied"),
    long_except(
        [(6, 30, 30, True)],
        [
            (6, 2, 1, False),
            (6, 30, 30, True),
            (12, 1500, 9, False),
            (12, 1500, 9, True),
            (6, 3000, 1100, False),
            (6, 3000, 1100, True),
        ],
    ),
)
def test_the_kernel_returns_what_the_operator_does(
    rows: int, count: int, entries: int, tied: bool
) -> None:
    torch.manual_seed(count)
    scores = torch.randn(rows, count) * 3
    if tied:
        scores = (scores * 2).round() / 2
    options = arguments(rows, count, entries)
    expected = sample_with_options(scores, *options)
    for part, other in zip(_sample_options_on_gpu(scores, *options), expected, strict=True):
        assert torch.equal(part, other)
    assert count == 2 or len(set(expected.tokens.flatten().tolist())) > 1


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("odd", long_except([NAN], [NAN, float("-inf"), float("inf")]))
def test_odd_scores_end(odd: float) -> None:
    """The kernel ends and chooses a token, whatever the scores are."""
    scores = torch.randn(6, 50)
    scores[:, ::2] = odd
    for _ in range(2):
        tokens, *_ = _sample_options_on_gpu(scores, *arguments(6, 50, 5))
        assert bool(((tokens >= 0) & (tokens < 50)).all())
        scores[:] = odd
