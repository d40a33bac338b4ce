"""Convolutions and recurrences as TensorRT's plugins equal the operators on the CPU.

They also equal transformers' functions, over several steps of each row. A network is built for each
size and dtype; its state is an output at its own address.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from inplace.plugins import plugins
from inplace.trt import TensorRT, load_tensorrt
from inplace_builder.lower import CompileOptions, compile_network
from inplace_builder.lower.recurrences import NAMES
from support.recurrence_steps import SHAPES, STEPS, Step
from support.recurrent_case import CHECKS, Operator
from support.recurrent_networks import RecurrenceNetwork
from torch import Tensor

pytest.importorskip("tensorrt", reason="needs TensorRT")
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use; there is none here"
)

from support.engine_runner import PlanRunner  # noqa: E402

DTYPES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""With the tolerance of outputs and states."""
OPTIONS = CompileOptions(plugins=True, optimization_level=1)
RUN = [name for name, (slots, counts) in STEPS.items() if slots and sum(counts)]
"""Steps with tokens: a plan takes one at least."""
Plans = dict[tuple[str, torch.dtype], tuple[RecurrenceNetwork, PlanRunner]]


@pytest.fixture(scope="module")
def tensorrt() -> TensorRT:
    return load_tensorrt("tensorrt")


@pytest.fixture(scope="module")
def plans(tensorrt: TensorRT) -> Plans:
    """The network and the plan of every size and dtype."""
    networks = {}
    for name, shape in SHAPES.items():
        for dtype in DTYPES:
            arguments = Step(shape, "decode", dtype).arguments()
            networks[name, dtype] = RecurrenceNetwork.of(
                tensorrt, shape.name, arguments, shape.options
            )

    def build(network: RecurrenceNetwork) -> Any:
        return compile_network(network.lowered, [network.profile()], OPTIONS)

    with ThreadPoolExecutor(8) as pool:
        built = list(pool.map(build, networks.values()))
    return {
        key: (network, PlanRunner(tensorrt, plan))
        for (key, network), plan in zip(networks.items(), built, strict=True)
    }


def run(
    tensorrt: TensorRT, network: RecurrenceNetwork, runner: PlanRunner, arguments: list[Any]
) -> Tensor:
    """The plan's result; the state, on the GPU, is updated where it is."""
    inputs = network.inputs(arguments)
    owner, state = plugins(tensorrt), inputs["state"]
    failures = owner.failures
    with owner.observe_aliases() as addresses:
        out = runner.run(inputs, {"state_updated": state})["out"]
    assert owner.failures == failures, owner.errors
    assert addresses == {state.data_ptr()}
    return out


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("step", RUN)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_plugin_equals_the_operator_on_the_cpu(
    tensorrt: TensorRT, plans: Plans, dtype: torch.dtype, step: str, name: str
) -> None:
    shape = SHAPES[name]
    on_cpu, on_gpu = Step(shape, step, dtype), Step(shape, step, dtype).to("cuda")
    before = on_cpu.state.clone()
    expected = on_cpu.run()
    out = run(tensorrt, *plans[name, dtype], on_gpu.arguments())
    on_gpu.compare(out, expected, on_cpu.state, before, DTYPES[dtype])


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),  # time steps of up to 20 multiply the rounding of bfloat16
    [(torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 6e-2)],
    ids=str,
)
def test_plugins_equal_the_functions_of_transformers(
    tensorrt: TensorRT, dtype: torch.dtype, tolerance: float, name: str
) -> None:
    def operator(name: str) -> Operator:
        made: list[tuple[RecurrenceNetwork, PlanRunner]] = []

        def call(*arguments: Any, **options: Any) -> Tensor:
            if not made:  # all steps of a check have the same sizes
                network = RecurrenceNetwork.of(tensorrt, name, list(arguments), options)
                plan = compile_network(network.lowered, [network.profile()], OPTIONS)
                made.append((network, PlanRunner(tensorrt, plan)))
            moved = [x if x is None else x.cuda() for x in arguments]
            out = run(tensorrt, *made[0], moved)
            arguments[-3].copy_(moved[-3])
            return out.cpu()

        return call

    CHECKS[name]({name: operator(name) for name in NAMES}, dtype, tolerance)
