"""Fusion of transformers' decoders: which operators are left, and that results are the same."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from inplace_builder import Capture, DecoderOptions, capture_decoder
from inplace_builder.fusion.fuse import bindable_weights, fuse
from inplace_builder.graph.program import AnyProgram, GraphProgram, weights_of
from support.long import long_except
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteSWAConfig,
    LlamaConfig,
    MixtralConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

pytestmark = pytest.mark.slow

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 8,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**GROUPED),
    "llama-tied": LlamaConfig(
        **GROUPED, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED),
    "gemma2": Gemma2Config(
        **GROUPED, query_pre_attn_scalar=8, sliding_window=64, hidden_activation="gelu_pytorch_tanh"
    ),
    "gemma3": Gemma3TextConfig(**GROUPED, query_pre_attn_scalar=8, sliding_window=64),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt_neox": GPTNeoXConfig(**SIZES),
    "phi": PhiConfig(**SIZES),
    "granite_swa": GraniteSWAConfig(**GROUPED, sliding_window=64),
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=4),
}
FULLY_FUSED = {"inplace.linear.default": 4 * 2 + 1, "inplace.qkv_attention.default": 2}
EXPECTED: dict[str, dict[str, int]] = {
    "llama": FULLY_FUSED,
    "llama-tied": FULLY_FUSED,
    "qwen2": FULLY_FUSED,
    "qwen3": {
        "inplace.rotary_attention.default": 2,
        "inplace.rms_norm.default": 2 * 2,
        "inplace.linear.default": 4 * 2 + 1,
    },
    "gemma2": FULLY_FUSED | {"inplace.rms_norm.default": 2 * 2, "aten.type_as.default": 0},
    "gemma3": {
        "inplace.rotary_attention.default": 2,
        "inplace.rms_norm.default": 4 * 2,
        "inplace.linear.default": 4 * 2 + 1,
    },
    "gpt2": FULLY_FUSED
    | {
        "aten.layer_norm.default": 2 * 2 + 1,
        "aten.tanh.default": 0,
        "aten.add.Tensor": 1,
        "aten.dropout.default": 0,
    },
    "gpt_neox": FULLY_FUSED
    | {"aten.layer_norm.default": 2 * 2 + 1, "aten.chunk.default": 0, "aten.dropout.default": 0},
    # norm and QKV, output and residual, router; experts with their gate, and down
    "mixtral": {
        "inplace.qkv_attention.default": 2,
        "inplace.linear.default": 3 * 2 + 1,
        "inplace.grouped_linear.default": 2 * 2,
        "aten.silu.default": 0,
        "aten.chunk.default": 0,
    },
    "granite_swa": FULLY_FUSED,
    "phi": FULLY_FUSED | {"aten.layer_norm.default": 2 + 1, "aten.dropout.default": 0},
}


def run(program: AnyProgram, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Interpret a program's graph; states are mutated in ``inputs``."""
    values = {node.name: tensor for node, tensor in weights_of(program).items()} | inputs
    placeholders = program.graph.find_nodes(op="placeholder")
    with torch.no_grad():
        outputs = torch.fx.Interpreter(program.graph_module).run(
            *(values[node.name] for node in placeholders)
        )
    assert isinstance(outputs, tuple)
    return outputs


