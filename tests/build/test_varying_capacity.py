"""Caller-owned caches whose capacity each call chooses, updated in place."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import inplace
import pytest
import torch
from inplace.errors import CallError
from inplace_builder import RowOptions, capture_exported, capture_exported_rows
from inplace_builder.errors import BuildError
from inplace_builder.standalone.build import build
from inplace_builder.standalone.serialize import serialize
from support.corpus.case import noise
from torch import Tensor, nn
from torch.export import Dim

CAPACITY = Dim("capacity", min=4, max=64)


class Attention(nn.Module):
    """Two caches of one capacity; the positions of one are counted from its end."""

    def forward(self, keys: Tensor, values: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        keys.index_copy_(2, pos, x)
        values[:, :, pos - keys.shape[2]] = x * 2
        seen = (torch.arange(keys.shape[2]) <= pos[:, None])[None, None]
        return nn.functional.scaled_dot_product_attention(x, keys, values, attn_mask=seen)


SHAPES: Any = ({2: CAPACITY}, {2: CAPACITY}, {}, {})


def caches(capacity: int) -> list[Tensor]:
    return [torch.zeros(1, 2, capacity, 4) for _ in range(2)]


def inputs(step: int) -> tuple[Tensor, Tensor]:
    return noise(step, 1, 2, 1, 4), torch.tensor([step])


def run_beside_eager(module: nn.Module, engine: Any, capacity: int) -> None:
    mine, theirs = caches(capacity), caches(capacity)
    addresses = [cache.data_ptr() for cache in mine]
    for step in range(min(capacity, 9)):
        before = deepcopy(mine)
        with torch.no_grad():
            torch.testing.assert_close(engine(*mine, *inputs(step)), module(*theirs, *inputs(step)))
        for one, other, old in zip(mine, theirs, before, strict=True):
            assert torch.equal(one, other)
            old[:, :, step] = one[:, :, step]
            assert torch.equal(one, old), "nothing but the written position has changed"
    assert addresses == [cache.data_ptr() for cache in mine]


def test_caches_of_any_capacity_are_updated_in_place(tmp_path: Path) -> None:
    module = Attention()
    engine = build(
        module,
        (*caches(16), *inputs(0)),
        path=tmp_path / "engine",
        dynamic_shapes=SHAPES,
        strict=True,
    )
    assert [record.reason.partition(":")[0] for record in engine.manifest.lowering] == [
        "index_copy",
        "index_put",
    ]
    assert all(
        "the length of its caches varies" in record.reason for record in engine.manifest.lowering
    )
    assert engine.manifest.built_with["verified_calls"] == "7"
    engine = inplace.load(tmp_path / "engine")
    for capacity in (4, 16, 17, 64):
        run_beside_eager(module, engine, capacity)


def test_a_capacity_outside_the_range_or_two_that_differ_are_refused(tmp_path: Path) -> None:
    engine = build(
        Attention(), (*caches(16), *inputs(0)), path=tmp_path / "engine", dynamic_shapes=SHAPES
    )
    with pytest.raises(
        CallError,
        match=r"keys has the extent on axis 2 65, the engine was built for 4 to 64.*writes it at",
    ):
        engine(*caches(65), *inputs(0))
    with pytest.raises(
        CallError,
        match=r"argument values has the extent on axis 2 9, which must be that of keys, 8",
    ):
        engine(caches(8)[0], caches(9)[1], *inputs(0))
    one, other = caches(8)
    with pytest.raises(IndexError, match="outside a slot that holds 8"):
        engine(one, other, *inputs(8))


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_a_program_of_such_an_engine_takes_any_capacity(tmp_path: Path) -> None:
    engine = build(
        Attention(), (*caches(16), *inputs(0)), path=tmp_path / "engine", dynamic_shapes=SHAPES
    )
    program = torch.export.export(engine, (*caches(16), *inputs(0)), dynamic_shapes=(SHAPES,))
    torch.export.save(program, tmp_path / "program.pt2")
    run_beside_eager(Attention(), torch.export.load(tmp_path / "program.pt2").module(), 23)


class Masked(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache.copy_(torch.where((torch.arange(cache.shape[1]) == pos)[None, :, None], x, cache))
        return cache.sum(1)


class Across(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache.index_copy_(2, pos, x[..., None].expand(1, cache.shape[1], 1))
        return cache.sum(1)


@pytest.mark.parametrize(
    ("module", "x", "reason"),
    [(Masked(), (1, 1, 3), "anew"), (Across(), (1, 1), "a dynamic extent on another axis")],
)
def test_a_write_across_the_dynamic_axis_is_correct_and_writes_the_whole_state(
    module: nn.Module, x: tuple[int, ...], reason: str, tmp_path: Path
) -> None:
    shapes: Any = ({1: CAPACITY}, {}, {})
    arguments = (torch.zeros(1, 8, 3), noise(0, *x), torch.tensor([1]))
    engine = build(module, arguments, path=tmp_path / "engine", dynamic_shapes=shapes)
    assert reason in engine.manifest.lowering[0].reason
    mine, theirs = torch.zeros(1, 11, 3), torch.zeros(1, 11, 3)
    for step in range(3):
        further = noise(step, *x), torch.tensor([step])
        torch.testing.assert_close(engine(mine, *further), module(theirs, *further))
        assert torch.equal(mine, theirs)


def test_a_dynamic_capacity_that_is_not_supported_is_refused_with_the_reason() -> None:
    arguments = (*caches(16), *inputs(0))
    made = serialize(Attention(), arguments, dynamic_shapes=SHAPES)
    assert [binding.shape[2] for binding in made.states] == [
        made.records[0].shape[2]
    ] * 2 and isinstance(made.records[0].shape[2], str)
    with pytest.raises(
        BuildError,
        match=r"argument keys is a state of .*a call chooses an extent of it.*engine='torch'",
    ):
        serialize(
            Attention(),
            arguments,
            dynamic_shapes=SHAPES,
            engine="tensorrt_rtx",
            compute_capability="8.9",
        )
    program = torch.export.export(Attention(), arguments, dynamic_shapes=SHAPES)
    with pytest.raises(
        BuildError, match="state keys has extents that vary; slots are all of one size"
    ):
        capture_exported_rows(program, RowOptions(2, positions="pos"))
    assert [state.tensor.dynamic_axes for state in capture_exported(program).states] == [{2}, {2}]
