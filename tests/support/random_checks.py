"""What must be true of random modules, and how many of them are tried."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from inplace.standalone import Engine
from inplace.trt import load_tensorrt
from inplace_builder.errors import BuildError, LoweringError
from inplace_builder.standalone.build import build

from support.comparing import compare_engine
from support.random_layers import stacks
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
from support.row_cases import RowCase
from support.row_checks import check_network, check_rows
from support.time_limit import within

SECONDS_PER_MODULE = 120
"""Within this a stack of layers is captured, built, verified and compared."""


def run(kind: str, examples: int, shard: int | None = None) -> None:
    """Try random modules of a kind; the same ones in every run, or others in each shard."""
    strategy, check = KINDS[kind]

    @hypothesis.settings(max_examples=examples, derandomize=shard is None)
    @hypothesis.given(strategy)
    def once(case: Any) -> None:
        check(case)

    if shard is not None:
        once = hypothesis.seed(shard)(once)
    once()


def _build(case: Random | Steps, **options: Any) -> Engine:
    with tempfile.TemporaryDirectory() as folder:
        example = (case.states(), *case.inputs(0))
        return build(case.module, example, path=Path(folder) / "engine", **options)


def _compare(case: Random | Steps, engine: Engine) -> None:
    compare_engine(engine, case.module, lambda: [case.states()], case.inputs, steps=STEPS)


def patterns(engine: Engine) -> list[str]:
    """How each state is written."""
    return [record.reason.partition(":")[0] for record in engine.manifest.lowering]


def check_supported(case: Random) -> None:
    """States that are written in parts are appended to, all others replaced."""
    engine = _build(case, strict=True)
    result = patterns(engine)
    appended = sum(set(plan.writes) <= set(APPENDS) for plan in case.plans)
    assert sum(pattern not in ("replace", "window") for pattern in result) == appended, result
    _compare(case, engine)


def check_steps(case: Steps) -> None:
    """Rows write at positions of their own, or a step writes any number of tokens."""
    engine = _build(case, strict=True, **case.options)
    assert isinstance(case.module, Writes)
    for pattern, plan in zip(patterns(engine), case.module.states, strict=True):
        assert (pattern == "replace") == ("whole" in plan.ways), (pattern, plan)
    _compare(case, engine)


def check_attention(case: Steps) -> None:
    """Every layer of attention is matched, however it is written."""
    engine = _build(case, strict=True, **case.options)
    matched = [
        record for record in engine.manifest.lowering if "the attention over it is" in record.reason
    ]
    assert len(matched) == 2 * case.attentions, engine.manifest.lowering
    _compare(case, engine)


def check_copied(case: Random) -> None:
    """A state that is written back whole is correct, and refused by ``strict``."""
    message = r"is read, computed and written back whole: .*random_modules\.py"
    with pytest.raises(BuildError, match=message):
        _build(case, strict=True)
    _compare(case, _build(case))


def check_refused(case: tuple[Random, Defect]) -> None:
    """A module that does one thing that no engine can is refused with the reason."""
    working, defect = case
    module = Broken(working.module, defect.does)
    example = (working.states(), *working.inputs(0), *defect.more())
    with tempfile.TemporaryDirectory() as folder, pytest.raises(BuildError, match=defect.reason):
        build(module, example, path=Path(folder) / "engine", **defect.options)


def check_layers(case: RowCase) -> None:
    """A stack of layers is built in time; rows compute what it computes for each sequence alone.

    So does the network for TensorRT, which has no states of int8.
    """
    within(SECONDS_PER_MODULE, _check_layers, case)


def _check_layers(case: RowCase) -> None:
    hypothesis.note(case.name)
    with tempfile.TemporaryDirectory() as folder:
        capture = check_rows(case, Path(folder))
    tensorrt = load_tensorrt("tensorrt_rtx")
    if "int8" in case.name:
        with pytest.raises(LoweringError, match="entries, which is int8"):
            check_network(capture, case, tensorrt)
    else:
        check_network(capture, case, tensorrt)


KINDS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], None]]] = {
    "supported": (supported(), check_supported),
    "rows and tokens": (st.one_of(rows_of_their_own(), varying_tokens()), check_steps),
    "attention": (attending(), check_attention),
    "written back whole": (copied(), check_copied),
    "refused": (unsupported(), check_refused),
    "layers": (stacks(), check_layers),
}
