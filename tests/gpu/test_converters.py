"""Every operator of the table, built and run by TensorRT beside PyTorch, at two sizes of one plan.

Many operators share a network, and networks are built in parallel: one network for each operator
would take minutes.
"""

import contextlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from inplace.trt import TensorRT, load_tensorrt
from inplace_builder.lower import CompileOptions, compile_network, lower, lowerable
from support.operator_case import Batch, Case
from support.operator_cases import BATCHES, CASES
from torch import Tensor

pytest.importorskip("tensorrt", reason="needs TensorRT")
pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use; there is none here"
    ),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]

from support.engine_runner import PlanRunner  # noqa: E402

QUICK = CompileOptions(optimization_level=1)
Results = dict[str, list[tuple[tuple[Tensor, ...], list[Tensor]]] | Exception]


@pytest.fixture(scope="module")
def tensorrt() -> TensorRT:
    return load_tensorrt("tensorrt")


@pytest.fixture(scope="module")
def results(tensorrt: TensorRT) -> Results:
    """TensorRT's outputs for each case, by its name, or the error."""

    def plan(batch: Batch) -> Any:
        lowered = lower(
            lowerable(batch.case.exported), outputs=batch.case.outputs, tensorrt=tensorrt
        )
        return compile_network(lowered, [batch.case.profile()], QUICK)

    def attempt(batch: Batch) -> Any:
        try:
            return plan(batch)
        except Exception as error:  # raised by its cases
            return error

    def exported(batches: Iterable[Batch]) -> list[Batch]:
        """Export them here: torch.export is not made for threads."""
        for batch in batches:
            with contextlib.suppress(Exception):  # raised again where it is planned
                _ = batch.case.exported
        return list(batches)

    with ThreadPoolExecutor(8) as pool:
        exported(BATCHES)
        plans = list(zip(BATCHES, pool.map(attempt, BATCHES), strict=True))
        # If a network fails, each case is built alone, to name the one that does.
        singles = [
            Batch((case,))
            for batch, built in plans
            if isinstance(built, Exception)
            for case in batch.cases
        ]
        plans += zip(singles, pool.map(attempt, exported(singles)), strict=True)
    by_case: Results = {}
    for batch, built in plans:
        try:
            if isinstance(built, Exception):
                raise built
            by_case |= batch.run(PlanRunner(tensorrt, built).run)
        except Exception as error:
            by_case |= {case.name: error for case in batch.cases}
    return by_case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_operator_computes_what_pytorch_computes(results: Results, case: Case) -> None:
    runs = results[case.name]
    if isinstance(runs, Exception):
        raise runs
    for inputs, outputs in runs:
        case.compare(inputs, outputs)
