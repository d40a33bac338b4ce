"""What a Hugging Face decoder sees in place of a mask and an attention of transformers.

Importing this module registers both with transformers, under the name `IMPLEMENTATION`.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from inplace_builder.capture.masks import LayerMask, MaskOptions, mask_options
from inplace_builder.capture.slot_cache import (
    LayerStates,
    SeenLayer,
    SeenLayers,
    SlotCache,
    step_cache,
)
from inplace_builder.capture.sparse import AllPositions, Selection
from inplace_builder.errors import BuildError

IMPLEMENTATION = "inplace"
"""The name under which transformers knows `slot_attention` and `_layer_mask`."""


def _layer_mask(
    *_: object,
    mask_function: Callable[..., Tensor],
    dtype: torch.dtype = torch.float32,
    **__: object,
) -> LayerMask | Tensor:
    """The mask function that transformers calls, once for each kind of layer."""
    cache = step_cache()
    step = cache.step
    if cache.own_attention is not None:
        return _added_mask(cache, mask_function, dtype)
    if isinstance(step, LayerStates):  # evaluated before, on real tensors
        return LayerMask(None)
    try:
        return LayerMask(mask_options(mask_function, step.capacity))
    except BuildError as error:  # models also make masks that no layer uses
        return LayerMask(None, error)


def _added_mask(
    cache: SlotCache, mask_function: Callable[..., Tensor], dtype: torch.dtype
) -> Tensor:
    """A mask ``[1, 1, tokens, tokens]`` that is added to scores, as eager attention takes it.

    Nothing uses it while a graph is traced.
    """
    tokens = cache.positions.shape[0]
    added = torch.zeros((1, 1, tokens, tokens), dtype=dtype, device=cache.positions.device)
    if isinstance(cache.step, LayerStates):
        return added
    first, index = torch.zeros((1, 1, 1, 1), dtype=torch.int64), torch.arange(tokens)
    seen = mask_function(first, first, index.view(1, 1, -1, 1), index.view(1, 1, 1, -1))
    return added.masked_fill(~seen.to(added.device), torch.finfo(dtype).min)


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in each layer.

    Args:
        module: the layer's attention.
        query: ``[1, heads, tokens, dim]``.
        key, value: ``[1, kv_heads, tokens, dim]``.
        attention_mask: None, or what `_layer_mask` returned.
        scaling: factor of the scores; ``dim ** -0.5`` if None.
        dropout: not used: the model is in evaluation mode.
        sliding_window: the window that the model states; must be that of its mask.
        softcap: soft-cap of the scores.
        s_aux: attention sinks, a logit of each query head.
        others: what else a model passes to its attention.

    Returns:
        The result ``[1, tokens, heads, dim]``; no attention weights.

    Raises:
        BuildError: the layer attends in a way that ``inplace::attention`` does not have.
    """
    cache = step_cache()
    layer, cache.updated = cache.updated, None
    kind = type(module).__name__
    shares = layer is None  # as the last layers of Gemma 3n and Gemma 4 do
    if layer is None:
        layer = cache.layer_of(key)
    if layer is None:
        raise BuildError(
            f"{kind} attends to keys and values that neither it nor another layer has cached "
            f"(cross-attention is not supported)"
        )
    if shares and (again := cache.attends_again(layer, value)) is not None:
        layer, shares = again, False
    selection: Selection | None = None
    computed, cache.computed_mask = cache.computed_mask, None
    if computed is not None and isinstance(attention_mask, Tensor):
        selection = Selection(attention_mask.squeeze(2))
        attention_mask = LayerMask(computed)
    if attention_mask is not None and not isinstance(attention_mask, LayerMask):
        raise BuildError(
            f"{kind} has an attention mask of its own; only causal attention, with a window or in "
            f"chunks or without, is supported"
        )
    if unknown := sorted(
        name for name in ("position_bias", "head_mask") if others.get(name) is not None
    ):
        raise BuildError(f"{kind} attends with {unknown}, which inplace::attention does not have")
    if attention_mask is not None and attention_mask.selection is not None:
        selection = attention_mask.selection
    for name in ("indices", "block_indices"):
        selected = others.get(name)
        if not isinstance(selected, AllPositions | Selection | None):
            raise BuildError(f"{kind} attends to the positions that it selects ({name}) only")
        selection = selected if isinstance(selected, Selection) else selection
    step, latent = cache.step, cache.absorbed(key, value)
    if isinstance(step, SeenLayers):
        mask = _layer_options(module, attention_mask, sliding_window, step.capacity)
        if shares:
            _check_shared(kind, mask, step.by_layer[layer].mask)
            step.sharing += 1
        else:
            sizes = ((1, latent.key_dim), (1, 0)) if latent is not None else _sizes(key, value)
            step.by_layer[layer] = SeenLayer(*sizes, mask)
        groups = query.shape[1] // value.shape[1]
        return value.repeat_interleave(groups, 1).transpose(1, 2).contiguous(), None
    # a layer that shares keys and values appends them once more, to the same positions
    queries = query[0].transpose(0, 1)
    out = step.attend(
        layer,
        queries if latent is None else latent.query(queries),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1) if latent is None else None,
        latent_dim=0 if latent is None else latent.latent_dim,
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
        softcap=softcap or 0.0,
        sinks=s_aux,
        bias=None if selection is None else selection.bias,
    )
    return (out if latent is None else latent.result(out)).unsqueeze(0), None


def _sizes(key: Tensor, value: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """Heads, and elements of a head, of keys and of values ``[1, heads, tokens, dim]``."""
    return (key.shape[1], key.shape[3]), (value.shape[1], value.shape[3])


def _check_shared(kind: str, mask: MaskOptions, owner: MaskOptions) -> None:
    if mask != owner:
        raise BuildError(
            f"{kind} lets a token see {mask}, and attends to keys and values of a layer that lets "
            f"it see {owner}; layers that share them need the same mask"
        )


def _layer_options(
    module: torch.nn.Module, mask: LayerMask | None, stated: int | None, capacity: int
) -> MaskOptions:
    """What a token of a layer may see, from its mask and from what its attention is given.

    Without a mask, transformers' attention functions ask the module whether it is causal. With one
    they do not: BigBird-Pegasus calls its decoder's attention not causal, and gives it a causal
    mask.

    Args:
        module: the layer's attention.
        mask: its mask.
        stated: the window that its attention function is given.
        capacity: maximum number of positions of a sequence.

    Raises:
        BuildError: the two differ, or the operator does not have the mask.
    """
    kind = type(module).__name__
    stated = stated if stated and stated < capacity else 0
    if mask is not None and mask.error is not None:
        raise mask.error
    if mask is None or mask.options is None:
        options = MaskOptions(lookahead=not getattr(module, "is_causal", True))
    else:
        options = mask.options
        if stated not in (0, options.reach):
            raise BuildError(
                f"{kind} hands a window of {stated} positions to its attention, but its mask lets "
                f"a token see {options}: implementations of attention would differ"
            )
        return options
    if stated and options.lookahead:
        raise BuildError(
            f"{kind} is not causal and has a window of {stated} positions; lookahead is only "
            f"supported without a window"
        )
    return MaskOptions(window=stated, lookahead=options.lookahead)


AttentionInterface.register(IMPLEMENTATION, slot_attention)
AttentionMaskInterface.register(IMPLEMENTATION, _layer_mask)
