"""Operators and TensorRT plugins of the user's own that write states: declared, so that they are handed a state's own memory.

An operator that is not declared is as correct, but works on a copy of what it writes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from inplace.trt import TensorRT

from inplace_builder.errors import BuildError

PluginMaker = Callable[["TensorRT", Mapping[str, Any]], Any]
"""Makes the plugin of one call: from TensorRT, and the operator's arguments by name, tensors left out. An ``IPluginV3``, or an `Operation`
of a class that was registered with `inplace.plugins.register`."""


@dataclass(frozen=True)
class Declared:
    """A declared operator.

    Attributes:
        operator: the overload.
        written: names of the arguments that it writes, in the order of its schema.
        plugin: how it becomes a plugin; None where it has none.
    """

    operator: torch._ops.OpOverload
    written: tuple[str, ...]
    plugin: PluginMaker | None


_declared: dict[torch._ops.OpOverload, Declared] = {}


def declare_alias(operator: torch._ops.OpOverload, *, plugin: PluginMaker | None = None) -> Declared:
    """Declare that an operator writes the tensors that its schema marks (``Tensor(a!)``) in their own memory, and only those.

    Engines hand it the states themselves, of the module's own shapes; the alias has the kind ``user``. That it does what was declared is
    the user's word: verification compares every state, every input and every address after the build's calls.

    Args:
        operator: one overload of an operator registered with `torch.library`, for example ``torch.ops.mine.step.default``. It must also be
            registered in every process that loads an engine with it.
        plugin: makes its TensorRT plugin. The plugin's inputs are the operator's tensors, in the order of the schema; its outputs are what
            the operator returns, then each written tensor, aliased (``get_aliased_input``) to the input that it is.

    Raises:
        BuildError: the operator writes none of its arguments, or a list of them; it returns memory of an argument; or it is declared
            already, with another plugin.
    """
    schema = operator._schema
    written = [argument for argument in schema.arguments if argument.alias_info is not None and argument.alias_info.is_write]
    if not written:
        raise BuildError(
            f'{operator} writes none of its arguments: mark those in its schema, as in "(Tensor x, Tensor(a!) state) -> Tensor"'
        )
    if lists := [argument.name for argument in written if not isinstance(argument.type, torch.TensorType)]:
        raise BuildError(f"{operator} writes {lists}, which are no single tensors; give each state an argument of its own")
    if any(result.alias_info is not None for result in schema.returns):
        raise BuildError(f"{operator} returns memory of an argument; return nothing, or new tensors")
    declared = Declared(operator, tuple(argument.name for argument in written), plugin)
    if _declared.setdefault(operator, declared) != declared:
        raise BuildError(f"{operator} is declared already, with another plugin; declare it once")
    return declared


def find_declared(operator: object) -> Declared | None:
    """The declaration of an operator, if there is one."""
    return _declared.get(operator) if isinstance(operator, torch._ops.OpOverload) else None


def made_plugin(declared: Declared, tensorrt: "TensorRT", constants: Mapping[str, Any], inputs: list[str]) -> Any:
    """The plugin of one call, its aliases compared with the declaration.

    Args:
        declared: the operator.
        tensorrt: what it is made for.
        constants: its arguments that are no tensors.
        inputs: the names of its tensors, in order.

    Raises:
        BuildError: there is no plugin, or it aliases other tensors than the operator writes.
    """
    if declared.plugin is None:
        raise BuildError(
            f"{declared.operator} was declared without a TensorRT plugin: give declare_alias one, or build with engine='torch'"
        )
    from inplace.plugins import Operation, plugins

    made = declared.plugin(tensorrt, constants)
    if isinstance(made, Operation):
        made = plugins(tensorrt).make(made)
    first = len(declared.operator._schema.returns)
    wanted = {first + place: inputs.index(name) for place, name in enumerate(declared.written)}
    asked = getattr(made, "get_aliased_input", None)
    if asked is not None:  # a plugin of Python; what a C++ plugin aliases shows in verification
        outputs = range(first + len(declared.written))
        found = {output: asked(output) for output in outputs if asked(output) >= 0}
        if found != wanted:
            raise BuildError(
                f"the plugin of {declared.operator} has the aliases {found} (output: input), the operator writes "
                f"{list(declared.written)}, so they must be {wanted}: correct get_aliased_input, or the order of its inputs and outputs"
            )
    return made
