"""A mixture of experts of transformers, computed by ``inplace::grouped_linear``.

transformers' own implementations are loops over the experts that are used, which do not export, or
sort and gather on their way to a product. Where a model has its experts behind the experts
interface of transformers, `grouped_experts` lets it call `slot_experts` instead: two layers and a
sum as operators, with the model's own gate between them and its own router before them. `OWN_CODE`
has the same for models whose experts are not behind that interface.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from inplace.operators import grouped_linear, weighted_sum
from inplace.operators.grouped_linear import GROUPED_DTYPES
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from inplace_builder.capture.checkpoint import quiet
from inplace_builder.capture.scaled_linear import is_rounded
from inplace_builder.errors import BuildError

IMPLEMENTATION = "inplace"
"""The name under which transformers knows `slot_experts`."""


QUANTIZED = "transformers.integrations."
"""Where transformers has the layers of quantized models."""

NOT_QUANTIZED = "quantized experts are not supported; load them as float32, float16 or bfloat16"
"""Ends the errors about them."""


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
    return weighted_sum(out, top_k_weights)


def _project(module: Any, name: str, x: Tensor, expert_ids: Tensor) -> Tensor:
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    scale = getattr(module, f"{name}_scale", None) if is_rounded(module) else None
    if scale is not None:
        weight = getattr(module, f"{name}_float8")
        transposed = module.is_transposed
        return grouped_linear(x, expert_ids, weight, bias, scale=scale, transposed=transposed)
    weight = getattr(module, name)
    if not isinstance(weight, Tensor) or weight.dtype not in GROUPED_DTYPES:
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise BuildError(f"{name} of {type(module).__name__} is {kind}; {NOT_QUANTIZED}")
    return grouped_linear(x, expert_ids, weight, bias, transposed=module.is_transposed)


def _dbrx(module: Any, hidden_states: Tensor, top_k_index: Tensor, weights: Tensor) -> Tensor:
    """``DbrxExperts``: the weights of all experts are rows of three matrices."""
    mlp, x = module.mlp, hidden_states.reshape(-1, module.hidden_size)
    extents = (-1, module.ffn_hidden_size, module.hidden_size)
    gate, up = (grouped_linear(x, top_k_index, part.view(extents)) for part in (mlp.w1, mlp.v1))
    inner = mlp.activation_fn(gate) * up
    out = grouped_linear(inner, top_k_index, mlp.w2.view(extents), transposed=True)
    return weighted_sum(out, weights).view(hidden_states.shape[0], -1, module.hidden_size)


def _aria(module: Any, hidden_states: Tensor, router_logits: Tensor) -> Tensor:
    """``AriaExperts``, which route themselves."""
    ids, weights = module.route_tokens_to_experts(router_logits)
    projected = grouped_linear(hidden_states, ids, module.fc1.weight, transposed=True)
    gate, up = projected.chunk(2, -1)
    inner = torch.nn.functional.silu(gate) * up
    return weighted_sum(grouped_linear(inner, ids, module.fc2.weight, transposed=True), weights)


def _longcat_flash(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, weights: Tensor
) -> Tensor:
    """``LongcatFlashExperts``: ids beyond those with weights are experts that change nothing."""
    unchanged = (top_k_index >= module.num_routed_experts).unsqueeze(-1)
    vectors = hidden_states.unsqueeze(1)
    if module.gate_up_proj is None:
        return weighted_sum(vectors.expand(-1, top_k_index.shape[1], -1), weights)
    gate, up = grouped_linear(hidden_states, top_k_index, module.gate_up_proj).chunk(2, -1)
    out = grouped_linear(module.act_fn(gate) * up, top_k_index, module.down_proj)
    return weighted_sum(torch.where(unchanged, vectors, out), weights)


def _llama4(module: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """``Llama4TextMoe``, whose own code computes every expert, most of them of zeros."""
    x = hidden_states.reshape(-1, module.hidden_dim)
    logits = torch.nn.functional.linear(x, module.router.weight, module.router.bias)
    values, ids = torch.topk(logits, module.top_k, dim=1)
    scores = torch.sigmoid(values.float()).to(x.dtype)
    experts = module.experts
    scaled = x.unsqueeze(1) * scores.unsqueeze(-1)
    gate, up = grouped_linear(scaled, ids, experts.gate_up_proj, transposed=True).chunk(2, -1)
    out = grouped_linear(up * experts.act_fn(gate), ids, experts.down_proj, transposed=True)
    return module.shared_expert(x) + weighted_sum(out, torch.ones_like(scores)), logits


def _jetmoe_route(router: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The experts of vectors ``[tokens, hidden]``, their weights, and the scores of all."""
    logits = router.layer(x).float()
    values, ids = logits.topk(router.top_k, dim=1)
    return ids, torch.softmax(values, dim=1).type_as(x), logits


