"""The layers that converters are made of: each call adds one step of a network, checked, named, and with PyTorch's meaning.

Networks are strongly typed: a layer never casts, so every cast is one of ours. Extents are Python integers where they are known;
``torch.SymInt`` where they are an expression over the extents of the network's inputs; layers for the latter are added once, when a
shape that cannot be written with a single unknown needs them.

Dynamic extents: expressions over the extents of the network's inputs, turned into shape tensors when a layer needs one.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import sympy
import torch
from inplace.trt import TensorRT
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod

from inplace_builder.errors import BuildError

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


class Measured:
    """The extent of some tensor's axis, asked of the tensor itself."""

    def __init__(self, tensor: Any, axis: int) -> None:
        self.tensor, self.axis = tensor, axis

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Measured) and other.tensor is self.tensor and other.axis == self.axis
        )

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
        key = tuple(
            size if isinstance(size, int | Measured) else expression(size) for size in sizes
        )
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
                raise BuildError(
                    f"{layers.label}{layers.origin}: the extent {wanted} is that of no input; only extents of inputs may vary"
                )
            found = self._measured(*self._sources[wanted])
        elif isinstance(wanted, Mod):
            value, by = (self._evaluate(part) for part in wanted.args)
            found = layers.subtract(
                value, layers.multiply(layers.elementwise("FLOOR_DIV", value, by), by)
            )
        elif wanted.func in OPERATIONS:
            found, *others = (self._evaluate(part) for part in wanted.args)
            for other in others:
                found = layers.elementwise(OPERATIONS[wanted.func], found, other)
        else:
            where = f"{layers.label}{layers.origin}"
            raise BuildError(
                f"{where}: the extent {wanted} has an operation ({wanted.func.__name__}) that is not lowered"
            )
        self._known[wanted] = found
        return found


def expression(extent: Size) -> Any:
    """An extent as sympy has it. Comparing these, unlike comparing SymInts, adds no guard to the graph."""
    return sympy.Integer(extent) if isinstance(extent, int) else extent.node.expr


ITensor: TypeAlias = Any
"""A tensor of a network (``tensorrt.ITensor``; TensorRT's module has no types)."""


Number: TypeAlias = int | float | bool


HALF = frozenset({torch.float16, torch.bfloat16})


