"""Latent attention: what is cached is the latent, on every engine."""

import pytest
import torch
import transformers
from inplace.trt import TensorRT, load_tensorrt
from inplace_builder import Capture, DecoderOptions, capture_decoder
from support.decoding import SHAPE
from support.experts import STATIC_STEPS, check_ragged_rows, graph_step, network_step
from support.lowering import lowered
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["copy", "kv_cache_update"])
def test_latents_are_the_only_state_and_logits_the_models(rtx: TensorRT, kind: str) -> None:
    model = decoder()
    capture = capture_decoder(model, OPTIONS)
    assert sizes(capture) == {f"key_states_{layer}": (1, 32, 20) for layer in range(2)}
    check_ragged_rows(model, capture, graph_step(capture))
    network = lowered(capture, kind, rtx)  # type: ignore[arg-type]
    check_ragged_rows(model, capture, network_step(capture, network), STATIC_STEPS)


@pytest.mark.filterwarnings("ignore")
def test_latents_larger_than_keys_and_values_are_expanded() -> None:
    model = decoder(kv_lora_rank=90)
    capture = capture_decoder(model, OPTIONS)
    assert sizes(capture)["value_states_0"] == (4, 32, 10)
    check_ragged_rows(model, capture, graph_step(capture))


@pytest.mark.filterwarnings("ignore")
def test_an_expansion_that_is_not_linear_stays() -> None:
    model = decoder()
    for module in model.modules():
        if hasattr(module, "kv_b_proj"):
            module.kv_b_proj.bias = torch.nn.Parameter(torch.randn(4 * 18))
    capture = capture_decoder(model, OPTIONS)
    assert sizes(capture)["key_states_1"] == (4, 32, 12)
    check_ragged_rows(model, capture, graph_step(capture))
    assert not [name for name, _ in model.named_parameters() if "absorbed" in name]
