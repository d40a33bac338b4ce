"""Every use of a state compiles with the mechanisms that support it; the others give a reason.

Compiled with TensorRT for RTX. Plans cannot run here, so the networks are interpreted in PyTorch.
The GPU tests run them with TensorRT.
"""

import pytest
from inplace.schema.specs import AliasKind
from inplace.trt import TensorRT, load_tensorrt
from inplace_builder.errors import BuildError
from inplace_builder.lower import CompileOptions, choose_mechanisms, compile_network, lower
from support.long import long_except
from support.native_cases import NATIVE_CASES, REFUSED, no_matrix_products
from support.network_interpreter import interpret
from support.state_cases import STATE_CASES, StateCase
from torch import Tensor

COMBINED = {
    "attention-chunk-not-grouped",
    "bias-bfloat16",
    "bias-not-grouped",
    "bias-of-all-heads",
    "causal-bfloat16",
    "not-causal-one-kv-head",
    "sinks-bfloat16",
    "sinks-softcap",
}
"""Cases of options that others have alone, or in another combination."""
SOME = [case for case in STATE_CASES if case.name not in COMBINED]
NATIVE = [
    case
    for case in NATIVE_CASES
    if case.name in {"append-rows", "bias", "causal", "cross", "sinks"}
]


@pytest.fixture(scope="module")
def rtx() -> TensorRT:
    return load_tensorrt("tensorrt_rtx")


@pytest.mark.parametrize("kind", ["copy", "kv_cache_update"])
@pytest.mark.parametrize("case", long_except(SOME, STATE_CASES), ids=lambda case: case.name)
def test_a_use_of_a_state_compiles_or_is_refused(
    rtx: TensorRT, case: StateCase, kind: AliasKind
) -> None:
    if kind == "kv_cache_update" and case.name in REFUSED:
        with pytest.raises(BuildError, match=REFUSED[case.name]):
            choose_mechanisms(case.exported.graph, case.states, rtx, order=("kv_cache_update",))
        return
    (choice,) = {
        record.kind
        for record in choose_mechanisms(case.exported.graph, case.states, rtx, order=(kind,))
    }
    assert choice == kind
    lowered = lower(
        case.exported,
        outputs=["out"],
        states=case.states,
        kinds={s.name: kind for s in case.states},
        tensorrt=rtx,
    )
    assert set(lowered.state_outputs) == (
        set() if case.name == "cross" else {state.name for state in case.states}
    )

    def step(
        inputs: dict[str, Tensor], memory: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        outputs = interpret(lowered, inputs | memory)
        return outputs["out"], memory | {
            name: outputs[output].clone() for name, output in lowered.state_outputs.items()
        }

    case.check(step)
    assert (
        compile_network(lowered, [case.profile()], CompileOptions(("SM89", "SM120"))).nbytes > 1000
    )


@pytest.mark.parametrize("case", long_except(NATIVE, NATIVE_CASES), ids=lambda case: case.name)
def test_the_cache_layers_networks_without_matrix_products_compute_the_same(
    rtx: TensorRT, case: StateCase
) -> None:
    """What `tests/gpu/test_native_kv.py` runs."""
    kinds: dict[str, AliasKind] = {state.name: "kv_cache_update" for state in case.states}
    with no_matrix_products():
        lowered = lower(
            case.exported, outputs=["out"], states=case.states, kinds=kinds, tensorrt=rtx
        )
    layers = [lowered.network.get_layer(index) for index in range(lowered.network.num_layers)]
    assert rtx.api.LayerType.MATRIX_MULTIPLY not in {layer.type for layer in layers}
    assert len(case.steps) == 20

    def step(
        inputs: dict[str, Tensor], memory: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return interpret(lowered, inputs | memory)["out"], memory

    case.check(step)
