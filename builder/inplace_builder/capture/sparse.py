"""Sparse attention, as far as it is full causal attention.

Some layers have an indexer, which selects a fixed number of positions. Up to that many positions
they attend to all of them, and so they are captured; what the indexer computes then has no effect
on the result and is left out.
`check_positions` refuses a larger capacity.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel


def _whole_blocks(config: Any) -> int:
    """Of MiniMax-M3: the best blocks, of which one may be incomplete."""
    size, blocks = int(config.index_block_size), int(config.index_topk_blocks)
    return size * blocks


def _blocks_and_rest(config: Any) -> int:
    """Of Qwen4: the best of all complete blocks, and the positions after them."""
    size, budget = int(config.indexer_compress_ratio), int(config.indexer_budget)
    return budget // size * size + size - 1


@dataclass(frozen=True)
class SparseKind:
    """A kind of layers that attend to a limited number of positions.

    Attributes:
        fields: what limits them, in the configuration's words.
        limit: up to how many positions of a sequence all are attended to; None if there is no
            limit.
    """

    fields: str
    limit: Callable[[Any], int | None]


SPARSE_KINDS = {
    "deepseek_sparse_attention": SparseKind("index_topk", lambda config: config.index_topk),
    "minimax_m3_sparse": SparseKind("index_topk_blocks of index_block_size", _whole_blocks),
    "qwen_sparse_attention": SparseKind(
        "indexer_budget in blocks of indexer_compress_ratio", _blocks_and_rest
    ),
}
"""Kinds of layers, in transformers' names, that are captured up to a number of positions."""


def sparse_limits(config: PretrainedConfig) -> Iterator[tuple[int, str]]:
    """Up to how many positions each sparse kind of layers attends to all, and what limits it."""
    for name in sorted(set(getattr(config, "layer_types", None) or ()) & set(SPARSE_KINDS)):
        kind = SPARSE_KINDS[name]
        limit = kind.limit(config)
        if limit is not None:
            yield limit, f"layers of the kind {name!r} ({kind.fields})"


class AllPositions:
    """Stands for the positions that an indexer selects, where these are all; not a tensor."""


@contextmanager
def without_indexers(model: PreTrainedModel) -> Iterator[None]:
    """Let each indexer select all positions, without computing its scores.

    The capacity must be one that `check_positions` allows.
    """
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    indexers = [
        module
        for module in model.modules()
        if type(module).__name__.endswith("Indexer") and _is_sparse(kinds, module)
    ]
    for module in indexers:
        module.__dict__["forward"] = _select_all
    try:
        yield
    finally:
        for module in indexers:
            module.__dict__.pop("forward")


def _is_sparse(kinds: Sequence[str], indexer: Any) -> bool:
    """Whether the layer of an indexer is of a sparse kind."""
    layer = getattr(indexer, "layer_idx", None)
    return layer is not None and layer < len(kinds) and kinds[layer] in SPARSE_KINDS


def _select_all(*_: object, **__: object) -> AllPositions:
    """The forward of an indexer."""
    return AllPositions()
