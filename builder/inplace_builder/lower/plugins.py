"""The mechanisms ``plugin`` and ``user``: operators become plugins with aliased outputs.

``plugin`` uses the plugins of this project, which operators without states have too. ``user`` uses
the plugin that the user has declared for an operator of their own.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from inplace.kernels.attention import MAX_DIM
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
    plugins,
)
from inplace.schema.specs import WORD, Dtype
from inplace.trt import TensorRT

from inplace_builder.errors import LoweringError
from inplace_builder.lower.layers import ITensor
from inplace_builder.lower.mechanisms import Eligibility, StateUse, mechanism
from inplace_builder.lower.network import Network, NetworkState
from inplace_builder.lower.registry import converter, state_converter
from inplace_builder.states.user_operators import find_declared, make_plugin

inplace = torch.ops.inplace


MIN_VERSION = (10, 3)
"""The first TensorRT with plugins whose outputs may alias inputs."""


MAX_ROWS = 257
"""Rows that a plugin's counters have room for: one null row more than the largest batch."""


@mechanism("plugin")
def supports_plugin(uses: Sequence[StateUse], tensorrt: TensorRT) -> Eligibility:
    """Any state, where TensorRT has plugins with aliased outputs."""
    if tensorrt.is_rtx:
        return Eligibility(False, "networks of TensorRT for RTX take no plugins")
    if tensorrt.version[:2] < MIN_VERSION:
        return Eligibility(False, f"aliased plugin outputs need TensorRT 10.3, this is {tensorrt}")
    for use in uses:
        if use.operator.endswith("attention"):
            latent = use.arguments.get("latent_dim") or 0  # the kernels take it and the rest apart
            if max(latent, use.state.shape[2] - latent) > MAX_DIM:
                return Eligibility(
                    False,
                    f"heads of {use.state.name} are {use.state.shape[2]} wide; "
                    f"the attention kernels take up to {MAX_DIM}",
                )
        if use.state.dtype is Dtype.FLOAT8_E4M3FN and use.operator.endswith("attention"):
            if use.state.shape[-1] % WORD:
                return Eligibility(
                    False,
                    f"heads of {use.state.name} are {use.state.shape[-1]} 8-bit floats wide, which "
                    f"are not whole words of {WORD}",
                )
        elif not tensorrt.has_dtype(use.state.dtype.as_torch):
            return Eligibility(
                False, f"{use.state.name} is {use.state.dtype}, which {tensorrt} does not have"
            )
    return Eligibility(
        True,
        "a plugin's output is the state's own memory, any slots in any rows, "
        "at a cost that follows the cached length",
    )


def _add(ctx: Network, operation: Operation, inputs: Sequence[ITensor]) -> list[ITensor]:
    """Add a plugin; its outputs."""
    owner = plugins(ctx.tensorrt)
    if len(inputs) != operation.input_count:
        raise LoweringError(
            f"{operation.name} takes {operation.input_count} inputs, got {len(inputs)}{ctx.origin}"
        )
    layer = ctx.checked(ctx.network.add_plugin_v3(list(inputs), [], owner.make(operation)))
    return [layer.get_output(index) for index in range(layer.num_outputs)]


@converter(inplace.linear.default)
def _linear(
    ctx: Network,
    x: ITensor,
    weight: ITensor,
    bias: ITensor | None = None,
    norm: ITensor | None = None,
    residual: ITensor | None = None,
    *,
    scale: ITensor | None = None,
    **options: Any,
) -> ITensor:
    """A linear layer with its norm, bias, activation, gate and residual."""
    if not _has_plugins(ctx.tensorrt):
        raise LoweringError(f"{ctx.node.target}{ctx.origin} is lowered as a plugin only")
    outputs, inputs = ctx.meta(ctx.node.args[1]).shape
    optional = {"bias": bias, "norm": norm, "residual": residual, "scaled": scale}
    present: dict[str, Any] = {name: part is not None for name, part in optional.items()}
    if scale is not None:
        _record_scale(ctx, ctx.node.args[1])
    operation = LinearOperation(inputs=inputs, outputs=outputs, **present, **options)
    parts = [part for part in optional.values() if part is not None]
    return _add(ctx, operation, [x, weight, *parts])[0]


def _record_scale(ctx: Network, weight: object) -> None:
    """Note which bound weight has the scales of this node's weight."""
    names = [str(each) for each in (weight, ctx.node.kwargs["scale"])]
    ctx.scales |= {names[0]: names[1]} if ctx.bound_weights.keys() >= set(names) else {}


