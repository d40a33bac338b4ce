"""Random modules on TensorRT: the plan of each against eager PyTorch, step by step.

Plans are built in parallel and at a low optimization level, because building is most of the time of
these tests.
"""

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from inplace.standalone import Engine
from inplace_builder.capture.exported import ExportedCapture, capture_exported
from inplace_builder.errors import BuildError
from inplace_builder.lower.compile import Target
from inplace_builder.standalone.call import alignment, describe_call, export_for
from inplace_builder.standalone.plan import build_plan
from inplace_builder.standalone.write import write_files
from torch import Tensor
from torch.utils import _pytree as pytree

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


def cuda(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.cuda(), tree)


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


def test_every_module_builds_and_computes_what_eager_does(
    engines: list[tuple[Case, Engine]],
) -> None:
    assert len(engines) == MODULES + MORE
    for index, (case, engine) in enumerate(engines):
        assert {alias.kind for alias in engine.manifest.parsed_aliases} == {"plugin"}
        run_beside_eager(f"module {index}: {case}", case, engine)


def run_beside_eager(title: str, case: Case, engine: Engine) -> None:
    """Compare outputs and states after each step.

    Elements that a step of eager PyTorch leaves unchanged must be unchanged bit for bit.
    """
    eager, mine, theirs = deepcopy(case.module), cuda(case.states()), case.states()
    own = [*pytree.tree_leaves(mine), *engine.states.values()]
    addresses = [tensor.data_ptr() for tensor in own]
    for step in range(STEPS):
        inputs = case.inputs(step)
        before = [tensor.cpu() for tensor in own]
        with torch.no_grad():
            expected = eager(theirs, *inputs)
        for one, other in zip(engine(mine, *cuda(inputs)), expected, strict=True):
            torch.testing.assert_close(
                one.cpu(), other, rtol=1e-3, atol=1e-3, msg=f"{{}} in step {step} of {title}".format
            )
        references = [
            *pytree.tree_leaves(theirs),
            *(eager.get_buffer(name) for name in engine.states),
        ]
        for one, other, old in zip(
            (tensor.cpu() for tensor in own), references, before, strict=True
        ):
            torch.testing.assert_close(
                one, other, msg=f"{{}} of a state after step {step} of {title}".format
            )
            same = other == old
            assert torch.equal(
                one[same].contiguous().view(torch.uint8), old[same].contiguous().view(torch.uint8)
            ), title
    assert addresses == [tensor.data_ptr() for tensor in own]


def test_types_that_tensorrt_lacks_are_refused() -> None:
    for case in examples(supported((torch.float64, torch.complex64, torch.int16)), 10):
        exported = export_for(case.module, (case.states(), *case.inputs(0)), "tensorrt")
        capture = capture_exported(exported)
        with pytest.raises(
            BuildError,
            match=r"no mechanism .*plugin: \w+ is (float64|complex64|int16), which TensorRT",
        ):
            build_plan(capture, describe_call(exported, capture), Target.of("tensorrt"))
