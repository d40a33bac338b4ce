"""Layers and extents: what converters build a network from.

Every method of `Layers` adds one step of a network: checked, named, and with PyTorch's meaning.
Networks are strongly typed, so a layer never casts: every cast is one of ours.

An extent is a Python integer where it is known, a ``torch.SymInt`` where it is an expression over
the extents of the network's inputs, and an `AxisExtent` where it is read from a tensor. A shape
with more than one extent that is not known becomes a shape tensor; `Extents` adds the layers that
compute it, each once.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import sympy
import torch
from inplace.trt import TensorRT
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod

from inplace_builder.errors import LoweringError

INT = torch.int64


OPERATIONS = {
    sympy.Add: "SUM",
    sympy.Mul: "PROD",
    FloorDiv: "FLOOR_DIV",
    Max: "MAX",
    Min: "MIN",
    sympy.Max: "MAX",
    sympy.Min: "MIN",
}
"""Operations of extents, as members of TensorRT's ElementWiseOperation."""


class AxisExtent:
    """The extent of a tensor's axis, read from the tensor at run time."""

    def __init__(self, tensor: Any, axis: int) -> None:
        self.tensor, self.axis = tensor, axis

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, AxisExtent)
            and other.tensor is self.tensor
            and other.axis == self.axis
        )

    def __hash__(self) -> int:
        return hash((id(self.tensor), self.axis))


Size: TypeAlias = int | torch.SymInt
"""An extent as the captured graph has it."""


Extent: TypeAlias = int | torch.SymInt | AxisExtent
"""How many elements an axis has."""


class Extents:
    """The symbols of a graph, and the layers that compute extents from them.

    A symbol is the extent of some input's axis. Every layer made here is made once.
    """

    def __init__(self, layers: "Layers") -> None:
        self._layers = layers
        self._sources: dict[sympy.Symbol, tuple[Any, int]] = {}
        self._computed: dict[Any, Any] = {}

    def define(self, tensor: Any, shape: Sequence[int | torch.SymInt]) -> None:
        """Use the axes of a network input as the values of the symbols in its shape."""
        for axis, extent in enumerate(shape):
            if isinstance(extent, torch.SymInt) and isinstance(expression(extent), sympy.Symbol):
                self._sources.setdefault(expression(extent), (tensor, axis))

    def of(self, x: Any) -> list[Extent]:
        """The extents of a tensor: integers, and `AxisExtent` where they are not known."""
        return [size if size >= 0 else AxisExtent(x, axis) for axis, size in enumerate(x.shape)]

    def tensor(self, extent: Extent) -> Any:
        """An extent as an int64 tensor of shape ``[1]``.

        Raises:
            LoweringError: it is not an expression over the extents of inputs.
        """
        if isinstance(extent, AxisExtent):
            return self._read(extent.tensor, extent.axis)
        if isinstance(extent, int):
            return self._layers.scalar(extent, INT, 1)
        return self._evaluate(expression(extent))

    def shape(self, sizes: Sequence[Extent]) -> Any:
        """Extents as one int64 tensor of shape ``[len(sizes)]``."""
        key = tuple(
            size if isinstance(size, int | AxisExtent) else expression(size) for size in sizes
        )
        if key not in self._computed:
            self._computed[key] = self._layers.concatenate([self.tensor(size) for size in sizes], 0)
        return self._computed[key]

    def _read(self, tensor: Any, axis: int) -> Any:
        key = AxisExtent(tensor, axis)
        if key not in self._computed:
            layers = self._layers
            shape = layers.cast(layers.output(layers.network.add_shape(tensor)), INT)
            self._computed[key] = layers.slice(shape, [axis], [1])
        return self._computed[key]

    def _evaluate(self, extent: sympy.Expr) -> Any:
        if extent not in self._computed:
            self._computed[extent] = self._add(extent)
        return self._computed[extent]

    def _add(self, extent: sympy.Expr) -> Any:
        """Add the layers of an expression.

        Raises:
            LoweringError: it has an operation or a symbol that is not known here.
        """
        layers = self._layers
        where = f"{layers.label}{layers.origin}"
        if isinstance(extent, sympy.Integer | int):
            return layers.scalar(int(extent), INT, 1)
        if isinstance(extent, sympy.Symbol):
            if extent not in self._sources:
                raise LoweringError(
                    f"{where}: the extent {extent} is not the extent of any input; "
                    f"only extents of inputs may vary"
                )
            return self._read(*self._sources[extent])
        if isinstance(extent, Mod):
            value, by = (self._evaluate(part) for part in extent.args)
            multiple = layers.multiply(layers.elementwise("FLOOR_DIV", value, by), by)
            return layers.subtract(value, multiple)
        if extent.func in OPERATIONS:
            result, *others = (self._evaluate(part) for part in extent.args)
            for other in others:
                result = layers.elementwise(OPERATIONS[extent.func], result, other)
            return result
        raise LoweringError(
            f"{where}: the extent {extent} has an operation ({extent.func.__name__}) "
            f"that is not lowered"
        )


