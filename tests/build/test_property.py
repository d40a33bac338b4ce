"""Random modules: eager PyTorch against the engine that is built of each, step after step; and those that must be refused.

``make test`` tries 50 that must build and 50 that must be refused, ``make test-full`` 500 (the Hypothesis profile ``full``).
"""

import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inplace.standalone import Engine
from inplace_builder.errors import BuildError
from inplace_builder.standalone.build import build
from support.random_modules import (
    APPENDS,
    STEPS,
    Broken,
    Defect,
    Random,
    copied,
    supported,
    unsupported,
)
from support.random_steps import Steps, Writes, attending, rows_of_their_own, varying_tokens
from torch import Tensor
from torch.utils import _pytree as pytree

pytestmark = pytest.mark.timeout(3600)


def as_bits(tensor: Tensor) -> Tensor:
    return (
        tensor.contiguous().view(torch.uint8)
        if tensor.dim()
        else tensor.reshape(1).view(torch.uint8)
    )


def run_beside_eager(case: Random | Steps, engine: Engine) -> None:
    """Outputs and states after each step; what a step of eager PyTorch leaves as it was, the engine must leave bit for bit."""
    eager, mine, theirs = deepcopy(case.module), case.states(), case.states()
    own = [*pytree.tree_leaves(mine), *engine.states.values()]
    addresses = [tensor.data_ptr() for tensor in own]
    for step in range(STEPS):
        inputs = case.inputs(step)
        before = [tensor.clone() for tensor in own]
        with torch.no_grad():
            expected = eager(theirs, *inputs)
        torch.testing.assert_close(
            engine(mine, *inputs), expected, msg=f"{{}} in step {step}".format
        )
        wanted = [*pytree.tree_leaves(theirs), *(eager.get_buffer(name) for name in engine.states)]
        for one, other, old in zip(own, wanted, before, strict=True):
            torch.testing.assert_close(one, other, msg=f"{{}} of a state after step {step}".format)
            same = other == old
            assert torch.equal(as_bits(one[same]), as_bits(old[same]))
    assert addresses == [tensor.data_ptr() for tensor in own]


def built(case: Random | Steps, **options: Any) -> Engine:
    with tempfile.TemporaryDirectory() as folder:
        return build(
            case.module, (case.states(), *case.inputs(0)), path=Path(folder) / "engine", **options
        )


@given(supported())
def test_supported_modules_build_and_do_as_in_eager(case: Random) -> None:
    engine = built(case, strict=True)
    patterns = {
        record.state: record.reason.partition(":")[0] for record in engine.manifest.lowering
    }
    sources = {state.name: state.source for state in engine.manifest.states}
    appended = sum(set(plan.writes) <= set(APPENDS) for plan in case.plans)
    assert sum(pattern not in ("replace", "window") for pattern in patterns.values()) == appended, (
        patterns,
        sources,
    )
    run_beside_eager(case, engine)


@settings(max_examples=settings().max_examples // 2)
@given(st.one_of(rows_of_their_own(), varying_tokens()))
def test_rows_at_their_own_positions_and_any_number_of_tokens(case: Steps) -> None:
    engine = built(case, strict=True, **case.options)
    assert isinstance(case.module, Writes)
    for record, plan in zip(engine.manifest.lowering, case.module.states, strict=True):
        assert (record.reason.partition(":")[0] == "replace") == ("whole" in plan.ways), (
            record,
            plan,
        )
    run_beside_eager(case, engine)


@settings(max_examples=settings().max_examples // 2)
@given(attending())
def test_attention_is_found_however_it_is_written(case: Steps) -> None:
    engine = built(case, strict=True, **case.options)
    found = [
        record for record in engine.manifest.lowering if "the attention over it is" in record.reason
    ]
    assert len(found) == 2 * case.attentions, engine.manifest.lowering
    run_beside_eager(case, engine)


@settings(max_examples=settings().max_examples // 5)  # two builds each
@given(copied())
def test_what_is_written_as_a_whole_is_correct_and_refused_where_that_is_asked_for(
    case: Random,
) -> None:
    with pytest.raises(
        BuildError, match=r"is read, computed and written back whole: .*random_modules\.py"
    ):
        built(case, strict=True)
    run_beside_eager(case, built(case))


@given(unsupported())
def test_what_no_engine_can_do_is_refused_with_its_reason(case: tuple[Random, Defect]) -> None:
    working, defect = case
    module = Broken(working.module, defect.does)
    with tempfile.TemporaryDirectory() as folder, pytest.raises(BuildError, match=defect.because):
        build(
            module,
            (working.states(), *working.inputs(0), *defect.more()),
            path=Path(folder) / "engine",
            **defect.options,
        )
