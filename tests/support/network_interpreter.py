"""Interpret a TensorRT network definition in PyTorch on the CPU.

It is not TensorRT: it reads the finished definition back, layer by layer, with the meaning that
TensorRT's documentation gives each layer, and compares every result with the shape and type that
TensorRT inferred. So a wrong lowering is found on a machine without a GPU; a misunderstanding of
TensorRT, or a wrong kernel, is found by the GPU tests only.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from inplace_builder.lower import LoweredNetwork
from torch import Tensor, nn

ELEMENTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "SUM": torch.add,
    "SUB": torch.sub,
    "PROD": torch.mul,
    "DIV": lambda a, b: torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc"),
    "FLOOR_DIV": torch.floor_divide,
    "MAX": torch.maximum,
    "MIN": torch.minimum,
    "POW": torch.pow,
    "EQUAL": torch.eq,
    "LESS": torch.lt,
    "GREATER": torch.gt,
    "AND": torch.logical_and,
    "OR": torch.logical_or,
    "XOR": torch.logical_xor,
}
UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    name: getattr(torch, name.lower())
    for name in (
        *("EXP", "LOG", "SQRT", "ERF", "FLOOR", "CEIL", "ROUND", "NEG", "ABS", "ISNAN", "ISINF"),
        *("COS", "SIN", "TAN", "COSH", "SINH", "ACOS", "ASIN", "ATAN", "ACOSH", "ASINH", "ATANH"),
    )
} | {"RECIP": torch.reciprocal, "NOT": torch.logical_not}
CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {4: torch.conv2d, 5: torch.conv3d}
TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    4: torch.conv_transpose2d,
    5: torch.conv_transpose3d,
}
ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "RELU": torch.relu,
    "TANH": torch.tanh,
    "SIGMOID": torch.sigmoid,
}


def interpret(lowered: LoweredNetwork, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of a network for these inputs.

    Raises:
        AssertionError: a layer breaks a rule of strongly typed networks, reads out of range, or its
            result is not of the shape and type that TensorRT inferred.
    """
    network, context = lowered.network, lowered.context
    interpreter = _Interpreter(context)
    values = {
        name: inputs[name]
        for name in (network.get_input(index).name for index in range(network.num_inputs))
    }
    plugins = list(getattr(network, "plugins", ()))  # of `support.plugin_networks`
    for index in range(network.num_layers):
        while plugins and plugins[0].position <= index:
            plugins.pop(0).run(values)
        layer = network.get_layer(index)
        tensors = [layer.get_input(each) for each in range(layer.num_inputs)]
        outputs = [layer.get_output(each) for each in range(layer.num_outputs)]
        if layer.type == context.api.LayerType.CONSTANT:
            results = [context.constant_values[outputs[0].name]]
        else:
            results = interpreter.run(
                layer, [None if x is None else values[x.name] for x in tensors], outputs[0]
            )
        for output, result in zip(outputs, results, strict=True):
            assert context.dtype_of(output) == result.dtype, (
                f"{layer.name}: {output.dtype} inferred, {result.dtype} computed"
            )
            inferred = tuple(output.shape)
            fits = len(inferred) == result.dim() and all(
                a in (-1, b) for a, b in zip(inferred, result.shape, strict=True)
            )
            assert fits, f"{layer.name}: {inferred} inferred, {tuple(result.shape)} computed"
            values[output.name] = result
    return {name: values[name] for name in lowered.outputs}


