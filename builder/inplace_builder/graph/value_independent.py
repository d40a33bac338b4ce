"""Export a module whose lines ask a tensor for its value where they need not.

``x[:, n]``, ``x[:, n:n + 2]``, ``x.narrow(1, n, 2)`` and ``x.select(1, n)`` ask a counter ``n`` for
its value, which an export has not. `ValueIndependent` indexes with a tensor of one axis instead.
What that makes is a copy and no view, so it is written back when the module writes it, and taken
again when the module writes what it is a part of. Numbers that ``n.item()`` returned become tensors
again where they index or are calculated with. A mask of Python's numbers, as in
``x[:, torch.tensor([True, False])]``, becomes the places that it has, whose number an export has
not either; `inplace_builder.graph.passes` does so in what was exported.
"""

import functools
import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from inplace_builder.graph.quantile import quantile

_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)
"""Types of an index; ``uint8`` is a mask."""

_WHOLE: Any = slice(None)


@dataclass(frozen=True)
class _Range:
    """The item of a key for a number of entries from a start."""

    start: Any
    length: int


class UnknownLengthError(Exception):
    """How long a slice is depends on a tensor's value."""


class UnknownNumberError(Exception):
    """A number is computed from a tensor's value in a way that no operator is known for."""


@dataclass(frozen=True)
class _Offset:
    """A number that a step computes: a value of the module plus a constant.

    Attributes:
        source: equal for numbers that differ by a constant.
        constant: what is added to the source.
    """

    source: Any
    constant: int


@dataclass
class _Part:
    """A part of a tensor, as a copy.

    Attributes:
        copy: the copy.
        base: the tensor that it is a part of.
        key: its place there, with the indices as they were.
        versions: those of the copy and of the base when both were the same.
    """

    copy: "weakref.ref[Tensor]"
    base: Tensor
    key: "_Key"
    versions: tuple[int, int]


@dataclass(frozen=True)
class _Key:
    """The place of a part of a tensor.

    Attributes:
        indices: the axis, and the index of one axis, of each place that a step computes.
        items: what else selects: an integer 0 or a whole slice stands where an index was applied.
    """

    indices: tuple[tuple[int, Tensor], ...]
    items: tuple[Any, ...]

    def take(self, x: Tensor) -> Tensor:
        """A copy of the part."""
        for axis, index in self.indices:
            x = x[(*(_WHOLE,) * axis, index)]
        return x[self.items].clone() if not self.indices else x[self.items]

    def put(self, x: Tensor, new: Any) -> None:
        """Write the part."""
        if not self.indices:
            x[self.items] = new
            return
        (axis, index), *rest = self.indices
        place = _place(self.items, axis)
        if not rest and all(item is None or isinstance(item, int | slice) for item in self.items):
            before, at, after = self.items[:place], self.items[place], self.items[place + 1 :]
            view = x[(*before, _WHOLE, *after)]
            axis = sum(not isinstance(item, int) for item in before)
            extents = [*view.shape]
            extents[axis] = index.shape[0]
            if isinstance(new, Tensor):
                new = _expanded(new.to(view.dtype), extents, axis if at == 0 else None)
            view[(*(_WHOLE,) * axis, index)] = new
            return
        part = x[(*(_WHOLE,) * axis, index)]
        _Key(tuple(rest), self.items).put(part, new)
        x[(*(_WHOLE,) * axis, index)] = part


def _place(items: Sequence[Any], axis: int) -> int:
    """The place of an axis of the tensor among the items of a key."""
    return [place for place, item in enumerate(items) for _ in range(_axes(item))][axis]


def _expanded(new: Tensor, extents: list[int], missing: int | None) -> Tensor:
    """A value as large as what it is written into; an index of no axes lacks an axis."""
    target = [each for axis, each in enumerate(extents) if axis != missing]
    while new.dim() > len(target):  # PyTorch ignores leading 1s
        new = new.squeeze(0)
    new = new.expand(target)
    return new if missing is None else new.unsqueeze(missing)


def _axes(item: Any) -> int:
    """How many axes of a tensor an item of a key is for."""
    if item is None:
        return 0
    if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8):
        return item.dim()
    return 1