class Layers:
    """A network under construction.

    Attributes:
        tensorrt: the TensorRT it is made with.
        network: TensorRT's own object, for layers that have no method here.
        label: name of what is being lowered; the names of its layers start with it.
        origin: where the model's source has it; becomes the layers' metadata.
        baked: what each constant tensor holds, by its name; TensorRT reads their memory when it builds, not when they are added.
    """

    def __init__(self, tensorrt: TensorRT) -> None:
        self.tensorrt, self.api = tensorrt, tensorrt.api
        self.log = tensorrt.log()
        self.builder = self.log.watch(self.api.Builder(self.log.logger))
        self.network = self.builder.create_network(tensorrt.strongly_typed())
        self.label, self.origin = "network", ""
        self.extents = Extents(self)
        self.baked: dict[str, torch.Tensor] = {}
        self._scalars: dict[tuple[type, Number, torch.dtype, int], ITensor] = {}
        self._ranked: dict[tuple[str, int], ITensor] = {}
        self._names: dict[str, int] = {}

    @property
    def constants(self) -> Sequence[torch.Tensor]:
        """The constants of the network so far; one that stands in several shapes counts once."""
        return tuple(
            {(value.data_ptr(), value.nbytes): value for value in self.baked.values()}.values()
        )

    def added(self, layer: Any) -> Any:
        """Check and name a layer that was just added.

        Raises:
            BuildError: TensorRT did not add it.
        """
        if layer is None:
            raise BuildError(
                f"{self.tensorrt} refused a layer of {self.label}{self.origin}: {self.log.last_errors(1)}"
            )
        count = self._names[self.label] = self._names.get(self.label, 0) + 1
        layer.name = self.label if count == 1 else f"{self.label}.{count}"
        layer.metadata = self.origin.strip().replace(
            '"', "'"
        )  # with a double quote TensorRT 10.6 cannot generate a kernel
        return layer

    def output(self, layer: Any) -> ITensor:
        """The only output of a layer that was just added."""
        return self.added(layer).get_output(0)

    def dtype_of(self, x: ITensor) -> torch.dtype:
        """Element type of a tensor, as PyTorch has it."""
        return self.tensorrt.torch_dtype(x.dtype)

    # Constants

    def constant(self, value: torch.Tensor) -> ITensor:
        """A constant; its memory is kept until the network goes.

        Raises:
            BuildError: TensorRT has no such element type.
        """
        value = value.detach()
        if value.dtype == torch.float64:
            value = value.float()
        if not self.tensorrt.has_dtype(value.dtype):
            raise BuildError(
                f"{self.label}{self.origin}: a constant is {value.dtype}, which TensorRT does not have; convert the model"
            )
        value = value.cpu().contiguous()
        weights = self.api.Weights(
            self.tensorrt.dtype(value.dtype), value.data_ptr(), value.numel()
        )
        tensor = self.output(self.network.add_constant(tuple(value.shape), weights))
        self.baked[tensor.name] = value
        return tensor

    def scalar(self, value: Number, dtype: torch.dtype, rank: int = 0) -> ITensor:
        """One value, of shape ``[1] * rank``."""
        key = (type(value), value, dtype, rank)
        if key not in self._scalars:
            self._scalars[key] = self.constant(torch.full((1,) * rank, value, dtype=dtype))
        return self._scalars[key]

    def tensor(self, value: ITensor | Extent | float, dtype: torch.dtype, rank: int = 0) -> ITensor:
        """A tensor, number or extent as a tensor of this element type and at least this rank (ones in front)."""
        if isinstance(value, torch.SymInt | Measured):
            value = self.reshape(self.extents.tensor(value), [])
        elif isinstance(value, int | float):
            return self.scalar(value, dtype, rank)
        return self.ranked(self.cast(value, dtype), rank)

    # Types

    def cast(self, x: ITensor, dtype: torch.dtype) -> ITensor:
        """PyTorch's ``x.to(dtype)``; ``x`` itself where it has that type."""
        own = self.dtype_of(x)
        if own == dtype:
            return x
        if dtype == torch.bool:
            return self.invert(self.equal(x, self.scalar(0, own, len(x.shape))))
        return self.output(self.network.add_cast(x, self.tensorrt.dtype(dtype)))

    def as_float32(
        self, compute: Callable[[ITensor], ITensor], x: ITensor, dtype: torch.dtype | None = None
    ) -> ITensor:
        """``compute`` in float32, rounded once to ``dtype`` (default: that of ``x``), as PyTorch's kernels compute for half types."""
        return self.cast(compute(self.cast(x, torch.float32)), dtype or self.dtype_of(x))

    # Shapes

    def reshape(self, x: ITensor, sizes: Sequence[Extent]) -> ITensor:
        """Reshape; -1 at most once and only where the others are integers, 0 keeps the extent that ``x`` has at that place."""
        static = sum(not isinstance(size, int) or size == -1 for size in sizes) <= 1
        shape = None if static else self.extents.shape(sizes)
        layer = self.network.add_shuffle(x)
        if shape is None:
            layer.reshape_dims = tuple(_known(size) for size in sizes)
        else:
            layer.set_input(1, shape)
        return self.output(layer)

    def ranked(self, x: ITensor, rank: int) -> ITensor:
        """With extents of 1 in front, up to this rank."""
        missing = rank - len(x.shape)
        if missing <= 0:
            return x
        if x.name in self.baked:  # a weight stands beside its product, with no layer between them
            if (x.name, rank) not in self._ranked:
                self._ranked[x.name, rank] = self.constant(self.baked[x.name][(None,) * missing])
            return self._ranked[x.name, rank]
        return self.unsqueezed(x, range(missing))

    def unsqueezed(self, x: ITensor, axes: Sequence[int]) -> ITensor:
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
        """``size`` elements a axis from ``start``; a stride of 0 repeats one."""
        stride = tuple(stride or (1,) * len(size))
        zeros = (0,) * len(size)  # stands for what an input of the layer gives
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
        x = self.ranked(x, len(sizes))
        stride = [
            0 if own == 1 and size != 1 else 1
            for own, size in zip(x.shape, map(_known, sizes), strict=True)
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
        """``x`` at these indices of an axis; the axes of ``indices`` stand in its place. Indices must lie within it."""
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

    # Arithmetic: operands of one element type; ranks are matched, extents of 1 broadcast

    def elementwise(self, operation: str, a: ITensor, b: ITensor) -> ITensor:
        """A member of TensorRT's ElementWiseOperation."""
        rank = max(len(a.shape), len(b.shape))
        return self.output(
            self.network.add_elementwise(
                self.ranked(a, rank),
                self.ranked(b, rank),
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

    def both(self, a: ITensor, b: ITensor) -> ITensor:
        """Logical and."""
        return self.elementwise("AND", a, b)

    def invert(self, x: ITensor) -> ITensor:
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
            self.network.add_select(*(self.ranked(x, rank) for x in (condition, yes, no)))
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
                self.ranked(a, rank), kind.NONE, self.ranked(b, rank), flip
            )
        )


def _known(extent: Extent) -> int:
    """The extent, or -1 where it is not known yet."""
    return extent if isinstance(extent, int) else -1
