"""Random decoders with a mixture of experts, and packed steps of them beside transformers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from inplace_builder import Capture
from inplace_builder.lower import LoweredNetwork
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from support.lowering import greedy_rows
from support.network_interpreter import interpret

VOCABULARY, CAPACITY, ROWS, CHUNK = 64, 32, 4, 8
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
_SHARED = {"shared_expert_intermediate_size": 16}
_ERNIE = {
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_intermediate_size": 16,
    "moe_layer_start_index": 0,
}

CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", _LOCAL | {"sliding_window": None}),
    "qwen2_moe": ("Qwen2MoeConfig", _EXPERTS | _SHARED),
    "qwen3_moe": ("Qwen3MoeConfig", _EXPERTS),
    "olmoe": ("OlmoeConfig", _EXPERTS),
    "phimoe": ("PhimoeConfig", _LOCAL),
    "granitemoe": ("GraniteMoeConfig", _LOCAL),
    "granitemoeshared": ("GraniteMoeSharedConfig", _LOCAL | {"shared_intermediate_size": 16}),
    "glm4_moe": ("Glm4MoeConfig", _ROUTED),
    "dots1": ("Dots1Config", _ROUTED),
    "solar_open": ("SolarOpenConfig", _ROUTED),
    "ernie4_5_moe": ("Ernie4_5_MoeConfig", _ERNIE),
    "minimax_m2": ("MiniMaxM2Config", _LOCAL),
    "hunyuan_v1_moe": ("HunYuanMoEV1Config", {"num_experts": 4, "moe_topk": 2}),
    "flex_olmo": ("FlexOlmoConfig", _EXPERTS),
    "afmoe": ("AfmoeConfig", _EXPERTS | {"num_dense_layers": 1}),
    "cohere2_moe": ("Cohere2MoeConfig", _EXPERTS),
    "exaone_moe": ("ExaoneMoeConfig", _EXPERTS),
    "mellum": ("MellumConfig", _EXPERTS),
    "laguna": ("LagunaConfig", _EXPERTS),
}


def moe_decoder(name: str, **changes: object) -> PreTrainedModel:
    """A random decoder of this family, with transformers' eager experts."""
    kind, fields = CONFIGURATIONS[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**(_SMALL | fields | changes))
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.set_experts_implementation("eager")
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            # Routers begin at zero: every expert is a tie, and devices break ties differently.
            torch.nn.init.normal_(parameter, std=0.3)
    return model


Step = Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]
"""Logits ``[rows, vocabulary]`` of a step; it updates the states in place."""


STEPS = [[(2, 7), (0, 1), (1, 4)], [(1, 1), (-1, 2), (2, 1)], [(0, 5), (1, 1)], [(1, 2), (0, 1)]]
"""Of each row of a step its slot, and how many tokens it has; slot -1 is a null row."""


STATIC_STEPS = [
    [(0, 7), (-1, 7), (2, 7)],
    [(0, 1), (1, 1), (-1, 1)],
    [(0, 3), (1, 3), (2, 3)],
    [(0, 1), (1, 1), (2, 1)],
]
"""Steps for networks without plugins: row r is slot r, and all rows have as many tokens."""


def graph_step(capture: Capture) -> Step:
    """A step of the captured graph."""
    graph = capture.exported.module()
    assert isinstance(graph, torch.fx.GraphModule)

    def step(inputs: dict[str, Tensor], states: dict[str, Tensor]) -> Tensor:
        arguments = (inputs[spec.name] for spec in capture.program.inputs)
        with torch.no_grad():
            results = torch.fx.Interpreter(graph).run(*arguments, *states.values())
        _, logits, *_ = pytree.tree_leaves(results)
        assert isinstance(logits, Tensor)
        return logits

    return step


def network_step(capture: Capture, network: LoweredNetwork) -> Step:
    """A step of a network, read back and computed in PyTorch."""

    def step(inputs: dict[str, Tensor], states: dict[str, Tensor]) -> Tensor:
        outputs = interpret(network, inputs | states)
        for name, output in network.state_outputs.items():
            states[name].copy_(outputs[output])
        return outputs["logits"]

    return step


def check_ragged_rows(
    model: PreTrainedModel,
    capture: Capture,
    step: Step,
    steps: Sequence[Sequence[tuple[int, int]]] = STEPS,
) -> None:
    """Compare the logits of every row with the model's own of the whole sequence.

    Raises:
        AssertionError: they differ.
    """
    generator = torch.Generator().manual_seed(0)
    states = {state.name: torch.full((3, *state.shape), float("nan")) for state in capture.states}
    sequences = torch.randint(0, VOCABULARY, (3, CAPACITY), generator=generator)
    lengths = [0, 0, 0]
    for rows in steps:
        starts = [0 if slot < 0 else lengths[slot] for slot, _ in rows]
        spans = [
            (slot, start, start + count) for (slot, count), start in zip(rows, starts, strict=True)
        ]
        offsets = (
            torch.tensor([0, *(count for _, count in rows)], dtype=torch.int32).cumsum(0).int()
        )
        inputs = {
            "input_ids": torch.cat([sequences[slot, first:end] for slot, first, end in spans]),
            "positions": torch.cat([torch.arange(first, end) for _, first, end in spans]).int(),
            "row_offsets": offsets,
            "last_tokens": offsets[1:] - 1,
            "slots": torch.tensor([slot for slot, _ in rows], dtype=torch.int32),
            "write_indices": torch.tensor(starts, dtype=torch.int32),
            **greedy_rows(len(rows)),
        }
        logits = step(inputs, states)
        for row, (slot, _, end) in enumerate(spans):
            if slot >= 0:
                with torch.no_grad():
                    expected = model(sequences[None, slot, :end]).logits[0, -1]
                torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)
                lengths[slot] = end
