"""Sparse attention: indexers that choose the cached positions that each token attends to.

An indexer compares a query of each token with a key of each cached position. Its keys are an append
state of their own. The model's code runs unchanged, with each token as a batch of one: the keys
that its cache returns are then those of the token's own row. What it selects becomes a bias of
``inplace::attention``, 0 where a position is selected and ``-inf`` elsewhere.

Where the capacity is no more than an indexer selects, it selects all, and is left out.

Doge computes its mask from a term of each cached position, which is kept in the same way, and adds
the term to its scores.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from inplace.operators.rotary_attention import rotate
from torch import Tensor
from transformers import PreTrainedModel

from inplace_builder.capture.masks import LayerMask, MaskOptions
from inplace_builder.capture.slot_cache import SlotCache, step_cache
from inplace_builder.capture.sparse import SPARSE_KINDS, AllPositions, Selection
from inplace_builder.errors import BuildError

DYNAMIC_MASK = "prepare_dynamic_mask"
"""The method of an attention that computes a mask, in Doge's words."""

Select = Callable[[Any, Any, SlotCache, Sequence[Any], dict[str, Any]], Tensor]
"""From a model, an indexer of it, the cache of the step and the indexer's arguments to a bias
``[tokens, heads or 1, capacity]``."""


@contextmanager
def slot_indexers(
    model: PreTrainedModel, capacity: int, *, skips_masks: bool = False
) -> Iterator[None]:
    """Let each indexer select from the cached positions of a token's own row.

    Args:
        model: the model.
        capacity: maximum number of positions of a sequence.
        skips_masks: the model's own attention is one that transformers gives no mask where a
            prompt begins a sequence, as it is causal without. What makes its mask of none then
            sees the whole prompt.
    """
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or ()
    patched = []
    for module in model.modules():
        if hasattr(module, DYNAMIC_MASK):
            module.__dict__[DYNAMIC_MASK] = _dynamic_mask(module, sees_prompt=skips_masks)
            patched.append((module, DYNAMIC_MASK))
        kind = _sparse_kind(kinds, module)
        if kind is None:
            continue
        limit = SPARSE_KINDS[kind](config)
        select = None if limit is None or capacity <= limit else SELECTIONS[kind]
        module.__dict__["forward"] = (
            _select_all if select is None else _selecting(model, module, select)
        )
        patched.append((module, "forward"))
    try:
        yield
    finally:
        for module, name in patched:
            module.__dict__.pop(name)


def _sparse_kind(kinds: Sequence[str], module: torch.nn.Module) -> str | None:
    """The kind of the layer of an indexer, if it is a sparse one."""
    layer = getattr(module, "layer_idx", None)
    if not type(module).__name__.endswith("Indexer") or layer is None or layer >= len(kinds):
        return None
    return kinds[layer] if kinds[layer] in SPARSE_KINDS else None


def _select_all(*_: object, **__: object) -> AllPositions:
    """The forward of an indexer that selects all positions."""
    return AllPositions()


def _selecting(
    model: PreTrainedModel, indexer: torch.nn.Module, select: Select
) -> Callable[..., Selection]:
    """The forward of an indexer that selects some."""

    def forward(*args: Any, **kwargs: Any) -> Selection:
        with torch.no_grad():
            return Selection(select(model, indexer, step_cache(), args, kwargs))

    return forward


class TokenCache:
    """The cache that an indexer sees: each token is a batch of one, beside the keys of its row."""

    def __init__(self, cache: SlotCache) -> None:
        self._cache = cache

    def update_indexer(self, keys: Tensor, layer: int) -> Tensor:
        """Append a key of each token, ``[tokens, 1, dim]``; those of its row at all positions.

        Returns:
            ``[tokens, capacity, dim]``; what lies beyond a row's length holds anything.
        """
        return self._cache.of_tokens(self._cache.append_index(layer, keys))

    @property
    def layers(self) -> "_TokenLayers":
        """What has ``update_index`` for a layer."""
        return _TokenLayers(self)


class _TokenLayers:
    def __init__(self, cache: TokenCache) -> None:
        self._cache = cache

    def __getitem__(self, layer: int) -> "_TokenLayer":
        return _TokenLayer(self._cache, layer)


class _TokenLayer:
    def __init__(self, cache: TokenCache, layer: int) -> None:
        self._cache, self._layer = cache, layer

    def update_index(self, keys: Tensor) -> Tensor:
        """As `TokenCache.update_indexer`, with an axis of one head after the first."""
        return self._cache.update_indexer(keys.squeeze(1), self._layer).unsqueeze(1)


def by_token(value: Any, cache: SlotCache) -> Any:
    """An argument of an indexer, with each token as a batch of one.

    Tensors ``[1, tokens, ...]`` become ``[tokens, 1, ...]``, a mask what each token may see,
    ``[tokens, 1, capacity]``, and the cache one of the token's row.
    """
    if isinstance(value, tuple):
        return tuple(by_token(each, cache) for each in value)
    if isinstance(value, LayerMask):
        return cache.visible().unsqueeze(1)
    if value is cache:
        return TokenCache(cache)
    return value.transpose(0, 1) if isinstance(value, Tensor) else value


def _run_by_token(
    indexer: Any, cache: SlotCache, args: Sequence[Any], kwargs: dict[str, Any]
) -> Tensor:
    """The result of the indexer's own code."""
    result: Tensor = type(indexer).forward(
        indexer,
        *(by_token(each, cache) for each in args),
        **{name: by_token(each, cache) for name, each in kwargs.items()},
    )
    return result