def expression(extent: Size) -> Any:
    """An extent as a sympy expression; comparing SymInts instead would add guards to the graph."""
    return sympy.Integer(extent) if isinstance(extent, int) else extent.node.expr


ITensor: TypeAlias = Any
"""A tensor of a network (``tensorrt.ITensor``; TensorRT's module has no types)."""


Number: TypeAlias = int | float | bool


HALF = frozenset({torch.float16, torch.bfloat16})
"""Element types of 16 bits."""


MASKED_SCORE = torch.finfo(torch.float32).min
"""Replaces masked attention scores. Unlike -inf it gives a finite softmax if all are masked."""


class Layers:
    """A network under construction.

    Attributes:
        tensorrt: the TensorRT it is made with.
        api: TensorRT's module.
        log: the errors that TensorRT reports.
        builder: TensorRT's builder.
        network: TensorRT's own object, for layers that have no method here.
        label: name of what is being lowered; the names of its layers start with it.
        origin: the line of the model's source; becomes the layers' metadata.
        extents: the layers that compute extents.
        constant_values: the value of each constant, by the name of its tensor. TensorRT reads this
            memory when it builds the plan, not when the constant is added.
    """

    def __init__(self, tensorrt: TensorRT) -> None:
        self.tensorrt, self.api = tensorrt, tensorrt.api
        self.log = tensorrt.log()
        self.builder = self.log.watch(self.api.Builder(self.log.logger))
        self.network = self.builder.create_network(tensorrt.strongly_typed())
        self.label, self.origin = "network", ""
        self.extents = Extents(self)
        self.constant_values: dict[str, torch.Tensor] = {}
        self._scalars: dict[tuple[type, Number, torch.dtype, int], ITensor] = {}
        self._widened: dict[str, ITensor] = {}
        self._ranked: dict[tuple[str, int], ITensor] = {}
        self._names: dict[str, int] = {}

    @property
    def constants(self) -> Sequence[torch.Tensor]:
        """The constants of the network so far; one that is used in several shapes counts once."""
        values = self.constant_values.values()
        return tuple({(value.data_ptr(), value.nbytes): value for value in values}.values())

    def checked(self, layer: Any) -> Any:
        """Check and name a layer that was just added.

        Raises:
            LoweringError: TensorRT did not add it.
        """
        if layer is None:
            error = self.log.last_errors(1)
            raise LoweringError(
                f"{self.tensorrt} refused a layer of {self.label}{self.origin}: {error}"
            )
        count = self._names[self.label] = self._names.get(self.label, 0) + 1
        layer.name = self.label if count == 1 else f"{self.label}.{count}"
        # with a double quote in it TensorRT 10.6 cannot generate a kernel
        layer.metadata = self.origin.strip().replace('"', "'")
        return layer

    def output(self, layer: Any) -> ITensor:
        """The only output of a layer that was just added."""
        return self.checked(layer).get_output(0)

    def dtype_of(self, x: ITensor) -> torch.dtype:
        """Element type of a tensor, as PyTorch has it."""
        return self.tensorrt.torch_dtype(x.dtype)

    # Constants

    def constant(self, value: torch.Tensor) -> ITensor:
        """A constant; its memory is kept as long as the network.

        Raises:
            LoweringError: TensorRT has no such element type.
        """
        value = value.detach()
        if value.dtype == torch.float64:
            value = value.float()
        if not self.tensorrt.has_dtype(value.dtype):
            raise LoweringError(
                f"{self.label}{self.origin}: a constant is {value.dtype}, which TensorRT does not "
                f"have; convert the model"
            )
        value = value.cpu().contiguous()
        weights = self.api.Weights(
            self.tensorrt.dtype(value.dtype), value.data_ptr(), value.numel()
        )
        tensor = self.output(self.network.add_constant(tuple(value.shape), weights))
        self.constant_values[tensor.name] = value
        return tensor

    def scalar(self, value: Number, dtype: torch.dtype, rank: int = 0) -> ITensor:
        """One value, of shape ``[1] * rank``."""
        key = (type(value), value, dtype, rank)
        if key not in self._scalars:
            self._scalars[key] = self.constant(torch.full((1,) * rank, value, dtype=dtype))
        return self._scalars[key]

    def tensor(self, value: ITensor | Extent | float, dtype: torch.dtype, rank: int = 0) -> ITensor:
        """A tensor, number or extent as a tensor of an element type and at least a rank.

        Axes of extent 1 are added in front.
        """
        if isinstance(value, torch.SymInt | AxisExtent):
            value = self.reshape(self.extents.tensor(value), [])
        elif isinstance(value, int | float):
            return self.scalar(value, dtype, rank)
        return self.expand_rank(self.cast(value, dtype), rank)

    # Types

    def cast(self, x: ITensor, dtype: torch.dtype) -> ITensor:
        """PyTorch's ``x.to(dtype)``; ``x`` itself where it has that type.

        Of an int32 tensor that was cast to int64, such as the indices of TensorRT's TopK, the cast
        back is the tensor itself.
        """
        from_dtype = self.dtype_of(x)
        if from_dtype == dtype:
            return x
        source = self._widened.get(x.name)
        if source is not None and self.dtype_of(source) == dtype:
            return source
        if dtype == torch.bool:
            return self.logical_not(self.equal(x, self.scalar(0, from_dtype, len(x.shape))))
        cast = self.output(self.network.add_cast(x, self.tensorrt.dtype(dtype)))
        if (from_dtype, dtype) == (torch.int32, torch.int64):
            self._widened[cast.name] = x
        return cast

    def as_float32(
        self, compute: Callable[[ITensor], ITensor], x: ITensor, dtype: torch.dtype | None = None
    ) -> ITensor:
        """``compute`` in float32, rounded once to ``dtype`` (default: the type of ``x``).

        PyTorch's kernels compute so for half types.
        """
        return self.cast(compute(self.cast(x, torch.float32)), dtype or self.dtype_of(x))

    # Shapes

    def reshape(self, x: ITensor, sizes: Sequence[Extent]) -> ITensor:
        """Reshape to ``sizes``.

        -1 may occur once, and only where the others are integers; 0 keeps the extent that ``x`` has
        on that axis.
        """
        static = sum(not isinstance(size, int) or size == -1 for size in sizes) <= 1
        shape = None if static else self.extents.shape(sizes)
        layer = self.network.add_shuffle(x)
        if shape is None:
            layer.reshape_dims = tuple(_known(size) for size in sizes)
        else:
            layer.set_input(1, shape)
        return self.output(layer)

    def expand_rank(self, x: ITensor, rank: int) -> ITensor:
        """With extents of 1 in front, up to this rank."""
        missing = rank - len(x.shape)
        if missing <= 0:
            return x
        if x.name in self.constant_values:  # so that no layer is between a weight and its product
            if (x.name, rank) not in self._ranked:
                self._ranked[x.name, rank] = self.constant(
                    self.constant_values[x.name][(None,) * missing]
                )
            return self._ranked[x.name, rank]
        return self.unsqueeze(x, range(missing))

    def unsqueeze(self, x: ITensor, axes: Sequence[int]) -> ITensor:
        """With extents of 1 at these axes of the result."""
        sizes = list(self.extents.of(x))
        for axis in sorted(axes):
            sizes.insert(axis, 1)
        return self.reshape(x, sizes)

    def permute(self, x: ITensor, order: Sequence[int]) -> ITensor:
        """Axis i of the result is axis ``order[i]`` of ``x``."""
        if list(order) == list(range(len(order))):
            return x
        layer = self.network.add_shuffle(x)
        layer.first_transpose = tuple(order)
        return self.output(layer)

    def slice(
        self,
        x: ITensor,
        start: Sequence[Extent],
        size: Sequence[Extent],
        stride: Sequence[int] | None = None,
    ) -> ITensor:
        """``size`` elements of each axis from ``start``; a stride of 0 repeats one element."""
        stride = tuple(stride or (1,) * len(size))
        zeros = (0,) * len(size)  # a placeholder for what an input of the layer gives
        inputs = {
            index: self.extents.shape(extents)
            for index, extents in ((1, start), (2, size))
            if not all(isinstance(extent, int) for extent in extents)
        }
        layer = self.network.add_slice(
            x, zeros if 1 in inputs else tuple(start), zeros if 2 in inputs else tuple(size), stride
        )
        for index, tensor in inputs.items():
            layer.set_input(index, tensor)
        return self.output(layer)

    def expand(self, x: ITensor, sizes: Sequence[Extent]) -> ITensor:
        """Repeat axes of extent 1 so that ``x`` has these sizes."""
        x = self.expand_rank(x, len(sizes))
        stride = [
            0 if extent == 1 and size != 1 else 1
            for extent, size in zip(x.shape, map(_known, sizes), strict=True)
        ]
        return x if all(stride) else self.slice(x, [0] * len(sizes), sizes, stride)

    def concatenate(self, parts: Sequence[ITensor], axis: int) -> ITensor:
        """Join along an axis."""
        if len(parts) == 1:
            return parts[0]
        layer = self.network.add_concatenation(list(parts))
        layer.axis = axis
        return self.output(layer)

    def gather(self, x: ITensor, indices: ITensor, axis: int) -> ITensor:
        """``x`` at these indices of an axis, which the axes of ``indices`` replace.

        Indices must lie within the axis.
        """
        return self.output(self.network.add_gather(x, indices, axis))

    def iota(self, count: Extent, dtype: torch.dtype = torch.int32) -> ITensor:
        """``[0, 1, …, count - 1]``."""
        if isinstance(count, int):
            return self.constant(torch.arange(count, dtype=dtype))
        inputs = (self.extents.tensor(count), self.scalar(0, dtype), self.scalar(1, dtype, 1))
        layer = self.network.add_fill(
            (1,), self.api.FillOperation.LINSPACE, self.tensorrt.dtype(dtype)
        )
        for index, tensor in enumerate(inputs):
            layer.set_input(index, tensor)
        return self.output(layer)

    # Arithmetic: operands have one element type; ranks are matched, extents of 1 broadcast

    def elementwise(self, operation: str, a: ITensor, b: ITensor) -> ITensor:
        """A member of TensorRT's ElementWiseOperation."""
        rank = max(len(a.shape), len(b.shape))
        return self.output(
            self.network.add_elementwise(
                self.expand_rank(a, rank),
                self.expand_rank(b, rank),
                getattr(self.api.ElementWiseOperation, operation),
            )
        )

    def add(self, a: ITensor, b: ITensor) -> ITensor:
        """Sum."""
        return self.elementwise("SUM", a, b)

    def subtract(self, a: ITensor, b: ITensor) -> ITensor:
        """Difference."""
        return self.elementwise("SUB", a, b)

    def multiply(self, a: ITensor, b: ITensor) -> ITensor:
        """Product."""
        return self.elementwise("PROD", a, b)

    def equal(self, a: ITensor, b: ITensor) -> ITensor:
        """Whether equal."""
        return self.elementwise("EQUAL", a, b)

    def less(self, a: ITensor, b: ITensor) -> ITensor:
        """Whether smaller."""
        return self.elementwise("LESS", a, b)

    def logical_and(self, a: ITensor, b: ITensor) -> ITensor:
        """Logical and."""
        return self.elementwise("AND", a, b)

    def logical_not(self, x: ITensor) -> ITensor:
        """Logical not."""
        return self.unary("NOT", x)

    def unary(self, operation: str, x: ITensor) -> ITensor:
        """A member of TensorRT's UnaryOperation."""
        return self.output(self.network.add_unary(x, getattr(self.api.UnaryOperation, operation)))

    def activation(self, kind: str, x: ITensor) -> ITensor:
        """A member of TensorRT's ActivationType."""
        return self.output(self.network.add_activation(x, getattr(self.api.ActivationType, kind)))

    def select(self, condition: ITensor, yes: ITensor, no: ITensor) -> ITensor:
        """``yes`` where the condition holds, else ``no``."""
        rank = max(len(x.shape) for x in (condition, yes, no))
        return self.output(
            self.network.add_select(*(self.expand_rank(x, rank) for x in (condition, yes, no)))
        )

    def reduce(self, operation: str, x: ITensor, axes: Sequence[int], *, keep: bool) -> ITensor:
        """A member of TensorRT's ReduceOperation, over these axes."""
        mask = sum(1 << axis for axis in axes)
        return self.output(
            self.network.add_reduce(x, getattr(self.api.ReduceOperation, operation), mask, keep)
        )

    def softmax(self, x: ITensor, axis: int) -> ITensor:
        """Softmax along an axis."""
        layer = self.network.add_softmax(x)
        layer.axes = 1 << axis
        return self.output(layer)

    def matmul(self, a: ITensor, b: ITensor, *, transpose_b: bool = False) -> ITensor:
        """Matrix product of the last two axes; the others broadcast."""
        rank = max(len(a.shape), len(b.shape))
        kind = self.api.MatrixOperation
        flip = kind.TRANSPOSE if transpose_b else kind.NONE
        return self.output(
            self.network.add_matrix_multiply(
                self.expand_rank(a, rank), kind.NONE, self.expand_rank(b, rank), flip
            )
        )


def _known(extent: Extent) -> int:
    """The extent, or -1 where it is not known yet."""
    return extent if isinstance(extent, int) else -1
