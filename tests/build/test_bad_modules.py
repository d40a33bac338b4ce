"""Modules and example inputs that no engine can be built of: each is refused in words, with the module's own line."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from inplace_builder import ExportedCapture, capture_exported
from inplace_builder.errors import BuildError
from support.random_modules import CAPACITY
from support.random_steps import Attends, Heads
from torch import Tensor, nn


class Writes(nn.Module):
    def __init__(self, write: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.write = write

    def forward(self, cache: Tensor, x: Tensor) -> Any:
        return self.write(cache, x)


LINE = r"at \"[^\"]*test_bad_modules\.py\", line \d+"
MEMORY = torch.zeros(8, 4)
REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], Any], tuple[Tensor, Tensor], str]] = {
    "shared memory": (
        lambda c, x: c.add_(x).sum(),
        (MEMORY[:4], MEMORY[2:6]),
        f"input cache and input x share memory, and the module writes it {LINE}",
    ),
    "not contiguous": (
        lambda c, x: c.add_(x).sum(),
        (torch.zeros(4, 4).T, torch.zeros(4, 4)),
        rf"strides \(1, 4\), and the module writes it {LINE}",
    ),
    "no such type": (
        lambda c, x: c.copy_(x.to(c.dtype)).to(torch.float32).sum(),
        (torch.zeros(4).to(torch.float8_e4m3fnuz), torch.zeros(4)),
        f"float8_e4m3fnuz, which no engine takes, and the module writes it {LINE}",
    ),
    "a copy is written": (
        lambda c, x: c.flip(0).add_(x).sum(),
        (torch.zeros(4, 4), torch.zeros(4)),
        rf"no state to keep; what it writes {LINE}.* is a copy that aten\.flip\.default made",
    ),
    "a new version is returned": (
        lambda c, x: torch.index_copy(c, 0, torch.tensor([1]), x),
        (torch.zeros(4, 4), torch.zeros(1, 4)),
        rf"output 0 is cache with something written into it, as a new tensor {LINE}.*write it in place \(cache\.copy_",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_module_that_no_engine_can_be_is_refused_with_its_line(case: str) -> None:
    write, arguments, because = REFUSED[case]
    with pytest.raises(BuildError, match=because):
        capture_exported(Writes(write), arguments)


VIEWS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "t": lambda c, x: c.t()[0].add_(x),
    "diagonal": lambda c, x: torch.diagonal(c).add_(1),
    "as_strided": lambda c, x: torch.as_strided(c, (2,), (3,)).add_(1),
}


@pytest.mark.parametrize("view", VIEWS)
def test_a_part_written_through_a_view_that_nothing_follows_is_said_or_refused(view: str) -> None:
    module, arguments = Writes(VIEWS[view]), (torch.zeros(4, 4), torch.ones(4))
    (state,) = capture_exported(module, arguments).states
    says = "through a transposed view" if view == "t" else f"through the view aten.{view}.default"
    assert state.pattern == "explicit" and says in state.reason
    with pytest.raises(
        BuildError,
        match=rf"state cache is read, computed and written back whole: .*{says}.* {LINE}",
    ):
        capture_exported(module, arguments, strict=True)


def test_an_extent_that_is_to_vary_and_is_1_in_the_example_is_named() -> None:
    how = Heads(1, 4, 2, 8, 0, 0.7, "capped", "additive", "expand", "index_copy", stacked=True)
    tokens = torch.export.Dim("tokens", min=1, max=4)

    def capture(count: int) -> ExportedCapture:
        arguments = (
            torch.zeros(1, 2, 1, 2, CAPACITY, 8),
            torch.zeros(1, count, 32),
            torch.arange(count),
        )
        return capture_exported(
            Attends(how),
            arguments,
            dynamic_shapes=({}, {1: tokens}, {0: tokens}),
            assume_consecutive=["pos"],
        )

    with pytest.raises(
        BuildError,
        match="if an extent that varies is 1 in the example, give it 2 entries or more",
    ):
        capture(1)
    assert len(capture(2).states) == 2
