"""Converters of the kind ``user``: an operator of the user's own becomes the plugin that was declared for it."""

from typing import Any

import torch
from torch.fx import Node

from inplace_builder.aliases import find_declared, made_plugin
from inplace_builder.errors import BuildError
from inplace_builder.lower.layers import ITensor
from inplace_builder.lower.network import Network, State
from inplace_builder.lower.registry import state_converter

KIND = "user"
inplace = torch.ops.inplace


@state_converter(inplace.read.default, KIND)
def read(ctx: Network, state: State, slots: ITensor) -> ITensor:
    """The state as the plugin ahead left it."""
    out = ctx.reshape(state.current, ctx.result().shape)
    ctx.readers.setdefault(state.spec.name, []).append(out)
    return out


def call_user_operator(ctx: Network, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Add the plugin of an operator that is handed states.

    Raises:
        BuildError: it is not declared, has no plugin, aliases something else than it writes, or writes a state that was read before:
            TensorRT knows no order between the two.
    """
    declared = find_declared(node.target)
    if declared is None:
        raise BuildError(f"{node.target}{ctx.origin} writes a state and is not declared; call inplace_builder.aliases.declare_alias")
    schema = declared.operator._schema
    given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
    tensors = {name: value for name, value in given.items() if _is_tensor(value)}
    constants = {
        argument.name: given.get(argument.name, argument.default_value) for argument in schema.arguments if argument.name not in tensors
    }
    if nested := [name for name, value in constants.items() if isinstance(value, list | tuple) and any(_is_tensor(x) for x in value)]:
        raise BuildError(f"{node.target}{ctx.origin} takes lists of tensors ({nested}), which a plugin has no inputs for")
    states = {name: tensors[name] for name in declared.written}
    for state in states.values():
        if ctx.readers.pop(state.spec.name, None):
            raise BuildError(
                f"state {state.spec.name} is read ahead of {node.target}{ctx.origin}, which writes it, and TensorRT could run the plugin "
                f"first; let the operator return what is read, or build with engine='torch'"
            )
    plugin = made_plugin(declared, ctx.tensorrt, constants, list(tensors))
    ctx.keep.append(plugin)
    inputs = [value.current if isinstance(value, State) else value for value in tensors.values()]
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
    return isinstance(value, State) or type(value).__name__ == "ITensor"
