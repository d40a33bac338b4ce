"""Whole decoders compile, with either mechanism, for GPUs this machine does not have; running them is for the GPU tests."""

import pytest
from inplace.trt import TensorRT, load_tensorrt
from inplace_builder.lower import CompileOptions, choose, compile_network
from lowering import DECODERS, captured, decoder_profiles, lowered

GPUS = CompileOptions(("SM89", "SM120"))


@pytest.fixture(scope="module")
def rtx() -> TensorRT:
    return load_tensorrt("tensorrt_rtx")


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_compiles_with_both_mechanisms(rtx: TensorRT, name: str) -> None:
    capture = captured(name)
    expected = {state.name: f"{state.name}_updated" for state in capture.states}
    rings = {state.name for state in capture.states if state.update == "ring"}
    kinds = {record.state: record.kind for record in choose(capture.exported.graph, capture.states, rtx, order=("kv_cache_update", "copy"))}
    assert kinds == {state.name: "copy" if state.name in rings else "kv_cache_update" for state in capture.states}
    for kind in ["copy"] if rings else ["copy", "kv_cache_update"]:
        network = lowered(capture, kind, rtx)
        assert network.state_outputs == expected
        assert compile_network(network, decoder_profiles(capture), GPUS).nbytes > 10_000


def test_an_updated_cache_is_the_output_of_the_cache_layer(rtx: TensorRT) -> None:
    """What the builder's API lets us read back of the alias before there is an engine: the layer between input and output."""
    network = lowered(captured("llama"), "kv_cache_update", rtx).network
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    pairs = {layer.get_input(0).name: layer.get_output(0).name for layer in layers if layer.type == rtx.api.LayerType.KV_CACHE_UPDATE}
    assert pairs == {f"{part}_states_{layer}": f"{part}_states_{layer}_updated" for part in ("key", "value") for layer in range(2)}


def test_attention_can_be_tensorrts_own_layer(rtx: TensorRT) -> None:
    capture = captured("llama")
    network = lowered(capture, "kv_cache_update", rtx, fused_attention=True)
    assert compile_network(network, decoder_profiles(capture), GPUS).nbytes > 10_000
