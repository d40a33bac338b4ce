"""A user's own module as a function: no mutation, the new value of each state an output.

The memory that a user's module is given: which of it is written, by which line, and what of that no engine can take.

What functionalisation leaves of an assignment, said with the value that is assigned.
"""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from inplace.operators.library import written_arguments
from inplace.schema.dtypes import Dtype
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.fx import Graph, GraphModule, Node

from inplace_builder.errors import BuildError, brief
from inplace_builder.graph.nodes import Emitter, copy_graph, dtype, is_call, shape, source_line
from inplace_builder.graph.reexport import size_oblivious
from inplace_builder.states.state import Owner, StateTensor

aten = torch.ops.aten


FOLLOWED = frozenset(
    {
        aten.select.int,
        aten.slice.Tensor,
        aten.narrow.default,
        aten.view.default,
        aten.reshape.default,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.alias.default,
        aten.detach.default,
        aten.expand.default,
        aten.index.Tensor,
    }
)
"""Views that the passes follow, or of which they say themselves where they do not."""


@dataclass(frozen=True)
class FirstWriter:
    """The first operator that writes an input.

    Attributes:
        line: the module's line, as `source_line` has it.
        unmatched_view: a part of the input was written through a view that no pattern follows: in words, with the line; else empty.
    """

    line: str
    unmatched_view: str


def find_first_writers(exported: ExportedProgram) -> dict[str, FirstWriter]:
    """For each input and buffer that is written the operator that does it, in the graph before functionalisation."""
    found: dict[str, FirstWriter] = {}
    for node in exported.graph.nodes:
        if node.op == "placeholder" and (first := first_writer(node)) is not None:
            found[node.name] = FirstWriter(source_line(first), _unmatched_view(node, first))
    return found


def _unmatched_view(node: Node, first: Node) -> str:
    """Whether only a part was written, and through what."""
    for written in written_arguments(first):
        steps = []
        current = written
        while (
            current is not node
            and current.op == "call_function"
            and isinstance(current.args[0], Node)
        ):
            steps.append(current)
            current = current.args[0]
        whole, part = node.meta["val"], written.meta["val"]
        hidden = [step for step in steps if step.target not in FOLLOWED]
        if (
            current is node
            and hidden
            and whole.numel() * whole.itemsize != part.numel() * part.itemsize
        ):
            return f"a part of it is written through the view {hidden[-1].target}, which no pattern follows{source_line(first)}"
    return ""


def check_shape_kept(state: StateTensor, result: Node, writer: FirstWriter | None) -> None:
    """BuildError where a state would become another shape; extents that only a call knows are left to it."""
    old, new = tuple(state.initial.shape), tuple(result.meta["val"].shape)
    if (
        all(isinstance(extent, int) for extent in new) and old != new
    ):  # to compare with one that varies would fix it
        line = writer.line if writer is not None else ""
        raise BuildError(
            f"state {state.source} of {old} becomes {new}{line}: a state is updated in its own memory, so it keeps its shape"
        )


def check_state_supported(state: StateTensor, written: FirstWriter | None) -> None:
    """BuildError if a state is not contiguous, or of a type that no engine takes."""
    line = "" if written is None else written.line
    if not state.initial.is_contiguous():
        raise BuildError(
            f"state {state.source} of {tuple(state.initial.shape)} has strides {state.initial.stride()}, and the module writes it{line}: a "
            f"state is updated in its own memory, which must be contiguous; pass .contiguous() and keep that tensor"
        )
    try:
        Dtype.of(state.initial.dtype)
    except ValueError:
        raise BuildError(
            f"state {state.source} is {state.initial.dtype}, which no engine takes, and the module writes it{line}; the types are "
            f"{[str(dtype) for dtype in Dtype]}"
        ) from None