@converter(inplace.grouped_linear.default)
def _grouped_linear(
    ctx: Network,
    x: ITensor,
    expert_ids: ITensor,
    weight: ITensor,
    bias: ITensor | None = None,
    *,
    scale: ITensor | None = None,
    transposed: bool = False,
    **options: Any,
) -> ITensor:
    """The linear layers of experts, each on the tokens that are routed to it."""
    if not _has_plugins(ctx.tensorrt):
        if options or scale is not None:
            options = options if scale is None else {**options, "scale": "8-bit weights"}
            raise LoweringError(
                f"{ctx.node.target}{ctx.origin} is lowered with {options} as a plugin only"
            )
        return _gathered_linear(ctx, x, expert_ids, weight, bias, transposed=transposed)
    experts, *extents = ctx.meta(ctx.node.args[2]).shape
    inputs, outputs = extents if transposed else reversed(extents)
    operation = GroupedLinearOperation(
        inputs=inputs,
        outputs=outputs,
        experts=experts,
        bias=bias is not None,
        transposed=transposed,
        scaled=scale is not None,
        **options,
    )
    if scale is not None:
        _record_scale(ctx, ctx.node.args[2])
    parts = [part for part in (bias, scale) if part is not None]
    ids = ctx.cast(expert_ids, torch.int32)
    return _add(ctx, operation, [x, ids, weight, *parts])[0]


def _has_plugins(tensorrt: TensorRT) -> bool:
    return not tensorrt.is_rtx and tensorrt.version[:2] >= MIN_VERSION


def _gathered_linear(
    ctx: Network,
    x: ITensor,
    expert_ids: ITensor,
    weight: ITensor,
    bias: ITensor | None,
    *,
    transposed: bool,
) -> ITensor:
    """``inplace::grouped_linear`` in layers of TensorRT; a weight is read for each of its rows."""
    dtype, experts = ctx.dtype_of(expert_ids), ctx.meta(ctx.node.args[2]).shape[0]
    zero, last = (ctx.scalar(value, dtype, 2) for value in (0, experts - 1))
    known = ctx.elementwise("MIN", ctx.elementwise("MAX", expert_ids, zero), last)
    vectors = ctx.unsqueeze(x, [1, 2] if len(x.shape) == 2 else [2])
    matrices = ctx.gather(weight, known, 0)
    product = ctx.matmul(vectors, matrices, transpose_b=not transposed)
    tokens, per_token, _, outputs = ctx.extents.of(product)
    out = ctx.reshape(product, [tokens, per_token, outputs])
    if bias is not None:
        out = ctx.add(out, ctx.gather(bias, known, 0))
    valid = ctx.unsqueeze(ctx.equal(known, expert_ids), [2])
    return ctx.select(valid, out, ctx.scalar(0, ctx.dtype_of(out), 3))


@converter(inplace.weighted_sum.default)
def _weighted_sum(ctx: Network, x: ITensor, weights: ITensor) -> ITensor:
    """The weighted sum over the experts of each token, in float32."""
    if _has_plugins(ctx.tensorrt):
        operation = WeightedSumOperation(width=ctx.meta(ctx.node.args[0]).shape[2])
        return _add(ctx, operation, [x, weights])[0]
    value, factor = (ctx.cast(each, torch.float32) for each in (x, weights))
    product = ctx.multiply(value, ctx.unsqueeze(factor, [2]))
    return ctx.cast(ctx.reduce("SUM", product, [1], keep=False), ctx.dtype_of(x))


@converter(inplace.rms_norm.default)
def _rms_norm(ctx: Network, x: ITensor, weight: ITensor, eps: float) -> ITensor:
    """RMS norm over the last axis."""
    operation = RmsNormOperation(width=ctx.meta(ctx.node.args[1]).shape[0], eps=eps)
    return _add(ctx, operation, [x, weight])[0]


@converter(inplace.argmax.default)
def _argmax(ctx: Network, scores: ITensor) -> ITensor:
    """The index of each row's largest score."""
    return _add(ctx, ArgmaxOperation(max_rows=MAX_ROWS), [scores])[0]


@converter(inplace.sample.default)
def _sample(ctx: Network, scores: ITensor, *parameters: ITensor) -> ITensor:
    """Each row's next token, by its own temperature, top-k, top-p and seed."""
    return _add(ctx, SampleOperation(max_rows=MAX_ROWS), [scores, *parameters])[0]


@converter(inplace.sample.options)
def _sample_options(ctx: Network, scores: ITensor, *parameters: ITensor) -> list[ITensor]:
    """Each row's next token, by its options too, and log-probabilities."""
    return _add(ctx, SampleOptionsOperation(max_rows=MAX_ROWS), [scores, *parameters])


