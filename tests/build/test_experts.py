"""Decoders with a mixture of experts: ``inplace::grouped_linear`` for every engine."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from decoders.configs import make_model
from inplace.trt import load_tensorrt
from inplace_builder import (
    BuildError,
    Capture,
    DecoderOptions,
    capture_decoder,
    capture_exported_decoder,
)
from inplace_builder.capture.experts import grouped_experts
from inplace_builder.fusion.fuse import bindable_weights, fuse
from inplace_builder.lower import lower, lowerable
from support.comparing import operators
from support.experts import (
    CAPACITY,
    CHUNK,
    CONFIGURATIONS,
    ROWS,
    STATIC_STEPS,
    check_ragged_rows,
    graph_step,
    moe_decoder,
    network_step,
)
from support.exported_decoders import exported as exported_decoder
from support.long import long_except
from support.lowering import lowered
from support.network_interpreter import interpret
from torch import Tensor
from torch.export import Dim
from transformers import PreTrainedModel
from transformers.integrations.finegrained_fp8 import FP8Experts
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.dbrx.modeling_dbrx import DbrxExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.jetmoe.modeling_jetmoe import JetMoeMoA, JetMoeMoE
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

OPTIONS = DecoderOptions(CAPACITY, ROWS, CHUNK)


def captured(model: PreTrainedModel) -> Capture:
    capture = capture_decoder(model, OPTIONS)
    assert model.get_experts_implementation()[""] == "eager", "the model is left as it was"
    return capture


@pytest.mark.parametrize("name", long_except(["mixtral"], CONFIGURATIONS))
@pytest.mark.filterwarnings("ignore")
def test_ragged_rows_have_the_logits_of_eager_experts(name: str) -> None:
    """Of the graph, and of its network for TensorRT."""
    model = moe_decoder(name)
    capture = captured(model)
    count = sum(hasattr(part, "gate_up_proj") for part in model.modules() if is_experts(part))
    assert operators(capture)["grouped_linear"] == 2 * count > 0
    check_ragged_rows(model, capture, graph_step(capture))
    network = lowered(capture, "copy", load_tensorrt("tensorrt_rtx"))  # no operator is missing
    check_ragged_rows(model, capture, network_step(capture, network), STATIC_STEPS)


@pytest.mark.parametrize("name", long_except(["mixtral"], ["mixtral", "glm4_moe", "ernie4_5_moe"]))
@pytest.mark.filterwarnings("ignore")
def test_a_decoder_that_transformers_exports_may_have_grouped_experts(name: str) -> None:
    model = moe_decoder(name)
    with grouped_experts(model):
        program = exported_decoder(model, dynamic=True)
    capture = capture_exported_decoder(program, OPTIONS)
    assert operators(capture)["grouped_linear"] > 0
    check_ragged_rows(model, capture, graph_step(capture))


def is_experts(module: torch.nn.Module) -> bool:
    return isinstance(getattr(module, "gate_up_proj", None), torch.nn.Parameter)


def test_weights_of_experts_are_bound_so_that_no_plan_holds_them() -> None:
    capture = captured(moe_decoder("mixtral"))
    program = fuse(lowerable(capture.exported))
    grouped = [node for node in program.graph.nodes if "grouped_linear" in str(node.target)]
    assert len(grouped) == 4
    assert {node.args[2].name for node in grouped} <= bindable_weights(program)


BLOCKS = [
    *("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"),
    *("gpt_oss", "granitemoe_swa", "granitemoehybrid", "hy_v4", "jamba", "kimi_linear", "lfm2_moe"),
    *("longcat_flash", "mimo_v2_flash", "minimax", "minimax_m3_vl_text", "nemotron_h"),
    "qwen3_next",
]
"""Models whose attention or other layers have more than these tests are about."""


class Block(torch.nn.Module):
    """Router, experts and shared experts of a layer, without the router's scores."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """``[1, tokens, hidden]`` to the same."""
        out = self.block(x)
        result = out[0] if isinstance(out, tuple) else out
        assert isinstance(result, Tensor)
        return result


@pytest.mark.parametrize("name", long_except(["deepseek_v3", "gpt_oss"], BLOCKS))
@pytest.mark.filterwarnings("ignore")
def test_a_block_of_routed_experts_lowers_and_equals_the_eager_one(name: str) -> None:
    model = make_model(name)
    if name != "longcat_flash":  # its experts are not behind the interface
        model.set_experts_implementation("eager")
    experts = next(
        path for path, part in model.named_modules() if type(part).__name__.endswith("Experts")
    )
    block = Block(model.get_submodule(experts.rpartition(".")[0]))
    hidden: int = model.config.get_text_config(decoder=True).hidden_size
    shapes = ({1: Dim("tokens", min=1, max=64)},)
    with grouped_experts(model), torch.no_grad():
        exported = torch.export.export(block, (torch.randn(1, 5, hidden),), dynamic_shapes=shapes)
    program = lowerable(exported)
    assert sum("grouped_linear" in str(node.target) for node in program.graph.nodes) == 2
    network = lower(program, outputs=["y"], tensorrt=load_tensorrt("tensorrt_rtx"))
    for tokens in (1, 9):
        x = torch.randn(1, tokens, hidden)
        with torch.no_grad():
            expected = block(x)
        result = interpret(network, {network.inputs[0]: x})["y"]
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


