"""The front-end for a user's own module: finds its states and matches how it updates them."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from inplace.operators import written_states
from inplace.schema.specs import Alias, Lowering, StateSpec
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node

from inplace_builder.capture.eager import EagerModule
from inplace_builder.errors import BuildError, brief
from inplace_builder.graph.export import (
    InterpretedModule,
    copy_module,
    correct_lstm,
    example_hint,
    named_extents,
    rename_inputs,
    size_oblivious,
    without_unused_attributes,
)
from inplace_builder.graph.nodes import placeholders_by_name, value
from inplace_builder.graph.passes import (
    check_state_uses,
    drop_dead_assertions,
    give_indices_an_axis,
    index_strided,
    normalise_assignments,
    remove_no_ops,
    resolve_constant_masks,
)
from inplace_builder.states.adapt import AdaptedStates, States, adapted_states
from inplace_builder.states.divide import divide_states
from inplace_builder.states.lift import SLOTS, FunctionalGraph, common_rows, lift_mutated_buffers
from inplace_builder.states.rewrite import CapturedState, rewrite_updates
from inplace_builder.states.user_operators import apply_user_operators


@dataclass(frozen=True)
class ExportedCapture:
    """A user's module as a graph on the ``inplace::`` operators.

    Attributes:
        exported: the graph (torch.export's training IR). Its placeholders are the inputs, ``slots``
            (int32 ``[rows]``), then the states ``[slots, ...]``; it returns what the module
            returns, each output once and in order.
        graph_module: the same as a plain module, before it was exported again.
        original: the module as a function, before it was rewritten: takes the inputs and the states
            in their own shapes (parts of a tensor that was divided), returns the outputs and the
            states' new values.
        eager: makes the module itself, as PyTorch runs it.
        inputs: names of the placeholders before ``slots``.
        states: in the order of the placeholders, and how each is updated.
        rows: 1; more if every state's first axis counts rows and each row has its own position.
        lowering: how each state is updated, as the manifest records it.
        aliases: one for each state.
    """

    exported: ExportedProgram
    graph_module: GraphModule
    original: GraphModule
    eager: Callable[[], EagerModule]
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
        """The rows' slots if each state is bound alone: row r is slot r."""
        return torch.arange(self.rows, dtype=torch.int32)


def capture_exported(
    module: torch.nn.Module | ExportedProgram,
    example_inputs: Sequence[Any] = (),
    *,
    states: States = "auto",
    dynamic_shapes: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    assume_consecutive: Collection[str] = (),
    strict: bool = False,
    alignment: int = 1,
    shared: Collection[str] = (),
    batched: bool = False,
) -> ExportedCapture:
    """Capture a module that mutates its inputs or its buffers.

    What it mutates are its states: inputs stay the caller's memory, buffers become the engine's.
    Each state of shape ``S`` becomes a placeholder ``[slots, *S]``; an ``S`` that begins with the
    extent 1 is a batch of one and becomes ``[slots, *S[1:]]``. ``slots`` is an input, not a
    constant, so the graph is the one that a server runs over many slots, and is lowered in the same
    way. A tensor that holds a state for each of several layers, ``cache[layer]``, becomes that many
    states, views of the one tensor.

    Args:
        module: the module, or ``torch.export.export`` of it.
        example_inputs: its positional arguments; also dicts, tuples and objects of tensors.
        states: ``auto``, or the names of exactly the inputs and buffers that are states, to have
            that checked. ``{input: output}`` for states that are passed in and returned: an output
            by its place, or by its key or field; it is an output no more, unless the module returns
            nothing else. With ``auto``, if the module writes nothing, these are matched by their
            keys or fields, else by shape, and the match is printed.
        dynamic_shapes: as for ``torch.export.export``.
        kwargs: its keyword arguments.
        assume_consecutive: integer inputs ``[n]`` that are always consecutive positions
            (``cache_position``). The caller vouches for it; it is not checked.
        strict: refuse a module that writes a part of a state in a way that no pattern covers.
        alignment: bytes that the address of a state must be a multiple of; a tensor whose parts lie
            closer stays one state.
        shared: names of buffers that are states of other programs too, see
            `inplace_builder.capture.programs`. They stay one state each, and may be only read.
        batched: the graph will take several rows, so no line of it may ask for a tensor's value,
            as ``n.item()`` does. A slice at such a number is then written at indices.

    Raises:
        BuildError: torch.export cannot capture it, it has no state, memory is shared, or, if
            ``strict``, a write is not matched.
    """
    if isinstance(example_inputs, Tensor):  # a sequence too: of its rows
        raise BuildError("example_inputs is one tensor, not a tuple of arguments: write (x,)")
    # 1. Export the module and make it a function: what it mutates goes in and comes out.
    module = getattr(module, "_orig_mod", module)  # what torch.compile was called with
    with adapted_states(module, example_inputs, kwargs, states) as adapted:
        functional = lift_mutated_buffers(
            module,
            adapted.args,
            states=adapted.states,
            dynamic_shapes=adapted.shapes(dynamic_shapes),
            kwargs=adapted.kwargs,
            shared=shared,
            batched=batched,
        )
    functional.check_assumed(assume_consecutive)
    _check_slots_name_is_free(functional)
    graph_module = functional.graph_module
    # 2. Keep a copy as it is: what programs that share states are verified against.
    original = copy_module(graph_module)
    # 3. Select by indices where masks are constant, and where a view reads memory. Assign values
    #    instead of copying into slices.
    index_strided(graph_module.graph)
    resolve_constant_masks(graph_module.graph, _constants(graph_module))
    normalise_assignments(graph_module.graph, functional.num_outputs)
    give_indices_an_axis(graph_module.graph)
    # 4. Divide tensors that hold the states of several layers.
    functional = replace(
        functional,
        states=divide_states(
            graph_module, original, functional.states, functional.num_outputs, alignment, shared
        ),
    )
    # 5. Match writes and attention; put inplace::update, read and attention in their place.
    captured, rows = _rewrite(functional, frozenset(assume_consecutive))
    # 6. Call declared user operators on the states themselves.
    captured = apply_user_operators(graph_module, captured)
    if strict:
        _refuse_unmatched(captured)
    # 7. Drop what nothing uses any more.
    drop_dead_assertions(graph_module.graph)
    functional = replace(functional, graph_module=without_unused_attributes(graph_module))
    # 8. Check that only operators use the states.
    check_state_uses(functional.graph_module.graph, [state.name for state in captured])
    # 9. Export again, with a dynamic number of slots.
    exported = _export(functional, captured, rows)
    places = dict(zip(functional.inputs, functional.places, strict=True))
    eager = functools.partial(_eager_module, module, adapted, places)
    return _described(exported, functional, original, eager, captured, rows)


def _eager_module(
    module: torch.nn.Module | ExportedProgram,
    adapted: AdaptedStates,
    places: Mapping[str, int],
) -> EagerModule:
    arguments: Any = (adapted.args, dict(adapted.kwargs))
    if isinstance(module, ExportedProgram):
        module, arguments = module.module(), module.example_inputs
    return EagerModule(module, arguments, places, adapted.pairs, adapted.objects)


def _constants(module: GraphModule) -> dict[Node, Tensor]:
    """The parameters, constants and unchanging buffers of a graph, by the nodes that fetch them."""
    fetched = {
        node: torch.fx.graph_module._get_attr(module, str(node.target))
        for node in module.graph.find_nodes(op="get_attr")
    }
    return {node: each for node, each in fetched.items() if isinstance(each, Tensor)}


def _check_slots_name_is_free(functional: FunctionalGraph) -> None:
    if SLOTS in (*functional.inputs, *(state.name for state in functional.states)):
        raise BuildError(
            f"an input of the module is named {SLOTS!r}, which the graph needs for itself: give it "
            f"another name"
        )


def _rewrite(
    functional: FunctionalGraph, assume_consecutive: frozenset[str]
) -> tuple[tuple[CapturedState, ...], int]:
    """Rewrite the graph for one row, or for as many as the states' first axis counts.

    Returns:
        How each state is updated, and the number of rows.
    """
    common = common_rows(functional.states) or 1
    for rows in (1, common):
        captured = rewrite_updates(
            functional.graph_module,
            functional.states,
            functional.num_outputs,
            rows=rows,
            assume_consecutive=assume_consecutive,
        )
        if captured is not None:
            return captured, rows
    raise BuildError("internal: the writes match neither with one row nor with several")


def _refuse_unmatched(states: Sequence[CapturedState]) -> None:
    if unmatched := [state for state in states if not state.is_matched]:
        raise BuildError(
            "; ".join(f"state {state.tensor.source} is {state.reason}" for state in unmatched)
        )


def _described(
    exported: ExportedProgram,
    functional: FunctionalGraph,
    original: GraphModule,
    eager: Callable[[], EagerModule],
    states: tuple[CapturedState, ...],
    rows: int,
) -> ExportedCapture:
    """The capture with the manifest's description of it."""
    names = {state.name for state in states if not state.tensor.only_read}
    if unwritten := sorted(names - set(written_states(exported.graph))):
        raise BuildError(f"internal: the rewritten graph does not write {unwritten}")
    lowering = tuple(
        Lowering(state=state.name, kind=state.kind, reason=f"{state.pattern}: {state.reason}")
        for state in states
    )
    aliases = tuple(
        Alias(output=f"{state.name}_updated", input=state.name, kind=state.kind) for state in states
    )
    return ExportedCapture(
        exported,
        functional.graph_module,
        original,
        eager,
        functional.inputs,
        states,
        rows,
        lowering,
        aliases,
    )


def _export(
    functional: FunctionalGraph, states: Sequence[CapturedState], rows: int
) -> ExportedProgram:
    """Export the rewritten graph as the other front-ends do: dynamic slots, one signature."""
    slots = Dim("slots", min=rows if any(state.kind == "user" for state in states) else 1)
    names = [state.name for state in states]
    tensors = [torch.cat([state.bound_initial()] * 2) for state in states]
    arguments = (*_example_arguments(functional), torch.arange(rows, dtype=torch.int32), *tensors)
    inputs, memory = _dynamic_shapes(functional, names)
    shapes = (*inputs, None, *({0: slots, **varying} for varying in memory))
    try:
        with torch.no_grad(), correct_lstm(), size_oblivious(), named_extents():
            exported = torch.export.export(
                InterpretedModule(functional.graph_module), arguments, dynamic_shapes=(shapes,)
            )
    except Exception as error:
        raise BuildError(
            f"torch.export cannot capture the rewritten graph: {brief(error)}"
            f"{example_hint(functional.example_inputs)}"
        ) from error
    rename_inputs(exported, [*functional.inputs, SLOTS, *names])
    remove_no_ops(exported)
    exported._example_inputs = None
    return exported


def _example_arguments(functional: FunctionalGraph) -> tuple[Any, ...]:
    """The example inputs, with two entries where an extent varies that is 1 in the example.

    torch.export takes such a 1 for a constant in some operators.
    """
    values = {
        name: node.meta["val"]
        for name, node in placeholders_by_name(functional.graph_module.graph).items()
    }
    places: dict[Any, list[tuple[int, int]]] = {}
    for place, name in enumerate(functional.inputs):
        extents = values[name].shape if isinstance(values[name], Tensor) else ()
        for axis, extent in enumerate(extents):
            if isinstance(extent, torch.SymInt):
                places.setdefault(extent.node.expr, []).append((place, axis))
    of_states = {
        symbol for state in functional.states for symbol in _symbols(values.get(state.name))
    }
    ranges = functional.range_constraints
    examples = list(functional.example_inputs)
    for expression, where in places.items():
        independent = (
            expression.is_Symbol
            and expression not in of_states
            and not any(expression in other.free_symbols for other in places if other != expression)
        )
        if independent and expression in ranges and ranges[expression].upper >= 2:
            for place, axis in where:
                if examples[place].shape[axis] == 1:
                    examples[place] = torch.cat([examples[place]] * 2, axis)
    return tuple(examples)


def _symbols(tensor: Any) -> set[Any]:
    """The symbols in a tensor's extents."""
    return {
        symbol
        for extent in getattr(tensor, "shape", ())
        if not isinstance(extent, int)
        for symbol in extent.node.expr.free_symbols
    }


def _dynamic_shapes(
    functional: FunctionalGraph, states: Sequence[str]
) -> tuple[list[Any], list[dict[int, Any]]]:
    """The dynamic extents of the inputs, and of the states, as the first export had them."""
    placeholders = placeholders_by_name(functional.graph_module.graph)
    dims: dict[Any, Any] = {}
    shapes: list[Any] = []
    for name in functional.inputs:
        example = placeholders[name].meta.get("val")
        if isinstance(example, torch.SymInt):
            shapes.append(Dim.DYNAMIC)
        else:
            shapes.append(_dynamic_extents(example, functional, dims) or None)
    return shapes, [
        _dynamic_extents(value(placeholders[name]), functional, dims) for name in states
    ]


def _dynamic_extents(
    tensor: Any, functional: FunctionalGraph, dims: dict[Any, Any]
) -> dict[int, Any]:
    """The extents of a tensor that vary, by axis; ``dims`` has one Dim for each symbol."""
    return {
        axis: _dim(extent, functional, dims)
        for axis, extent in enumerate(tensor.shape)
        if not isinstance(extent, int)
    }


def _dim(extent: torch.SymInt, functional: FunctionalGraph, dims: dict[Any, Any]) -> Any:
    expression, ranges = extent.node.expr, functional.range_constraints
    if not expression.is_Symbol or expression not in ranges:
        return Dim.AUTO
    if expression not in dims:
        low, high = ranges[expression].lower, ranges[expression].upper
        is_number = getattr(high, "is_Integer", isinstance(high, int))
        limit = int(high) if is_number and int(high) < 2**62 else None
        dims[expression] = Dim(str(expression), min=int(low), max=limit)
    return dims[expression]
