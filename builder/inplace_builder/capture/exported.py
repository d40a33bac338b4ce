"""Frontend for a user's own module: its states are found, its updates recognised."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from inplace.operators import written_states
from inplace.schema.served import Alias, Lowering
from inplace.schema.specs import StateSpec
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from inplace_builder.errors import BuildError, brief
from inplace_builder.graph.nodes import check_state_uses, remove_no_ops
from inplace_builder.graph.reexport import (
    InterpretedModule,
    copy_module,
    rename_inputs,
    size_oblivious,
    without_unused_attributes,
)
from inplace_builder.states.divide import divide_states
from inplace_builder.states.lift import (
    FunctionalGraph,
    drop_dead_assertions,
    example_hint,
    lift_mutated_buffers,
    normalise_assignments,
)
from inplace_builder.states.rewrite import SLOTS, rewrite_updates
from inplace_builder.states.state import CapturedState, common_rows
from inplace_builder.states.user_operators import apply_user_operators


@dataclass(frozen=True)
class ExportedCapture:
    """A user's module as a graph on the ``inplace::`` operators.

    Attributes:
        exported: the graph (torch.export's training IR); placeholders are the inputs, ``slots`` (int32 ``[rows]``), then the states
            ``[slots, ...]``; it returns what the module returns, each output once and in order.
        graph_module: the same as a plain module, before it was exported again.
        original: the module as a function, before any of it was rewritten: takes the inputs and the states in their own shapes (parts
            where a tensor was divided), returns the outputs and the states' new values.
        inputs: the placeholders before ``slots``.
        states: in the order of the placeholders, each with its verdict.
        rows: 1; more where every state's first axis counts rows and each row has a position of its own.
        lowering: the verdicts as the manifest records them.
        aliases: one a state.
    """

    exported: ExportedProgram
    graph_module: GraphModule
    original: GraphModule
    inputs: tuple[str, ...]
    states: tuple[CapturedState, ...]
    rows: int
    lowering: tuple[Lowering, ...]
    aliases: tuple[Alias, ...]

    @property
    def state_specs(self) -> tuple[StateSpec, ...]:
        """The manifest's description of the states."""
        return tuple(state.spec() for state in self.states)

    def slots(self) -> Tensor:
        """The rows' slots where each state is bound alone: row r is slot r."""
        return torch.arange(self.rows, dtype=torch.int32)


def capture_exported(
    module: torch.nn.Module | ExportedProgram,
    example_inputs: Sequence[Any] = (),
    *,
    states: str | Collection[str] = "auto",
    dynamic_shapes: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    assume_consecutive: Collection[str] = (),
    strict: bool = False,
    alignment: int = 1,
) -> ExportedCapture:
    """Capture a module that mutates its inputs or its buffers.

    What it mutates are its states: inputs stay the caller's memory, buffers become the engine's. Each state of shape ``S`` becomes a
    placeholder ``[slots, *S]``; an ``S`` that begins with the extent 1 is taken as ``[slots, *S[1:]]``, a batch of one. ``slots`` is an
    input, not a constant, so that the graph is the one that a server runs over many slots, and its lowering the same. A tensor that holds a
    state for each of several layers, ``cache[layer]``, becomes that many states, views of the one tensor.

    Args:
        module: the module, or ``torch.export.export`` of it.
        example_inputs: its positional arguments; dicts, tuples and registered dataclasses of tensors too.
        states: ``auto``, or the names of exactly the inputs and buffers that are states, to have that checked.
        dynamic_shapes: as for ``torch.export.export``.
        kwargs: its keyword arguments.
        assume_consecutive: integer inputs ``[n]`` that are always consecutive positions (``cache_position``): the caller's promise.
        strict: refuse a module of which a part of a state is written in a way that no pattern covers.
        alignment: bytes that the address of a state must be a multiple of; a tensor whose parts lie closer stays one state.

    Raises:
        BuildError: torch.export cannot capture it, it has no state, memory is shared, or, if ``strict``, a write is not recognised.
    """
    found = lift_mutated_buffers(
        module, example_inputs, states=states, dynamic_shapes=dynamic_shapes, kwargs=kwargs
    )
    if unknown := sorted(set(assume_consecutive) - set(found.inputs)):
        raise BuildError(
            f"assume_consecutive names {unknown}, which are no inputs; the inputs are {list(found.inputs)}"
        )
    if SLOTS in (*found.inputs, *(state.name for state in found.states)):
        raise BuildError(
            f"an input of the module is named {SLOTS!r}, which the graph needs for itself: give it another name"
        )
    original = copy_module(found.graph_module)
    normalise_assignments(found.graph_module.graph, found.num_outputs)
    found = replace(
        found,
        states=divide_states(
            found.graph_module, original, found.states, found.num_outputs, alignment
        ),
    )
    rows = 1
    made = rewrite_updates(
        found.graph_module,
        found.states,
        found.num_outputs,
        rows=rows,
        assume_consecutive=frozenset(assume_consecutive),
    )
    if made is None:
        rows = common_rows(found.states) or 1
        made = rewrite_updates(
            found.graph_module,
            found.states,
            found.num_outputs,
            rows=rows,
            assume_consecutive=frozenset(assume_consecutive),
        )
    assert made is not None
    made = apply_user_operators(found.graph_module, made)
    if strict and (refused := [state for state in made if not state.is_matched]):
        raise BuildError(
            "; ".join(f"state {state.tensor.source} is {state.reason}" for state in refused)
        )
    drop_dead_assertions(found.graph_module.graph)
    found = replace(found, graph_module=without_unused_attributes(found.graph_module))
    names = [state.name for state in made]
    check_state_uses(found.graph_module.graph, names)
    exported = _export(found, made, rows)
    if unwritten := sorted(set(names) - set(written_states(exported.graph))):
        raise BuildError(f"internal: the rewritten graph does not write {unwritten}")
    return ExportedCapture(
        exported,
        found.graph_module,
        original,
        found.inputs,
        made,
        rows,
        tuple(
            Lowering(state=state.name, kind=state.kind, reason=f"{state.pattern}: {state.reason}")
            for state in made
        ),
        tuple(
            Alias(output=f"{state.name}_updated", input=state.name, kind=state.kind)
            for state in made
        ),
    )


def _export(found: FunctionalGraph, states: Sequence[CapturedState], rows: int) -> ExportedProgram:
    """Export the rewritten graph as every other frontend does: dynamic slots, one signature."""
    slots = Dim("slots", min=rows if any(state.kind == "user" for state in states) else 1)
    tensors = [torch.cat([state.bound_initial()] * 2) for state in states]
    arguments = (*_example_arguments(found), torch.arange(rows, dtype=torch.int32), *tensors)
    inputs, memory = _dynamic_shapes(found, [state.name for state in states])
    shapes = (*inputs, None, *({0: slots, **varying} for varying in memory))
    try:
        with torch.no_grad(), size_oblivious():
            exported = torch.export.export(
                InterpretedModule(found.graph_module), arguments, dynamic_shapes=(shapes,)
            )
    except Exception as error:
        raise BuildError(
            f"torch.export cannot capture the rewritten graph: {brief(error)}{example_hint(found.example_inputs)}"
        ) from error
    rename_inputs(exported, [*found.inputs, SLOTS, *(state.name for state in states)])
    remove_no_ops(exported)
    exported._example_inputs = None
    return exported


def _example_arguments(found: FunctionalGraph) -> tuple[Any, ...]:
    """The example inputs, with two entries where an extent that varies is 1, which torch.export takes for a constant in some operators."""
    extents: dict[Any, list[tuple[int, int]]] = {}
    values = {
        node.name: node.meta["val"]
        for node in found.graph_module.graph.nodes
        if node.op == "placeholder"
    }
    for place, name in enumerate(found.inputs):
        for axis, extent in enumerate(
            values[name].shape if isinstance(values[name], Tensor) else ()
        ):
            if isinstance(extent, torch.SymInt):
                extents.setdefault(extent.node.expr, []).append((place, axis))
    examples = list(found.example_inputs)
    taken = {symbol for state in found.states for symbol in _symbols(values.get(state.name))}
    for expression, places in extents.items():
        alone = (
            expression.is_Symbol
            and expression not in taken
            and not any(
                expression in other.free_symbols for other in extents if other != expression
            )
        )
        if (
            alone
            and expression in found.range_constraints
            and found.range_constraints[expression].upper >= 2
        ):
            for place, axis in places:
                if examples[place].shape[axis] == 1:
                    examples[place] = torch.cat([examples[place]] * 2, axis)
    return tuple(examples)


def _symbols(held: Any) -> set[Any]:
    """The symbols in a tensor's extents."""
    return {
        symbol
        for extent in getattr(held, "shape", ())
        if not isinstance(extent, int)
        for symbol in extent.node.expr.free_symbols
    }


def _dynamic_shapes(
    found: FunctionalGraph, states: Sequence[str]
) -> tuple[list[Any], list[dict[int, Any]]]:
    """The dynamic extents of the inputs, and of the states in slots, as torch.export found them the first time."""
    placeholders = {
        node.name: node for node in found.graph_module.graph.nodes if node.op == "placeholder"
    }
    named: dict[Any, Any] = {}
    shapes: list[Any] = []
    for name in found.inputs:
        held = placeholders[name].meta.get("val")
        if isinstance(held, torch.SymInt):
            shapes.append(Dim.DYNAMIC)
            continue
        shapes.append(_dynamic_extents(held, found, named) or None)
    return shapes, [
        _dynamic_extents(placeholders[name].meta["val"], found, named) for name in states
    ]


def _dynamic_extents(held: Tensor, found: FunctionalGraph, named: dict[Any, Any]) -> dict[int, Any]:
    """The extents of a tensor that vary."""
    extents: list[Any] = list(held.shape)
    return {
        axis: _dim(extent, found, named)
        for axis, extent in enumerate(extents)
        if not isinstance(extent, int)
    }


def _dim(extent: torch.SymInt, found: FunctionalGraph, named: dict[Any, Any]) -> Any:
    expression = extent.node.expr
    if not expression.is_Symbol or expression not in found.range_constraints:
        return Dim.AUTO
    if expression not in named:
        low, high = (
            found.range_constraints[expression].lower,
            found.range_constraints[expression].upper,
        )
        limit = (
            int(high)
            if getattr(high, "is_Integer", isinstance(high, int)) and int(high) < 2**62
            else None
        )
        named[expression] = Dim(str(expression), min=int(low), max=limit)
    return named[expression]
