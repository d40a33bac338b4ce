"""Modules that no engine can be built of: each is refused in words, with the module's own line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from inplace_builder import ExportedCapture, capture_exported
from inplace_builder.errors import BuildError
from inplace_builder.standalone.build import build
from support.random_modules import CAPACITY
from support.random_steps import Attends, Heads
from torch import Tensor, nn


class Writes(nn.Module):
    def __init__(self, write: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.write = write

    def forward(self, cache: Tensor, x: Tensor) -> Any:
        return self.write(cache, x)


LINE = r"at \"[^\"]*test_module_refusals\.py\", line \d+"
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
    "a view that torch cannot invert": (
        lambda c, x: c.unflatten(0, (4, 2)).movedim(1, 0).index_copy_(1, torch.tensor([1]), x),
        (torch.zeros(8, 3), torch.zeros(2, 1, 3)),
        rf"cannot make the module functional because of aten\.index_copy_\.default {LINE}.*Cannot "
        "view a tensor .*; write into the state itself, or into a simpler view of it",
    ),
    "a new version is returned": (
        lambda c, x: torch.index_copy(c, 0, torch.tensor([1]), x),
        (torch.zeros(4, 4), torch.zeros(1, 4)),
        rf"output 0 is cache with something written into it, as a new tensor {LINE}.*write "
        r"it in place \(cache\.copy_",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_module_that_no_engine_can_be_is_refused_with_its_line(case: str) -> None:
    write, arguments, why = REFUSED[case]
    with pytest.raises(BuildError, match=why):
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
    part = f"{view}_scatter writes a part of it through a view of another shape"
    message = "through a transposed view" if view == "t" else part
    assert state.pattern == "explicit" and message in state.reason
    with pytest.raises(
        BuildError,
        match=rf"state cache is read, computed and written back whole: .*{message}.* {LINE}",
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


class Overlapping(nn.Module):
    """Neither is a part of the other that constant indices on first axes make."""

    early: Tensor
    late: Tensor

    def __init__(self) -> None:
        super().__init__()
        memory = torch.zeros(3, 4)
        self.register_buffer("early", memory[:2])
        self.register_buffer("late", memory[1:])

    def forward(self, x: Tensor) -> Tensor:
        self.late.add_(x)
        return self.early.sum(0)


def test_memory_shared_by_halves_is_refused() -> None:
    with pytest.raises(
        BuildError,
        match=r"buffer \w+ and buffer \w+ share memory.*test_module_refusals.py.*self.late.add_",
    ):
        capture_exported(Overlapping(), (torch.ones(4),))


class Two(nn.Module):
    def forward(self, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        a.add_(x)
        return a + b


def test_two_inputs_that_share_memory_are_refused() -> None:
    memory = torch.zeros(4)
    with pytest.raises(BuildError, match=r"input a and input b share memory.*a\.add_"):
        capture_exported(Two(), (memory, memory, torch.ones(4)))


def test_declared_states_are_checked() -> None:
    arguments = (torch.zeros(4), torch.zeros(4), torch.ones(4))
    assert capture_exported(Two(), arguments, states=["a"]).states[0].name == "a"
    with pytest.raises(BuildError, match=r"never writes \['b'\]"):
        capture_exported(Two(), arguments, states=["a", "b"])
    with pytest.raises(BuildError, match=r"also writes \['a'\]"):
        capture_exported(Two(), arguments, states=[])


def test_a_module_without_state_is_refused() -> None:
    with pytest.raises(BuildError, match="no state"):
        capture_exported(nn.Linear(4, 4), (torch.ones(4),))


def test_what_cannot_be_exported_is_refused_by_name() -> None:
    class Branch(nn.Module):
        def forward(self, cache: Tensor, x: Tensor) -> Tensor:
            if x.sum() > 0:
                cache.add_(x)
            return cache

    with pytest.raises(BuildError, match=r"torch\.export cannot capture Branch"):
        capture_exported(Branch(), (torch.zeros(4), torch.ones(4)))


def test_a_mask_of_another_shape_is_refused_as_pytorch_does() -> None:
    module = Writes(lambda c, x: c.add_(x)[torch.tensor([True, False])].unfold(0, 1, 1))
    with pytest.raises(BuildError, match="The shape of the mask"):
        capture_exported(module, (torch.zeros(3, 4), torch.ones(3, 4)))


def test_an_exported_program_serves_as_well() -> None:
    program = torch.export.export(Two(), (torch.zeros(4), torch.zeros(4), torch.ones(4)))
    assert capture_exported(program).states[0].pattern == "replace"


class Growing(nn.Module):
    def forward(self, cache: Tensor, rest: dict[str, Tensor]) -> Tensor:
        cache.add_(1.0)
        rest["more"] = cache * 2
        return cache * 1


class Resized(nn.Module):
    def forward(self, cache: Tensor) -> Tensor:
        cache.add_(1.0)
        cache.t_()
        return cache * 1


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (Growing(), (torch.zeros(4), {"x": torch.zeros(4)}), "adds to its arguments"),
        (
            Resized(),
            (torch.zeros(2, 4),),
            r"state cache of \(2, 4\) becomes \(4, 2\).*test_module_refusals\.py",
        ),
    ],
)
def test_what_is_no_update_is_refused_in_words(
    module: nn.Module, arguments: tuple[Any, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(BuildError, match=message):
        build(module, arguments, path=tmp_path / "engine")
