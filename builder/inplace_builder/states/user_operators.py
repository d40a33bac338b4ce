"""A user's own operators and TensorRT plugins that write states.

A declared operator gets the states themselves: `declare_alias` states which tensors it writes in
place. An operator that is not declared is just as correct, but works on a copy of what it writes.
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
from inplace_builder.graph.nodes import (
    Emitter,
    is_call,
    only_user,
    placeholders_by_name,
    source_line,
    value,
)
from inplace_builder.states.lift import SLOTS
from inplace_builder.states.rewrite import CapturedState

if TYPE_CHECKING:
    from inplace.trt import TensorRT

aten, inplace = torch.ops.aten, torch.ops.inplace

PluginMaker = Callable[["TensorRT", Mapping[str, Any]], Any]
"""Makes the plugin of one call, from TensorRT and the operator's arguments that are not tensors.

It returns an ``IPluginV3``, or an `Operation` whose class was registered with
`inplace.plugins.register`.
"""


@dataclass(frozen=True)
class DeclaredOperator:
    """A declared operator.

    Attributes:
        operator: the overload.
        written: names of the arguments that it writes, in the order of its schema.
        plugin: makes its TensorRT plugin; None if it has none.
    """

    operator: torch._ops.OpOverload
    written: tuple[str, ...]
    plugin: PluginMaker | None


_declared: dict[torch._ops.OpOverload, DeclaredOperator] = {}


def declare_alias(
    operator: torch._ops.OpOverload, *, plugin: PluginMaker | None = None
) -> DeclaredOperator:
    """Declare that an operator writes, in place, exactly the tensors that its schema marks.

    The schema marks a written tensor as ``Tensor(a!)``. Engines pass the operator the states
    themselves, in the module's own shapes; the alias has the kind ``user``. Verification does not
    trust the declaration: it compares every state, every input and every address after its calls.

    Args:
        operator: one overload of an operator registered with `torch.library`, for example
            ``torch.ops.mine.step.default``. It must also be registered in every process that loads
            an engine with it.
        plugin: makes its TensorRT plugin. The plugin's inputs are the operator's tensors, in the
            order of the schema; its outputs are what the operator returns, then each written
            tensor, aliased (``get_aliased_input``) to its own input.

    Raises:
        BuildError: the operator writes none of its arguments, or a list of them; it returns memory
            of an argument; or it is declared already, with another plugin.
    """
    schema = operator._schema
    written = [
        argument
        for argument in schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    if not written:
        raise BuildError(
            f"{operator} writes none of its arguments: mark those that it writes in its schema, as "
            f'in "(Tensor x, Tensor(a!) state) -> Tensor"'
        )
    if lists := [
        argument.name for argument in written if not isinstance(argument.type, torch.TensorType)
    ]:
        raise BuildError(
            f"{operator} writes {lists}, which are not single tensors; give each state an argument "
            f"of its own"
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
    """The declaration of an operator; None if there is none."""
    return _declared.get(operator) if isinstance(operator, torch._ops.OpOverload) else None


def make_plugin(
    declared: DeclaredOperator,
    tensorrt: "TensorRT",
    constants: Mapping[str, Any],
    inputs: list[str],
) -> Any:
    """Make the plugin of one call, and compare its aliases with the declaration.

    Args:
        declared: the operator.
        tensorrt: what it is made for.
        constants: the operator's arguments that are not tensors.
        inputs: the names of its tensors, in order.

    Raises:
        BuildError: there is no plugin, or it aliases other tensors than the operator writes.
    """
    if declared.plugin is None:
        raise BuildError(
            f"{declared.operator} was declared without a TensorRT plugin: give declare_alias one, "
            f"or build with engine='torch'"
        )
    from inplace.plugins import Operation, plugins

    plugin = declared.plugin(tensorrt, constants)
    if isinstance(plugin, Operation):
        plugin = plugins(tensorrt).make(plugin)
    get_aliased_input = getattr(plugin, "get_aliased_input", None)
    if get_aliased_input is None:  # a C++ plugin: verification compares what it aliases
        return plugin
    first = len(declared.operator._schema.returns)
    expected = {first + place: inputs.index(name) for place, name in enumerate(declared.written)}
    aliases = {
        output: get_aliased_input(output)
        for output in range(first + len(declared.written))
        if get_aliased_input(output) >= 0
    }
    if aliases != expected:
        raise BuildError(
            f"the plugin of {declared.operator} has the aliases {aliases} (output: input), the "
            f"operator writes {list(declared.written)}, so they must be {expected}: correct "
            f"get_aliased_input, or the order of its inputs and outputs"
        )
    return plugin


@dataclass(frozen=True)
class _Version:
    """A functional call that makes a new version of a state.

    Attributes:
        node: ``auto_functionalized_v2``.
        base: the place of the state among the tensors that the call writes.
        result: the new version.
    """

    node: Node
    base: int
    result: Node


def apply_user_operators(
    module: GraphModule, states: Sequence[CapturedState]
) -> tuple[CapturedState, ...]:
    """Rewrite, in place, the calls of mutable operators that are not ours.

    Functionalisation wraps them in ``auto_functionalized_v2``. If every tensor that an operator
    writes is a whole state that only such operators write, and the operator is declared, it is
    called on the states' own memory. If not, it is called on copies, and the state is written
    back whole.

    Returns:
        The states; those that such operators write have a new pattern and reason.
    """
    graph = module.graph
    calls = [node for node in graph.nodes if node.target is auto_functionalized_v2]
    if not calls:
        return tuple(states)
    placeholders = placeholders_by_name(graph)
    versions = {state.name: _versions(placeholders[state.name]) for state in states}
    owners: dict[Node, dict[int, CapturedState]] = {node: {} for node in calls}
    for state in states:
        for version in versions[state.name] or ():
            owners[version.node][version.base] = state
    copied = _calls_on_copies(calls, owners, versions)
    described: dict[str, CapturedState] = {}
    for state in states:
        last = _last_call(placeholders[state.name])
        if last is not None:
            described[state.name] = _describe(state, last, versions[state.name], copied)
    for node in calls:
        if node in copied:
            # export traces it into copies and the operator
            node.args, node.target = (node.args[0],), auto_functionalized_v2_dense
        else:
            _call_in_place(module, node, owners[node], placeholders)
    graph.eliminate_dead_code()
    module.recompile()
    return tuple(described.get(state.name, state) for state in states)


def _calls_on_copies(
    calls: Sequence[Node],
    owners: Mapping[Node, dict[int, CapturedState]],
    versions: Mapping[str, tuple[_Version, ...] | None],
) -> dict[Node, str]:
    """The calls that must work on copies, each with the reason.

    A state with one such call is written as a whole, so its other calls work on copies too.
    """
    copied = {
        node: reason for node in calls if (reason := _why_copies(node, owners[node])) is not None
    }
    while more := {
        node: f"{_name(other.node)} on the same state {copied[other.node]}"
        for node in calls
        if node not in copied
        for state in owners[node].values()
        for other in versions[state.name] or ()
        if other.node in copied
    }:
        copied |= more
    return copied


def _update_of(placeholder: Node) -> Node | None:
    """The only update of a state, if it writes the whole state."""
    updates = [user for user in placeholder.users if is_call(user, inplace.update.default)]
    whole = len(updates) == 1 and len(updates[0].args) == 3
    return updates[0] if whole else None


def _last_call(placeholder: Node) -> Node | None:
    """The functional call whose result is a state's new value."""
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
    """The operand of a call of ``target``, or the node itself if it is another call."""
    stripped = node.args[0] if isinstance(node, Node) and is_call(node, target) else node
    return stripped if isinstance(stripped, Node) else None


