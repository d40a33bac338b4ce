"""Dynamic extents: expressions over the extents of the network's inputs, turned into shape tensors when a layer needs one."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod

from inplace_builder.errors import BuildError

if TYPE_CHECKING:
    from inplace_builder.lower.layers import Layers

INT = torch.int64
OPERATIONS = {sympy.Add: "SUM", sympy.Mul: "PROD", FloorDiv: "FLOOR_DIV", Max: "MAX", Min: "MIN", sympy.Max: "MAX", sympy.Min: "MIN"}


class Measured:
    """The extent of some tensor's axis, asked of the tensor itself."""

    def __init__(self, tensor: Any, axis: int) -> None:
        self.tensor, self.axis = tensor, axis

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Measured) and other.tensor is self.tensor and other.axis == self.axis

    def __hash__(self) -> int:
        return hash((id(self.tensor), self.axis))


Size: TypeAlias = int | torch.SymInt
"""An extent as the captured graph has it."""
Extent: TypeAlias = int | torch.SymInt | Measured
"""How many elements an axis has."""


class Extents:
    """What each symbol of the graph stands for, and the layers that compute extents from them.

    A symbol is the extent of some input's axis. Every layer made here is made once.
    """

    def __init__(self, layers: "Layers") -> None:
        self._layers = layers
        self._sources: dict[sympy.Symbol, tuple[Any, int]] = {}
        self._known: dict[Any, Any] = {}

    def define(self, tensor: Any, shape: Sequence[int | torch.SymInt]) -> None:
        """The extents of a network input name symbols."""
        for axis, extent in enumerate(shape):
            if isinstance(extent, torch.SymInt) and isinstance(expression(extent), sympy.Symbol):
                self._sources.setdefault(expression(extent), (tensor, axis))

    def of(self, x: Any) -> list[Extent]:
        """The extents of a tensor: integers, and `Measured` where they are not known."""
        return [size if size >= 0 else Measured(x, axis) for axis, size in enumerate(x.shape)]

    def tensor(self, extent: Extent) -> Any:
        """An extent as an int64 tensor of shape ``[1]``.

        Raises:
            BuildError: it is no expression over the extents of inputs.
        """
        if isinstance(extent, Measured):
            return self._measured(extent.tensor, extent.axis)
        if isinstance(extent, int):
            return self._layers.scalar(extent, INT, 1)
        return self._evaluate(expression(extent))

    def shape(self, sizes: Sequence[Extent]) -> Any:
        """Extents as one int64 tensor of shape ``[len(sizes)]``."""
        key = tuple(size if isinstance(size, int | Measured) else expression(size) for size in sizes)
        if key not in self._known:
            self._known[key] = self._layers.concatenate([self.tensor(size) for size in sizes], 0)
        return self._known[key]

    def _measured(self, tensor: Any, axis: int) -> Any:
        key = (Measured(tensor, -1), axis)
        if key not in self._known:
            layers = self._layers
            shape = layers.cast(layers.output(layers.network.add_shape(tensor)), INT)
            self._known[key] = layers.slice(shape, [axis], [1])
        return self._known[key]

    def _evaluate(self, wanted: sympy.Expr) -> Any:
        if wanted in self._known:
            return self._known[wanted]
        layers = self._layers
        if isinstance(wanted, sympy.Integer | int):
            found = layers.scalar(int(wanted), INT, 1)
        elif isinstance(wanted, sympy.Symbol):
            if wanted not in self._sources:
                raise BuildError(f"{layers.label}{layers.origin}: the extent {wanted} is that of no input; only extents of inputs may vary")
            found = self._measured(*self._sources[wanted])
        elif isinstance(wanted, Mod):
            value, by = (self._evaluate(part) for part in wanted.args)
            found = layers.subtract(value, layers.multiply(layers.elementwise("FLOOR_DIV", value, by), by))
        elif wanted.func in OPERATIONS:
            found, *others = (self._evaluate(part) for part in wanted.args)
            for other in others:
                found = layers.elementwise(OPERATIONS[wanted.func], found, other)
        else:
            where = f"{layers.label}{layers.origin}"
            raise BuildError(f"{where}: the extent {wanted} has an operation ({wanted.func.__name__}) that is not lowered")
        self._known[wanted] = found
        return found


def expression(extent: Size) -> Any:
    """An extent as sympy has it. Comparing these, unlike comparing SymInts, adds no guard to the graph."""
    return sympy.Integer(extent) if isinstance(extent, int) else extent.node.expr
