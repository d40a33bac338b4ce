"""TensorRT's own cache layer, executed: 20 steps of every state case, and standalone engines.

The networks have no matrix products (`support.native_cases`). Every state must stay where it is,
and slots around those that are bound must keep their bytes. Plans are built at optimization level
0, at which TensorRT 10.15 was seen to build such networks.
"""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from inplace.trt import TensorRT, load_tensorrt
from inplace_builder.lower import CompileOptions, choose_mechanisms, compile_network, lower
from inplace_builder.lower.kv_cache_update import KIND, MIN_VERSION
from inplace_builder.standalone.build import build
from support.comparing import compare_engine
from support.corpus import CORPUS
from support.corpus.case import ModuleCase
from support.native_cases import NATIVE_CASES, no_matrix_products
from support.state_cases import StateCase
from torch import Tensor

pytest.importorskip("tensorrt", reason="needs TensorRT")
VERSION = load_tensorrt("tensorrt").version
pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use; there is none here"
    ),
    pytest.mark.skipif(
        VERSION[:2] < MIN_VERSION,
        reason=f"IKVCacheUpdateLayer is in TensorRT 10.15 and later, this is {VERSION}",
    ),
]

from support.engine_runner import PlanRunner  # noqa: E402

LEVEL = 0
MODULES = [case for case in CORPUS.values() if case.plans and case.fits_cache_layer]


@pytest.fixture(scope="module")
def tensorrt() -> TensorRT:
    return load_tensorrt("tensorrt")


def between_others(memory: Tensor) -> Tensor:
    """The states on the GPU, with a slot of noise before them and one after them."""
    noise = torch.randn_like(memory[:1])
    return torch.cat([noise, memory, noise]).cuda()


@pytest.mark.parametrize("case", NATIVE_CASES, ids=lambda case: case.name)
def test_steps_write_the_caches_in_place_and_compute_what_the_operators_compute(
    tensorrt: TensorRT, case: StateCase
) -> None:
    choose_mechanisms(case.exported.graph, case.states, tensorrt, order=(KIND,))
    kinds = {state.name: KIND for state in case.states}
    with no_matrix_products():
        lowered = lower(
            case.exported, outputs=["out"], states=case.states, kinds=kinds, tensorrt=tensorrt
        )
    options = CompileOptions(optimization_level=LEVEL)
    runner = PlanRunner(tensorrt, compile_network(lowered, [case.profile()], options))
    for state, output in lowered.state_outputs.items():
        assert runner.engine.get_aliased_input_tensor(output) == state
    arenas = {name: between_others(x) for name, x in case.memory().items()}
    before = {name: arena.clone() for name, arena in arenas.items()}
    bound = {name: arena[1:-1] for name, arena in arenas.items()}
    in_place = {output: bound[name] for name, output in lowered.state_outputs.items()}

    def step(
        inputs: dict[str, Tensor], memory: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        outputs = runner.run(inputs | bound, in_place)
        for name, output in lowered.state_outputs.items():
            addresses = {
                runner.context.get_tensor_address(name),
                runner.context.get_tensor_address(output),
            }
            assert addresses == {bound[name].data_ptr()}
        return outputs["out"], bound

    case.check(step)
    for name, arena in arenas.items():
        assert torch.equal(arena[[0, -1]], before[name][[0, -1]])


@pytest.mark.parametrize("case", MODULES, ids=lambda case: case.name)
def test_standalone_engines_compute_what_their_modules_do(case: ModuleCase, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = case.module().eval()
    with no_matrix_products():
        engine = build(
            deepcopy(module),
            case.example(),
            path=tmp_path / "engine",
            engine="tensorrt",
            alias=KIND,
            optimization_level=LEVEL,
            **case.options,
        )
    assert {record.kind for record in engine.manifest.lowering} == {KIND}
    compare_engine(
        engine,
        module,
        case.states,
        case.inputs,
        steps=case.steps,
        callers=2,
        device="cuda",
        tolerance=1e-4,
    )
