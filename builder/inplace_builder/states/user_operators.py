"""Operators of the user's own that write states: a declared one is handed the states themselves, any other works on copies.

Operators and TensorRT plugins of the user's own that write states: declared, so that they are handed a state's own memory.

An operator that is not declared is as correct, but works on a copy of what it writes.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from inplace.schema.specs import Update
from torch._higher_order_ops.auto_functionalize import (
    auto_functionalized_v2,
    auto_functionalized_v2_dense,
)
from torch.fx import GraphModule, Node

from inplace_builder.errors import BuildError
from inplace_builder.graph.nodes import Emitter, is_call, source_line
from inplace_builder.states.state import CapturedState

if TYPE_CHECKING:
    from inplace.trt import TensorRT

PluginMaker = Callable[["TensorRT", Mapping[str, Any]], Any]
"""Makes the plugin of one call: from TensorRT, and the operator's arguments by name, tensors left out. An ``IPluginV3``, or an `Operation`
of a class that was registered with `inplace.plugins.register`."""


@dataclass(frozen=True)
class DeclaredOperator:
    """A declared operator.

    Attributes:
        operator: the overload.
        written: names of the arguments that it writes, in the order of its schema.
        plugin: how it becomes a plugin; None where it has none.
    """

    operator: torch._ops.OpOverload
    written: tuple[str, ...]
    plugin: PluginMaker | None


_declared: dict[torch._ops.OpOverload, DeclaredOperator] = {}


def declare_alias(
    operator: torch._ops.OpOverload, *, plugin: PluginMaker | None = None
) -> DeclaredOperator:
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
    written = [
        argument
        for argument in schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    if not written:
        raise BuildError(
            f'{operator} writes none of its arguments: mark those in its schema, as in "(Tensor x, Tensor(a!) state) -> Tensor"'
        )
    if lists := [
        argument.name for argument in written if not isinstance(argument.type, torch.TensorType)
    ]:
        raise BuildError(
            f"{operator} writes {lists}, which are no single tensors; give each state an argument of its own"
        )
    if any(result.alias_info is not None for result in schema.returns):
        raise BuildError(
            f"{operator} returns memory of an argument; return nothing, or new tensors"
        )
    declared = DeclaredOperator(operator, tuple(argument.name for argument in written), plugin)
    if _declared.setdefault(operator, declared) != declared:
        raise BuildError(f"{operator} is declared already, with another plugin; declare it once")
    return declared


def find_declared(operator: object) -> DeclaredOperator | None:
    """The declaration of an operator, if there is one."""
    return _declared.get(operator) if isinstance(operator, torch._ops.OpOverload) else None


def make_plugin(
    declared: DeclaredOperator,
    tensorrt: "TensorRT",
    constants: Mapping[str, Any],
    inputs: list[str],
) -> Any:
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


aten, inplace = torch.ops.aten, torch.ops.inplace


SLOTS = "slots"


@dataclass(frozen=True)
class _Version:
    """A functional call that makes a new version of a state.

    Attributes:
        node: ``auto_functionalized_v2``.
        base: which of the tensors it writes the state is.
        result: the new version.
    """

    node: Node
    base: int
    result: Node


def apply_user_operators(
    module: GraphModule, states: Sequence[CapturedState]
) -> tuple[CapturedState, ...]:
    """Rewrite, in place, what functionalisation made of mutable operators that are not ours.

    Where every tensor that an operator writes is a state from its beginning to its end, and the operator is declared, it is called on the
    states' own memory. Otherwise it is called on copies, and the state keeps its update as a whole.

    Returns:
        The states, with the verdict of those that such operators write.
    """
    graph = module.graph
    calls = [node for node in graph.nodes if node.target is auto_functionalized_v2]
    if not calls:
        return tuple(states)
    placeholders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    chains = {state.name: _chain(placeholders[state.name]) for state in states}
    owners: dict[Node, dict[int, CapturedState]] = {node: {} for node in calls}
    for state in states:
        for version in chains[state.name] or ():
            owners[version.node][version.base] = state
    refused = {
        node: because for node in calls if (because := _why_copies(node, owners[node])) is not None
    }
    while (
        more
        := {  # a state whose chain has one refused call is written as a whole: so are all its other calls
            node: f"{_name(other.node)} on the same state {refused[other.node]}"
            for node in calls
            if node not in refused
            for state in owners[node].values()
            for other in chains[state.name] or ()
            if other.node in refused
        }
    ):
        refused |= more
    verdicts: dict[str, CapturedState] = {}
    for state in states:
        last = _last_call(placeholders[state.name])
        if last is not None:
            verdicts[state.name] = _describe(state, last, chains[state.name], refused)
    for node in calls:
        if node in refused:
            node.args, node.target = (
                (node.args[0],),
                auto_functionalized_v2_dense,
            )  # traced into copies and the operator when exported
        else:
            _call_in_place(module, node, owners[node], placeholders)
    graph.eliminate_dead_code()
    module.recompile()
    return tuple(verdicts.get(state.name, state) for state in states)


def _update_of(placeholder: Node) -> Node | None:
    """The one update, of the whole, that a state has."""
    updates = [user for user in placeholder.users if is_call(user, inplace.update.default)]
    whole = len(updates) == 1 and len(updates[0].args) == 3
    return updates[0] if whole else None


def _last_call(placeholder: Node) -> Node | None:
    """The functional call whose result a state becomes."""
    update = _update_of(placeholder)
    result = None if update is None else _strip(update.args[2], aten.unsqueeze.default)
    if (
        result is None
        or result.target is not operator.getitem
        or not isinstance(result.args[0], Node)
    ):
        return None
    return result.args[0] if result.args[0].target is auto_functionalized_v2 else None


def _strip(node: Any, target: Any) -> Node | None:
    found = node.args[0] if isinstance(node, Node) and is_call(node, target) else node
    return found if isinstance(found, Node) else None


def _chain(placeholder: Node) -> tuple[_Version, ...] | None:
    """The calls that make a state's new value of its old one, last first; None where something else has a part in it."""
    update = _update_of(placeholder)
    current = None if update is None else _strip(update.args[2], aten.unsqueeze.default)
    versions: list[_Version] = []
    while current is not None and current.target is operator.getitem:
        node, index = current.args
        if (
            not isinstance(node, Node)
            or node.target is not auto_functionalized_v2
            or not isinstance(index, int)
        ):
            return None
        base = index - _first(node)
        versions.append(_Version(node, base, current))
        current = node.kwargs["_all_bases"][base]  # type: ignore[index, assignment]
    read = _strip(current, aten.squeeze.dim)
    return (
        tuple(versions)
        if versions
        and read is not None
        and is_call(read, inplace.read.default)
        and read.args[0] is placeholder
        else None
    )


