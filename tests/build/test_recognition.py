"""The corpus captured: each graph does what its module does, and records how states are written."""

import re

import pytest
import torch
from inplace_builder import capture_exported
from inplace_builder.errors import BuildError
from support.corpus import BUILT, CORPUS, RARELY
from support.corpus.attention import EVERY_BLOCK
from support.corpus.case import ModuleCase
from support.corpus.check import check_graph
from support.corpus.writes import ONE, TWO, IndexCopy, Tokens, zeros
from support.long import long_except
from torch import Tensor


@pytest.mark.parametrize(
    "name",  # those of BUILT are captured by test_engines_of_modules.py
    long_except([name for name in CORPUS if name not in (*RARELY, *BUILT)], CORPUS),
)
def test_a_graph_does_what_its_module_does_and_states_are_recognised(name: str) -> None:
    check_graph(CORPUS[name])


@pytest.mark.long
@pytest.mark.parametrize(
    "case", [case for case in EVERY_BLOCK if case.name not in CORPUS], ids=lambda case: case.name
)
def test_attention_is_recognised_however_it_is_written(case: ModuleCase) -> None:
    check_graph(case)


@pytest.mark.parametrize(
    "name",
    long_except(
        ["slice with a step", "two positions", "part of a transposed view"],
        [case.name for case in CORPUS.values() if case.explicit],
    ),
)
def test_strict_refuses_a_state_that_is_written_back_whole(name: str) -> None:
    case = CORPUS[name]
    with pytest.raises(BuildError, match="is read, computed and written back whole") as refused:
        capture_exported(case.module(), case.example(), strict=True, **case.options)
    assert re.search(case.reason, str(refused.value))


def test_a_batch_of_one_is_the_axis_of_slots() -> None:
    arguments = (*zeros(1, 2, 16, 4)(), torch.zeros(ONE), torch.tensor([0]))
    (state,) = capture_exported(IndexCopy(), arguments).states
    assert state.has_slot_axis


def test_positions_that_are_assumed_consecutive_are_inputs() -> None:
    arguments: tuple[Tensor, ...] = (*zeros(1, 2, 16, 4)(), torch.zeros(TWO), torch.arange(2))
    with pytest.raises(BuildError, match=r"assume_consecutive names \['where'\]"):
        capture_exported(Tokens(), arguments, assume_consecutive=["where"])
