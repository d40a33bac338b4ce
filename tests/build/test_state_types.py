"""States of every element type: updated in place, and read as zeros in a null row."""

from pathlib import Path

import pytest
import torch
from inplace.operators import read
from inplace.schema.specs import Dtype
from inplace_builder.compare import same_bits
from inplace_builder.standalone.build import build
from support.comparing import compare_graph
from support.long import long_except
from torch import Tensor, nn


class Assigns(nn.Module):
    """Assigns two entries of a cache and returns some of its values."""

    def forward(self, cache: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        cache[:, 3:4] = x.to(cache.dtype)
        cache[:, -1] = x[:, 0].to(cache.dtype)
        return cache[:, 2:5].to(torch.complex64 if cache.is_complex() else torch.float32), cache[
            :, 3
        ].clone()


@pytest.mark.parametrize(
    "dtype",
    long_except(
        [Dtype.BFLOAT16, Dtype.FLOAT8_E5M2, Dtype.UINT16, Dtype.INT64, Dtype.BOOL, Dtype.COMPLEX64],
        Dtype,
    ),
)
def test_a_state_of_every_type_is_updated_in_place(dtype: Dtype, tmp_path: Path) -> None:
    module, wide = Assigns(), torch.complex64 if dtype.as_torch.is_complex else torch.float32
    cache, theirs = (
        torch.arange(24).reshape(1, 8, 3).to(wide).to(dtype.as_torch) for _ in range(2)
    )
    engine = build(
        module, (cache, torch.ones(1, 1, 3, dtype=wide)), path=tmp_path / "engine", strict=True
    )
    assert (
        engine.manifest.states[0].dtype is dtype
        and engine.manifest.built_with["verified_error"] == "0, bit for bit"
    )
    address = cache.data_ptr()
    for step in range(4):
        x = (
            (torch.randn(1, 1, 3, generator=torch.Generator().manual_seed(step), dtype=wide) * 9)
            .abs()
            .to(wide)
        )
        for one, other in zip(engine(cache, x), module(theirs, x), strict=True):
            assert same_bits(one, other)
        assert same_bits(cache, theirs) and cache.data_ptr() == address


def test_a_null_row_reads_as_zeros_of_every_type() -> None:
    for dtype in Dtype:
        state = torch.ones(2, 3).to(dtype.as_torch)
        rows = read(state, torch.tensor([1, -1]))
        assert same_bits(rows[0], state[1]) and same_bits(
            rows[1], torch.zeros(3).to(dtype.as_torch)
        )
        assert same_bits(
            read(torch.ones(2).to(dtype.as_torch), torch.tensor([-1])),
            torch.zeros(1).to(dtype.as_torch),
        )


def test_a_state_with_imaginary_initial_values_is_not_filled_with_others() -> None:
    class Turning(nn.Module):
        phase: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("phase", torch.full((1, 4), 1j, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            self.phase.mul_(torch.polar(torch.ones_like(x), x))
            return self.phase.real * 1

    compare_graph(
        Turning(),
        [],
        lambda step: (torch.randn(1, 4, generator=torch.Generator().manual_seed(step)),),
    )