def _without_ellipsis(items: Sequence[Any], axes: int) -> list[Any]:
    """The items with a whole slice for each axis that they do not name."""
    place = next((place for place, item in enumerate(items) if item is Ellipsis), len(items))
    rest = [*items[:place], *items[place + 1 :]]
    missing = axes - sum(map(_axes, rest))
    return [*items[:place], *[_WHOLE] * missing, *items[place + 1 :]]


class ValueIndependent(TorchFunctionMode):
    """Index and calculate with tensors instead of their values, and take quantiles so.

    ``x.data`` is the tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self._offsets = WeakTensorKeyDictionary()
        self._numbers: dict[Any, Tensor] = {}
        self._masks = WeakTensorKeyDictionary()
        self._parts: list[_Part] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer a call of torch."""
        if func in _DATA:  # what an export cannot follow
            return _DATA[func](*args)
        name, result = getattr(func, "__name__", ""), None
        args, options = self._with_tensors(name, args, kwargs or {})
        if name in ("__getitem__", "__setitem__"):
            args = self._with_places(*args)
        if name in ("quantile", "nanquantile") and args and "out" not in options:
            result = quantile(*args, **options, ignore_nan=name == "nanquantile")
        elif (given := self._indexed(name, args, options)) is not None:
            x, key, *new = given
            if new:
                key.put(x, *new)
            else:
                result = key.take(x)
                if name != "roll":  # all others are views
                    versions = (result._version, x._version)
                    self._parts.append(_Part(weakref.ref(result), x, key, versions))
        else:
            result = func(*args, **options)
            self._note_number(name, args, options, result)
            if func is torch.tensor and result.dtype == torch.bool and not _has_tensors(args[0]):
                self._masks[result] = (result._version, np.asarray(args[0], bool))
        self._synchronise()
        return result

    def _indexed(
        self, name: str, args: Sequence[Any], options: Mapping[str, Any]
    ) -> tuple[Any, ...] | None:
        """The tensor, the place, and for an assignment the value, of a call that is replaced."""
        if not args or not isinstance(args[0], Tensor):
            return None
        x: Tensor = args[0]
        if name == "roll":
            return self._rolled(x, *args[1:], **options)
        if name not in _BINDINGS:
            return None
        items, *new = _BINDINGS[name](x, *args[1:], **options)
        computed = [leaf for item in items for leaf in _bounds(item) if self._is_computed(leaf)]
        if not computed or any(isinstance(item, bool) for item in items):
            return None
        indices: list[tuple[int, Tensor]] = []
        axis = 0
        items = _without_ellipsis(items, x.dim())
        for place, item in enumerate(items):
            if any(self._is_computed(leaf) for leaf in _bounds(item)):
                whole = isinstance(item, slice | _Range)
                index = self._along(item) if whole else self._tensor(item).reshape(1)
                indices.append((axis, index.clone()))
                items[place] = _WHOLE if whole else 0
            axis += _axes(item)
        return x, _Key(tuple(indices), tuple(items)), *new

    def _rolled(self, x: Tensor, shifts: Any, dims: Any = None) -> tuple[Any, ...] | None:
        """The tensor and the place of a roll by a computed number of entries."""
        shift, axis = (
            each[0] if isinstance(each, tuple | list) and len(each) == 1 else each
            for each in (shifts, dims)
        )
        if not self._is_computed(shift) or not isinstance(axis, int):
            return None
        axis %= x.dim()
        shift = self._tensor(shift)
        places = torch.arange(x.shape[axis], device=shift.device)
        index = (places - shift) % x.shape[axis]
        return x, _Key(((axis, index),), (_WHOLE,) * x.dim())

    def _with_tensors(
        self, name: str, args: Sequence[Any], options: Mapping[str, Any]
    ) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """The arguments of a call on each element, with tensors for numbers that were read."""
        if name.strip("_").removeprefix("r") not in _ON_EACH_ELEMENT:
            return args, options

        def tensor(given: Any) -> Any:
            read = isinstance(given, torch.SymInt | torch.SymFloat) and self._is_computed(given)
            return self._computed(given.node.expr) if read else given

        return [*map(tensor, args)], {key: tensor(given) for key, given in options.items()}

    def _with_places(self, x: Tensor, key: Any, *new: Any) -> Sequence[Any]:
        """The arguments of an index with the places of masks that are known."""
        items = _without_ellipsis(key if isinstance(key, tuple) else (key,), x.dim())
        known: list[Any] = []
        axis = 0
        for item in items:
            mask = self._mask(item)
            if mask is None:
                known.append(item)
            elif tuple(x.shape[axis : axis + mask.ndim]) == mask.shape:
                known += map(torch.tensor, np.nonzero(mask))
            else:  # PyTorch refuses it
                return (x, key, *new)
            axis += _axes(item)
        return (x, (*known,) if any(self._mask(item) is not None for item in items) else key, *new)

    def _mask(self, item: Any) -> NDArray[np.bool_] | None:
        """The mask that an item of a key is, if it is a known one with axes."""
        if isinstance(item, list):
            kinds = {type(each) for each in item}
            return np.asarray(item, bool) if kinds == {bool} else None
        known: tuple[int, NDArray[np.bool_]] | None = (
            self._masks.get(item) if isinstance(item, Tensor) else None
        )
        if known is None or known[0] != item._version or not known[1].ndim:
            return None
        return known[1]

    def _is_computed(self, item: Any) -> bool:
        """Whether an item is an integer that the export has no value for."""
        if isinstance(item, torch.SymInt | torch.SymFloat):
            return any(symbol in self._numbers for symbol in item.node.expr.free_symbols)
        return (
            isinstance(item, FakeTensor)
            and item.dim() == 0
            and item.dtype in _INTEGERS
            and item.constant is None
        )

    def _tensor(self, number: Any) -> Tensor:
        """An index as a tensor of no axes."""
        return number.long() if isinstance(number, Tensor) else self._computed(number.node.expr)

    def _computed(self, expression: Any) -> Any:
        """An expression of numbers that the module read off tensors, as a tensor of no axes.

        Raises:
            UnknownNumberError: it is computed in a way that has no operator here.
        """
        if expression in self._numbers:
            return self._numbers[expression]
        if expression.is_Integer or expression.is_Float:
            return int(expression) if expression.is_Integer else float(expression)
        function = _FUNCTIONS.get(type(expression).__name__)
        if function is None:
            raise UnknownNumberError(
                f"{expression} is computed from a tensor's value: compute it with tensors, without "
                f"item()"
            )
        return functools.reduce(function, map(self._computed, expression.args))

    def _along(self, item: slice | _Range) -> Tensor:
        """The index of a slice whose bounds a step computes and whose length it does not.

        Raises:
            UnknownLengthError: the length is not known.
        """
        if isinstance(item, _Range):
            first = self._tensor(item.start)
            return first + torch.arange(item.length, device=first.device)
        start, stop = self._offset(item.start), self._offset(item.stop)
        if item.step not in (None, 1) or start is None or stop is None or start[0] != stop[0]:
            raise UnknownLengthError(
                "how long a slice is depends on a tensor's value: take the whole axis of n entries "
                "and choose with torch.where(torch.arange(n) < length, …), or take a fixed number "
                "of entries, x.narrow(axis, start, 4)"
            )
        first = self._tensor(item.start)
        return first + torch.arange(max(0, stop[1] - start[1]), device=first.device)

    def _offset(self, bound: Any) -> tuple[Any, int] | None:
        """A bound as a source and what is added to it; None if it is not a sum of the two."""
        if isinstance(bound, torch.SymInt):
            constant = bound.node.expr.as_coeff_Add()[0]
            return (bound.node.expr - constant, int(constant)) if constant.is_Integer else None
        if not isinstance(bound, Tensor):
            return None
        known = self._offsets.get(bound)
        if known is None or known[0] != bound._version:
            known = (bound._version, _Offset(object(), 0))
            self._offsets[bound] = known
        return known[1].source, known[1].constant

    def _note_number(
        self, name: str, args: Sequence[Any], options: Mapping[str, Any], result: Any
    ) -> None:
        """Note what a number is that a call returned: one that was read, or a sum."""
        if name == "item" and isinstance(result, torch.SymInt | torch.SymFloat):
            number = args[0].reshape(())  # of the type that a Python number stands for
            number = number.long() if isinstance(result, torch.SymInt) else number.float()
            self._numbers[result.node.expr] = number.clone()
        if name not in _SUMS or options or not isinstance(result, Tensor) or result.dim():
            return
        one, other = args if len(args) == 2 else (args[0], 0)
        if not isinstance(one, Tensor) and _SUMS[name] is operator.add:
            one, other = other, one
        if isinstance(other, int) and self._is_computed(one) and self._is_computed(result):
            source, constant = self._offset(one) or (None, 0)
            offset = _Offset(source, _SUMS[name](constant, other))
            self._offsets[result] = (result._version, offset)

    def _synchronise(self) -> None:
        """Let parts and what they are parts of be the same again."""
        for part in list(self._parts):
            copy = part.copy()
            if copy is None:
                self._parts.remove(part)
                continue
            now = (copy._version, part.base._version)
            if now[0] != part.versions[0]:
                part.key.put(part.base, copy)
            elif now[1] != part.versions[1]:
                copy.copy_(part.key.take(part.base))
            part.versions = (copy._version, part.base._version)