def explain_stateless(exported: ExportedProgram, made: "FunctionalGraph") -> str:
    """What a module without state may have meant: it writes a copy, or returns what it should have written."""
    for node in exported.graph.nodes:
        for written in written_arguments(node):
            if written.op == "call_function" and node.target is not aten.detach_.default:
                return f"; what it writes{source_line(node)} is a copy that {written.target} made, not the tensor itself"
    last = made.graph_module.graph.output_node()
    for place, node in enumerate(last.args[0]):  # type: ignore[arg-type]
        if (
            isinstance(node, Node)
            and node.target in NEW_VERSIONS
            and isinstance(node.args[0], Node)
            and node.args[0].op == "placeholder"
        ):
            return (
                f"; output {place} is {node.args[0].name} with something written into it, as a new tensor{source_line(node)}: for a state "
                f"write it in place ({node.args[0].name}.copy_(…)), and need not return it"
            )
    return ""


NEW_VERSIONS = frozenset(
    {
        aten.index_copy.default,
        aten.index_put.default,
        aten.scatter.src,
        aten.scatter.value,
        aten.slice_scatter.default,
        aten.select_scatter.default,
    }
)
"""Operators that return their first argument with something written into it."""


def merge_shared_buffers(exported: ExportedProgram) -> None:
    """Make one of buffers that are one tensor or parts of one; refuse memory shared in any other way once it is written.

    Functionalisation takes every input for memory of its own, so what is written through one name would be missing under the other.
    """
    tensors = _memory_of_inputs(exported)
    merged: set[Node] = set()
    for (first, a), (second, b) in combinations(tensors.items(), 2):
        if first in merged or second in merged or not _overlap(a, b):
            continue
        written = first_writer(first) or first_writer(second)
        held = bool(first.meta.get("buffer") and second.meta.get("buffer"))
        whole, part = (first, second) if a.numel() >= b.numel() else (second, first)
        path = _select_path(tensors[whole], tensors[part])
        if held and path is not None and (written is not None or not path):
            _merge(exported, whole, part, path)
            merged.add(part)
        elif written is not None:
            raise BuildError(
                f"{_describe_input(first)} and {_describe_input(second)} share memory, and the module writes it{source_line(written)}: keep one tensor and "
                f"take views of it in forward, or give each memory of its own"
            )


def _describe_input(node: Node) -> str:
    return f"buffer {node.meta['buffer']}" if node.meta.get("buffer") else f"input {node.name}"


def _memory_of_inputs(exported: ExportedProgram) -> dict[Node, Tensor]:
    nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    arguments, named = exported.example_inputs or ((), {})
    leaves = iter(torch.utils._pytree.tree_leaves((arguments, named)))
    found: dict[Node, Tensor] = {}
    for spec in exported.graph_signature.input_specs:
        name = spec.arg.name
        if spec.kind is InputKind.USER_INPUT:
            leaf = next(leaves, None)
            if isinstance(leaf, Tensor):
                found[nodes[name]] = leaf
        elif (
            spec.kind in (InputKind.BUFFER, InputKind.PARAMETER, InputKind.CONSTANT_TENSOR)
            and spec.target is not None
        ):
            held = exported.state_dict.get(spec.target, exported.constants.get(spec.target))
            if isinstance(held, Tensor):
                if spec.kind is InputKind.BUFFER:
                    nodes[name].meta["buffer"] = spec.target
                found[nodes[name]] = held
    return found


