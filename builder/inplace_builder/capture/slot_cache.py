"""What a Hugging Face decoder sees in place of a cache of transformers.

The model's code runs unchanged: its keys and values pass through `SlotCache`, its attention through
`inplace_builder.capture.slot_attention`. Both know each token's position and nothing else. A
question that has no one answer for the packed tokens of several rows, such as how many tokens are
cached (`inplace_builder.capture.cache_length`), raises BuildError.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import torch
from inplace.operators import attention, read, update
from torch import Tensor
from transformers.cache_utils import Cache as TransformersCache

from inplace_builder.capture.cache_length import (
    CacheLength,
    LayerLength,
    MaskLength,
    OwnCacheLength,
)
from inplace_builder.capture.masks import MaskOptions
from inplace_builder.capture.own_attention import OwnAttention, Scores
from inplace_builder.errors import BuildError


@dataclass(frozen=True)
class LayerStates:
    """The states of all layers, and how ``inplace::attention`` addresses them.

    Attributes:
        keys, values: the states of each layer that attends, ``[slots, kv_heads, capacity, dim]``;
            no values where latents are the keys.
        index: the keys of the indexers of layers, ``[slots, 1, capacity, dim]``.
        recurrent: the other states by name, ``[slots, ...]``.
        slots, row_offsets, write_indices: as ``inplace::attention`` takes them.
        masks: for each layer that attends what a token may see.
        rings: for each of them whether its states are rings.
        scores: how each of them computes them; used where attention is the model's own.
        scales: the scales of keys and values of layers whose states are 8-bit floats.
    """

    keys: Mapping[int, Tensor]
    values: Mapping[int, Tensor]
    index: Mapping[int, Tensor]
    recurrent: Mapping[str, Tensor]
    slots: Tensor
    row_offsets: Tensor
    write_indices: Tensor
    masks: Mapping[int, MaskOptions]
    rings: Mapping[int, bool]
    scores: Mapping[int, Scores]
    scales: Mapping[int, tuple[Tensor, Tensor]]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        *,
        scale: float,
        softcap: float = 0.0,
        latent_dim: int = 0,
        sinks: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """``inplace::attention`` on the states of a layer.

        Query, key and value are ``[tokens, heads, dim]``, sinks ``[heads]``, and bias
        ``[tokens, heads or 1, capacity]``. Without a value it is the first ``latent_dim`` elements
        of the key.
        """
        mask = self.masks[layer]
        key_scale, value_scale = self.scales.get(layer, (None, None))
        return attention(
            query,
            key,
            value,
            self.keys[layer],
            self.values.get(layer),
            self.slots,
            self.row_offsets,
            self.write_indices,
            scale=scale,
            causal=not mask.lookahead,
            window=mask.window,
            attention_chunk=mask.attention_chunk,
            ring=self.rings[layer],
            softcap=softcap,
            latent_dim=latent_dim,
            sinks=sinks,
            bias=bias,
            key_scale=key_scale,
            value_scale=value_scale,
        )


@dataclass(frozen=True)
class SeenLayer:
    """What a layer handed to its attention.

    Attributes:
        key, value: heads, and elements of a head; 0 for values that are a part of keys.
        mask: what a token may see.
        scores: how they are computed; used where attention is the model's own.
    """

    key: tuple[int, int]
    value: tuple[int, int]
    mask: MaskOptions
    scores: Scores = field(default_factory=Scores)


@dataclass
class SeenLayers:
    """Collects what layers attend to and keep while a model runs once; see `slot_attention`.

    Attributes:
        capacity: maximum number of positions of a sequence.
        by_layer: the layers that attend to keys and values of their own, by index.
        index: for each layer with an indexer the elements of its keys.
        sharing: how many attentions are to keys and values of another layer.
        recurrent: the states of other layers by name: what a slot holds, in zeros.
        num_logits: for how many tokens the model returned logits, of which one was asked for.
    """

    capacity: int
    by_layer: dict[int, SeenLayer] = field(default_factory=dict)
    index: dict[int, int] = field(default_factory=dict)
    sharing: int = 0
    recurrent: dict[str, Tensor] = field(default_factory=dict)
    num_logits: int = 1


class Latents(Protocol):
    """What gave a layer its keys and values; see `inplace_builder.capture.latent`.

    Attributes:
        key, value: what it gave last.
        absorbed: they are the latents, so queries and results are those of latents.
        latent_dim: elements of a latent, and of a value.
    """

    key: Tensor
    value: Tensor
    absorbed: bool
    latent_dim: int

    @property
    def key_dim(self) -> int:
        """Elements of a key: of a latent, and of the rotated part."""

    def query(self, query: Tensor) -> Tensor:
        """A query of keys, ``[tokens, heads, dim]``, as one of latents."""

    def result(self, attended: Tensor) -> Tensor:
        """Attention over latents, ``[tokens, heads, latent_dim]``, as one over values."""


class SlotCache(TransformersCache):
    """A cache that keeps nothing: the attention function appends the keys and values it gets.

    Args:
        positions: the position of each token, ``[tokens]``.
        num_layers: layers of the model.
        step: where attention keeps keys and values, or what is seen of each layer.
        own_attention: the name of the model if it attends in code of its own; such a model sees an
            empty cache, and masks of its own kind.
    """

    def __init__(
        self,
        positions: Tensor,
        num_layers: int,
        step: LayerStates | SeenLayers,
        own_attention: str | None = None,
    ) -> None:
        # without the constructor of transformers, which makes a list of layers
        self.positions, self.num_layers, self.step = positions, num_layers, step
        self.own_attention = own_attention
        self.updated: int | None = None
        self._keys: dict[int, Tensor] = {}  # of the step, by layer
        self._values: dict[int, Tensor] = {}
        self._again: dict[int, int] = {}  # times that a layer attended after the first
        self._convolved: str | None = None  # the layer whose convolution comes next
        self._scanned: int | None = None  # the layer whose recurrence comes next, or came last
        self._num_scans = 0
        self._token_rows: Tensor | None = None
        self.expansion: Latents | None = None  # of the layer that attends next
        self.computed_mask: MaskOptions | None = None  # of the layer that attends next

    def __setattr__(self, name: str, value: object) -> None:
        """Keep our methods: RecurrentGemma gives its cache others, which read its layers."""
        if not callable(getattr(type(self), name, None)):
            super().__setattr__(name, value)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Note which layer attends next.

        Args:
            key_states, value_states: ``[1, kv_heads, tokens, dim]`` each; returned as they are, or
                tracked where the model attends in code of its own.
            layer_idx: the layer.
            args, kwargs: not used.
        """
        self.updated = layer_idx
        if self.own_attention is None:
            self._keys[layer_idx], self._values[layer_idx] = key_states, value_states
            return key_states, value_states
        return self._own_attention(key_states, value_states, layer_idx).tracked()

    def layer_of(self, key: Tensor) -> int | None:
        """The layer that gave the cache these keys in this step; None if none did."""
        return next((layer for layer, each in self._keys.items() if each is key), None)

    def absorbed(self, key: Tensor, value: Tensor) -> Latents | None:
        """The expansion that gave the keys and values of a layer, if it is to be absorbed."""
        expansion, self.expansion = self.expansion, None
        if expansion is None or not expansion.absorbed:
            return None
        return expansion if expansion.key is key and expansion.value is value else None

    def attends_again(self, layer: int, value: Tensor) -> int | None:
        """Where a layer keeps its keys again, with other values than it gave the cache.

        DiffLlama attends to two halves of its values, with the same queries and keys.

        Args:
            layer: the layer.
            value: the values.

        Returns:
            A number beyond those of layers; None if the values are those of the cache.
        """
        if self._values[layer] is value:
            return None
        self._again[layer] = self._again.get(layer, 0) + 1
        return layer + self._again[layer] * self.num_layers

    def _own_attention(self, key: Tensor, value: Tensor, layer: int) -> OwnAttention:
        step = self.step
        assert self.own_attention is not None
        if isinstance(step, LayerStates):

            def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                query, key, scale = step.scores[layer].attended(query, key, self.positions)
                return step.attend(layer, query, key, value, scale=scale)

            return OwnAttention(
                self.own_attention, key, value, attend=attend, proved=lambda *_: None
            )

        def proved(scores: Scores, mask: MaskOptions) -> None:
            dim = key.shape[3] + scores.key_components
            step.by_layer[layer] = SeenLayer(
                (key.shape[1], dim), (value.shape[1], value.shape[3]), mask, scores
            )

        return OwnAttention(self.own_attention, key, value, attend=None, proved=proved)

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        """False: a recurrent layer computes as for a new sequence, through the operators."""
        return False

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """Note which layer convolves next.

        Args:
            conv_states: the convolution's inputs, ``[1, channels, tokens]``; returned as they are.
            layer_idx: the layer.
            state_idx: which of its convolutions.
            kwargs: not used.
        """
        self.check_states_stored()
        self._convolved = f"{layer_idx}_{state_idx}" if state_idx else f"{layer_idx}"
        self._scanned, self._num_scans = layer_idx, 0
        return conv_states

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """Check that the layer's recurrence has run, which stored its state.

        Args:
            recurrent_states: what stands for the state; returned as it is.
            layer_idx: the layer.
            state_idx, kwargs: not used.

        Raises:
            BuildError: the state was computed by code that is not replaced.
        """
        if self._scanned != layer_idx or not self._num_scans:
            raise BuildError(
                f"layer {layer_idx} computes its recurrent state in code of its own; only the "
                f"recurrences of inplace.operators are supported: selective_scan, delta_rule"
            )
        return recurrent_states

    def convolution(self) -> str:
        """Which state the convolution that runs now uses: its layer, and its number if several.

        Raises:
            BuildError: its inputs were not given to the cache.
        """
        name, self._convolved = self._convolved, None
        if name is None:
            raise BuildError(
                "the model convolves tokens without caching the inputs of the convolution, so it "
                "would mix the rows of a step"
            )
        return name

    def recurrence(self) -> str:
        """Which state the recurrence that runs now uses: its layer, and its number if several.

        Raises:
            BuildError: no convolution of the same layer ran before, so the layer is unknown.
        """
        if self._scanned is None:
            raise BuildError("the model has a recurrence without a convolution, of unknown layer")
        self._num_scans += 1
        number = self._num_scans - 1
        return f"{self._scanned}_{number}" if number else f"{self._scanned}"

    def check_states_stored(self) -> None:
        """BuildError if a layer gave the cache states that no operator has taken since."""
        if self._convolved is not None:
            raise BuildError(
                f"layer {self._convolved} caches the inputs of a convolution that it computes in "
                f"code of its own; only transformers' causal_conv1d_fn is supported"
            )

    def state(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The state of this name, ``[slots, *shape]``; while layers are collected, one of zeros."""
        step = self.step
        if isinstance(step, LayerStates):
            return step.recurrent[name]
        state = torch.zeros((1, *shape), dtype=dtype, device=self.positions.device)
        step.recurrent[name] = state[0].clone()
        return state

    def rows(self) -> tuple[Tensor, Tensor]:
        """The slots ``[rows]`` and the row offsets ``[rows + 1]`` of the step."""
        step = self.step
        if isinstance(step, LayerStates):
            return step.slots, step.row_offsets
        return torch.tensor([0]), torch.tensor([0, len(self.positions)])

    def append_index(self, layer: int, keys: Tensor) -> Tensor:
        """Append a key of each token to those of a layer's indexer.

        Args:
            layer: the layer.
            keys: ``[tokens, 1, dim]``.

        Returns:
            The keys of each row at all positions, ``[rows, capacity, dim]``; see `of_tokens`. What
            lies beyond a row's length holds anything.
        """
        step = self.step
        if isinstance(step, SeenLayers):
            step.index[layer] = keys.shape[2]
            return keys[:1].expand(-1, step.capacity, -1)
        state = step.index[layer]
        update(state, step.slots, keys, step.row_offsets, step.write_indices, axis=2)
        return read(state, step.slots).squeeze(1)

    def of_tokens(self, rows: Tensor) -> Tensor:
        """What each token's own row has, ``[tokens, ...]``, of ``rows``, ``[rows, ...]``."""
        step = self.step
        if isinstance(step, SeenLayers):  # one row
            return rows.expand(self.positions.shape[0], *rows.shape[1:])
        return rows.index_select(0, self._rows_of_tokens(step.row_offsets))

    def _rows_of_tokens(self, row_offsets: Tensor) -> Tensor:
        """The row of each token, ``[tokens]``."""
        if self._token_rows is None:
            tokens = torch.arange(self.positions.shape[0], device=row_offsets.device)
            self._token_rows = (row_offsets[:-1] <= tokens[:, None]).sum(1) - 1
        return self._token_rows

    def visible(self, *, whole_prompts: bool = False) -> Tensor:
        """What each token may see of its row, ``[tokens, capacity]``.

        Args:
            whole_prompts: not only positions up to its own, but all tokens of a step that begins
                its sequence.
        """
        step = self.step
        if isinstance(step, SeenLayers):
            capacity = step.capacity
        else:
            capacity = next(iter(step.index.values())).shape[2]
        entries = torch.arange(capacity, device=self.positions.device)
        visible = entries <= self.positions[:, None]
        if whole_prompts and isinstance(step, LayerStates):
            counts = step.row_offsets[1:] - step.row_offsets[:-1]
            begins = torch.where(step.write_indices == 0, counts, 0)
            visible = visible | (entries < self.of_tokens(begins)[:, None])
        return visible

    def get_seq_length(self, layer_idx: int | None = None) -> Any:
        """The number of cached tokens, as far as there is one.

        Args:
            layer_idx: the layer that is asked for; None where the model asks for any.
        """
        if self.own_attention is not None:
            return OwnCacheLength(self.positions)
        return (CacheLength if layer_idx is None else LayerLength)(self.positions)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> Any:
        """What transformers hands to `_layer_mask`."""
        if self.own_attention is not None:
            return self.positions.shape[0], 0
        capacity = self.step.capacity if isinstance(self.step, SeenLayers) else None
        return MaskLength(self.positions, capacity), 0

    def __len__(self) -> int:
        """The number of layers."""
        return self.num_layers

    @property
    def is_sliding(self) -> list[bool]:
        """False for all layers: transformers chooses by it whose mask sizes to ask for."""
        return [False] * self.num_layers

    @property
    def is_initialized(self) -> bool:
        """Whether tokens may be cached."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether transformers may call torch.compile."""
        return False

    @property
    def layers(self) -> NoReturn:
        """BuildError: what transformers keeps in layers is in the engine's states."""
        raise BuildError(
            "the model reads the layers of its cache (shared states, and others that it does not "
            "update through the cache's own methods, are not supported)"
        )


_current_cache: ContextVar[SlotCache] = ContextVar("inplace_cache")
"""The cache of the step that runs: transformers does not pass it to attention functions."""


def current_step_cache() -> SlotCache | None:
    """The cache of the step that runs; None while none does."""
    return _current_cache.get(None)


def step_cache() -> SlotCache:
    """The cache of the step that runs."""
    return _current_cache.get()


@contextmanager
def current_cache(cache: SlotCache) -> Iterator[None]:
    """Let attention, mask functions and recurrences use this cache."""
    token = _current_cache.set(cache)
    try:
        yield
    finally:
        _current_cache.reset(token)