def _has_tensors(data: Any) -> bool:
    """Whether what a tensor is made of has tensors, or numbers that a step computes."""
    if isinstance(data, list | tuple):
        return any(map(_has_tensors, data))
    return not isinstance(data, bool | int | float | np.ndarray | np.generic)


def _bounds(item: Any) -> tuple[Any, ...]:
    """The numbers of an item of a key."""
    if isinstance(item, slice):
        return item.start, item.stop
    return (item.start if isinstance(item, _Range) else item,)


def _at(x: Tensor, axis: int, item: Any) -> tuple[Any, ...]:
    """The key for an item on one axis."""
    return (*(_WHOLE,) * (axis % x.dim()), item)


_BINDINGS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "__getitem__": lambda x, key: (key if isinstance(key, tuple) else (key,),),
    "__setitem__": lambda x, key, new: (key if isinstance(key, tuple) else (key,), new),
    "select": lambda x, dim, index: (_at(x, dim, index),),
    "slice": lambda x, dim=0, start=None, end=None, step=1: (
        _at(x, dim, slice(start, end, None if step == 1 else step)),
    ),
    "narrow": lambda x, dim, start, length: (_at(x, dim, _Range(start, length)),),
}
"""The key, and the value that is assigned, of the calls that are replaced."""

_DATA: dict[Any, Callable[..., Any]] = {
    torch.Tensor.data.__get__: lambda x: x.detach(),  # type: ignore[attr-defined]
    torch.Tensor.data.__set__: lambda x, new: x.copy_(new),  # type: ignore[attr-defined]
}
"""Reading and assigning ``x.data``, without gradients: the memory, and a copy into it."""

_FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add,
    "Mul": operator.mul,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "FloorDiv": operator.floordiv,
    "IntTrueDiv": operator.truediv,
    "FloatTrueDiv": operator.truediv,
    "FloatPow": operator.pow,
    "Pow": operator.pow,
    "PowByNatural": operator.pow,
    "ToFloat": operator.add,
    "Max": lambda one, other: torch.maximum(*map(torch.as_tensor, (one, other))),
    "Min": lambda one, other: torch.minimum(*map(torch.as_tensor, (one, other))),
}
"""What computes a sympy expression of numbers, by the name of its class."""

_ON_EACH_ELEMENT = frozenset(
    {
        *("add", "sub", "mul", "div", "truediv", "true_divide", "floordiv", "floor_divide", "pow"),
        *("mod", "remainder", "fmod", "eq", "ne", "lt", "le", "gt", "ge", "maximum", "minimum"),
        *("where", "clamp", "clamp_min", "clamp_max", "fill", "masked_fill", "lerp"),
    }
)
"""Names of calls that take a tensor of no axes for a number, without ``r``, ``_`` and ``__``."""

_SUMS: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "__add__": operator.add,
    "__radd__": operator.add,
    "sub": operator.sub,
    "__sub__": operator.sub,
    "clone": operator.add,
    "detach": operator.add,
    "long": operator.add,
}
"""Calls whose result is their first argument plus a constant."""