@state_converter(inplace.attention.default, "plugin")
def _attention(
    ctx: Network,
    query: ITensor,
    key: ITensor | None,
    value: ITensor | None,
    *others: Any,
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
    *others: Any,
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
    *others: Any,
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
    value_state: NetworkState | None,
    slots: ITensor,
    row_offsets: ITensor,
    write_indices: ITensor,
    sinks: ITensor | None = None,
    bias: ITensor | None = None,
    key_scale: ITensor | None = None,
    value_scale: ITensor | None = None,
    latent_dim: int = 0,
    **options: Any,
) -> ITensor:
    """Add an attention plugin; ``options`` are fields of `AttentionOperation`."""
    controls = [ctx.cast(row, torch.int32) for row in (slots, row_offsets, write_indices)]
    # no kernel of the step computes or converts them
    are_inputs = all(control.is_network_input for control in controls)
    kv_heads, _, dim = key_state.spec.shape
    states = [state for state in (key_state, value_state) if state is not None]
    names = [state.spec.name for state in states]
    readers = (
        [reader for name in names for reader in ctx.readers.pop(name, [])]
        if options.get("append", True)
        else []
    )
    operation = AttentionOperation(
        kv_heads=kv_heads,
        dim=dim,
        value_dim=latent_dim if value_state is None else value_state.spec.shape[2],
        latent=value_state is None,
        quantized=key_scale is not None,
        max_rows=MAX_ROWS,
        sinks=sinks is not None,
        bias_heads=0 if bias is None else bias.shape[1],
        settled=are_inputs and not any(state.written for state in states),
        readers=len(readers),
        **options,
    )
    given = [*inputs, *(state.current for state in states), *controls]
    terms = (sinks, bias, key_scale, value_scale)
    given += [term for term in terms if term is not None] + readers
    out, *updated = _add(ctx, operation, given)
    if not updated:  # it only reads them: the next writer must run after it
        for name in names:
            ctx.readers.setdefault(name, []).append(out)
    for state, current in zip(states, updated, strict=False):
        ctx.update_state(state, current)
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
    ctx.update_state(state, _add(ctx, operation, inputs)[0])


@state_converter(inplace.causal_conv1d.default, "plugin")
def _causal_conv1d(
    ctx: Network,
    x: ITensor,
    weight: ITensor,
    bias: ITensor | None,
    state: NetworkState,
    slots: ITensor,
    row_offsets: ITensor,
    *,
    silu: bool = False,
) -> ITensor:
    """The convolution of each row over its last inputs."""
    operation = partial(CausalConv1dOperation, bias=bias is not None, silu=silu)
    return _add_recurrence(ctx, operation, [x, weight], state, slots, row_offsets, bias)


@state_converter(inplace.selective_scan.default, "plugin")
def _selective_scan(
    ctx: Network,
    x: ITensor,
    dt: ITensor,
    A: ITensor,  # noqa: N803  the names of the operator's arguments
    B: ITensor,  # noqa: N803
    C: ITensor,  # noqa: N803
    D: ITensor | None,  # noqa: N803
    state: NetworkState,
    slots: ITensor,
    row_offsets: ITensor,
) -> ITensor:
    """The scan of each row."""
    operation = partial(SelectiveScanOperation, skip=D is not None)
    return _add_recurrence(ctx, operation, [x, dt, A, B, C], state, slots, row_offsets, D)


@state_converter(inplace.delta_rule.default, "plugin")
def _delta_rule(
    ctx: Network,
    query: ITensor,
    key: ITensor,
    value: ITensor,
    decay: ITensor,
    beta: ITensor,
    state: NetworkState,
    slots: ITensor,
    row_offsets: ITensor,
) -> ITensor:
    """The delta rule of each row."""
    own = [query, key, value, decay, beta]
    return _add_recurrence(ctx, DeltaRuleOperation, own, state, slots, row_offsets)


@state_converter(inplace.linear_recurrence.default, "plugin")
def _linear_recurrence(
    ctx: Network,
    decay: ITensor,
    x: ITensor,
    state: NetworkState,
    slots: ITensor,
    row_offsets: ITensor,
) -> ITensor:
    """The recurrence of each row."""
    operation = LinearRecurrenceOperation
    return _add_recurrence(ctx, operation, [decay, x], state, slots, row_offsets)


