"""Latent attention: what is cached is the latent, on every engine."""

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from inplace.plugins.operations import AttentionOperation
from inplace.schema.served import Manifest
from inplace.schema.specs import Dtype
from inplace.trt import TensorRT, load_tensorrt
from inplace_builder import (
    BuildOptions,
    Capture,
    DecoderOptions,
    capture_decoder,
    write_engine,
)
from inplace_builder.tools.report import position_bytes, summary_table
from rich.console import Console
from safetensors.torch import load_file
from support.decoding import SHAPE
from support.experts import STATIC_STEPS, check_ragged_rows, graph_step, network_step
from support.lowering import lowered
from support.plugin_decoders import TwoSequences
from support.plugin_networks import tensorrt_with_plugins
from transformers import PreTrainedModel

OPTIONS = DecoderOptions(32, 4, 8)


def decoder(**changes: int) -> PreTrainedModel:
    """Latents of 16 elements, rotated parts of 4; of four heads keys of 8 + 4 and values of 10."""
    sizes = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 10}
    fields = SHAPE | sizes | {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16}
    torch.manual_seed(0)
    return transformers.MiniCPM3ForCausalLM(transformers.MiniCPM3Config(**fields | changes)).eval()


def sizes(capture: Capture) -> dict[str, tuple[int, ...]]:
    return {state.name: state.shape for state in capture.states}


@pytest.fixture(scope="module")
def rtx() -> TensorRT:
    return load_tensorrt("tensorrt_rtx")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return decoder()


@pytest.fixture(scope="module")
def capture(model: PreTrainedModel) -> Capture:
    return capture_decoder(model, OPTIONS)


@pytest.mark.filterwarnings("ignore")
def test_latents_are_the_only_state_and_logits_the_models(
    model: PreTrainedModel, capture: Capture
) -> None:
    assert sizes(capture) == {f"key_states_{layer}": (1, 32, 20) for layer in range(2)}
    assert capture.notes == {"latents": "latents of 16 elements and rotated parts of 4 (2 layers)"}
    check_ragged_rows(model, capture, graph_step(capture))


@pytest.mark.parametrize("kind", ["copy", "kv_cache_update"])
def test_networks_take_values_from_keys(
    model: PreTrainedModel, capture: Capture, rtx: TensorRT, kind: Any
) -> None:
    network = lowered(capture, kind, rtx)
    check_ragged_rows(model, capture, network_step(capture, network), STATIC_STEPS)


def test_plugins_have_one_state_of_latents(model: PreTrainedModel, capture: Capture) -> None:
    sequences = TwoSequences(capture, tensorrt_with_plugins())
    operations = [layer.operation for layer in sequences.network.network.plugins]
    attentions = [each for each in operations if isinstance(each, AttentionOperation)]
    assert [(each.latent, each.dim, each.value_dim) for each in attentions] == [(True, 20, 16)] * 2
    assert [each.aliases for each in attentions] == [{1: 2}] * 2
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(1))
    ends = [0, 0]
    for counts in ((4, 1), (1, 8), (1, 1)):
        starts, ends = ends, [end + count for end, count in zip(ends, counts, strict=True)]
        outputs = sequences.step(*(ids[row, starts[row] : ends[row]].tolist() for row in (0, 1)))
        for row in (0, 1):
            with torch.no_grad():
                expected = model(input_ids=ids[row : row + 1, : ends[row]]).logits[0, -1]
            torch.testing.assert_close(outputs[row]["logits"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_latents_larger_than_keys_and_values_are_expanded() -> None:
    model = decoder(kv_lora_rank=90)
    capture = capture_decoder(model, OPTIONS)
    assert sizes(capture)["value_states_0"] == (4, 32, 10)
    assert "94 elements are not fewer than the 88 of all heads" in capture.notes["latents"]
    check_ragged_rows(model, capture, graph_step(capture))


@pytest.mark.filterwarnings("ignore")
def test_an_expansion_that_is_not_linear_stays() -> None:
    model = decoder()
    for module in model.modules():
        if hasattr(module, "kv_b_proj"):
            module.kv_b_proj.bias = torch.nn.Parameter(torch.randn(4 * 18))
    capture = capture_decoder(model, OPTIONS)
    assert sizes(capture)["key_states_1"] == (4, 32, 12)
    assert "expand_kv is not proved to be linear (2 layers)" in capture.notes["latents"]
    check_ragged_rows(model, capture, graph_step(capture))
    assert not [name for name, _ in model.named_parameters() if "absorbed" in name]


def test_an_engine_has_the_projections_in_place_of_the_expansion(
    model: PreTrainedModel, capture: Capture, tmp_path: Path
) -> None:
    options = BuildOptions(capacity=32, slots=4, max_rows=4, chunk=8, dtype=Dtype.FLOAT32)
    write_engine(capture, tmp_path, options)
    folder = tmp_path / "1"
    stored = [each.nbytes for each in load_file(folder / "engine.safetensors").values()]
    attention = model.model.layers[0].self_attn
    assert attention.o_proj.weight.nbytes in stored
    assert attention.kv_b_proj.weight.nbytes not in stored
    manifest = Manifest.load(folder)
    assert position_bytes(manifest) == 2 * 20 * 4
    printed = StringIO()
    Console(width=120, file=printed).print(summary_table(manifest, folder))
    assert "a position  160 bytes" in printed.getvalue()
    assert "latents of 16 elements and rotated parts of 4" in printed.getvalue()
