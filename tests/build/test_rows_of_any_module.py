"""Modules that look like a pattern and are not quite, with a row for each of several: each row is what the module alone would be."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request
from inplace.schema.specs import StateSpec
from inplace_builder import Capture, RowOptions, capture_exported_rows
from inplace_builder.served.build import write_engine
from inplace_builder.served.model_config import MODEL_VERSION
from inplace_builder.served.options import BuildOptions
from support.unusual import CAPACITY, STEPS, VISIBLE, attention, caches, numbers, token, written
from torch import Tensor, nn


class Hash(nn.Module):
    """Numbers that stand for something else while rows are traced."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.count.copy_((self.count * 31 + x * 19946) % 9973 + x % 9967)
        return self.count.clone()


def test_any_number_may_stand_in_a_module_of_rows(tmp_path: Path) -> None:
    capture = capture_exported_rows(
        Hash(), RowOptions(3, max_requests=CAPACITY), (torch.zeros(1, dtype=torch.int64),)
    )
    write_engine(capture, tmp_path / "hash", BuildOptions(slots=3, max_rows=3, capacity=CAPACITY))
    instance = ModelInstance.open(tmp_path / "hash" / MODEL_VERSION)
    own = [Hash() for _ in range(3)]
    for step in range(STEPS):
        given = [torch.tensor([100 * step + row]) for row in range(3)]
        works = [
            instance.admit(Request(row + 1, step == 0, False, {"x": x[None]}))
            for row, x in enumerate(given)
        ]
        instance.step(works)
        for work, x, module in zip(works, given, own, strict=True):
            assert int(work.outputs["output_0"]) == int(module(x))
            instance.finish(work)


class Sees(nn.Module):
    """One layer of attention, and a cache; what is not causal sees positions that nobody wrote."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(
        self, keys: Tensor, values: Tensor, x: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        written(keys, values, x, position)
        match self.how:
            case "causal":
                return attention(x, keys, values, position >= VISIBLE), keys
            case "blind at first":
                return attention(x, keys, values, position > VISIBLE), keys
            case "biased":
                return attention(x, keys, values, -0.1 * (VISIBLE - position).abs()), keys
            case "everything":
                return F.scaled_dot_product_attention(x, keys, values), keys
        scores = x @ keys.transpose(2, 3)
        return (scores * torch.sigmoid(scores)) @ values, keys


@pytest.mark.parametrize("how", ["causal", "blind at first", "biased", "everything", "no softmax"])
def test_rows_return_their_caches_and_attend_in_any_way(how: str, tmp_path: Path) -> None:
    example = (*caches(), *token(0))
    capture: Capture = capture_exported_rows(
        Sees(how), RowOptions(4, positions="position"), example
    )
    write_engine(capture, tmp_path / "rows", BuildOptions(slots=5, max_rows=4, capacity=CAPACITY))
    instance = ModelInstance.open(tmp_path / "rows" / MODEL_VERSION)
    own = [(Sees(how), caches()) for _ in range(3)]
    for step in range(STEPS):
        inputs = [numbers(7 * step + row, 1, 2, 1, 4) for row in range(3)]
        works = [
            instance.admit(Request(row + 1, step == 0, False, {"x": x}))
            for row, x in enumerate(inputs)
        ]
        instance.step(works)
        for work, x, (module, held) in zip(works, inputs, own, strict=True):
            out, keys = module(*held, x, torch.tensor([step]))
            torch.testing.assert_close(work.outputs["output_0"].reshape(out.shape), out)
            torch.testing.assert_close(work.outputs["output_1"].reshape(keys.shape), keys)
            instance.finish(work)


class Clock(nn.Module):
    """Counts from a number that no float64 holds."""

    ticks: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ticks", torch.full((2,), 2**53 + 1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.ticks += x
        return self.ticks - 2**53


def test_a_whole_number_that_a_state_begins_with_is_kept_to_the_last_bit() -> None:
    capture = capture_exported_rows(Clock(), RowOptions(2), (torch.ones(2, dtype=torch.int64),))
    [state] = capture.states
    assert state.fill == 2**53 + 1
    assert StateSpec.model_validate_json(state.model_dump_json()) == state