def _span(tensor: Tensor) -> tuple[int, int]:
    first = tensor.data_ptr()
    last = sum(
        (extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return first, first + (last + 1) * tensor.element_size()


def _overlap(a: Tensor, b: Tensor) -> bool:
    if not a.numel() or not b.numel() or a.device != b.device or a.device.type == "meta":
        return False
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    (a_start, a_end), (b_start, b_end) = _span(a), _span(b)
    return a_start < b_end and b_start < a_end


def _select_path(whole: Tensor, part: Tensor) -> list[int] | None:
    """The indices on the first axes that make one tensor of another, ``whole[2, 0]``; None where it is no such part."""
    axes = whole.dim() - part.dim()
    apart = part.data_ptr() - whole.data_ptr()
    alike = (whole.dtype, whole.shape[axes:], whole.stride()[axes:]) == (
        part.dtype,
        part.shape,
        part.stride(),
    )
    if axes < 0 or not alike or apart < 0 or apart % part.element_size():
        return None
    left, path = apart // part.element_size(), []
    for extent, stride in zip(whole.shape[:axes], whole.stride()[:axes], strict=True):
        index, left = divmod(left, stride) if stride else (0, left)
        if index >= extent:
            return None
        path.append(index)
    return path if left == 0 else None


def _merge(exported: ExportedProgram, kept: Node, alias: Node, path: list[int]) -> None:
    """Let every user of the second buffer use the first, or the part of it."""
    first = next(node for node in exported.graph.nodes if node.op != "placeholder")
    with Emitter(exported.graph, kept).before(first) as emit:
        for index in path:
            kept = emit.call(aten.select.int, kept, 0, index)
    alias.replace_all_uses_with(kept)
    exported.graph.erase_node(alias)
    specs = exported.graph_signature.input_specs
    specs[:] = [spec for spec in specs if spec.arg.name != alias.name]
    exported.state_dict.pop(alias.meta["buffer"], None)
    exported.constants.pop(alias.meta["buffer"], None)
    exported.graph_module.recompile()


def first_writer(node: Node) -> Node | None:
    """The first operator that writes a tensor or a view of it, in the graph before functionalisation."""
    pending, seen = [node], {node}
    while pending:
        tensor = pending.pop(0)
        for user in tensor.users:
            if not isinstance(user.target, torch._ops.OpOverload) or user in seen:
                continue
            if tensor in written_arguments(user):
                return user
            for argument, passed in zip(user.target._schema.arguments, user.args, strict=False):
                if passed is tensor and argument.alias_info is not None:
                    seen.add(user)
                    pending.append(user)
    return None


@dataclass(frozen=True)
class FunctionalGraph:
    """A module without mutation.

    Attributes:
        graph_module: takes the inputs, then the states (each of the module's own shape); returns the outputs, then the new value of each
            state. Parameters, constants and buffers that never change are its attributes.
        states: in the order of the placeholders.
        inputs: names of the placeholders before them.
        example_inputs: a tensor or a number for each of them.
        num_outputs: how many outputs stand before the states' values.
        range_constraints: what torch.export found of each dynamic extent.
    """

    graph_module: GraphModule
    states: tuple[StateTensor, ...]
    inputs: tuple[str, ...]
    example_inputs: tuple[Any, ...]
    num_outputs: int
    range_constraints: Mapping[Any, Any]


def lift_mutated_buffers(
    module: torch.nn.Module | ExportedProgram,
    example_inputs: Sequence[Any],
    *,
    states: str | Collection[str] = "auto",
    dynamic_shapes: Any = None,
    kwargs: Mapping[str, Any] | None = None,
) -> FunctionalGraph:
    """Export a module, or take an exported one, and lift its states, the inputs and buffers that it mutates, to inputs of a function.

    `inplace_builder.inline_lifted_buffers` is the inverse.

    Raises:
        BuildError: torch.export cannot capture the module; ``states`` names something else than what is mutated; two tensors of which one
            is mutated overlap in memory; a state is not contiguous.
    """
    exported = export_module(module, example_inputs, dynamic_shapes, kwargs)
    _adopt_constants(exported)
    merge_shared_buffers(exported)
    writers = find_first_writers(exported)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own deprecations
            program = exported.run_decompositions({})
    except Exception as error:
        raise BuildError(
            f"torch.export cannot make the module functional: {brief(error)}"
        ) from error
    made = _lift(program, exported.example_inputs, writers)
    if states != "auto":
        _check_declared(made.states, {states} if isinstance(states, str) else set(states))
    if not made.states:
        raise BuildError(
            f"the module mutates none of its inputs and buffers: it has no state to keep{explain_stateless(exported, made)}"
        )
    return made


def export_module(
    module: torch.nn.Module | ExportedProgram,
    example_inputs: Sequence[Any],
    dynamic_shapes: Any,
    kwargs: Mapping[str, Any] | None,
) -> ExportedProgram:
    """Export a module, as it stands; of an exported program a copy with the same tensors, for what captures one changes it.

    Raises:
        BuildError: torch.export cannot capture it.
    """
    if isinstance(module, ExportedProgram):
        return _copy_program(module)
    plain: Callable[[], AbstractContextManager[None]] = nullcontext
    failures: list[Exception] = []
    for mode in (
        size_oblivious,
        plain,
    ):  # an extent of 1 stays dynamic where it can; a position passed as a number needs the usual rules
        try:
            with torch.no_grad(), warnings.catch_warnings(), mode():
                warnings.simplefilter("ignore")
                return torch.export.export(
                    module, tuple(example_inputs), dict(kwargs or {}), dynamic_shapes=dynamic_shapes
                )
        except Exception as error:
            failures.append(error)
    said = example_hint(example_inputs) if dynamic_shapes else ""
    raise BuildError(
        f"torch.export cannot capture {type(module).__name__}: {failures[-1]}{said}"
    ) from failures[-1]


def example_hint(example_inputs: Sequence[Any]) -> str:
    """What may be wrong with example inputs of which an extent varies."""
    tensors = [
        leaf
        for leaf in torch.utils._pytree.tree_leaves(list(example_inputs))
        if isinstance(leaf, Tensor)
    ]
    if not any(extent == 1 for tensor in tensors for extent in tensor.shape):
        return ""
    return "; if an extent that is to vary is 1 in the example, give it 2 entries or more: torch.export often takes a 1 for a constant"


def _copy_program(program: ExportedProgram) -> ExportedProgram:
    return ExportedProgram(
        root=program.graph_module,
        graph=copy_graph(program.graph),
        graph_signature=deepcopy(program.graph_signature),
        state_dict=dict(program.state_dict),
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=dict(program.constants),
        verifiers=program.verifiers,
    )


def _adopt_constants(exported: ExportedProgram) -> None:
    """Make buffers of constants that the module writes.

    torch.export without ``strict`` takes a tensor for a constant that the module reaches through an object of Python's (a cache) and not
    through its own attributes, also where it is the memory of a registered buffer; `_check_sharing` then makes one of the two.
    """
    nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    for spec in exported.graph_signature.input_specs:
        if (
            spec.kind is InputKind.CONSTANT_TENSOR
            and first_writer(nodes[spec.arg.name]) is not None
        ):
            spec.kind, spec.persistent = InputKind.BUFFER, False


def _lift(
    program: ExportedProgram, examples: Any, writers: Mapping[str, FirstWriter]
) -> FunctionalGraph:
    """What is mutated becomes an input, everything else of the module an attribute."""
    graph, signature = program.graph_module.graph, program.graph_signature
    nodes = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    leaves = iter(torch.utils._pytree.tree_leaves(examples or ((), {})))
    written_buffers, written_inputs = (
        set(signature.buffers_to_mutate.values()),
        set(signature.user_inputs_to_mutate.values()),
    )
    found: dict[str, StateTensor] = {}
    held: dict[str, Any] = {}
    inputs: list[str] = []
    passed: list[Any] = []
    for spec in signature.input_specs:
        node = nodes[spec.arg.name]
        if spec.kind is InputKind.USER_INPUT:
            leaf = next(leaves, None)
            if isinstance(spec.arg, ConstantArgument):
                graph.erase_node(node)  # a Python constant, baked into the graph
            elif isinstance(spec.arg, TensorArgument) and node.name in written_inputs:
                initial = (
                    leaf.detach().clone()
                    if isinstance(leaf, Tensor)
                    else torch.zeros(tuple(node.meta["val"].shape))
                )
                varies = frozenset(
                    axis
                    for axis, extent in enumerate(node.meta["val"].shape)
                    if not isinstance(extent, int)
                )
                found[node.name] = StateTensor(node.name, Owner.CALLER, node.name, initial, varies)
            else:
                inputs.append(node.name)
                passed.append(leaf)
        elif (
            spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
            and spec.target is not None
        ):
            tensor = (
                program.state_dict[spec.target]
                if spec.target in program.state_dict
                else program.constants[spec.target]
            )
            if spec.kind is InputKind.BUFFER and spec.target in written_buffers:
                found[spec.target] = StateTensor(
                    node.name, Owner.MODULE, spec.target, tensor.detach().clone()
                )
            else:
                held[spec.target] = tensor
                _make_attribute(graph, node, spec.target)
        else:
            raise BuildError(
                f"input {spec.arg.name} is a {spec.kind.name.lower()}, which an engine cannot hold; pass tensors only"
            )
    held |= _subgraphs(program, held)
    outputs, values = _outputs(program)
    states = tuple(found[key] for key in values)
    for state, result in zip(states, values.values(), strict=True):
        check_shape_kept(state, result, writers.get(state.name))
        check_state_supported(state, writers.get(state.name))
    states = tuple(
        replace(
            state,
            first_write=writers[state.name].line,
            unmatched_view=writers[state.name].unmatched_view,
        )
        if state.name in writers
        else state
        for state in states
    )
    _order_placeholders(graph, [*inputs, *(state.name for state in states)])
    last = graph.output_node()
    graph.erase_node(last)
    graph.output((*outputs, *values.values()))
    return FunctionalGraph(
        GraphModule(held, graph),
        states,
        tuple(inputs),
        tuple(passed),
        len(outputs),
        program.range_constraints,
    )


def _outputs(program: ExportedProgram) -> tuple[list[Any], dict[str, Any]]:
    """What the module returns, and the new value of each state by the input or buffer that it belongs to."""
    returned = program.graph_module.graph.output_node().args[0]
    assert isinstance(returned, tuple | list)
    outputs: list[Any] = []
    values: dict[str, Any] = {}
    for spec, node in zip(program.graph_signature.output_specs, returned, strict=True):
        if spec.kind is OutputKind.USER_OUTPUT:
            outputs.append(node)
        elif (
            spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION)
            and spec.target is not None
        ):
            values[spec.target] = node
        else:
            raise BuildError(
                f"output {spec.arg} is a {spec.kind.name.lower()}, which an engine cannot return; return tensors only"
            )
    return outputs, values


def _subgraphs(program: ExportedProgram, held: Collection[str]) -> dict[str, Any]:
    """What the graph holds beside what it is ``held`` now: the branches of torch.cond and the like."""
    names = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"} - set(held)
    return {name: torch.fx.graph_module._get_attr(program.graph_module, name) for name in names}


def _make_attribute(graph: torch.fx.Graph, node: Node, target: str) -> None:
    with graph.inserting_before(node):
        read = graph.create_node("get_attr", target, name=f"{node.name}_")
    read.meta.update(node.meta)
    node.replace_all_uses_with(read)
    graph.erase_node(node)


def _order_placeholders(graph: torch.fx.Graph, names: Sequence[str]) -> None:
    """Put the placeholders first, in this order."""
    nodes = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    first = next(iter(graph.nodes))
    for name in names:
        first.prepend(nodes[name]) if first is not nodes[name] else None
        if first is nodes[name]:
            first = first.next


def _check_declared(states: Sequence[StateTensor], declared: Collection[str]) -> None:
    known = {alias: state for state in states for alias in (state.name, state.source)}
    if unknown := sorted(set(declared) - known.keys()):
        raise BuildError(
            f"the module never writes {unknown}: what it only reads is a constant; its states are {[s.source for s in states]}"
        )
    named = {known[name].name for name in declared}
    if missing := [state.source for state in states if state.name not in named]:
        raise BuildError(
            f"the module also writes {missing}: declare them as states too, or leave states='auto'"
        )


def normalise_assignments(graph: Graph, outputs: int) -> None:
    """Rewrite ``copy(old, new)`` to ``new`` in the type and extents of ``old``, and ``fill(old, x)`` to a full tensor.

    ``state[...] = x`` is exported as a copy over a slice of the old state; only its type and extents matter, so the slice goes away and
    with it a read of the old state. Assertions about types go too: a pattern wants the parts it is made of for itself alone.
    """
    last = graph.output_node().args[0]
    assert isinstance(last, tuple)
    returned = set(last[:outputs])
    for node in list(graph.nodes):
        if is_call(node, aten._assert_tensor_metadata.default):
            graph.erase_node(node)
        elif is_call(
            node, aten.copy.default, aten.fill.Tensor, aten.fill.Scalar, aten.zero.default
        ):
            old, new = node.args[0], node.args[1] if len(node.args) > 1 else 0
            with Emitter(graph, node).before(node) as emit:
                assigned = _assigned(emit, old, new)
                if node in returned or (
                    not _is_new_memory(assigned)
                    and any(not _only_stores(user, node) for user in node.users)
                ):
                    assigned = emit.call(
                        aten.clone.default, assigned, memory_format=torch.contiguous_format
                    )
            node.replace_all_uses_with(assigned)
            graph.erase_node(node)
    graph.eliminate_dead_code()


_INTO = (aten.slice_scatter.default, aten.select_scatter.default)


def _is_new_memory(node: Node) -> bool:
    """Whether it is memory of its own, laid out as a new tensor is: else views would not be those of the old one."""
    made = node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
    alone = made and all(result.alias_info is None for result in node.target._schema.returns)  # type: ignore[union-attr]
    return alone and bool(node.meta["val"].is_contiguous())


def _only_stores(user: Node, node: Node) -> bool:
    """Whether a user only writes a value into something else."""
    into = is_call(user, *_INTO) and user.args[1] is node and user.args[0] is not node
    return (
        into or user.op == "output"
    )  # what is returned was asked for above, and a state takes a copy


def _assigned(emit: Emitter, old: Any, new: Any) -> Node:
    extents = [_extent(emit, old, axis) for axis in range(len(shape(old)))]
    if not isinstance(new, Node) or not isinstance(new.meta["val"], torch.Tensor):
        return emit.call(
            aten.full.default, extents, new, dtype=dtype(old), device=old.meta["val"].device
        )
    assigned = new if dtype(new) == dtype(old) else emit.call(aten.to.dtype, new, dtype(old))
    return (
        assigned
        if shape(assigned) == shape(old)
        else emit.call(aten.expand.default, assigned, extents)
    )


def _extent(emit: Emitter, node: Node, axis: int) -> Any:
    extent = shape(node)[axis]
    return int(extent) if isinstance(extent, int) else emit.call(aten.sym_size.int, node, axis)


def drop_dead_assertions(graph: Graph) -> None:
    """Drop run-time assertions about numbers that nothing else uses any more.

    An index that a pattern moved into ``inplace::update`` is checked there; the assertion alone would make the host wait for the device.
    """
    live: set[Node] = set()
    for node in reversed(graph.nodes):
        if (
            node.op == "output"
            or (not _assertion(node) and not _number(node))
            or any(user in live for user in node.users)
        ):
            live.add(node)
    for node in reversed(graph.nodes):
        if node not in live and (_assertion(node) or not node.users):
            if _assertion(node) and not _only_dead_numbers(node, live):
                continue
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _assertion(node: Node) -> bool:
    return is_call(
        node,
        aten._assert_scalar.default,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
        aten._assert_async.msg,
    )


def _number(node: Node) -> bool:
    return (
        node.op == "call_function"
        and not isinstance(node.meta.get("val"), torch.Tensor)
        and not _writes(node)
    )


def _writes(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and bool(node.target._schema.is_mutable)


def _only_dead_numbers(node: Node, live: set[Node]) -> bool:
    pending, seen = list(node.all_input_nodes), set[Node]()
    while pending:
        source = pending.pop()
        if source in seen:
            continue
        seen.add(source)
        if source in live and _number(source):
            return False
        if _number(source):
            pending.extend(source.all_input_nodes)
    return True
