"""What a constant mask selects has known extents: rows, calls and networks compute it."""

from collections.abc import Callable
from pathlib import Path

import inplace
import inplace_builder as ib
import pytest
import torch
from inplace.trt import TensorRT, load_tensorrt
from inplace_builder.errors import BuildError
from inplace_builder.lower import lower, lowerable
from support.network_interpreter import interpret
from support.operator_case import Arg, fn
from support.row_cases import RowCase
from support.row_checks import check_network, check_rows
from torch import Tensor, nn


@pytest.fixture(scope="module")
def rtx() -> TensorRT:
    return load_tensorrt("tensorrt_rtx")


class Masks(nn.Module):
    """A running sum, of which the module uses what masks select."""

    total: Tensor
    mask: Tensor
    places: Tensor

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(4, 4)
        self.register_buffer("total", torch.zeros(1, 8))
        self.register_buffer("mask", torch.tensor([True, False] * 4))
        self.register_buffer("places", torch.tensor([[True, False], [True, True]]))

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(x)
        return USES[self.kind](self, x)


def assignment(module: Masks, x: Tensor) -> Tensor:
    y = x.clone()
    y[:, module.mask] = module.linear(module.total[:, ~module.mask])
    return y


def nothing(module: Masks, x: Tensor) -> Tensor:
    y, none = x.clone(), module.mask & ~module.mask
    y[:, none] = module.total[:, none] * 2
    return y


def axes(module: Masks, x: Tensor) -> Tensor:
    grid = module.total.view(2, 2, 2)
    return grid[module.places].sum(1) + grid[:, module.places].sum()


def written(module: Masks, x: Tensor) -> Tensor:
    module.mask.logical_not_()
    return module.total[:, module.mask].sum(1)


KINDS: dict[str, Callable[[Masks, Tensor], Tensor]] = {
    "index": lambda module, x: module.linear(module.total[:, module.mask]),
    "assignment": assignment,
    "several axes": axes,
    "selection": lambda module, x: module.total.view(2, 4).masked_select(module.mask[:4]),
    "places": lambda module, x: module.total[:, module.mask.nonzero()[:, 0]],
    "nothing": nothing,
}
USES = KINDS | {"written": written}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_networks_select_by_a_constant_mask(
    tmp_path: Path, rtx: TensorRT, kind: str
) -> None:
    case = RowCase(kind, lambda: Masks(kind), (1, 8))
    check_network(check_rows(case, tmp_path), case, rtx)


def test_an_engine_that_is_called_selects_by_a_constant_mask(tmp_path: Path) -> None:
    module = Masks("assignment")
    engine = ib.build(module, (torch.zeros(1, 8),), path=tmp_path / "engine")
    assert isinstance(engine, inplace.Engine)
    for step in range(3):
        x = torch.arange(8.0)[None] + step
        with torch.no_grad():
            torch.testing.assert_close(engine(x), module(x))


def test_a_mask_that_changes_is_no_constant() -> None:
    with pytest.raises(BuildError, match=r"aten.index.Tensor at .*test_constant_masks.py"):
        ib.capture_exported_rows(Masks("written"), ib.RowOptions(2), (torch.zeros(1, 8),))


def test_a_network_selects_adapters_by_constant_numbers(rtx: TensorRT) -> None:
    """As X-MOD chooses the adapter of each token's language."""
    numbers, adapters = torch.tensor([0, 2, 0, 2]), [nn.Linear(8, 8) for _ in range(3)]

    def choose(x: Tensor) -> Tensor:
        chosen = torch.zeros_like(x)
        for number, adapter in enumerate(adapters):
            mask = torch.ones(4) * numbers == number
            chosen[:, mask] = adapter(x[:, mask])
        return chosen

    case = fn("adapters", choose, Arg((2, 4, 8)))
    lowered = lower(lowerable(case.exported), outputs=case.outputs, tensorrt=rtx)
    case.check(lambda inputs: interpret(lowered, inputs))
