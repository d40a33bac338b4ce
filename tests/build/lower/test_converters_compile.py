"""Every operator is lowered, and compiled with TensorRT for RTX.

Plans cannot run here, so the networks are interpreted in PyTorch. The GPU tests run the same table
with TensorRT.
"""

import pytest
import torch
from inplace.trt import TensorRT, load_tensorrt
from inplace_builder.lower import CompileOptions, compile_network, lower
from inplace_builder.lower.registry import registered
from support.network_interpreter import interpret
from support.operator_case import Case
from support.operator_cases import BATCHES, CASES

aten = torch.ops.aten


@pytest.fixture(scope="module")
def rtx() -> TensorRT:
    return load_tensorrt("tensorrt_rtx")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_operator_compiles_and_its_network_computes_it(rtx: TensorRT, case: Case) -> None:
    lowered = lower(case.exported, outputs=case.outputs, tensorrt=rtx)
    case.check(lambda inputs: interpret(lowered, inputs))
    assert compile_network(lowered, [case.profile()], CompileOptions(("SM89",))).nbytes > 1000


def test_many_operators_can_share_a_network(rtx: TensorRT) -> None:
    """The GPU tests build them so."""
    batch = BATCHES[-1]
    lowered = lower(batch.case.exported, outputs=batch.case.outputs, tensorrt=rtx)
    results = batch.run(lambda inputs: interpret(lowered, inputs))
    assert list(results) == [case.name for case in batch.cases]
    for case in batch.cases:
        for inputs, outputs in results[case.name]:
            case.compare(inputs, outputs)
    assert (
        compile_network(
            lowered, [batch.case.profile()], CompileOptions(("SM89",), optimization_level=1)
        ).nbytes
        > 1000
    )


def test_the_table_has_every_converter() -> None:
    used = {
        node.target
        for case in CASES
        for node in case.exported.graph.nodes
        if node.op == "call_function"
    }
    aten_operators = {overload for overload in registered() if overload.namespace == "aten"}
    assert sorted(map(str, aten_operators - used)) == []
