"""Whole decoders compile with both mechanisms for GPUs that this machine does not have.

Their networks, interpreted in PyTorch, compute what the graphs compute.
"""

import pytest
import torch
from inplace.trt import TensorRT, load_tensorrt
from inplace_builder import Capture
from inplace_builder.lower import CompileOptions, LoweredNetwork, choose_mechanisms, compile_network
from inplace_builder.lower.compile import _explanation
from support.long import long_except
from support.lowering import DECODERS, VOCABULARY, captured, decoder_profiles, greedy_rows, lowered
from support.network_interpreter import interpret
from torch import Tensor
from torch.utils import _pytree as pytree

pytestmark = pytest.mark.slow

GPUS = CompileOptions(("SM89", "SM120"))


@pytest.fixture(scope="module")
def rtx() -> TensorRT:
    return load_tensorrt("tensorrt_rtx")


@pytest.fixture(scope="module")
def llama() -> Capture:
    return captured("llama")


@pytest.mark.parametrize("name", long_except(["gemma2"], DECODERS))
def test_a_decoder_compiles_with_both_mechanisms(rtx: TensorRT, name: str) -> None:
    capture = captured(name)
    expected = {state.name: f"{state.name}_updated" for state in capture.states}
    rings = {state.name for state in capture.states if state.update == "ring"}
    kinds = {
        record.state: record.kind
        for record in choose_mechanisms(
            capture.exported.graph, capture.states, rtx, order=("kv_cache_update", "copy")
        )
    }
    assert kinds == {
        state.name: "copy" if state.name in rings else "kv_cache_update" for state in capture.states
    }
    for kind in ["copy"] if rings else ["copy", "kv_cache_update"]:
        network = lowered(capture, kind, rtx)
        assert network.state_outputs == expected
        assert compile_network(network, decoder_profiles(capture), GPUS).nbytes > 10_000
        _steps_agree(capture, network)


def _steps_agree(capture: Capture, network: LoweredNetwork) -> None:
    """Chunks and single tokens of three rows, one of them null, until every ring has wrapped.

    The memory is full of NaN at first.
    """
    graph = capture.exported.module()
    assert isinstance(graph, torch.fx.GraphModule)
    expected_memory, memory = _nan(capture), _nan(capture)
    generator = torch.Generator().manual_seed(0)
    at = 0
    for tokens in (8, 1, 5, 1, 8):
        offsets = torch.arange(4, dtype=torch.int32) * tokens
        inputs = {
            "input_ids": torch.randint(0, VOCABULARY, (3 * tokens,), generator=generator),
            "positions": (torch.arange(tokens, dtype=torch.int32) + at).repeat(3),
            "row_offsets": offsets,
            "last_tokens": offsets[1:] - 1,
            "slots": torch.tensor([0, -1, 2], dtype=torch.int32),
            "write_indices": torch.full((3,), at, dtype=torch.int32),
            **greedy_rows(3),
        }
        at += tokens
        arguments = (inputs[spec.name] for spec in capture.program.inputs)
        with torch.no_grad():
            results = torch.fx.Interpreter(graph).run(*arguments, *expected_memory.values())
        token, logits, *_ = pytree.tree_leaves(results)
        outputs = interpret(network, inputs | memory)
        memory = {name: outputs[output].clone() for name, output in network.state_outputs.items()}
        assert torch.equal(outputs["next_token"], token)
        torch.testing.assert_close(outputs["logits"], logits, rtol=1e-4, atol=1e-4)
        for name, x in memory.items():
            torch.testing.assert_close(
                x, expected_memory[name], rtol=1e-4, atol=1e-4, equal_nan=True
            )


def _nan(capture: Capture) -> dict[str, Tensor]:
    return {state.name: torch.full((3, *state.shape), float("nan")) for state in capture.states}


def test_an_updated_cache_is_the_output_of_the_cache_layer(rtx: TensorRT, llama: Capture) -> None:
    """Before there is an engine, an alias is read back as the layer between input and output."""
    network = lowered(llama, "kv_cache_update", rtx).network
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    pairs = {
        layer.get_input(0).name: layer.get_output(0).name
        for layer in layers
        if layer.type == rtx.api.LayerType.KV_CACHE_UPDATE
    }
    assert pairs == {
        f"{part}_states_{layer}": f"{part}_states_{layer}_updated"
        for part in ("key", "value")
        for layer in range(2)
    }


@pytest.mark.parametrize("kind", ["copy", "kv_cache_update"])
def test_a_batch_of_one_row_has_as_many_rows_as_slots(
    rtx: TensorRT, llama: Capture, kind: str
) -> None:
    """Row r is slot r, and the arena may have more slots than a batch has rows.

    So the row of a batch of one must not be broadcast to every slot.
    """
    one, many = (lowered(capture, kind, rtx) for capture in (captured("llama", 1), llama))
    shapes = [
        {
            tensor.name: tuple(tensor.shape)
            for tensor in map(each.network.get_input, range(each.network.num_inputs))
        }
        for each in (one, many)
    ]
    assert shapes[0] == shapes[1]
    assert all(shape[0] == -1 for shape in shapes[0].values())
    _steps_agree(llama, one)


def test_no_layer_is_between_a_weight_and_its_product(rtx: TensorRT, llama: Capture) -> None:
    """And none has more than four axes: the form that TensorRT 10.6 was seen to build."""
    network = lowered(llama, "copy", rtx).network
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    constants = {
        layer.get_output(0).name for layer in layers if layer.type == rtx.api.LayerType.CONSTANT
    }
    products = [layer for layer in layers if layer.type == rtx.api.LayerType.MATRIX_MULTIPLY]
    weights = [layer for layer in products if layer.get_input(1).name in constants]
    assert len(weights) == 7 * 2 + 1
    assert max(len(tuple(layer.get_output(0).shape)) for layer in layers) <= 4


def test_a_kernel_that_is_missing_is_explanation(rtx: TensorRT, llama: Capture) -> None:
    """TensorRT 10.6's message about a missing kernel is related to the model's own lines."""
    network = lowered(llama, "copy", rtx)
    message = (
        "Error Code 10: Internal Error (Could not find any implementation for node "
        "{ForeignNode[unsqueeze...lm_head]}.)"
    )
    assert _explanation(network, "something else") == ""
    assert "States are updated by copy: another mechanism" in _explanation(network, message)
    assert "the layers from unsqueeze at " in _explanation(network, message)
