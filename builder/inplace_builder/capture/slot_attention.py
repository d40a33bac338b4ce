"""transformers' own extension points, a cache class and an attention function, on ``inplace::attention``."""

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch
from inplace.operators import attention
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from inplace_builder.errors import BuildError

IMPLEMENTATION = "inplace"
"""The name under which transformers knows `slot_attention`."""


class SlotCache(Cache):
    """A cache that keeps nothing: the keys and values it is given go on to the attention function, which appends them.

    Args:
        key_states, value_states: one state a layer, ``[slots, kv_heads, capacity, dim]``.
        slots, row_offsets, write_indices: as ``inplace::attention`` takes them.
        rings: for each layer whether its states are rings.
    """

    def __init__(
        self,
        key_states: Sequence[Tensor],
        value_states: Sequence[Tensor],
        slots: Tensor,
        row_offsets: Tensor,
        write_indices: Tensor,
        rings: Sequence[bool],
    ) -> None:
        super().__init__(layers=[])
        self.key_states, self.value_states, self.rings = key_states, value_states, rings
        self.slots, self.row_offsets, self.write_indices = slots, row_offsets, write_indices
        self.updated: int | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Note which layer's keys and values come next; ``[1, kv_heads, tokens, dim]`` each, returned as they are."""
        self.updated = layer_idx
        return key_states, value_states


current_cache: ContextVar[SlotCache] = ContextVar("inplace_cache")
"""The cache of the step that is being traced: transformers does not hand it to attention functions."""


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in each layer; query ``[1, heads, tokens, dim]``.

    Raises:
        BuildError: the layer attends in a way that ``inplace::attention`` does not have.
    """
    cache = current_cache.get()
    layer, cache.updated = cache.updated, None
    kind = type(module).__name__
    if layer is None or layer != getattr(module, "layer_idx", layer):
        raise BuildError(
            f"{kind} attends without caching its own keys and values (shared or cross-attention layers are not supported)"
        )
    if attention_mask is not None:
        raise BuildError(
            f"{kind} brings an attention mask of its own; only causal and sliding-window attention is supported"
        )
    if unknown := sorted(
        name for name in ("s_aux", "position_bias", "head_mask") if others.get(name) is not None
    ):
        raise BuildError(f"{kind} attends with {unknown}, which inplace::attention does not have")
    if not getattr(module, "is_causal", True):
        raise BuildError(f"{kind} is not causal; a decoder step needs causal attention")
    out = attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        cache.key_states[layer],
        cache.value_states[layer],
        cache.slots,
        cache.row_offsets,
        cache.write_indices,
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
        window=sliding_window or 0,
        ring=cache.rings[layer],
        softcap=softcap or 0.0,
    )
    return out.unsqueeze(0), None


AttentionInterface.register(IMPLEMENTATION, slot_attention)