GPT_OSS = {
    "hidden_size": 24,
    "intermediate_size": 16,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
}
NEMOTRON = {
    "hidden_size": 24,
    "moe_intermediate_size": 16,
    "n_routed_experts": 5,
    "mlp_hidden_act": "relu2",
}
LAYERS: dict[str, tuple[Any, Any]] = {
    # transposed weights, biases, gate and up interleaved
    "gpt_oss": (GptOssExperts, lambda: transformers.GptOssConfig(**GPT_OSS)),
    # no gate
    "nemotron_h": (NemotronHExperts, lambda: transformers.NemotronHConfig(**NEMOTRON)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore")
def test_layers_of_another_form_equal_eager_ones(name: str) -> None:
    kind, config = LAYERS[name]
    torch.manual_seed(0)
    layer = kind(config())
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x, ids = torch.randn(7, 24), torch.randint(0, 5, (7, 2))
    ids[:, 1] = (ids[:, 0] + 1 + ids[:, 1] % 4) % 5  # another one than the first
    weights, results = torch.rand(7, 2), []
    for implementation in ("eager", "inplace"):
        layer.config._experts_implementation = implementation
        with torch.no_grad():
            results.append(layer(x, ids, weights))
    torch.testing.assert_close(*results)


IDS = torch.tensor([[0, 3], [2, 1], [3, 0], [1, 2], [3, 2]])
JETMOE: dict[str, object] = {
    "hidden_size": 24,
    "intermediate_size": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "kv_channels": 8,
    "num_key_value_heads": 2,
}
OWN_CODE: dict[str, tuple[Any, Callable[[], Any], dict[str, object], tuple[Any, ...]]] = {
    "dbrx": (
        DbrxExperts,
        lambda: transformers.DbrxConfig().ffn_config,
        {"hidden_size": 24, "ffn_hidden_size": 16, "moe_num_experts": 4},
        (IDS, torch.rand(5, 2)),
    ),
    "aria": (
        AriaExperts,
        transformers.AriaTextConfig,
        {"hidden_size": 24, "intermediate_size": 16, "moe_num_experts": 4, "moe_topk": 2},
        (torch.randn(5, 4),),
    ),
    # ids 2 and 3 are experts that change nothing
    "longcat_flash": (
        LongcatFlashExperts,
        transformers.LongcatFlashConfig,
        {
            "hidden_size": 24,
            "expert_ffn_hidden_size": 16,
            "n_routed_experts": 2,
            "zero_expert_num": 2,
        },
        (IDS, torch.rand(5, 2)),
    ),
    "llama4": (
        Llama4TextMoe,
        transformers.Llama4TextConfig,
        {
            "hidden_size": 24,
            "intermediate_size": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
        (),
    ),
    "jetmoe": (JetMoeMoE, transformers.JetMoeConfig, JETMOE, ()),
}


@pytest.mark.parametrize("name", OWN_CODE)
@pytest.mark.filterwarnings("ignore")
def test_experts_in_code_of_their_own_equal_what_they_are_replaced_by(name: str) -> None:
    kind, make, fields, arguments = OWN_CODE[name]
    config = make()
    for field, value in fields.items():
        setattr(config, field, value)
    layer = kind(config)
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(1, 5, 24) if name in ("dbrx", "jetmoe") else torch.randn(5, 24)
    with torch.no_grad():
        expected = layer(x, *arguments)
        with grouped_experts(layer):
            assert "forward" in vars(layer)
            torch.testing.assert_close(layer(x, *arguments), expected)
    assert "forward" not in vars(layer), "the layer is left as it was"


def test_attention_of_experts_equals_what_it_is_replaced_by() -> None:
    config = transformers.JetMoeConfig()
    for field, value in JETMOE.items():
        setattr(config, field, value)
    layer, x = JetMoeMoA(config), torch.randn(1, 5, 24)
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)

    def attended() -> tuple[Tensor, Tensor]:
        queries, _, routing = layer.map(x)
        return queries, layer.reduce(queries.tanh(), routing)

    with torch.no_grad():
        expected = attended()
        with grouped_experts(layer):
            torch.testing.assert_close(attended(), expected)


def test_half_precision_is_rounded_like_batched_products() -> None:
    model = moe_decoder("mixtral")
    experts = next(part for part in model.modules() if is_experts(part)).bfloat16()
    x, ids = torch.randn(7, 32).bfloat16(), torch.tensor([[0, 3]] * 7)
    weights = torch.rand(7, 2).bfloat16()
    with torch.no_grad(), grouped_experts(model):
        own = experts(x, ids, weights)
        theirs = ALL_EXPERTS_FUNCTIONS["batched_mm"](experts, x, ids, weights)
    torch.testing.assert_close(own, theirs)


def test_experts_that_transformers_has_quantized_are_refused() -> None:
    model = moe_decoder("mixtral")
    model.model.layers[0].mlp.experts = FP8Experts(model.config, block_size=(16, 16))
    with pytest.raises(BuildError, match="the experts of the model are FP8Experts; quantized"):
        capture_decoder(model, OPTIONS)


def test_quantized_experts_are_refused() -> None:
    model = moe_decoder("mixtral")
    experts = next(part for part in model.modules() if is_experts(part))
    quantized = experts.gate_up_proj.detach().to(torch.int8)
    experts.gate_up_proj = torch.nn.Parameter(quantized, requires_grad=False)
    with pytest.raises(
        BuildError,
        match=r"gate_up_proj of MixtralExperts is torch\.int8; quantized experts are not supported",
    ):
        captured(model)
