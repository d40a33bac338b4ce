"""Quantiles that can be exported are PyTorch's."""

import itertools
from typing import Any

import pytest
import torch
from inplace_builder.graph.quantile import quantile


@pytest.mark.parametrize("dim", [None, 0, 1, -1])
@pytest.mark.parametrize("interpolation", ["linear", "lower", "higher", "midpoint", "nearest"])
def test_quantiles_are_those_of_torch(dim: int | None, interpolation: str) -> None:
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    x[0, 1, 2] = torch.nan
    x[2, :, 0] = torch.nan
    fractions: list[Any] = [
        0.0,
        0.3,
        1.0,
        torch.tensor(0.7),
        torch.tensor([0.2, 0.9]),
        torch.tensor([0.4]),
    ]
    for q, keepdim in itertools.product(fractions, (False, True)):
        for function, ignore_nan in ((torch.quantile, False), (torch.nanquantile, True)):
            expected = function(x, q, dim, keepdim, interpolation=interpolation)
            actual = quantile(
                x, q, dim, keepdim, interpolation=interpolation, ignore_nan=ignore_nan
            )
            torch.testing.assert_close(actual, expected, equal_nan=True)


def test_a_number_beyond_the_limits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"quantile of 1.5, which is not within 0 and 1"):
        quantile(torch.zeros(3), 1.5)
    with pytest.raises(ValueError, match="no interpolation 'cubic'"):
        quantile(torch.zeros(3), 0.5, interpolation="cubic")
