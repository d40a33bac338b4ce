"""Decoders whose heads have attention sinks: logits without values in the softmax."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from inplace.trt import TensorRT, load_tensorrt
from inplace_builder import (
    BuildOptions,
    Capture,
    DecoderOptions,
    capture_decoder,
    capture_exported_decoder,
)
from inplace_builder.capture.experts import grouped_experts
from inplace_builder.served.build import write_engine
from support.decoding import generate, generate_together, random_prompt
from support.experts import STATIC_STEPS, check_ragged_rows, graph_step, network_step
from support.exported_decoders import exported
from support.long import long_except
from support.lowering import captured, lowered
from support.models import open_instance
from support.sinks import SINKS, decoder_with_sinks, sinks_of
from torch.fx import Node

CAPACITY, CHUNK, TOKENS = 72, 8, 24
OPTIONS = BuildOptions(slots=3, max_rows=3, capacity=CAPACITY, chunk=CHUNK)
PROMPTS = [random_prompt(1, 41), random_prompt(2, 3), random_prompt(3, 17)]
"""Longer than the windows, shorter, and between."""

EACH = pytest.mark.parametrize("name", long_except(["gpt_oss"], SINKS))


def attentions(capture: Capture) -> list[Node]:
    target = torch.ops.inplace.attention.default
    return list(capture.exported.graph.find_nodes(op="call_function", target=target))


@pytest.mark.slow
@EACH
@pytest.mark.filterwarnings("ignore")
def test_ragged_rows_generate_what_transformers_generates(tmp_path: Path, name: str) -> None:
    model = decoder_with_sinks(name)
    expected = [generate(model, prompt, TOKENS) for prompt in PROMPTS]
    assert len({token for tokens in expected for token in tokens}) >= 8
    capture = capture_decoder(model, DecoderOptions(CAPACITY, 3, CHUNK))
    write_engine(capture, tmp_path / "model", OPTIONS)
    assert generate_together(open_instance(tmp_path / "model"), PROMPTS, TOKENS) == expected
    with torch.no_grad():
        for parameter in sinks_of(model):
            parameter.fill_(-1e9)
    assert [generate(model, prompt, TOKENS) for prompt in PROMPTS] != expected, (
        "sinks make no difference"
    )


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", long_except([], [True, False]))
@pytest.mark.filterwarnings("ignore")
def test_a_decoder_that_transformers_exports_has_its_sinks(dynamic: bool) -> None:
    model = decoder_with_sinks("gpt_oss")
    model.set_attn_implementation("eager")
    with grouped_experts(model):
        program = exported(model, dynamic=dynamic)
    capture = capture_exported_decoder(program, DecoderOptions(32, 4, CHUNK))
    assert [len(node.args) for node in attentions(capture)] == [9, 9]
    check_ragged_rows(model, capture, graph_step(capture))


@pytest.fixture(scope="module")
def rtx() -> TensorRT:
    return load_tensorrt("tensorrt_rtx")


@EACH
@pytest.mark.filterwarnings("ignore")
def test_networks_for_tensorrt_have_the_logits_of_the_model(rtx: TensorRT, name: str) -> None:
    model = decoder_with_sinks(name)
    capture = capture_decoder(model, DecoderOptions(32, 4, CHUNK))
    with_sinks = [node for node in attentions(capture) if len(node.args) == 9]
    assert len(with_sinks) == len(sinks_of(model)) == SINKS[name]
    check_ragged_rows(model, capture, graph_step(capture))
    network = lowered(capture, "copy", rtx)
    check_ragged_rows(model, capture, network_step(capture, network), STATIC_STEPS)


def test_an_attention_without_sinks_is_the_softmax_that_it_was(rtx: TensorRT) -> None:
    """One softmax layer for each attention, and nothing of a sink: no maximum, no exponential."""
    capture = captured("llama")
    assert all(len(node.args) == 8 for node in attentions(capture))
    for kind in ("copy", "kv_cache_update"):
        network = lowered(capture, kind, rtx).network
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        kinds = Counter(layer.type for layer in layers)
        assert kinds[rtx.api.LayerType.SOFTMAX] == len(attentions(capture)) == 2
        reductions = [layer for layer in layers if layer.type == rtx.api.LayerType.REDUCE]
        for layer in reductions:
            layer.__class__ = rtx.api.IReduceLayer
        assert {layer.op for layer in reductions} == {rtx.api.ReduceOperation.AVG}, "of the norms"
