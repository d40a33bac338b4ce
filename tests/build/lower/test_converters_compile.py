"""Every operator is lowered, and compiled with TensorRT for RTX.

Plans cannot run here, so the networks are interpreted in PyTorch. The GPU tests run the same table
with TensorRT.
"""

import pytest
import torch
from inplace.trt import TensorRT, load_tensorrt
from inplace_builder.lower import CompileOptions, compile_network, lower, lowerable
from inplace_builder.lower.registry import registered
from support.core_cases import DECOMPOSED
from support.long import long_except
from support.network_interpreter import interpret
from support.operator_case import Batch, Case
from support.operator_cases import BATCHES, CASES

from tools.operators import PAGE, page

aten = torch.ops.aten


pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:The tensor attributes self.part._flat_weights"),
]

FIRST: dict[str, Case] = {}
for each in (*CASES, *DECOMPOSED):
    FIRST.setdefault(each.name.partition("-")[0], each)


@pytest.fixture(scope="module")
def rtx() -> TensorRT:
    return load_tensorrt("tensorrt_rtx")


@pytest.mark.parametrize(
    "case", long_except(FIRST.values(), [*CASES, *DECOMPOSED]), ids=lambda case: case.name
)
def test_an_operators_network_computes_it(rtx: TensorRT, case: Case) -> None:
    lowered = lower(lowerable(case.exported), outputs=case.outputs, tensorrt=rtx)
    case.check(lambda inputs: interpret(lowered, inputs))


@pytest.mark.parametrize(
    "batch", long_except(BATCHES[:1], BATCHES), ids=lambda batch: batch.cases[0].name
)
def test_operators_compile_in_one_network(rtx: TensorRT, batch: Batch) -> None:
    """The GPU tests build them so."""
    program = lowerable(batch.case.exported)
    lowered = lower(program, outputs=batch.case.outputs, tensorrt=rtx)
    options = CompileOptions(("SM89",), optimization_level=1)
    assert compile_network(lowered, [batch.case.profile()], options).nbytes > 1000


def test_operators_that_share_a_network_are_compared_one_by_one(rtx: TensorRT) -> None:
    batch = BATCHES[-1]
    program = lowerable(batch.case.exported)
    lowered = lower(program, outputs=batch.case.outputs, tensorrt=rtx)
    results = batch.run(lambda inputs: interpret(lowered, inputs))
    assert list(results) == [case.name for case in batch.cases]
    for case in batch.cases:
        for inputs, outputs in results[case.name]:
            case.compare(inputs, outputs)


def test_the_page_of_operators_is_current() -> None:
    assert PAGE.read_text() == page(), "run `make tables`"


def test_the_table_has_every_converter() -> None:
    used = {
        node.target
        for case in CASES
        for node in case.exported.graph.nodes
        if node.op == "call_function"
    }
    aten_operators = {overload for overload in registered() if overload.namespace == "aten"}
    assert sorted(map(str, aten_operators - used)) == []