def _dynamic_mask(module: Any, *, sees_prompt: bool) -> Callable[..., Tensor]:
    """What makes an attention mask of a term of each cached position.

    Args:
        module: the layer's attention.
        sees_prompt: tokens of a step that begins a sequence see each other.
    """

    def prepare(
        hidden_states: Tensor,
        dt_states: Tensor,
        keep_window_size: int = 2048,
        attention_mask: LayerMask | None = None,
    ) -> Tensor:
        """From terms ``[1, kv_heads, tokens]`` to a bias ``[tokens, kv_heads, 1, capacity]``."""
        cache = step_cache()
        options = attention_mask.options if attention_mask is not None else None
        if options is not None and options.reach:
            raise BuildError(
                f"{type(module).__name__} computes its attention mask, and a token sees {options}; "
                f"only all positions before it are supported"
            )
        cache.computed_mask = MaskOptions(lookahead=sees_prompt)
        terms = cache.of_tokens(cache.append_index(module.layer_idx, dt_states.permute(2, 0, 1)))
        bias: Tensor = getattr(type(module), DYNAMIC_MASK)(
            module,
            hidden_states=hidden_states.transpose(0, 1),
            dt_states=terms.transpose(1, 2),
            keep_window_size=keep_window_size,
            attention_mask=cache.visible(whole_prompts=sees_prompt)[:, None, None],
        )
        return bias

    return prepare


def _select_positions(
    model: Any, indexer: Any, cache: SlotCache, args: Sequence[Any], kwargs: dict[str, Any]
) -> Tensor:
    """DeepSeek: the positions with the best scores, for all heads."""
    indices = _run_by_token(indexer, cache, args, kwargs)
    hidden = torch.full_like(cache.visible(), float("-inf"), dtype=args[0].dtype)
    return hidden.unsqueeze(1).scatter(-1, indices.long(), 0.0)


def _select_blocks(
    model: Any, indexer: Any, cache: SlotCache, args: Sequence[Any], kwargs: dict[str, Any]
) -> Tensor:
    """MiniMax-M3: the blocks with the best scores, for each group of heads."""
    blocks = _run_by_token(indexer, cache, args, kwargs)
    hidden, positions, capacity = args[0], cache.positions[:, None], cache.visible().shape[1]
    bias: Tensor = indexer.build_block_mask(
        blocks, None, capacity, hidden.dtype, hidden.device, positions
    )
    return bias.squeeze(2)


def _select_pooled_blocks(
    model: Any, indexer: Any, cache: SlotCache, args: Sequence[Any], kwargs: dict[str, Any]
) -> Tensor:
    """Qwen4: the complete blocks with the best scores, and the positions after all of them.

    A block's key is the mean of the keys in it, rotated as at its first position. transformers
    loops over tokens; here are the same operations for all of them.
    """
    hidden, (cos, sin) = args[0], args[1]
    size, heads, dim = indexer.compress_ratio, indexer.index_n_heads, indexer.index_head_dim
    tokens = hidden.shape[1]
    query, key = indexer.index_qk_proj(hidden)[0].split([heads * dim, dim], -1)
    query = rotate(indexer.q_layernorm(query.view(tokens, heads, dim)), cos[0], sin[0])
    # the keys of blocks, by row
    keys = cache.append_index(indexer.layer_idx, key.unsqueeze(1))
    blocks = keys.shape[1] // size
    pooled = keys[:, : blocks * size].unflatten(1, (blocks, size)).float().mean(2).to(keys.dtype)
    starts = torch.arange(blocks, device=hidden.device) * size
    cos, sin = _rotary_embedding(model, indexer)(hidden, starts.expand(3, 1, -1))
    pooled = indexer.k_layernorm(pooled).transpose(0, 1)
    block_keys = cache.of_tokens(rotate(pooled, cos[0], sin[0]).transpose(0, 1))
    # the scores of blocks, by token
    scores = torch.matmul(query.float(), block_keys.float().transpose(1, 2))
    scores = torch.relu(scores).sum(1) / math.sqrt(dim)
    ends = cache.positions[:, None] + 1
    scores = scores.masked_fill(starts + size > ends, float("-inf"))
    best = scores.topk(min(indexer.block_topk, blocks), dim=-1).indices
    hidden_blocks = torch.full_like(scores, float("-inf"), dtype=hidden.dtype)
    of_blocks = hidden_blocks.scatter(-1, best, 0.0)
    entries = torch.arange(keys.shape[1], device=hidden.device)
    of_entries = of_blocks.index_select(1, (entries // size).clamp(max=blocks - 1))
    is_rest = entries >= torch.div(ends, size, rounding_mode="floor") * size
    return of_entries.masked_fill(is_rest, 0.0).unsqueeze(1)


def _rotary_embedding(model: torch.nn.Module, indexer: torch.nn.Module) -> Any:
    """The rotary embedding of the decoder that an indexer belongs to."""
    for module in model.modules():
        if hasattr(module, "rotary_emb") and any(each is indexer for each in module.modules()):
            return module.rotary_emb
    raise BuildError(f"{type(indexer).__name__} belongs to no model with a rotary embedding")


SELECTIONS: dict[str, Select] = {
    "deepseek_sparse_attention": _select_positions,
    "minimax_m3_sparse": _select_blocks,
    "qwen_sparse_attention": _select_pooled_blocks,
}
"""What the indexers of a kind of layers, in transformers' names, select."""
