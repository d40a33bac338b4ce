"""What is true of every module of the corpus, captured and built."""

import re
from copy import deepcopy
from pathlib import Path

import torch
from inplace.schema.specs import Update
from inplace_builder.standalone.build import build

from support.comparing import compare_engine, compare_graph, operators
from support.corpus.case import ModuleCase


def check_graph(case: ModuleCase) -> None:
    """Capture the module, run the graph beside it, and compare the outcome with the expected."""
    torch.manual_seed(0)
    capture = compare_graph(
        case.module(), case.states(), case.inputs, steps=case.steps, **case.options
    )
    assert {state.name: state.pattern for state in capture.states} == case.patterns
    assert capture.rows == case.rows
    if case.operators is not None:
        assert operators(capture) == case.operators
    if case.axes:
        assert tuple(state.axis for state in capture.states) == case.axes
        assert all(state.update is Update.APPEND for state in capture.states)
    assert any(re.search(case.reason, state.reason) for state in capture.states)
    owner = "caller" if case.states() else "module"
    assert all(state.tensor.owner == owner for state in capture.states)
    for state, record in zip(capture.states, capture.lowering, strict=True):
        assert state.is_matched == (state.pattern != "explicit")
        if not state.is_matched:
            assert record.reason.startswith("explicit: ")
            assert re.search(r"corpus/\w+\.py", state.reason), "it names the module's line"


def check_engine(case: ModuleCase, folder: Path) -> None:
    """Build an engine for a CPU and call it beside the module, for two callers in turn."""
    torch.manual_seed(0)
    module = case.module().eval()
    engine = build(
        deepcopy(module),
        case.example(),
        path=folder / "engine",
        strict=not case.explicit,
        **case.options,
    )
    assert any(re.search(case.reason, record.reason) for record in engine.manifest.lowering)
    compare_engine(engine, module, case.states, case.inputs, steps=case.steps, callers=2)