def _add_recurrence(
    ctx: Network,
    operation: Callable[..., Operation],
    own: Sequence[ITensor],
    state: NetworkState,
    slots: ITensor,
    row_offsets: ITensor,
    weight: ITensor | None = None,
) -> ITensor:
    """Add the plugin of a convolution or recurrence that updates a state; its result.

    Args:
        ctx: the network.
        operation: makes the plugin's operation from its ``readers``.
        own: the operator's inputs before its state.
        state, slots, row_offsets: of the operator.
        weight: its optional input.
    """
    readers = ctx.readers.pop(state.spec.name, [])
    rows = [ctx.cast(row, torch.int32) for row in (slots, row_offsets)]
    weights = [] if weight is None else [weight]
    inputs = [*own, state.current, *rows, *weights, *readers]
    out, current = _add(ctx, operation(readers=len(readers)), inputs)
    ctx.update_state(state, current)
    return out


@state_converter(inplace.read.default, "plugin")
def _read(ctx: Network, state: NetworkState, slots: ITensor) -> ITensor:
    """Gather the rows; null rows read as zeros."""
    zero = ctx.scalar(0, ctx.dtype_of(slots), 1)
    rows = ctx.gather(state.current, ctx.elementwise("MAX", slots, zero), 0)
    rank = len(rows.shape)
    live = ctx.reshape(ctx.logical_not(ctx.less(slots, zero)), [-1, *(1,) * (rank - 1)])
    out = ctx.select(live, rows, ctx.scalar(0, ctx.dtype_of(rows), rank))
    ctx.readers.setdefault(state.spec.name, []).append(out)
    return out


@state_converter(inplace.read.default, "user")
def _read_user_state(ctx: Network, state: NetworkState, slots: ITensor) -> ITensor:
    """The state as the last plugin left it."""
    out = ctx.reshape(state.current, ctx.result().shape)
    ctx.readers.setdefault(state.spec.name, []).append(out)
    return out


def add_user_operator(
    ctx: Network,
    operator: torch._ops.OpOverload,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Add the plugin of a user's operator that takes states; the operator's results.

    Args:
        ctx: the network.
        operator: the operator.
        args, kwargs: its arguments, as a converter takes them.

    Raises:
        LoweringError: the operator is not declared, has no plugin, aliases something else than it
            writes, or writes a state that was read before: TensorRT knows no order between the two.
    """
    declared = find_declared(operator)
    if declared is None:
        raise LoweringError(
            f"{operator}{ctx.origin} writes a state and is not declared; "
            f"call inplace_builder.declare_alias"
        )
    schema = declared.operator._schema
    names = [argument.name for argument in schema.arguments]
    arguments = dict(zip(names, args, strict=False)) | kwargs
    tensors = {name: value for name, value in arguments.items() if _is_tensor(value)}
    constants = {
        argument.name: arguments.get(argument.name, argument.default_value)
        for argument in schema.arguments
        if argument.name not in tensors
    }
    if nested := [name for name, value in constants.items() if _holds_tensors(value)]:
        raise LoweringError(
            f"{operator}{ctx.origin} takes lists of tensors ({nested}), "
            f"which a plugin has no inputs for"
        )
    states: list[NetworkState] = [tensors[name] for name in declared.written]
    _check_unread(ctx, operator, states)
    plugin = make_plugin(declared, ctx.tensorrt, constants, list(tensors))
    ctx.keep_alive.append(plugin)
    inputs = [
        value.current if isinstance(value, NetworkState) else value for value in tensors.values()
    ]
    layer = ctx.checked(ctx.network.add_plugin_v3(inputs, [], plugin))
    num_results = len(schema.returns)
    if layer.num_outputs != num_results + len(states):
        raise LoweringError(
            f"the plugin of {operator} has {layer.num_outputs} outputs, "
            f"the operator's results and written states are {num_results + len(states)}"
        )
    outputs = [layer.get_output(index) for index in range(layer.num_outputs)]
    for state, current in zip(states, outputs[num_results:], strict=True):
        ctx.update_state(state, current)
    return outputs[0] if num_results == 1 else outputs[:num_results]


def _check_unread(
    ctx: Network, operator: torch._ops.OpOverload, states: Sequence[NetworkState]
) -> None:
    """Raise LoweringError if a state was read since it was last written.

    A user's plugin takes no inputs that would order it after the readers.
    """
    for state in states:
        if ctx.readers.pop(state.spec.name, None):
            raise LoweringError(
                f"state {state.spec.name} is read before {operator}{ctx.origin} writes it, and "
                f"TensorRT could run the plugin first; let the operator return what is read, or "
                f"build with engine='torch'"
            )


def _holds_tensors(value: object) -> bool:
    return isinstance(value, list | tuple) and any(_is_tensor(item) for item in value)


def _is_tensor(value: object) -> bool:
    return isinstance(value, NetworkState) or type(value).__name__ == "ITensor"
