"""Networks with plugins on a machine without TensorRT: defined through TensorRT for RTX's API.

A network of TensorRT for RTX takes no plugins. Here each output of a plugin is an input of the
network, with the dtype and shape that the plugin's operation declares, behind an identity layer.
`support.network_interpreter` computes it with the operators on the CPU. So the converters, the
order of the plugins' inputs and their answers are tested; the kernels are tested elsewhere.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from inplace.plugins import (
    ArgmaxOperation,
    AttentionOperation,
    CausalConv1dOperation,
    DeltaRuleOperation,
    GroupedLinearOperation,
    LinearOperation,
    LinearRecurrenceOperation,
    Operation,
    RmsNormOperation,
    SampleOperation,
    SampleOptionsOperation,
    SelectiveScanOperation,
    UpdateOperation,
    WeightedSumOperation,
)
from inplace.plugins.recurrences import RecurrentOperation
from inplace.trt import TensorRT, load_tensorrt
from torch import Tensor

ops = torch.ops.inplace


def tensorrt_with_plugins() -> TensorRT:
    """TensorRT, as far as networks are defined with it."""
    return TensorRT("tensorrt", _Api(load_tensorrt("tensorrt_rtx").api))


class _Delegate:
    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class _Api(_Delegate):
    __version__ = "10.15.0"

    def Builder(self, logger: Any) -> "_Builder":  # noqa: N802  TensorRT's name
        return _Builder(self._real.Builder(logger))

    def get_plugin_registry(self) -> "_Registry":
        return _Registry()


class _Registry:
    """Nothing is loaded from it: `tests/unit/test_plugins.py` tests creators."""

    def register_creator(self, creator: Any, namespace: str) -> bool:
        return True


class _Builder(_Delegate):
    def create_network(self, flags: int) -> "PluginNetwork":
        return PluginNetwork(self._real.create_network(flags))


class PluginNetwork(_Delegate):
    """A network definition.

    Attributes:
        plugins: its plugin layers, in order.
    """

    def __init__(self, real: Any) -> None:
        super().__init__(real)
        self.plugins: list[PluginLayer] = []

    @property
    def _own_inputs(self) -> list[Any]:
        inputs = map(self._real.get_input, range(self._real.num_inputs))
        outputs = {name for layer in self.plugins for name in layer.output_names}
        return [tensor for tensor in inputs if tensor.name not in outputs]

    @property
    def num_inputs(self) -> int:
        return len(self._own_inputs)

    def get_input(self, index: int) -> Any:
        return self._own_inputs[index]

    def add_plugin_v3(
        self, inputs: Sequence[Any], shape_inputs: Sequence[Any], plugin: Any
    ) -> "PluginLayer":
        assert not shape_inputs
        layer = PluginLayer(self._real, plugin, inputs, len(self.plugins))
        self.plugins.append(layer)
        return layer


class PluginLayer:
    """A plugin in a network.

    Attributes:
        operation: what it does.
        position: how many layers of TensorRT's own are before it.
        output_names: of the network inputs that stand for its outputs.
    """

    name = metadata = ""

    def __init__(self, network: Any, plugin: Any, inputs: Sequence[Any], number: int) -> None:
        self.operation: Operation = plugin.operation
        self.position = network.num_layers
        self._inputs = list(inputs)
        kinds = plugin.get_output_data_types([tensor.dtype for tensor in inputs])
        shapes = self.operation.output_shapes([list(tensor.shape) for tensor in inputs])
        self.output_names = [f"plugin {number} output {index}" for index in range(len(shapes))]
        assert plugin.num_outputs == len(kinds) == len(shapes)
        self._outputs = [
            network.add_identity(network.add_input(name, kind, tuple(shape))).get_output(0)
            for name, kind, shape in zip(self.output_names, kinds, shapes, strict=True)
        ]

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    def get_output(self, index: int) -> Any:
        return self._outputs[index]

    def run(self, values: dict[str, Tensor]) -> None:
        """Compute its outputs, which are added to the values of tensors by name.

        Raises:
            AssertionError: the plugin does not accept the dtypes, or an output that is declared to
                be an input's memory is not.
        """
        operation, inputs = self.operation, [values[tensor.name] for tensor in self._inputs]
        outputs = _COMPUTE[type(operation)](operation, *inputs)
        dtypes = [tensor.dtype for tensor in (*inputs, *outputs)]
        for position in range(len(dtypes)):
            assert operation.accepts(position, dtypes[: position + 1]), (self.name, position)
        for output, source in operation.aliases.items():
            assert outputs[output].data_ptr() == inputs[source].data_ptr()
        values |= dict(zip(self.output_names, outputs, strict=True))


def _linear(operation: LinearOperation, x: Tensor, weight: Tensor, *others: Tensor) -> list[Tensor]:
    optional = iter(others)
    out = ops.linear(
        x,
        weight.view(torch.float8_e4m3fn) if operation.scaled else weight,
        next(optional) if operation.bias else None,
        next(optional) if operation.norm else None,
        next(optional) if operation.residual else None,
        eps=operation.eps,
        activation=operation.activation,
        gated=operation.gated,
        float_out=operation.float_out,
        scale=next(optional) if operation.scaled else None,
        scale_group=operation.scale_group,
        activation_rows=operation.activation_rows,
    )
    return [out]


def _grouped_linear(
    operation: GroupedLinearOperation, x: Tensor, ids: Tensor, weight: Tensor, *others: Tensor
) -> list[Tensor]:
    optional = iter(others)
    out = ops.grouped_linear(
        x,
        ids,
        weight.view(torch.float8_e4m3fn) if operation.scaled else weight,
        next(optional) if operation.bias else None,
        scale=next(optional) if operation.scaled else None,
        transposed=operation.transposed,
        activation=operation.activation,
        gated=operation.gated,
    )
    return [out]


def _attention(operation: AttentionOperation, *inputs: Tensor) -> list[Tensor]:
    first, row = operation.first_state, operation.first_row
    states = inputs[first:row]
    stored = [state.view(torch.float8_e4m3fn) if operation.quantized else state for state in states]
    given = [*stored, *[None] * operation.latent, *inputs[row : row + 3]]
    optional = iter(inputs[row + 3 :])
    present = (operation.sinks, operation.bias_heads, operation.quantized, operation.quantized)
    terms = [next(optional) if each else None for each in present]
    names = ("scale", "causal", "window", "attention_chunk", "ring", "softcap")
    options: dict[str, Any] = {name: getattr(operation, name) for name in names}
    if operation.merged:
        rotary = inputs[1:3] if operation.rotary else (None, None)
        heads = operation.heads
        out = ops.qkv_attention(inputs[0], *rotary, *given, *terms, heads=heads, **options)
    elif operation.rotary:
        out = ops.rotary_attention(*inputs[:5], *given, *terms, **options)
    else:
        new = inputs[1 : operation.projections]
        parts = [inputs[0], *new, *[None] * (2 - len(new))]
        latent = operation.value_dim if operation.latent else 0
        out = ops.attention(
            *parts, *given, *terms, append=operation.append, latent_dim=latent, **options
        )
    return [out, *states] if operation.append else [out]


def _update(
    operation: UpdateOperation, state: Tensor, slots: Tensor, value: Tensor, *others: Tensor
) -> list[Tensor]:
    optional = iter(others)
    row_offsets = next(optional) if operation.packed else None
    write_indices = next(optional) if operation.append else None
    ops.update(
        state, slots, value, row_offsets, write_indices, axis=operation.axis, ring=operation.ring
    )
    return [state]


def _recurrence(operation: RecurrentOperation, *inputs: Tensor) -> list[Tensor]:
    first = operation.first_state
    own, (state, slots, row_offsets) = inputs[:first], inputs[first : first + 3]
    weight = inputs[first + 3] if operation.optional else None
    rows = (state, slots, row_offsets)
    match operation:
        case CausalConv1dOperation():
            out = ops.causal_conv1d(*own, weight, *rows, silu=operation.silu)
        case SelectiveScanOperation():
            out = ops.selective_scan(*own, weight, *rows)
        case DeltaRuleOperation():
            out = ops.delta_rule(*own, *rows)
        case _:
            out = ops.linear_recurrence(*own, *rows)
    return [out, state]


_COMPUTE: dict[type[Operation], Callable[..., list[Tensor]]] = {
    LinearOperation: _linear,
    GroupedLinearOperation: _grouped_linear,
    WeightedSumOperation: lambda _, x, weights: [ops.weighted_sum(x, weights)],
    RmsNormOperation: lambda operation, x, weight: [ops.rms_norm(x, weight, operation.eps)],
    ArgmaxOperation: lambda _, scores: [ops.argmax(scores)],
    SampleOperation: lambda _, *inputs: [ops.sample(*inputs)],
    SampleOptionsOperation: lambda _, *inputs: list(ops.sample.options(*inputs)),
    AttentionOperation: _attention,
    UpdateOperation: _update,
    CausalConv1dOperation: _recurrence,
    SelectiveScanOperation: _recurrence,
    DeltaRuleOperation: _recurrence,
    LinearRecurrenceOperation: _recurrence,
}
