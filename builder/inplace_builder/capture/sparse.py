"""Kinds of layers with sparse attention, and up to which capacity it is full causal attention."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig


def _whole_blocks(config: Any) -> int:
    """Of MiniMax-M3: the best blocks, of which one may be incomplete."""
    size, blocks = int(config.index_block_size), int(config.index_topk_blocks)
    return size * blocks


def _blocks_and_rest(config: Any) -> int:
    """Of Qwen4: the best of all complete blocks, and the positions after them."""
    size, budget = int(config.indexer_compress_ratio), int(config.indexer_budget)
    return budget // size * size + size - 1


SPARSE_KINDS: dict[str, Callable[[Any], int | None]] = {
    "deepseek_sparse_attention": lambda config: config.index_topk,
    "minimax_m3_sparse": _whole_blocks,
    "qwen_sparse_attention": _blocks_and_rest,
}
"""Kinds of layers with an indexer, in transformers' names: from a configuration to up to how many
positions of a sequence all are selected; None if there is no limit."""


def sparse_limits(config: PretrainedConfig) -> Iterator[int]:
    """Up to how many positions each sparse kind of layers attends to all."""
    for name in sorted(set(getattr(config, "layer_types", None) or ()) & set(SPARSE_KINDS)):
        limit = SPARSE_KINDS[name](config)
        if limit is not None:
            yield limit


class AllPositions:
    """Stands for the positions that an indexer selects, where these are all; not a tensor."""


@dataclass(frozen=True, eq=False)
class Selection:
    """Stands for the positions that an indexer selects.

    Attributes:
        bias: ``[tokens, heads or 1, capacity]``: 0 where a token attends to a position of its row,
            else very low.
    """

    bias: Tensor
