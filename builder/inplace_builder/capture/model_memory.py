"""What a Hugging Face decoder keeps between two tokens of one sequence, in the model's own code.

A model keeps tensors in an object that it takes and returns: a cache with layers, a cache of its
own class, a list. `ModelMemory` finds them by running one token, and lets them be replaced.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    LinearAttentionAndStaticFullAttentionLayer,
    LinearAttentionAndStaticSlidingWindowAttentionLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from inplace_builder.errors import BuildError

ARGUMENTS = ("cache_params", "past_key_values", "state")
"""What models call the object that they keep tensors in."""


def memory_argument(model: PreTrainedModel) -> str | None:
    """The argument that a model takes this object as; None if it has none."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in ARGUMENTS if name in parameters), None)


@dataclass(frozen=True)
class Place:
    """Where an object keeps a tensor.

    Attributes:
        name: how it is reached from the object, ``layers_0_keys``.
        owner, key: the list or mapping that has it, and where.
    """

    name: str
    owner: Any
    key: Any

    def get(self) -> Tensor:
        """The tensor."""
        tensor: Tensor = self.owner[self.key]
        return tensor

    def set(self, tensor: Tensor) -> None:
        """Put another tensor there."""
        self.owner[self.key] = tensor


@dataclass(frozen=True)
class ModelMemory:
    """What a model keeps after a first token.

    Attributes:
        argument: what the model calls the object.
        object: the object.
        states: where it keeps tensors that differ from sequence to sequence.
        counters: where it keeps the number of tokens so far.
        initial: what each of ``states`` holds in a new sequence.
    """

    argument: str
    object: Any
    states: tuple[Place, ...]
    counters: tuple[Place, ...]
    initial: tuple[Tensor, ...]

    @classmethod
    def of(cls, model: PreTrainedModel, capacity: int) -> "ModelMemory":
        """Run two tokens to see what a model keeps.

        Args:
            model: the model.
            capacity: maximum number of positions of a sequence.

        Raises:
            BuildError: it takes no object that it keeps tensors in, or these grow.
        """
        parameters = inspect.signature(model.forward).parameters
        argument = memory_argument(model)
        if argument is None:
            raise BuildError(
                f"{type(model).__name__} takes none of {list(ARGUMENTS)}: it keeps nothing between "
                f"two tokens"
            )
        kept: Any = _static_cache(model, capacity) if argument == "past_key_values" else None
        shapes, counts = [], []
        for token in range(2):
            ids = torch.tensor([[token]], device=model.device)
            given = {argument: kept} | positions_argument(parameters, ids[0])
            with torch.no_grad():
                out = model(input_ids=ids, use_cache=True, **given)
            kept = getattr(out, argument, None)
            places = list(_places(kept, argument if isinstance(kept, list) else ""))
            shapes.append({place.name: tuple(place.get().shape) for place in places})
            counts.append({place.name for place in places if _counts(place.get(), token + 1)})
        if not shapes[0]:
            raise BuildError(f"{type(model).__name__} returns no tensors as its {argument}")
        if shapes[0] != shapes[1]:
            raise BuildError(f"{argument} of {type(model).__name__} grows with every token")
        counters = tuple(place for place in places if place.name in counts[0] & counts[1])
        states = tuple(place for place in places if place not in counters)
        initial = tuple(torch.zeros_like(place.get()) for place in states)
        if argument == "state":
            initial[4].fill_(RWKV_LOWEST)
        return cls(argument, kept, states, counters, initial)

    def put(self, states: Sequence[Tensor], position: Tensor) -> None:
        """Let the object have these states after as many tokens as ``position [1]``."""
        for place, state in zip(self.states, states, strict=True):
            place.set(state)
        for place in self.counters:
            # a copy: the model counts on in its memory
            place.set(position.reshape(place.get().shape).clone())


RWKV_LOWEST = -1e30
"""The maximum of the exponents of no tokens, in ``RwkvModel.forward``."""


def positions_argument(parameters: Mapping[str, Any], positions: Tensor) -> dict[str, Tensor]:
    """The positions ``[tokens]`` of one sequence as a model's argument, if it has these.

    Args:
        parameters: those of its forward.
        positions: the positions.
    """
    return {"position_ids": positions[None]} if "position_ids" in parameters else {}


def _counts(tensor: Tensor, tokens: int) -> bool:
    """Whether a tensor is a number of tokens."""
    return not tensor.is_floating_point() and tensor.numel() == 1 and int(tensor) == tokens


class _SequenceCache(StaticCache):
    """A cache of transformers of fixed size."""

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """The number of cached tokens, as a copy: the cache counts on in its own tensor."""
        length: Any = super().get_seq_length(layer_idx)
        return length.clone() if isinstance(length, Tensor) else length


def _static_cache(model: PreTrainedModel, capacity: int) -> StaticCache:
    """A cache of transformers of fixed size; layers with a window keep all positions too.

    Raises:
        BuildError: transformers has no such cache for a layer.
    """
    try:
        cache = _SequenceCache(model.config, max_cache_len=capacity)
    except KeyError as error:
        raise BuildError(f"transformers has no static cache for layers of the kind {error}") from (
            error
        )
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, LinearAttentionAndStaticSlidingWindowAttentionLayer):
            cache.layers[index] = LinearAttentionAndStaticFullAttentionLayer(
                capacity, layer.number_of_states
            )
        elif isinstance(layer, StaticSlidingWindowLayer):
            cache.layers[index] = StaticLayer(capacity)
    return cache


def _places(kept: Any, name: str = "") -> Iterator[Place]:
    """Where an object keeps tensors, and its parts do; tuples of tensors become lists.

    Args:
        kept: the object; a list, a mapping, or one with attributes.
        name: begins the names.
    """
    owner: Any = kept if isinstance(kept, list | dict) else getattr(kept, "__dict__", {})
    for key, each in list(enumerate(owner) if isinstance(owner, list) else owner.items()):
        path = f"{name}_{key}" if name else str(key)
        if isinstance(each, tuple) and any(isinstance(part, Tensor) for part in each):
            each = owner[key] = list(each)
        if isinstance(each, Tensor):
            yield Place(path, owner, key)
        elif not isinstance(each, torch.nn.Module | PreTrainedConfig):
            yield from _places(each, path)