def _jetmoe(module: Any, layer_input: Tensor) -> Tensor:
    """``JetMoeMoE``, whose own code sorts the tokens by their experts."""
    x = layer_input.reshape(-1, module.input_size)
    ids, weights, _ = _jetmoe_route(module.router, x)
    gate, up = grouped_linear(x, ids, module.input_linear.weight).chunk(2, -1)
    out = grouped_linear(module.activation(gate) * up, ids, module.output_linear.weight)
    bias: Tensor = module.bias
    return weighted_sum(out, weights).view(layer_input.shape) + bias


def _jetmoe_queries(module: Any, layer_input: Tensor) -> tuple[Tensor, Tensor, Any]:
    """``JetMoeMoA.map``: an expert has a projection to queries, and one of what they attend to."""
    x = layer_input.reshape(-1, module.input_size)
    ids, weights, logits = _jetmoe_route(module.router, x)
    queries = grouped_linear(x, ids, module.input_linear.weight)
    return queries.view(*layer_input.shape[:-1], module.top_k, -1), logits, (ids, weights)


def _jetmoe_attended(module: Any, layer_input: Tensor, routing: tuple[Tensor, Tensor]) -> Tensor:
    """``JetMoeMoA.reduce``."""
    ids, weights = routing
    x = layer_input.reshape(-1, module.top_k, layer_input.shape[-1])
    out = weighted_sum(grouped_linear(x, ids, module.output_linear.weight), weights)
    bias: Tensor = module.bias
    return out.view(*layer_input.shape[:-2], module.input_size) + bias


OWN_CODE: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    "DbrxExperts": {"forward": _dbrx},
    "AriaExperts": {"forward": _aria},
    "LongcatFlashExperts": {"forward": _longcat_flash},
    "Llama4TextMoe": {"forward": _llama4},
    "JetMoeMoE": {"forward": _jetmoe},
    "JetMoeMoA": {"map": _jetmoe_queries, "reduce": _jetmoe_attended},
}
"""The methods of experts in code of their own, by the name of their class in transformers."""


@contextmanager
def grouped_experts(module: torch.nn.Module) -> Iterator[None]:
    """Let every model of transformers in ``module`` compute its experts by ``grouped_linear``.

    `capture_decoder` does so itself; a decoder that is exported by transformers must be exported
    inside this context. A model without experts stays as it is, and every other model is as it was
    after the context.

    Args:
        module: a model, or a module that holds some.

    Raises:
        BuildError: transformers has replaced the experts of one by quantized ones.
    """
    parts = list(module.modules())
    for part in parts:
        if type(part).__module__.startswith(QUANTIZED) and type(part).__name__.endswith("Experts"):
            raise BuildError(
                f"the experts of the model are {type(part).__name__}; {NOT_QUANTIZED} "
                f"(Mxfp4Config and FineGrainedFP8Config of transformers take dequantize=True)"
            )
    own = [part for part in parts if type(part).__name__ in OWN_CODE and _is_theirs(part)]
    with ExitStack() as stack:
        for model in parts:
            if isinstance(model, PreTrainedModel) and model._can_set_experts_implementation():
                stack.enter_context(_implementation(model))
        for part in own:
            for name, function in OWN_CODE[type(part).__name__].items():
                part.__dict__[name] = partial(function, part)
                stack.callback(part.__dict__.pop, name)
        yield


def _is_theirs(part: torch.nn.Module) -> bool:
    return type(part).__module__.startswith("transformers.")


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