def _versions(placeholder: Node) -> tuple[_Version, ...] | None:
    """The calls from a state's old value to its new one, last first.

    None if another operator takes part.
    """
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
        base = index - _first_written(node)
        versions.append(_Version(node, base, current))
        current = node.kwargs["_all_bases"][base]  # type: ignore[index, assignment]
    read = _strip(current, aten.squeeze.dim)
    if (
        not versions
        or read is None
        or not is_call(read, inplace.read.default)
        or read.args[0] is not placeholder
    ):
        return None
    return tuple(versions)


def _first_written(node: Node) -> int:
    """The place of the first written tensor among the results of a functional call."""
    return max(1, len(_operator(node)._schema.returns))


def _operator(node: Node) -> torch._ops.OpOverload:
    assert isinstance(node.args[0], torch._ops.OpOverload)
    return node.args[0]


def _name(node: Node) -> str:
    return _operator(node)._schema.name


def _why_copies(node: Node, owners: dict[int, CapturedState]) -> str | None:
    """Why a call cannot work on the states themselves; None if it can."""
    declared = find_declared(node.args[0])
    if declared is None:
        return "works on a copy: its aliases are not declared (inplace_builder.declare_alias)"
    bases = [node.kwargs.get(f"_{name}_base_index") for name in declared.written]
    if any(
        key.startswith(f"_{name}_") and key not in (f"_{name}_base_index", f"_{name}_alias")
        for key in node.kwargs
        for name in declared.written
    ):
        return "works on a copy: it gets a part of a state; pass the state itself"
    if len(set(bases)) != len(bases):
        return "works on a copy: it gets one state twice"
    if not all(base in owners for base in bases):
        return "works on a copy: what it writes is not a state, or something else writes it too"
    return None


