"""The number of cached tokens, which has no one value for the packed tokens of several rows.

A model that makes its tokens' positions of it gets them; for everything else there is no answer.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from inplace_builder.errors import BuildError
from inplace_builder.graph.export import model_line


class CacheLengthError(BuildError):
    """A model computes with the number of cached tokens, which differs from row to row."""


class _Positions:
    """What makes the tokens' positions of the number of cached tokens.

    Args:
        positions: the position of each token, ``[tokens]``.
        more: what was added to the number.
    """

    def __init__(self, positions: Tensor, more: Any = 0) -> None:
        self._positions, self._more = positions, more

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Answer a call of torch that takes the number."""
        if function in (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__) and not kwargs:
            tensors = [arg for arg in args if isinstance(arg, Tensor)]
            lengths = [arg for arg in args if isinstance(arg, cls)]
            if len(tensors) == len(lengths) == 1:
                length: _Positions = lengths[0]
                return length._from_indices(tensors[0])
        if function is torch.arange and len(args) == 2 and isinstance(args[0], _Positions):
            return args[0]._counted_to(args[1], **(kwargs or {}))
        return _refuse_length()

    def _counted_to(self, end: Any, dtype: torch.dtype = torch.int64, **_: Any) -> Tensor:
        """The positions, where ``end`` is as many tokens away as the step has."""
        more = end._more if isinstance(end, _Positions) else self._number(end)
        if more - self._more == self._positions.shape[0]:
            positions: Tensor = self._positions.to(dtype) + self._more
            return positions
        return _refuse_length()

    @staticmethod
    def _number(end: Any) -> Any:
        """What was added to the number to get another one."""
        return _refuse_length()

    def _from_indices(self, indices: Tensor) -> Tensor:
        """The positions, where ``indices`` counts the tokens of the step."""
        if (
            not indices.is_floating_point()
            and indices.shape == self._positions.shape
            and _counts_tokens(indices)
        ):
            positions: Tensor = self._positions.to(indices.dtype) + self._more
            return positions
        return _refuse_length()


def _counts_tokens(indices: Tensor) -> bool:
    """Whether it is ``arange(tokens)``; True while a graph is traced, after a run on values."""
    if is_fake(indices) or torch.compiler.is_compiling():
        return True
    return torch.equal(indices.flatten(), torch.arange(indices.numel(), dtype=indices.dtype))


def _refuse_length(*_: object) -> NoReturn:
    line = model_line(sys._getframe())
    raise CacheLengthError(
        f"the model computes with the number of cached tokens{line}, of which every row "
        f"of a step has its own; only its sum with arange(tokens), the positions, is supported"
    )


class CacheLength(_Positions):
    """The number of cached tokens: each row has its own, so it is not a number.

    A model that adds it to ``arange(tokens)``, or counts ``tokens`` on from it, computes the
    tokens' positions, and gets them. Every other use raises BuildError.
    """

    def __radd__(self, other: object) -> Any:
        """The positions, of indices; the number with more added, of a number."""
        if isinstance(other, int | torch.SymInt):
            return CacheLength(self._positions, self._more + other)
        return self._from_indices(other) if isinstance(other, Tensor) else _refuse_length()

    __add__ = __radd__

    def __sub__(self, other: object) -> Any:
        """No answer."""
        return _refuse_length()

    _no = staticmethod(_refuse_length)
    __rsub__ = __mul__ = __rmul__ = __floordiv__ = __mod__ = _no
    __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __int__ = __float__ = __index__ = _no
    __ne__ = _no

    def __eq__(self, other: object) -> bool:
        return _refuse_length()

    def __hash__(self) -> int:
        return _refuse_length()


class MaskLength(CacheLength):
    """The number of positions that a mask is made for.

    A model may pad to it what it knows of its tokens. It is the capacity while masks are evaluated;
    while a graph is traced nothing reads them.

    Args:
        positions: the position of each token, ``[tokens]``.
        capacity: maximum number of positions of a sequence; None while a graph is traced.
    """

    def __init__(self, positions: Tensor, capacity: int | None) -> None:
        super().__init__(positions)
        self._capacity = capacity

    def __add__(self, other: object) -> Any:
        """The number itself, of no more positions."""
        return self if isinstance(other, int) and other == 0 else super().__add__(other)

    __radd__ = __add__

    def __sub__(self, other: object) -> Any:
        """How many positions are missing."""
        if not isinstance(other, int | torch.SymInt):
            return _refuse_length()
        return 0 if self._capacity is None else self._capacity - int(other)


class LayerLength(CacheLength):
    """The number of cached tokens of one layer.

    Mllama asks whether it is 0, to pass over a layer that attends to images. None is ever cached,
    and for other layers it ignores the answer.
    """

    def __eq__(self, other: object) -> bool:
        return other == 0 or _refuse_length()

    def __hash__(self) -> int:
        return _refuse_length()


class OwnCacheLength(_Positions):
    """The number of cached tokens for a model that attends in code of its own.

    It sees an empty cache: as a number, of which it makes its mask, the length is 0. Positions that
    it computes from the length are those of its tokens.
    """

    @staticmethod
    def _number(end: Any) -> Any:
        return end

    def __radd__(self, other: Any) -> Any:
        """The positions, of indices; a number stays."""
        return self._from_indices(other) if isinstance(other, Tensor) else other

    __add__ = __radd__

    def __index__(self) -> int:
        return 0

    __int__ = __index__

    def __bool__(self) -> bool:
        return False

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return other == 0

    def __lt__(self, other: Any) -> Any:
        return other > 0

    def __gt__(self, other: Any) -> Any:
        return other < 0

    def __le__(self, other: Any) -> Any:
        return other >= 0

    def __ge__(self, other: Any) -> Any:
        return other <= 0

    def __sub__(self, other: Any) -> Any:
        return -other

    def __rsub__(self, other: Any) -> Any:
        return other
