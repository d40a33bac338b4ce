"""Each way PyTorch writes a part of a tensor, eager against the rewritten graph."""

from typing import Any

import pytest
import torch
from inplace.schema.specs import Update
from inplace_builder.capture.exported import capture_exported
from inplace_builder.errors import BuildError
from support import recognised_modules
from support.recognised_modules import (
    CAPACITY,
    Accumulated,
    Assign,
    Block,
    IndexCopy,
    IndexCopySeveral,
    Masked,
    Numbered,
    OtherRow,
    PerRow,
    PerRowMask,
    Promised,
    PutScalar,
    RingOfSlots,
    Scatter,
    SelectItem,
    Shuffled,
    SliceItem,
    SliceStatic,
    Strided,
    TwoWrites,
    Unaliased,
    Where,
    WhereNot,
    Wraps,
)
from support.state_modules import compare, operators
from torch import Tensor, nn

ONE, TWO = (1, 2, 1, 4), (1, 2, 2, 4)


def token(step: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(step))


def position(step: int) -> Tensor:
    return torch.tensor([step])


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


@pytest.mark.parametrize(
    ("module", "pattern", "shape", "placed"),
    APPENDS,
    ids=[type(case[0]).__name__ for case in APPENDS],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_append_is_one_update(
    module: nn.Module, pattern: str, shape: tuple[int, ...], placed: bool, dtype: torch.dtype
) -> None:
    def inputs(step: int) -> tuple[Any, ...]:
        new = token(step, *shape).to(dtype)
        return (new, position(step)) if placed else (new,)

    capture = compare(module, [torch.zeros(1, 2, CAPACITY, 4, dtype=dtype)], inputs)
    (state,) = capture.states
    assert (state.pattern, state.update, state.axis, state.has_slot_axis) == (
        pattern,
        Update.APPEND,
        1,
        True,
    )
    assert recognised_modules.__file__ in state.reason
    assert operators(capture) == {"update": 1, "read": 1}


@pytest.mark.parametrize(
    "module", [Wraps(), RingOfSlots(), Masked()], ids=lambda module: type(module).__name__
)
def test_positions_are_as_in_eager(module: nn.Module) -> None:
    capture = compare(
        module,
        [torch.zeros(1, 2, CAPACITY, 4)],
        lambda step: (token(step, *ONE), position(step)),
        steps=CAPACITY,
    )
    assert capture.states[0].is_matched
    assert operators(capture)["update"] == 1


def test_versions_are_read_in_order() -> None:
    capture = compare(
        TwoWrites(),
        [torch.zeros(1, 2, CAPACITY, 4)],
        lambda step: (token(step, *ONE), position(step)),
    )
    assert capture.states[0].pattern == "index_copy + select_scatter"
    assert operators(capture) == {"update": 2, "read": 3}


def test_rows_have_positions_of_their_own() -> None:
    states = [torch.zeros(3, 2, CAPACITY, 4), torch.zeros(3, CAPACITY, 4)]
    capture = compare(
        PerRow(),
        states,
        lambda step: (token(step, 3, 2, 4), torch.tensor([step, step + 3, step // 2])),
    )
    assert capture.rows == 3
    assert [state.pattern for state in capture.states] == ["index_put", "scatter"]
    assert [state.axis for state in capture.states] == [1, 0]
    assert operators(capture) == {"update": 2, "read": 1}


def test_a_mask_per_row() -> None:
    capture = compare(
        PerRowMask(),
        [torch.zeros(3, 2, CAPACITY, 4)],
        lambda step: (token(step, 3, 2, 1, 4), torch.tensor([step, 99, -1])),
    )
    assert (capture.rows, capture.states[0].pattern) == (3, "where")
    assert operators(capture) == {"update": 1, "read": 1}


def test_a_part_of_a_part_is_one_update_of_the_outer_part() -> None:
    capture = compare(
        Block(), [torch.zeros(1, 2, CAPACITY, 4)], lambda step: (token(step, *ONE), position(step))
    )
    (state,) = capture.states
    assert (state.pattern, state.axis) == ("slice_scatter", 0)
    assert state.reason.startswith("the outermost part")
    assert operators(capture)["update"] == 1


REFUSED: list[tuple[nn.Module, tuple[int, ...], tuple[int, ...], bool, str]] = [
    (Strided(), (1, 2, CAPACITY, 4), (1, 2, CAPACITY // 2, 4), False, "a slice of step 2"),
    (Shuffled(), (1, 2, CAPACITY, 4), TWO, True, "not provably consecutive"),
    (Accumulated(), (1, 2, CAPACITY, 4), ONE, True, "accumulates"),
    (Unaliased(), (1, 2, CAPACITY, 4), ONE, True, "a tensor computed from it, not into the state"),
    (OtherRow(), (2, 4, CAPACITY), (2, 4, CAPACITY), True, "not provably consecutive"),
]


@pytest.mark.parametrize(
    ("module", "state", "shape", "placed", "because"),
    REFUSED,
    ids=[type(case[0]).__name__ for case in REFUSED],
)
def test_what_no_pattern_covers_is_refused_with_its_line_and_stays_correct(
    module: nn.Module, state: tuple[int, ...], shape: tuple[int, ...], placed: bool, because: str
) -> None:
    def inputs(step: int) -> tuple[Any, ...]:
        new = token(step, *shape)
        return (new, position(step % 4)) if placed else (new,)

    capture = compare(module, [torch.zeros(state)], inputs)
    (found,) = capture.states
    assert found.pattern == "explicit"
    assert because in found.reason
    assert recognised_modules.__file__ in found.reason
    assert operators(capture)["update"] == 1
    assert capture.lowering[0].reason.startswith("explicit: ")
    with pytest.raises(BuildError, match="state cache is read, computed and written back whole"):
        capture_exported(module, (torch.zeros(state), *inputs(0)), strict=True)


def test_positions_are_consecutive_where_the_caller_says_so() -> None:
    def inputs(step: int) -> tuple[Any, ...]:
        return token(step, *TWO), torch.tensor([step, step + 1])

    assert not compare(Promised(), [torch.zeros(1, 2, CAPACITY, 4)], inputs).states[0].is_matched
    capture = compare(
        Promised(), [torch.zeros(1, 2, CAPACITY, 4)], inputs, assume_consecutive=["pos"]
    )
    assert capture.states[0].pattern == "index_copy"
    with pytest.raises(BuildError, match=r"assume_consecutive names \['where'\]"):
        capture_exported(
            Promised(), (torch.zeros(1, 2, CAPACITY, 4), *inputs(0)), assume_consecutive=["where"]
        )


def test_a_dynamic_number_of_tokens() -> None:
    def inputs(step: int) -> tuple[Any, ...]:
        count = 1 + step % 3
        return token(step, 1, 2, count, 4), torch.arange(step, step + count)

    tokens = torch.export.Dim("tokens", min=1, max=8)
    capture = compare(
        Promised(),
        [torch.zeros(1, 2, CAPACITY, 4)],
        inputs,
        assume_consecutive=["pos"],
        dynamic_shapes=({}, {2: tokens}, {0: tokens}),
    )
    assert capture.states[0].pattern == "index_copy"


def test_a_start_that_is_a_number() -> None:
    dynamic: tuple[Any, ...] = ({}, {}, torch.export.Dim.DYNAMIC)
    capture = compare(
        Numbered(),
        [torch.zeros(1, 2, CAPACITY, 4)],
        lambda step: (token(step, *ONE), step + 2),
        dynamic_shapes=dynamic,
        steps=8,
    )
    assert capture.states[0].pattern == "slice_scatter"
    assert operators(capture) == {"update": 1, "read": 1}