def _describe(
    state: CapturedState,
    last: Node,
    versions: tuple[_Version, ...] | None,
    copied: Mapping[Node, str],
) -> CapturedState:
    if versions is not None and not any(version.node in copied for version in versions):
        names = " and ".join(dict.fromkeys(_name(version.node) for version in reversed(versions)))
        return replace(
            state,
            pattern="user",
            reason=f"{names} writes it in its own memory, as declared{source_line(last)}",
            operators=("user",) * len(versions),
            update=Update.REPLACE,
            axis=None,
        )
    reason = copied.get(last, "works on a copy: something else writes the state too")
    return replace(
        state,
        pattern="explicit",
        reason=f"read, computed and written back whole: {_name(last)} {reason}{source_line(last)}",
    )


def _call_in_place(
    module: GraphModule,
    node: Node,
    owners: dict[int, CapturedState],
    placeholders: dict[str, Node],
) -> None:
    """Call the operator on the states, and let users of its results use those."""
    overload, slots = _operator(node), placeholders[SLOTS]
    returns = len(overload._schema.returns)
    declared = find_declared(overload)
    assert isinstance(declared, DeclaredOperator)
    with Emitter(module.graph, node).before(node) as emit:
        memory = {
            base: _state_memory(emit, placeholders[state.name], state, slots)
            for base, state in owners.items()
        }
        names = [argument.name for argument in overload._schema.arguments]
        given = {name: node.kwargs[name] for name in names if name in node.kwargs}
        for name in declared.written:
            base = node.kwargs[f"_{name}_base_index"]
            assert isinstance(base, int)
            given[name] = memory[base]
        call = emit.call(overload, **{name: given[name] for name in names if name in given})
        for result in list(node.users):
            index = result.args[1]
            assert isinstance(index, int)
            if index < returns:
                result.replace_all_uses_with(
                    call if returns == 1 else emit.call(operator.getitem, call, index)
                )
            else:
                state = owners[index - _first_written(node)]
                _drop_version(emit, result, placeholders[state.name], state, slots)


def _drop_version(
    emit: Emitter, version: Node, placeholder: Node, state: CapturedState, slots: Node
) -> None:
    """Erase the update that writes a version back; other users read the state."""
    for user in list(version.users):
        is_row = is_call(user, aten.unsqueeze.default) and len(user.users) == 1
        update = only_user(user) if is_row else user
        if is_call(update, inplace.update.default) and update.args[0] is placeholder:
            update.graph.erase_node(update)
            if update is not user:
                user.graph.erase_node(user)
    others = [user for user in version.users if user.target is not auto_functionalized_v2]
    if others:
        rows = emit.call(inplace.read.default, placeholder, slots)
        read = rows if state.has_slot_axis else emit.call(aten.squeeze.dim, rows, 0)
        for user in others:
            user.replace_input_with(version, read)


def _state_memory(emit: Emitter, placeholder: Node, state: CapturedState, slots: Node) -> Node:
    """The state's own memory in the module's own shape.

    Such states are bound alone: row r is slot r.
    """
    if state.has_slot_axis:
        return emit.call(aten.narrow.default, placeholder, 0, 0, value(slots).shape[0])
    return emit.call(aten.select.int, placeholder, 0, 0)