class _Interpreter:
    """One method for each type of layer.

    TensorRT returns layers as their base class, so each method sets the layer's own class first.
    """

    def __init__(self, context: Any) -> None:
        self.api, self.torch_dtype = context.api, context.tensorrt.torch_dtype

    def run(self, layer: Any, x: list[Any], output: Any) -> list[Tensor]:
        kind = layer.type.name
        method = getattr(self, kind.lower(), None)
        assert method is not None, f"{layer.name}: {kind} is not interpreted here"
        result = method(layer, output, *x)
        return list(result) if isinstance(result, tuple) else [result]

    def shuffle(self, layer: Any, output: Any, x: Tensor, shape: Tensor | None = None) -> Tensor:
        layer.__class__ = self.api.IShuffleLayer
        order = layer.first_transpose
        x = x.permute([order[axis] for axis in range(x.dim())])
        try:
            sizes = list(layer.reshape_dims) if shape is None else shape.tolist()
        except (TypeError, ValueError):  # the bindings raise these where nothing is reshaped
            return x
        return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)])

    def elementwise(self, layer: Any, output: Any, a: Tensor, b: Tensor) -> Tensor:
        layer.__class__ = self.api.IElementWiseLayer
        assert (a.dtype, a.dim()) == (b.dtype, b.dim()), (
            f"{layer.name}: {a.dtype} {a.shape} and {b.dtype} {b.shape}"
        )
        return ELEMENTWISE[layer.op.name](a, b)

    def unary(self, layer: Any, output: Any, x: Tensor) -> Tensor:
        layer.__class__ = self.api.IUnaryLayer
        return UNARY[layer.op.name](x)

    def activation(self, layer: Any, output: Any, x: Tensor) -> Tensor:
        layer.__class__ = self.api.IActivationLayer
        return ACTIVATION[layer.type.name](x)

    def cast(self, layer: Any, output: Any, x: Tensor) -> Tensor:
        return x.to(self.torch_dtype(output.dtype))

    def identity(self, layer: Any, output: Any, x: Tensor) -> Tensor:
        return x

    def shape(self, layer: Any, output: Any, x: Tensor) -> Tensor:
        return torch.tensor(x.shape, dtype=torch.int64)

    def slice(
        self,
        layer: Any,
        output: Any,
        x: Tensor,
        start: Tensor | None = None,
        size: Tensor | None = None,
    ) -> Tensor:
        layer.__class__ = self.api.ISliceLayer
        starts = list(layer.start) if start is None else start.tolist()
        sizes = list(layer.shape) if size is None else size.tolist()
        for axis, (first, count, step) in enumerate(zip(starts, sizes, layer.stride, strict=True)):
            x = _picked(x, axis, first + torch.arange(count) * step, layer)
        return x

    def concatenation(self, layer: Any, output: Any, *parts: Tensor) -> Tensor:
        layer.__class__ = self.api.IConcatenationLayer
        assert len({part.dtype for part in parts}) == 1, (
            f"{layer.name}: {[part.dtype for part in parts]}"
        )
        return torch.cat(parts, layer.axis)

    def gather(self, layer: Any, output: Any, x: Tensor, indices: Tensor) -> Tensor:
        layer.__class__ = self.api.IGatherLayer
        if layer.mode == self.api.GatherMode.ELEMENT:
            return torch.gather(x, layer.axis, indices.long())
        flat = _picked(x, layer.axis, indices.flatten(), layer)
        return flat.reshape(*x.shape[: layer.axis], *indices.shape, *x.shape[layer.axis + 1 :])

    def scatter(self, layer: Any, output: Any, x: Tensor, indices: Tensor, new: Tensor) -> Tensor:
        layer.__class__ = self.api.IScatterLayer
        assert (
            layer.mode == self.api.ScatterMode.ELEMENT
            and x.dtype == new.dtype
            and indices.shape == new.shape
        ), layer.name
        return x.scatter(layer.axis, indices.long(), new)

    def fill(self, layer: Any, output: Any, count: Tensor, start: Tensor, step: Tensor) -> Tensor:
        return start + torch.arange(int(count), dtype=start.dtype) * step

    def select(self, layer: Any, output: Any, condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
        assert condition.dtype == torch.bool and yes.dtype == no.dtype, (
            f"{layer.name}: {condition.dtype}, {yes.dtype}, {no.dtype}"
        )
        assert condition.dim() == yes.dim() == no.dim(), (
            f"{layer.name}: {condition.shape}, {yes.shape}, {no.shape}"
        )
        return torch.where(condition, yes, no)

    def reduce(self, layer: Any, output: Any, x: Tensor) -> Tensor:
        layer.__class__ = self.api.IReduceLayer
        axes = [axis for axis in range(x.dim()) if layer.axes >> axis & 1]
        if layer.op.name == "PROD":
            for axis in reversed(axes):
                x = x.prod(axis, layer.keep_dims, dtype=x.dtype)
            return x
        function = {"AVG": torch.mean, "SUM": torch.sum, "MAX": torch.amax, "MIN": torch.amin}[
            layer.op.name
        ]
        result: Tensor = function(x, axes, layer.keep_dims)  # type: ignore[operator]
        return result.to(x.dtype)

    def softmax(self, layer: Any, output: Any, x: Tensor) -> Tensor:
        layer.__class__ = self.api.ISoftMaxLayer
        return x.softmax(layer.axes.bit_length() - 1)

    def matrix_multiply(self, layer: Any, output: Any, a: Tensor, b: Tensor) -> Tensor:
        layer.__class__ = self.api.IMatrixMultiplyLayer
        assert (a.dtype, a.dim()) == (b.dtype, b.dim()), (
            f"{layer.name}: {a.dtype} {a.shape} and {b.dtype} {b.shape}"
        )
        flip = self.api.MatrixOperation.TRANSPOSE
        return (a.mT if layer.op0 == flip else a) @ (b.mT if layer.op1 == flip else b)

    def topk(self, layer: Any, output: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        layer.__class__ = self.api.ITopKLayer
        largest = layer.op == self.api.TopKOperation.MAX
        values, indices = x.topk(layer.k, layer.axes.bit_length() - 1, largest)
        return values, indices.int()

    def convolution(self, layer: Any, output: Any, x: Tensor, kernel: Tensor) -> Tensor:
        layer.__class__ = self.api.IConvolutionLayer
        x = nn.functional.pad(x, _ends(layer))
        return CONVOLUTIONS[x.dim()](
            x, kernel, None, tuple(layer.stride_nd), 0, tuple(layer.dilation_nd), layer.num_groups
        )

    def deconvolution(self, layer: Any, output: Any, x: Tensor, kernel: Tensor) -> Tensor:
        layer.__class__ = self.api.IDeconvolutionLayer
        whole = TRANSPOSED[x.dim()](
            x,
            kernel,
            None,
            tuple(layer.stride_nd),
            0,
            0,
            layer.num_groups,
            tuple(layer.dilation_nd),
        )
        return nn.functional.pad(whole, [-each for each in _ends(layer)])

    def pooling(self, layer: Any, output: Any, x: Tensor) -> Tensor:
        layer.__class__ = self.api.IPoolingLayer
        size, step = tuple(layer.window_size_nd), tuple(layer.stride_nd)
        largest = layer.type == self.api.PoolingType.MAX
        padded = nn.functional.pad(x, _ends(layer), value=float("-inf") if largest else 0.0)
        if largest:
            pool = nn.functional.max_pool2d if x.dim() == 4 else nn.functional.max_pool3d
            return pool(padded, size, step)
        mean: Any = nn.functional.avg_pool2d if x.dim() == 4 else nn.functional.avg_pool3d
        result: Tensor = mean(padded, size, step)
        if layer.average_count_excludes_padding:
            result = result / mean(nn.functional.pad(torch.ones_like(x), _ends(layer)), size, step)
        return result

    def kv_cache_update(
        self, layer: Any, output: Any, cache: Tensor, new: Tensor, starts: Tensor
    ) -> Tensor:
        """In place, as the layer does it; an update that would pass the end is dropped."""
        for row, start in enumerate(starts.tolist()):
            if start + new.shape[2] <= cache.shape[2]:
                cache[row, :, start : start + new.shape[2]] = new[row]
        return cache


def _ends(layer: Any) -> list[int]:
    """The padding of a layer as ``torch.nn.functional.pad`` takes it."""
    pairs = list(zip(layer.pre_padding, layer.post_padding, strict=True))
    return [each for pair in reversed(pairs) for each in pair]


def _picked(x: Tensor, axis: int, indices: Tensor, layer: Any) -> Tensor:
    inside = (indices >= 0) & (indices < x.shape[axis])
    assert bool(inside.all()), (
        f"{layer.name} reads {indices.tolist()} of axis {axis}, which has {x.shape[axis]}"
    )
    return x.index_select(axis, indices.long())
