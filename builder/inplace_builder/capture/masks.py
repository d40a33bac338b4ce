"""What a token may see: masks of transformers as options of ``inplace::attention``.

transformers describes what a token may see by a mask function, and its default implementations of
attention follow the mask alone. `mask_options` evaluates a mask function and reads the options off
it. The configuration's window, and the one that a model hands to its attention function, are not
trusted.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from inplace_builder.capture.sparse import AllPositions, Selection
from inplace_builder.errors import BuildError, brief

NUM_SAMPLED_QUERIES = 64
"""Positions of queries at which a mask is evaluated, beside those around its limits."""


@dataclass(frozen=True)
class MaskOptions:
    """What a token may see, as ``inplace::attention`` has it.

    Attributes:
        window: how many positions up to its own; 0 for all.
        attention_chunk: if not 0, only positions of its own chunk of so many.
        lookahead: also later tokens of its sequence that are fed in the same step.
    """

    window: int = 0
    attention_chunk: int = 0
    lookahead: bool = False

    @property
    def reach(self) -> int:
        """How many positions up to its own a token may see; 0 for all."""
        return self.window or self.attention_chunk

    def visible(self, queries: Tensor, positions: Tensor) -> Tensor:
        """Whether queries at ``queries [n]`` see each position, if all are fed in one step."""
        own = queries[:, None]
        seen = torch.full((len(queries), len(positions)), self.lookahead) | (positions <= own)
        if self.window:
            seen &= positions > own - self.window
        if self.attention_chunk:
            seen &= positions >= own // self.attention_chunk * self.attention_chunk
        return seen

    def __str__(self) -> str:
        """For errors."""
        if self.lookahead:
            return "later tokens too"
        if self.attention_chunk:
            return f"chunks of {self.attention_chunk} positions"
        return f"a window of {self.window} positions" if self.window else "all positions before it"


def mask_options(mask_function: Callable[..., Tensor], capacity: int) -> MaskOptions:
    """The options that a mask function stands for, evaluated over all positions of a sequence.

    Args:
        mask_function: of transformers: from batch, head, query and key index to whether the query
            sees the key.
        capacity: maximum number of positions of a sequence.

    Raises:
        BuildError: it is none that the operator has.
    """
    first = torch.zeros((1, 1, 1, 1), dtype=torch.int64)

    def visible(queries: Tensor, keys: Tensor) -> Tensor:
        """Whether queries ``[n]`` see keys ``[k]``, ``[n, k]``."""
        try:
            mask = mask_function(first, first, queries.view(1, 1, -1, 1), keys.view(1, 1, 1, -1))
        except Exception as error:
            raise BuildError(
                f"an attention mask of the model cannot be evaluated: {brief(error)}"
            ) from error
        return mask.expand(1, 1, len(queries), len(keys))[0, 0]

    positions = torch.arange(capacity)
    # as many queries see the first position as a window or a chunk has positions
    size = int(visible(positions, positions[:1]).sum())
    sampled = torch.linspace(0, capacity - 1, min(capacity, NUM_SAMPLED_QUERIES)).long()
    around = torch.cat([torch.arange(-2, 3) + limit for limit in (0, size, 2 * size, capacity)])
    queries = torch.cat([sampled, around]).clamp(0, capacity - 1)
    actual = visible(queries, positions)
    wrong = torch.zeros(len(queries), dtype=torch.bool)
    for options in _candidates(size, capacity):
        differs = (actual != options.visible(queries, positions)).any(1)
        if not differs.any():
            return options
        wrong = differs if not wrong.any() else wrong
    position = int(queries[wrong].min()) if wrong.any() else 0
    raise BuildError(
        f"the model has an attention mask that is neither causal nor a sliding window nor in "
        f"chunks: the token at position {position} does not see just those before it"
    )


def _candidates(size: int, capacity: int) -> Iterator[MaskOptions]:
    """Masks under which ``size`` queries see the first position."""
    if size == capacity:
        yield MaskOptions()
        yield MaskOptions(lookahead=True)
    elif size:
        yield MaskOptions(window=size)
        yield MaskOptions(attention_chunk=size)


class ChangedMaskError(BuildError):
    """A model computes with its mask, instead of handing it to an attention function."""


class LayerMask:
    """Stands for a mask of transformers; only the attention function reads it.

    Attributes:
        options: what a token may see; None if not evaluated.
        error: why there are no options, raised for a layer that uses the mask.
        selection: the positions that an indexer selects of those.
    """

    def __init__(
        self,
        options: MaskOptions | None,
        error: BuildError | None = None,
        selection: Selection | None = None,
    ) -> None:
        self.options, self.error, self.selection = options, error, selection

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # what Python and torch ask of any object
            raise AttributeError(name)
        self._refuse()

    @classmethod
    def __torch_function__(cls, *_: object) -> NoReturn:
        """Refuse a call of torch that takes the mask."""
        cls._refuse()

    def __getitem__(self, index: object) -> "LayerMask":
        """The mask without its axis of heads, which it does not tell apart."""
        if index != (slice(None), 0, slice(None), slice(None)):
            self._refuse()
        return self

    def is_floating_point(self) -> bool:
        """False: models combine masks that are boolean by ``&``."""
        return False

    def __and__(self, other: object) -> "LayerMask":
        """The mask, of the positions that an indexer selects."""
        if isinstance(other, Selection):
            return LayerMask(self.options, self.error, other)
        if not isinstance(other, AllPositions):
            self._refuse()
        return self

    @staticmethod
    def _refuse(*_: object) -> NoReturn:
        raise ChangedMaskError(
            "the model changes its attention mask itself; only causal attention, with a window or "
            "in chunks or without, is supported"
        )

    __add__ = __radd__ = __mul__ = __rmul__ = __rand__ = _refuse
    __sub__ = __rsub__ = __or__ = __ror__ = __invert__ = __neg__ = _refuse
