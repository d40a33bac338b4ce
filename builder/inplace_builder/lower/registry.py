"""Which function lowers which operator.

Keys are exact overloads: ``aten.add.Tensor`` and ``aten.add.Scalar`` are different operators. An operator of the ``inplace::`` library
that takes states has one converter a mechanism (a *kind*, see `mechanisms`).

A converter is called as ``convert(ctx, *args, **kwargs)`` with the arguments of the node: tensors as TensorRT tensors, states as
`State`, dynamic extents as ``torch.SymInt``, everything else as it stands in the graph. It returns what the operator returns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from inplace_builder.lower.network import Network

Convert = Callable[..., Any]


Supports = Callable[[torch.fx.Node, "Network"], str | None]
"""Why a node cannot be lowered; None if it can."""


Function = TypeVar("Function", bound=Convert)


@dataclass(frozen=True)
class Converter:
    """How one operator is lowered.

    Attributes:
        convert: adds the layers.
        supports: says why a node cannot be converted, or None.
    """

    convert: Convert
    supports: Supports | None = None


_converters: dict[tuple[torch._ops.OpOverload, str | None], Converter] = {}


def converter(
    *overloads: torch._ops.OpOverload, supports: Supports | None = None
) -> Callable[[Function], Function]:
    """Register the decorated function for these overloads.

    Raises:
        ValueError: one of them already has a converter.
    """
    return _register([(overload, None) for overload in overloads], supports)


def state_converter(
    overload: torch._ops.OpOverload, *kinds: str, supports: Supports | None = None
) -> Callable[[Function], Function]:
    """Register the decorated function for an operator that takes states of one of these kinds.

    Raises:
        ValueError: one of them already has a converter.
    """
    return _register([(overload, kind) for kind in kinds], supports)


def find_converter(overload: torch._ops.OpOverload, kind: str | None = None) -> Converter | None:
    """The converter of an operator, for states of this kind where it takes any; None if there is none."""
    return _converters.get((overload, kind))


def registered(kind: str | None = None) -> frozenset[torch._ops.OpOverload]:
    """Every operator that has a converter for this kind."""
    return frozenset(overload for overload, of in _converters if of == kind)


def _register(
    keys: list[tuple[torch._ops.OpOverload, str | None]], supports: Supports | None
) -> Callable[[Function], Function]:
    def register(function: Function) -> Function:
        for key in keys:
            if key in _converters:
                which = (
                    f"{key[0]}" if key[1] is None else f"{key[0]} for states of the kind {key[1]}"
                )
                raise ValueError(
                    f"{which} already has the converter {_converters[key].convert.__qualname__}"
                )
        for key in keys:
            _converters[key] = Converter(function, supports)
        return function

    return register