def captured(family: str, dtype: torch.dtype = torch.float32) -> Capture:
    """A random decoder of the family; its norms and biases are random too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return capture_decoder(model.to(dtype), DecoderOptions(capacity=32, max_rows=4, chunk=8))


def check_counts(family: str, fused: GraphProgram) -> None:
    counts = Counter(str(node.target) for node in fused.graph.nodes if node.op == "call_function")
    assert {name: counts[name] for name in EXPECTED[family]} == EXPECTED[family], counts
    assert not counts["aten.linear.default"]
    assert counts["inplace.argmax.default"] + counts["inplace.sample.options"] == 1


def both(
    capture: Capture, fused: GraphProgram
) -> tuple[list[tuple[torch.Tensor, ...]], list[dict[str, torch.Tensor]]]:
    """Outputs of the captured and the fused program in one step, and their states afterwards."""
    states = {
        state.name: torch.randn(3, *state.shape).to(state.dtype.as_torch)
        for state in capture.states
    }
    rows = {
        "input_ids": torch.tensor([5, 6, 7, 8]),
        "positions": torch.tensor([3, 0, 1, 2], dtype=torch.int32),
        "row_offsets": torch.tensor([0, 1, 4], dtype=torch.int32),
        "last_tokens": torch.tensor([0, 3], dtype=torch.int32),
        "slots": torch.tensor([2, 0], dtype=torch.int32),
        "write_indices": torch.tensor([3, 0], dtype=torch.int32),
    }
    rows |= {
        spec.name: torch.zeros(2, dtype=spec.dtype.as_torch)
        for spec in capture.program.inputs
        if spec.name not in rows
    }  # greedy
    results, memories = [], []
    for program in (capture.exported, fused):
        memory = {name: tensor.clone() for name, tensor in states.items()}
        results.append(run(program, rows | memory))
        memories.append(memory)
    return results, memories


@pytest.mark.parametrize(
    ("family", "dtype", "tolerance"),
    long_except(
        [("gemma2", torch.bfloat16, 5e-2), ("llama", torch.float16, 1e-2)],
        [*((family, torch.bfloat16, 5e-2) for family in FAMILIES), ("llama", torch.float16, 1e-2)],
    ),
)
def test_a_half_precision_decoder_is_fused_like_one_in_float32(
    family: str, dtype: torch.dtype, tolerance: float
) -> None:
    """transformers casts where it computes in float32; the patterns match through the casts."""
    capture = captured(family, dtype)
    fused = fuse(capture.exported)
    check_counts(family, fused)
    (_, expected, *_), (_, logits, *_) = both(capture, fused)[0]
    assert logits.dtype == torch.float32
    assert float((logits - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize(
    "family",
    long_except(["gemma2", "mixtral"], FAMILIES),
)
def test_a_fused_decoder_has_fewer_operators_and_the_same_results(family: str) -> None:
    capture = captured(family)
    fused = fuse(capture.exported)
    results, memories = both(capture, fused)
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-4)
    for state in capture.states:
        torch.testing.assert_close(
            memories[0][state.name], memories[1][state.name], rtol=1e-4, atol=1e-4
        )
    check_counts(family, fused)


def test_a_projection_with_another_user_is_left_alone(tmp_path: Path) -> None:
    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            gate = self.gate(x)
            return torch.nn.functional.silu(gate) * self.up(x), gate

    module, x = Step().eval(), torch.randn(3, 16)
    exported = torch.export.export(module, (x,))
    fused = fuse(exported)
    assert not any(node.kwargs.get("gated") for node in fused.graph.nodes)
    for output, expected in zip(run(fused, {"x": x}), module(x), strict=True):
        torch.testing.assert_close(output, expected)


class Layers(torch.nn.Module):
    """Convolutions of one entry, two that are more than a linear layer, and an LSTM's product."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.plane = torch.nn.Conv1d(6, 10, 1), torch.nn.Conv2d(6, 5, 1, bias=False)
        self.strided = torch.nn.Conv1d(6, 4, 1, stride=2)
        self.grouped = torch.nn.Conv1d(6, 4, 1, groups=2)
        self.product = torch.nn.Linear(6, 7)

    def forward(self, line: torch.Tensor, plane: torch.Tensor) -> tuple[torch.Tensor, ...]:
        last = line[:, :, -1]
        return (
            self.line(line),
            self.plane(plane),
            self.strided(line),
            self.grouped(line),
            torch.addmm(self.product.bias, last, self.product.weight.t()),
        )


def test_pointwise_convolutions_and_products_of_an_lstm_become_linear_layers() -> None:
    torch.manual_seed(0)
    module, inputs = Layers().eval(), {"line": torch.randn(3, 6, 8)}
    inputs["plane"] = torch.randn(3, 6, 4, 5)
    rows = {name: {0: torch.export.Dim("rows")} for name in inputs}
    exported = torch.export.export(module, tuple(inputs.values()), dynamic_shapes=rows)
    fused = fuse(exported)
    counts = Counter(str(node.target) for node in fused.graph.nodes if node.op == "call_function")
    assert (counts["inplace.linear.default"], counts["aten.conv1d.default"]) == (3, 2), counts
    assert not counts["aten.conv2d.default"]
    assert not counts["aten.addmm.default"]
    assert len(bindable_weights(fused)) == 3
    for output, expected in zip(run(fused, inputs), module(**inputs), strict=True):
        torch.testing.assert_close(output, expected)
