"""Converters of the ``plugin`` mechanism: operators become plugins of ours, states their aliased outputs.

Converters of the kind ``user``: an operator of the user's own becomes the plugin that was declared for it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from inplace.kernels.attention import MAX_DIM
from inplace.plugins import (
    ArgmaxOperation,
    AttentionOperation,
    LinearOperation,
    Operation,
    RmsNormOperation,
    SampleOperation,
    UpdateOperation,
    plugins,
)
from inplace.trt import TensorRT
from torch.fx import Node

from inplace_builder.errors import BuildError
from inplace_builder.lower.layers import ITensor
from inplace_builder.lower.mechanisms import Eligibility, StateUse, mechanism
from inplace_builder.lower.network import Network, NetworkState
from inplace_builder.lower.registry import converter, state_converter
from inplace_builder.states.user_operators import find_declared, make_plugin

inplace = torch.ops.inplace


FIRST_VERSION = (10, 3)


MOST_ROWS = 257
"""Rows that the counters of a plugin are made for: one null row more than the largest batch."""


@mechanism("plugin")
def supports_plugin(uses: Sequence[StateUse], tensorrt: TensorRT) -> Eligibility:
    """Any state, where TensorRT has plugins with aliased outputs."""
    if tensorrt.is_rtx:
        return Eligibility(False, "networks of TensorRT for RTX take no plugins")
    if tensorrt.version[:2] < FIRST_VERSION:
        return Eligibility(False, f"aliased plugin outputs need TensorRT 10.3, this is {tensorrt}")
    for use in uses:
        if use.operator.endswith("attention") and max(use.state.shape[2:]) > MAX_DIM:
            return Eligibility(
                False,
                f"heads of {use.state.name} are {use.state.shape[2]} wide; the attention kernels take up to {MAX_DIM}",
            )
        if not tensorrt.has_dtype(use.state.dtype.as_torch):
            return Eligibility(
                False, f"{use.state.name} is {use.state.dtype}, which {tensorrt} does not have"
            )
    return Eligibility(
        True,
        "a plugin's output is the state's own memory, any slots in any rows, at a cost that follows the cached length",
    )


def _add(ctx: Network, operation: Operation, inputs: Sequence[ITensor]) -> list[ITensor]:
    owner = plugins(ctx.tensorrt)
    if len(inputs) != operation.input_count:
        raise BuildError(
            f"{operation.name} takes {operation.input_count} inputs, got {len(inputs)}{ctx.origin}"
        )
    layer = ctx.added(ctx.network.add_plugin_v3(list(inputs), [], owner.make(operation)))
    return [layer.get_output(index) for index in range(layer.num_outputs)]


@converter(inplace.linear.default)
def _linear(
    ctx: Network,
    x: ITensor,
    weight: ITensor,
    bias: ITensor | None = None,
    norm: ITensor | None = None,
    residual: ITensor | None = None,
    **options: Any,
) -> ITensor:
    outputs, inputs = ctx.meta(ctx.node.args[1]).shape
    given: dict[str, Any] = {
        "bias": bias is not None,
        "norm": norm is not None,
        "residual": residual is not None,
    }
    operation = LinearOperation(inputs=inputs, outputs=outputs, **given, **options)
    return _add(
        ctx, operation, [x, weight, *(part for part in (bias, norm, residual) if part is not None)]
    )[0]


@converter(inplace.rms_norm.default)
def _rms_norm(ctx: Network, x: ITensor, weight: ITensor, eps: float) -> ITensor:
    return _add(
        ctx, RmsNormOperation(width=ctx.meta(ctx.node.args[1]).shape[0], eps=eps), [x, weight]
    )[0]


@converter(inplace.argmax.default)
def _argmax(ctx: Network, scores: ITensor) -> ITensor:
    return _add(ctx, ArgmaxOperation(max_rows=MOST_ROWS), [scores])[0]


@converter(inplace.sample.default)
def _sample(ctx: Network, scores: ITensor, *parameters: ITensor) -> ITensor:
    return _add(ctx, SampleOperation(max_rows=MOST_ROWS), [scores, *parameters])[0]


@state_converter(inplace.attention.default, "plugin")
def _attention(
    ctx: Network,
    query: ITensor,
    key: ITensor | None,
    value: ITensor | None,
    *others: NetworkState | ITensor,
    **options: Any,
) -> ITensor:
    inputs = [part for part in (query, key, value) if part is not None]
    return _attend(ctx, inputs, *others, heads=ctx.meta(ctx.node.args[0]).shape[1], **options)


@state_converter(inplace.qkv_attention.default, "plugin")
def _qkv_attention(
    ctx: Network,
    qkv: ITensor,
    cos: ITensor | None,
    sin: ITensor | None,
    *others: NetworkState | ITensor,
    **options: Any,
) -> ITensor:
    rotary = 0 if cos is None else ctx.meta(ctx.node.args[1]).shape[-1]
    return _attend(
        ctx,
        [part for part in (qkv, cos, sin) if part is not None],
        *others,
        rotary=rotary,
        merged=True,
        **options,
    )


@state_converter(inplace.rotary_attention.default, "plugin")
def _rotary_attention(
    ctx: Network,
    query: ITensor,
    key: ITensor,
    value: ITensor,
    cos: ITensor,
    sin: ITensor,
    *others: NetworkState | ITensor,
    **options: Any,
) -> ITensor:
    heads, rotary = ctx.meta(ctx.node.args[0]).shape[1], ctx.meta(ctx.node.args[3]).shape[-1]
    return _attend(
        ctx, [query, key, value, cos, sin], *others, heads=heads, rotary=rotary, **options
    )


def _attend(
    ctx: Network,
    inputs: Sequence[ITensor],
    key_state: NetworkState,
    value_state: NetworkState,
    *rows: ITensor,
    **options: Any,
) -> ITensor:
    """An attention plugin; ``options`` are fields of `AttentionOperation` that the operator names."""
    controls = [ctx.cast(row, torch.int32) for row in rows]
    given = all(
        control.is_network_input for control in controls
    )  # not computed or converted by a kernel of the step
    kv_heads, _, dim = key_state.spec.shape
    names = (key_state.spec.name, value_state.spec.name)
    readers = (
        [reader for name in names for reader in ctx.readers.pop(name, [])]
        if options.get("append", True)
        else []
    )
    operation = AttentionOperation(
        kv_heads=kv_heads,
        dim=dim,
        value_dim=value_state.spec.shape[2],
        max_rows=MOST_ROWS,
        settled=given and not (key_state.written or value_state.written),
        readers=len(readers),
        **options,
    )
    out, *states = _add(
        ctx, operation, [*inputs, key_state.current, value_state.current, *controls, *readers]
    )
    if not states:  # it only reads them: a writer comes after it
        for name in names:
            ctx.readers.setdefault(name, []).append(out)
    for state, current in zip((key_state, value_state), states, strict=False):
        ctx.written(state, current)
    return out


@state_converter(inplace.update.default, "plugin")
def _update(
    ctx: Network,
    state: NetworkState,
    slots: ITensor,
    value: ITensor,
    row_offsets: ITensor | None = None,
    write_indices: ITensor | None = None,
    axis: int = 0,
    ring: bool = False,
) -> None:
    readers = ctx.readers.pop(state.spec.name, [])
    operation = UpdateOperation(
        axis=axis,
        append=write_indices is not None,
        packed=row_offsets is not None,
        ring=ring,
        readers=len(readers),
    )
    rows = [
        ctx.cast(part, torch.int32) for part in (row_offsets, write_indices) if part is not None
    ]
    inputs = [state.current, ctx.cast(slots, torch.int32), value, *rows, *readers]
    ctx.written(state, _add(ctx, operation, inputs)[0])


@state_converter(inplace.read.default, "plugin")
def _read(ctx: Network, state: NetworkState, slots: ITensor) -> ITensor:
    """A gather of the rows; null rows read as zeros."""
    place = ctx.elementwise("MAX", slots, ctx.scalar(0, ctx.dtype_of(slots), 1))
    found = ctx.gather(state.current, place, 0)
    dtype = ctx.dtype_of(found)
    live = ctx.invert(ctx.less(slots, ctx.scalar(0, ctx.dtype_of(slots), 1)))
    rank = len(found.shape)
    out = ctx.select(
        ctx.reshape(live, [-1, *(1 for _ in range(rank - 1))]), found, ctx.scalar(0, dtype, rank)
    )
    ctx.readers.setdefault(state.spec.name, []).append(out)
    return out


KIND = "user"


@state_converter(inplace.read.default, KIND)
def read(ctx: Network, state: NetworkState, slots: ITensor) -> ITensor:
    """The state as the plugin ahead left it."""
    out = ctx.reshape(state.current, ctx.result().shape)
    ctx.readers.setdefault(state.spec.name, []).append(out)
    return out


def call_user_operator(
    ctx: Network, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Add the plugin of an operator that is handed states.

    Raises:
        BuildError: it is not declared, has no plugin, aliases something else than it writes, or writes a state that was read before:
            TensorRT knows no order between the two.
    """
    declared = find_declared(node.target)
    if declared is None:
        raise BuildError(
            f"{node.target}{ctx.origin} writes a state and is not declared; call inplace_builder.declare_alias"
        )
    schema = declared.operator._schema
    given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
    tensors = {name: value for name, value in given.items() if _is_tensor(value)}
    constants = {
        argument.name: given.get(argument.name, argument.default_value)
        for argument in schema.arguments
        if argument.name not in tensors
    }
    if nested := [
        name
        for name, value in constants.items()
        if isinstance(value, list | tuple) and any(_is_tensor(x) for x in value)
    ]:
        raise BuildError(
            f"{node.target}{ctx.origin} takes lists of tensors ({nested}), which a plugin has no inputs for"
        )
    states = {name: tensors[name] for name in declared.written}
    for state in states.values():
        if ctx.readers.pop(state.spec.name, None):
            raise BuildError(
                f"state {state.spec.name} is read ahead of {node.target}{ctx.origin}, which writes it, and TensorRT could run the plugin "
                f"first; let the operator return what is read, or build with engine='torch'"
            )
    plugin = make_plugin(declared, ctx.tensorrt, constants, list(tensors))
    ctx.keep.append(plugin)
    inputs = [
        value.current if isinstance(value, NetworkState) else value for value in tensors.values()
    ]
    layer = ctx.added(ctx.network.add_plugin_v3(inputs, [], plugin))
    first, count = len(schema.returns), len(schema.returns) + len(states)
    if layer.num_outputs != count:
        raise BuildError(
            f"the plugin of {node.target} has {layer.num_outputs} outputs, the operator's results and written states are {count}"
        )
    outputs = [layer.get_output(index) for index in range(count)]
    for state, current in zip(states.values(), outputs[first:], strict=True):
        ctx.written(state, current)
    return outputs[0] if first == 1 else outputs[:first]


def _is_tensor(value: object) -> bool:
    return isinstance(value, NetworkState) or type(value).__name__ == "ITensor"
