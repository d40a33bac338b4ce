"""Each way PyTorch writes a part of a tensor, eager against the rewritten graph."""

from typing import Any

import pytest
import torch
from inplace.specs import Update
from inplace_builder.capture.exported import capture_exported
from inplace_builder.errors import BuildError
from state_modules import compare, operators
from torch import Tensor, nn

CAPACITY = 16


def token(step: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(step))


def position(step: int) -> Tensor:
    return torch.tensor([step])


class SliceStatic(nn.Module):
    def forward(self, cache: Tensor, x: Tensor) -> Tensor:
        cache[:, :, 3:5] = x
        return cache.sum(2)


class SliceItem(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        start = pos.item()
        torch._check(start >= 0)
        torch._check(start + 2 <= CAPACITY)
        cache[:, :, start : start + 2] = x
        return cache.sum(2)


class Last(nn.Module):
    def forward(self, cache: Tensor, x: Tensor) -> Tensor:
        cache[:, :, -2:] = x
        cache[:, :, 1] = 7
        return cache * 2


class IndexCopy(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache.index_copy_(2, pos, x)
        return cache.sum(2)


class IndexCopySeveral(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache.index_copy_(2, pos + torch.arange(2), x)
        return cache.sum(2)


class Assign(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache[:, :, pos] = x
        return cache.sum(2)


class SelectItem(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        place: Any = pos.item()
        torch._check(place >= 0)
        torch._check(place < CAPACITY)
        cache.select(2, place).copy_(x[:, :, 0])
        return cache.sum(2)


class PutScalar(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        torch.ops.aten.index_put_.default(cache, [None, None, pos.reshape(())], x.squeeze(2))
        return cache.sum(2)


class Scatter(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache.scatter_(2, pos[None, None, :, None].expand(1, 2, 1, 4), x)
        return cache.sum(2)


class Where(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        mask = (torch.arange(CAPACITY) == pos)[None, None, :, None]
        cache.copy_(torch.where(mask, x, cache))
        return cache.sum(2)


class WhereNot(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        mask = (torch.arange(CAPACITY) != pos)[None, None, :, None]
        cache.copy_(torch.where(mask, cache, x))
        return cache.sum(2)


ONE, TWO = (1, 2, 1, 4), (1, 2, 2, 4)
APPENDS: list[tuple[nn.Module, str, tuple[int, ...], bool]] = [
    (SliceStatic(), "slice_scatter", TWO, False),
    (SliceItem(), "slice_scatter", TWO, True),
    (IndexCopy(), "index_copy", ONE, True),
    (IndexCopySeveral(), "index_copy", TWO, True),
    (Assign(), "index_put", ONE, True),
    (SelectItem(), "select_scatter", ONE, True),
    (PutScalar(), "index_put", ONE, True),
    (Scatter(), "scatter", ONE, True),
    (Where(), "where", ONE, True),
    (WhereNot(), "where", ONE, True),
]


@pytest.mark.parametrize(("module", "pattern", "shape", "placed"), APPENDS, ids=[type(case[0]).__name__ for case in APPENDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_append_is_one_update(module: nn.Module, pattern: str, shape: tuple[int, ...], placed: bool, dtype: torch.dtype) -> None:
    def inputs(step: int) -> tuple[Any, ...]:
        new = token(step, *shape).to(dtype)
        return (new, position(step)) if placed else (new,)

    capture = compare(module, [torch.zeros(1, 2, CAPACITY, 4, dtype=dtype)], inputs)
    (state,) = capture.states
    assert (state.pattern, state.update, state.axis, state.leading) == (pattern, Update.APPEND, 1, True)
    assert __file__ in state.because
    assert operators(capture) == {"update": 1, "read": 1}


class Wraps(nn.Module):
    """Negative positions count from the end, as in eager PyTorch."""

    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache[:, :, pos - 3] = x
        return cache.sum(2)


class RingOfSlots(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache[:, :, pos % 4] = x
        return cache.sum(2)


class Masked(nn.Module):
    """A position outside the cache writes nothing."""

    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        mask = (torch.arange(CAPACITY) == pos * 2 - 2)[:, None]
        cache.copy_(torch.where(mask, x, cache))
        return cache.sum(2)


@pytest.mark.parametrize("module", [Wraps(), RingOfSlots(), Masked()], ids=lambda module: type(module).__name__)
def test_positions_are_as_in_eager(module: nn.Module) -> None:
    capture = compare(module, [torch.zeros(1, 2, CAPACITY, 4)], lambda step: (token(step, *ONE), position(step)), steps=CAPACITY)
    assert capture.states[0].recognised
    assert operators(capture)["update"] == 1


class TwoWrites(nn.Module):
    """The old version, the one between and the new one are all looked at."""

    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        old = cache.sum()
        cache.index_copy_(2, pos, x)
        between = cache.amax(2)
        cache[:, :, 5] = cache[:, :, 0] + 1
        return old, between, cache.clone()


def test_versions_are_read_in_order() -> None:
    capture = compare(TwoWrites(), [torch.zeros(1, 2, CAPACITY, 4)], lambda step: (token(step, *ONE), position(step)))
    assert capture.states[0].pattern == "index_copy + select_scatter"
    assert operators(capture) == {"update": 2, "read": 3}


class PerRow(nn.Module):
    def forward(self, cache: Tensor, other: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache[torch.arange(3), :, pos] = x
        other.scatter_(1, pos[:, None, None].expand(3, 1, 4), x[:, :1])
        return cache.sum(2)


def test_rows_have_positions_of_their_own() -> None:
    states = [torch.zeros(3, 2, CAPACITY, 4), torch.zeros(3, CAPACITY, 4)]
    capture = compare(PerRow(), states, lambda step: (token(step, 3, 2, 4), torch.tensor([step, step + 3, step // 2])))
    assert capture.rows == 3
    assert [state.pattern for state in capture.states] == ["index_put", "scatter"]
    assert [state.axis for state in capture.states] == [1, 0]
    assert operators(capture) == {"update": 2, "read": 1}


class PerRowMask(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        mask = (torch.arange(CAPACITY)[None] == pos[:, None])[:, None, :, None]
        cache.copy_(torch.where(mask, x, cache))
        return cache.sum(2)


def test_a_mask_per_row() -> None:
    capture = compare(PerRowMask(), [torch.zeros(3, 2, CAPACITY, 4)], lambda step: (token(step, 3, 2, 1, 4), torch.tensor([step, 99, -1])))
    assert (capture.rows, capture.states[0].pattern) == (3, "where")
    assert operators(capture) == {"update": 1, "read": 1}


class Strided(nn.Module):
    def forward(self, cache: Tensor, x: Tensor) -> Tensor:
        cache[:, :, ::2] = x
        return cache.sum(2)


class Shuffled(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache[:, :, torch.cat([pos, 2 * pos + 1])] = x
        return cache.sum(2)


class Accumulated(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache.index_put_((torch.tensor([0]), torch.tensor([1]), pos), x[0, 0], accumulate=True)
        return cache.sum(2)


class Unaliased(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache.copy_((cache + 0).index_copy(2, pos, x))
        return cache.sum(2)


class Block(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache[:, 1:2, 3:4] = x[:, :1]
        return cache.sum(2)


def test_a_part_of_a_part_is_one_update_of_the_outer_part() -> None:
    capture = compare(Block(), [torch.zeros(1, 2, CAPACITY, 4)], lambda step: (token(step, *ONE), position(step)))
    (state,) = capture.states
    assert (state.pattern, state.axis) == ("slice_scatter", 0)
    assert state.because.startswith("the outermost part")
    assert operators(capture)["update"] == 1


class OtherRow(nn.Module):
    """The first axis is the batch of one: a slot has no such axis to append along."""

    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache[torch.tensor([1, 0])] = x
        return cache.sum(1)


REFUSED: list[tuple[nn.Module, tuple[int, ...], tuple[int, ...], bool, str]] = [
    (Strided(), (1, 2, CAPACITY, 4), (1, 2, CAPACITY // 2, 4), False, "a slice of step 2"),
    (Shuffled(), (1, 2, CAPACITY, 4), TWO, True, "not provably consecutive"),
    (Accumulated(), (1, 2, CAPACITY, 4), ONE, True, "accumulates"),
    (Unaliased(), (1, 2, CAPACITY, 4), ONE, True, "not the state itself but computed from it"),
    (OtherRow(), (2, 4, CAPACITY), (2, 4, CAPACITY), True, "not provably consecutive"),
]


@pytest.mark.parametrize(("module", "state", "shape", "placed", "because"), REFUSED, ids=[type(case[0]).__name__ for case in REFUSED])
def test_what_no_pattern_covers_is_refused_with_its_line_and_stays_correct(
    module: nn.Module, state: tuple[int, ...], shape: tuple[int, ...], placed: bool, because: str
) -> None:
    def inputs(step: int) -> tuple[Any, ...]:
        new = token(step, *shape)
        return (new, position(step % 4)) if placed else (new,)

    capture = compare(module, [torch.zeros(state)], inputs)
    (found,) = capture.states
    assert found.pattern == "explicit"
    assert because in found.because
    assert __file__ in found.because
    assert operators(capture)["update"] == 1
    assert capture.lowering[0].because.startswith("explicit: ")
    with pytest.raises(BuildError, match="state cache is read, computed and written back whole"):
        capture_exported(module, (torch.zeros(state), *inputs(0)), strict=True)


class Promised(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache.index_copy_(2, pos, x)
        return cache.sum(2)


def test_positions_are_consecutive_where_the_caller_says_so() -> None:
    def inputs(step: int) -> tuple[Any, ...]:
        return token(step, *TWO), torch.tensor([step, step + 1])

    assert not compare(Promised(), [torch.zeros(1, 2, CAPACITY, 4)], inputs).states[0].recognised
    capture = compare(Promised(), [torch.zeros(1, 2, CAPACITY, 4)], inputs, consecutive=["pos"])
    assert capture.states[0].pattern == "index_copy"
    with pytest.raises(BuildError, match=r"consecutive names \['where'\]"):
        capture_exported(Promised(), (torch.zeros(1, 2, CAPACITY, 4), *inputs(0)), consecutive=["where"])


def test_a_dynamic_number_of_tokens() -> None:
    def inputs(step: int) -> tuple[Any, ...]:
        count = 1 + step % 3
        return token(step, 1, 2, count, 4), torch.arange(step, step + count)

    tokens = torch.export.Dim("tokens", min=1, max=8)
    capture = compare(
        Promised(), [torch.zeros(1, 2, CAPACITY, 4)], inputs, consecutive=["pos"], dynamic_shapes=({}, {2: tokens}, {0: tokens})
    )
    assert capture.states[0].pattern == "index_copy"


class Numbered(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, start: int) -> Tensor:
        cache[:, :, start : start + 1] = x
        return cache.sum(2)


def test_a_start_that_is_a_number() -> None:
    dynamic: tuple[Any, ...] = ({}, {}, torch.export.Dim.DYNAMIC)
    capture = compare(
        Numbered(), [torch.zeros(1, 2, CAPACITY, 4)], lambda step: (token(step, *ONE), step + 2), dynamic_shapes=dynamic, steps=8
    )
    assert capture.states[0].pattern == "slice_scatter"
    assert operators(capture) == {"update": 1, "read": 1}
