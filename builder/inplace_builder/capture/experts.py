"""A mixture of experts of transformers, computed by ``inplace::grouped_linear``.

transformers' own implementations are loops over the experts that are used, which do not export, or
sort and gather on their way to a product. Where a model has its experts behind the experts
interface of transformers, `grouped_experts` lets it call `slot_experts` instead: two operators,
with the model's own gate between them and its own router before them.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from inplace.operators import grouped_linear
from inplace.operators.grouped_linear import GROUPED_DTYPES
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from inplace_builder.capture.checkpoint import quiet
from inplace_builder.errors import BuildError

IMPLEMENTATION = "inplace"
"""The name under which transformers knows `slot_experts`."""


def slot_experts(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The function that transformers calls in place of the forward of a layer's experts.

    Args:
        module: the layer's experts, with all weights of a projection in one tensor.
        hidden_states: ``[tokens, hidden]``.
        top_k_index: ``[tokens, k]``: the experts of each token.
        top_k_weights: ``[tokens, k]``: what the result of each is multiplied with.

    Returns:
        ``[tokens, hidden]``: the sum over the experts of a token.

    Raises:
        BuildError: the weights are quantized.
    """
    up = "gate_up_proj" if module.has_gate else "up_proj"
    projected = _project(module, up, hidden_states, top_k_index)
    inner = module._apply_gate(projected) if module.has_gate else module.act_fn(projected)
    out = _project(module, "down_proj", inner, top_k_index)
    return (out * top_k_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)


def _project(module: Any, name: str, x: Tensor, expert_ids: Tensor) -> Tensor:
    weight = getattr(module, name)
    if not isinstance(weight, Tensor) or weight.dtype not in GROUPED_DTYPES:
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise BuildError(
            f"{name} of {type(module).__name__} is {kind}; quantized experts are not supported, "
            f"load the model dequantized to float32, float16 or bfloat16"
        )
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    return grouped_linear(x, expert_ids, weight, bias, transposed=module.is_transposed)


@contextmanager
def grouped_experts(module: torch.nn.Module) -> Iterator[None]:
    """Let every model of transformers in ``module`` compute its experts by `slot_experts`.

    Models without experts, or with experts in code of their own, stay as they are.
    """
    models = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    with ExitStack() as stack:
        for model in models:
            if model._can_set_experts_implementation():
                stack.enter_context(_implementation(model))
        yield


@contextmanager
def _implementation(model: PreTrainedModel) -> Iterator[None]:
    original = model.get_experts_implementation()
    with quiet():
        model.set_experts_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        with quiet():
            model.set_experts_implementation(original)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, slot_experts)