def _first(node: Node) -> int:
    """Where the written tensors begin among the results."""
    return max(1, len(_operator(node)._schema.returns))


def _operator(node: Node) -> torch._ops.OpOverload:
    assert isinstance(node.args[0], torch._ops.OpOverload)
    return node.args[0]


def _name(node: Node) -> str:
    return _operator(node)._schema.name


def _why_copies(node: Node, owners: dict[int, CapturedState]) -> str | None:
    """Why a call cannot be made on the states themselves."""
    declared = find_declared(node.args[0])
    if declared is None:
        return "works on a copy, for its aliases are not declared (inplace_builder.declare_alias)"
    bases = [node.kwargs.get(f"_{name}_base_index") for name in declared.written]
    if any(
        key.startswith(f"_{name}_") and key not in (f"_{name}_base_index", f"_{name}_alias")
        for key in node.kwargs
        for name in declared.written
    ):
        return "works on a copy, for it is given a part of a state; pass the state itself"
    if len(set(bases)) != len(bases):
        return "works on a copy, for it is given one state twice"
    if not all(base in owners for base in bases):
        return "works on a copy, for what it writes is no state, or a state that something else writes too"
    return None


def _describe(
    state: CapturedState, last: Node, chain: tuple[_Version, ...] | None, refused: dict[Node, str]
) -> CapturedState:
    if chain is not None and not any(version.node in refused for version in chain):
        names = " and ".join(dict.fromkeys(_name(version.node) for version in reversed(chain)))
        because = f"{names} writes it in its own memory, as declared{source_line(last)}"
        return replace(
            state,
            pattern="user",
            reason=because,
            operators=("user",) * len(chain),
            update=Update.REPLACE,
            axis=None,
        )
    because = refused.get(last, "works on a copy, for something else writes the state too")
    return replace(
        state,
        pattern="explicit",
        reason=f"read, computed and written back whole: {_name(last)} {because}{source_line(last)}",
    )


def _call_in_place(
    module: GraphModule, node: Node, owners: dict[int, CapturedState], placeholders: dict[str, Node]
) -> None:
    """Call the operator on the states, and let what used its results use those."""
    graph, overload = module.graph, _operator(node)
    declared = find_declared(overload)
    assert isinstance(declared, DeclaredOperator)
    slots = placeholders[SLOTS]
    with Emitter(graph, node).before(node) as emit:
        memory = {
            base: _memory(emit, placeholders[state.name], state, slots)
            for base, state in owners.items()
        }
        given = {
            argument.name: node.kwargs[argument.name]
            for argument in overload._schema.arguments
            if argument.name in node.kwargs
        }
        given |= {name: memory[node.kwargs[f"_{name}_base_index"]] for name in declared.written}  # type: ignore[index]
        order = [argument.name for argument in overload._schema.arguments]
        made = emit.call(overload, **{name: given[name] for name in order if name in given})
        for result in list(node.users):
            index = result.args[1]
            assert isinstance(index, int)
            if index < len(overload._schema.returns):
                result.replace_all_uses_with(
                    made
                    if len(overload._schema.returns) == 1
                    else emit.call(operator.getitem, made, index)
                )
                continue
            state = owners[index - _first(node)]
            placeholder = placeholders[state.name]
            for user in list(result.users):
                written = (
                    next(iter(user.users))
                    if is_call(user, aten.unsqueeze.default) and len(user.users) == 1
                    else user
                )
                if is_call(written, inplace.update.default) and written.args[0] is placeholder:
                    graph.erase_node(written)
                    if written is not user:
                        graph.erase_node(user)
            others = [user for user in result.users if user.target is not auto_functionalized_v2]
            if others:
                rows = emit.call(inplace.read.default, placeholder, slots)
                version = rows if state.has_slot_axis else emit.call(aten.squeeze.dim, rows, 0)
                for user in others:
                    user.replace_input_with(result, version)


def _memory(emit: Emitter, placeholder: Node, state: CapturedState, slots: Node) -> Node:
    """The state's own memory in the module's own shape: states are bound alone, row r is slot r."""
    if state.has_slot_axis:
        return emit.call(aten.narrow.default, placeholder, 0, 0, slots.meta["val"].shape[0])
    return emit.call(aten.select.int, placeholder, 0, 0)
