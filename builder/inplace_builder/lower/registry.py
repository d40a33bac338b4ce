"""Which function lowers which operator.

Keys are exact overloads: ``aten.add.Tensor`` and ``aten.add.Scalar`` are different operators. An
operator of the ``inplace::`` library that takes states has one converter for each mechanism (a
*kind*, see `mechanisms`).

A converter is called as ``convert(ctx, *args, **kwargs)`` with the arguments of the node: tensors
as TensorRT tensors, states as `NetworkState`, dynamic extents as ``torch.SymInt``, everything else
as it is in the graph. It returns what the operator returns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from inplace_builder.lower.network import Network

Convert = Callable[..., Any]


Validator = Callable[[torch.fx.Node, Network], str | None]
"""Returns why a node cannot be lowered, or None where it can."""


Function = TypeVar("Function", bound=Convert)


@dataclass(frozen=True)
class Converter:
    """How one operator is lowered.

    Attributes:
        convert: adds the layers.
        validator: checks a node before it is converted; None where every node can be.
    """

    convert: Convert
    validator: Validator | None = None


_converters: dict[tuple[torch._ops.OpOverload, str | None], Converter] = {}


def converter(
    *overloads: torch._ops.OpOverload, validator: Validator | None = None
) -> Callable[[Function], Function]:
    """Register the decorated function for these overloads.

    Raises:
        ValueError: one of them already has a converter.
    """
    return _register([(overload, None) for overload in overloads], validator)


def state_converter(
    overload: torch._ops.OpOverload, *kinds: str, validator: Validator | None = None
) -> Callable[[Function], Function]:
    """Register the decorated function for an operator on states of one of these kinds.

    Raises:
        ValueError: one of them already has a converter.
    """
    return _register([(overload, kind) for kind in kinds], validator)


def find_converter(overload: torch._ops.OpOverload, kind: str | None = None) -> Converter | None:
    """The converter of an operator, or None.

    Args:
        overload: the operator.
        kind: the mechanism of the states that it takes; None where it takes none.
    """
    return _converters.get((overload, kind))


_unsupported: dict[torch._ops.OpOverload, str] = {}


def unsupported(reason: str, *overloads: torch._ops.OpOverload) -> None:
    """Record why TensorRT cannot express these operators; the reason ends their refusal."""
    for overload in overloads:
        _unsupported[overload] = reason


def unsupported_reason(overload: torch._ops.OpOverload) -> str | None:
    """Why TensorRT cannot express an operator; None where it is not known that it cannot."""
    return _unsupported.get(overload)


def registered(kind: str | None = None) -> frozenset[torch._ops.OpOverload]:
    """Every operator that has a converter for this kind."""
    return frozenset(overload for overload, its_kind in _converters if its_kind == kind)


def _register(
    keys: list[tuple[torch._ops.OpOverload, str | None]], validator: Validator | None
) -> Callable[[Function], Function]:
    def register(function: Function) -> Function:
        for overload, kind in keys:
            if (existing := _converters.get((overload, kind))) is not None:
                which = f"{overload}" if kind is None else f"{overload} for states of kind {kind}"
                name = existing.convert.__qualname__
                raise ValueError(f"{which} already has the converter {name}")
        for key in keys:
            _converters[key] = Converter(function, validator)
        return function

    return register
