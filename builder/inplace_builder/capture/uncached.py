"""Decoders without a cache of keys and values, which compute all tokens again at each step.

Their layers attend in a method of their own. While a model is captured it hands queries, keys and
values to `slot_attention`, as other models do by transformers' attention interface.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from inplace_builder.capture.slot_attention import slot_attention
from inplace_builder.capture.slot_cache import step_cache


def _openai_gpt(
    layer: int,
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: object = None,
    output_attentions: bool = False,
) -> list[Tensor]:
    """``Attention._attn`` of the first GPT, whose mask is causal: keys are ``[1, h, dim, tokens]``.

    Args:
        layer: the layer.
        module: its attention.
        q, v: queries and values, ``[1, heads, tokens, dim]``.
        k: keys, ``[1, heads, dim, tokens]``.
        attention_mask: a mask of padding; None.
        output_attentions: not used.
    """
    key = k.transpose(-1, -2)
    step_cache().update(key, v, layer)
    scale = v.shape[-1] ** -0.5 if module.scale else 1.0
    out, _ = slot_attention(module, q, key, v, attention_mask, scale)
    return [out.transpose(1, 2)]


METHODS: dict[str, tuple[str, Callable[..., Any]]] = {
    "transformers.models.openai.modeling_openai.Attention": ("_attn", _openai_gpt),
}
"""The method that attends, and what takes its place, by the class of a layer's attention."""


@contextmanager
def cached_attention(model: torch.nn.Module) -> Iterator[bool]:
    """Let the layers of a model without a cache attend to our states; yields whether it is one."""
    layers = [each for each in model.modules() if _name(each) in METHODS]
    for index, layer in enumerate(layers):
        name, function = METHODS[_name(layer)]
        layer.__dict__[name] = partial(function, index, layer)
    try:
        yield bool(layers)
    finally:
        for layer in layers:
            layer.__dict__.pop(METHODS[_name(layer)][0])


def _name(module: torch.nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
