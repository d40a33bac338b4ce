"""Modules of the corpus, and random ones, on TensorRT: each plan computes what its module does.

Plans are built in parallel and at a low optimization level, because building is most of the time of
these tests.
"""

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import inplace
import pytest
import torch
from inplace.standalone import Engine
from inplace_builder.capture.exported import ExportedCapture, capture_exported
from inplace_builder.errors import BuildError
from inplace_builder.lower.compile import Target
from inplace_builder.standalone.build import (
    alignment,
    build,
    describe_call,
    export_for,
    write_files,
)
from inplace_builder.standalone.plan import build_plan
from support.comparing import compare_engine
from support.corpus import CORPUS
from torch import Tensor

pytest.importorskip("tensorrt", reason="needs TensorRT")
pytest.importorskip("hypothesis", reason="needs Hypothesis, which makes the modules")
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use; there is none here"
)

from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from support.random_modules import STEPS, Random, supported  # noqa: E402
from support.random_steps import Steps, attending, rows_of_their_own, varying_tokens  # noqa: E402

MODULES, MORE = 40, 20
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.bool)


Case = Random | Steps


def examples(strategy: st.SearchStrategy[Case], count: int) -> list[Case]:
    """Examples of a strategy, the same in every run."""
    cases: list[Case] = []
    few = settings(
        max_examples=count,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )

    @few
    @given(strategy)
    def gather(case: Case) -> None:
        cases.append(case)

    gather()
    return cases[:count]


@pytest.mark.parametrize(
    ("name", "alias"),
    [
        *((case.name, "plugin") for case in CORPUS.values() if case.plans),
        ("attention written out", "copy"),
        ("recurrent", "copy"),
    ],
)
def test_replayed_and_launched_steps_equal_eager(name: str, alias: Any, tmp_path: Path) -> None:
    case = CORPUS[name]
    torch.manual_seed(0)
    module, path = case.module().eval(), tmp_path / "engine"
    engine = build(
        deepcopy(module),
        case.example(),
        path=path,
        engine="tensorrt",
        alias=alias,
        optimization_level=1,
        **case.options,
    )
    assert {record.kind for record in engine.manifest.lowering} == {alias}
    assert {text.rpartition("@")[2] for text in engine.manifest.aliases} == {alias}

    def compare(engine: Engine) -> list[list[Tensor]]:
        return compare_engine(
            engine,
            module,
            case.states,
            case.inputs,
            steps=10,
            callers=2,
            device="cuda",
            tolerance=1e-4,
        )

    replayed = compare(engine)
    captured = [key for key, graph in engine._runner._graphs.items() if graph is not None]  # type: ignore[attr-defined]
    assert captured, "a call that came again was captured"
    launched = compare(inplace.load(path, cuda_graphs=False))
    for one, other in zip(replayed, launched, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), (
            "graphs on and off give the same bits"
        )


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Case, Engine]]:
    folder = tmp_path_factory.mktemp("engines")
    cases = examples(supported(DTYPES), MODULES)
    cases += examples(st.one_of(rows_of_their_own(), varying_tokens(), attending()), MORE)

    def captured(case: Case) -> tuple[ExportedCapture, Any]:  # torch.export is not made for threads
        options = dict(case.options) if isinstance(case, Steps) else {}
        shapes = options.pop("dynamic_shapes", None)
        exported = export_for(
            case.module, (case.states(), *case.inputs(0)), "tensorrt", dynamic_shapes=shapes
        )
        capture = capture_exported(
            exported, strict=True, alignment=alignment("tensorrt"), **options
        )
        return capture, describe_call(exported, capture)

    def compiled(path: Path, capture: ExportedCapture, call: Any) -> Path:
        target = Target.of("tensorrt")
        plan = build_plan(capture, call, target, alias="plugin", optimization_level=1)
        path.mkdir()
        write_files(path, capture, call, plan)
        return path

    captures = [captured(case) for case in cases]
    with ThreadPoolExecutor(8) as pool:
        futures = [
            pool.submit(compiled, folder / str(index), *capture)
            for index, capture in enumerate(captures)
        ]
    # only after all are built: TensorRT captures the kernels that it times, and CUDA ends a capture
    # when another thread uses the default stream
    return [
        (case, Engine.load(future.result())) for case, future in zip(cases, futures, strict=True)
    ]


def _given(case: Case) -> list[Any]:
    """All states of a random module are one argument."""
    return [case.states()]


def test_every_random_module_builds_and_computes_what_eager_does(
    engines: list[tuple[Case, Engine]],
) -> None:
    assert len(engines) == MODULES + MORE
    for index, (case, engine) in enumerate(engines):
        assert {alias.kind for alias in engine.manifest.parsed_aliases} == {"plugin"}
        compare_engine(
            engine,
            case.module,
            partial(_given, case),
            case.inputs,
            steps=STEPS,
            device="cuda",
            title=f"module {index}: {case}",
            tolerance=1e-3,
        )


def test_types_that_tensorrt_lacks_are_refused() -> None:
    for case in examples(supported((torch.float64, torch.complex64, torch.int16)), 10):
        exported = export_for(case.module, (case.states(), *case.inputs(0)), "tensorrt")
        capture = capture_exported(exported)
        with pytest.raises(
            BuildError,
            match=r"no mechanism .*plugin: \w+ is (float64|complex64|int16), which TensorRT",
        ):
            build_plan(capture, describe_call(exported, capture), Target.of("tensorrt"))
