"""A user's module as a function: it mutates nothing, and returns the new value of each state.

What the module mutates are its states. `lift_mutated_buffers` exports the module, looks at the
memory it was given (which of it is written, by which line, and what of that no engine can take),
and lets torch.export make the graph functional.
"""

import builtins
import itertools
import keyword
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from inplace.engines.graph_reader import byte_span
from inplace.operators.state import written_arguments
from inplace.schema.specs import Dtype
from inplace.schema.standalone import Owner, Selection, format_selection, select_view
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    InputKind,
    InputSpec,
    OutputKind,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node

from inplace_builder.errors import BuildError, brief
from inplace_builder.graph.export import export_module
from inplace_builder.graph.nodes import (
    Emitter,
    placeholders_by_name,
    returned_values,
    source_line,
    value,
)
from inplace_builder.graph.passes import (
    cast_copies,
    check_deterministic,
    check_writes,
    keep_old_values,
)

aten = torch.ops.aten


SLOTS = "slots"
"""The placeholder that holds the slot of each row."""


@dataclass(frozen=True)
class StateTensor:
    """A tensor that a module mutates, or reads while another program mutates it.

    Attributes:
        name: the graph's placeholder.
        owner: who owns its memory.
        source: the input's name, or the buffer's qualified name.
        initial: its values at capture, in the module's own shape.
        dynamic_axes: axes whose extent each call chooses (of the caller's tensors only).
        first_write: the module's line that writes it first, as `source_line` gives it.
        unmatched_view: if a part of it is written through a view that no pattern covers, which
            one, in words; else empty.
        whole: the tensor that it is a part of; None if it is a tensor of its own.
        selects: axis and index of each `Tensor.select` that takes the part from the whole: a
            contiguous view of a contiguous tensor.
        only_read: the module does not write it, but another program of the engine does.
    """

    name: str
    owner: Owner
    source: str
    initial: Tensor
    dynamic_axes: frozenset[int] = frozenset()
    first_write: str = ""
    unmatched_view: str = ""
    whole: "StateTensor | None" = None
    selects: Selection = ()
    only_read: bool = False

    @property
    def module_tensor(self) -> "StateTensor":
        """The tensor as the module has it: the whole of a part, or this one."""
        return self.whole or self

    def select_from(self, tensor: Tensor) -> Tensor:
        """The view of the module's tensor that this state is."""
        return select_view(tensor, self.selects)

    def select(self, axis: int, index: int, name: str) -> "StateTensor":
        """The state at one index of it, under a name of its own."""
        return replace(
            self,
            name=name,
            source=f"{self.source}{format_selection(((axis, index),))}",
            initial=self.initial.select(axis, index),
            whole=self.module_tensor,
            selects=(*self.selects, (axis, index)),
        )

    def has_slot_axis(self, rows: int) -> bool:
        """Whether its first axis counts rows already and becomes the slot axis.

        Otherwise the slot axis is put in front of it.
        """
        return (self.initial.dim() > 1 and self.initial.shape[0] == rows) or rows > 1

    def slot_shape(self, rows: int) -> tuple[int, ...]:
        """Extents of one slot."""
        extents = tuple(self.initial.shape)
        return extents[1:] if self.has_slot_axis(rows) else extents


def common_rows(states: Sequence[StateTensor]) -> int | None:
    """The extent of the first axis if it is the same and more than 1 for every state."""
    extents = {state.initial.shape[0] if state.initial.dim() > 1 else 1 for state in states}
    return extents.pop() if len(extents) == 1 and 1 not in extents else None


@dataclass(frozen=True)
class FunctionalGraph:
    """A module without mutation.

    Attributes:
        graph_module: takes the inputs, then the states (each of the module's own shape); returns
            the outputs, then the new value of each state. Parameters, constants and buffers that
            never change are its attributes.
        states: in the order of the placeholders.
        inputs: names of the placeholders before them.
        example_inputs: a tensor or a number for each of them.
        places: the place of each of them among the leaves of the module's arguments.
        num_outputs: how many outputs are returned before the states' values.
        range_constraints: torch.export's range of each dynamic extent.
    """

    graph_module: GraphModule
    states: tuple[StateTensor, ...]
    inputs: tuple[str, ...]
    example_inputs: tuple[Any, ...]
    places: tuple[int, ...]
    num_outputs: int
    range_constraints: Mapping[Any, Any]

    def check_assumed(self, assume_consecutive: Collection[str]) -> None:
        """BuildError if the caller assumes something of an input that does not exist."""
        if unknown := sorted(set(assume_consecutive) - set(self.inputs)):
            raise BuildError(
                f"assume_consecutive names {unknown}, which are not inputs; the inputs are "
                f"{list(self.inputs)}"
            )


def lift_mutated_buffers(
    module: torch.nn.Module | ExportedProgram,
    example_inputs: Sequence[Any],
    *,
    states: str | Collection[str] = "auto",
    dynamic_shapes: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    shared: Collection[str] = (),
    batched: bool = False,
) -> FunctionalGraph:
    """Export a module and lift its states to inputs of a function.

    Its states are the inputs and buffers that it mutates. `inplace_builder.inline_lifted_buffers`
    is the inverse.

    Args:
        module: the module, or ``torch.export.export`` of it.
        example_inputs: its positional arguments.
        states: ``auto``, or the names of exactly the inputs and buffers that are states.
        dynamic_shapes: as for ``torch.export.export``.
        kwargs: its keyword arguments.
        shared: names of buffers that other programs write: states although this module only reads
            them.
        batched: as of `export_module`.

    Raises:
        BuildError: torch.export cannot capture the module; ``states`` does not name exactly what is
            mutated; two tensors of which one is mutated overlap in memory; a state is not
            contiguous.
    """
    exported = export_module(module, example_inputs, dynamic_shapes, kwargs, batched=batched)
    _adopt_written_constants(exported)
    merge_shared_buffers(exported)
    writers = find_first_writers(exported)
    check_writes(exported)
    keep_old_values(exported)
    cast_copies(exported)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own deprecations
            program = exported.run_decompositions({})
    except Exception as error:
        raise BuildError(
            f"torch.export cannot make the module functional{_failed_call(exported, error)}: "
            f"{brief(error)}; write into the state itself, or into a simpler view of it"
        ) from error
    check_deterministic(program.graph)
    lifted = _lift(program, exported.example_inputs, writers, shared)
    if states != "auto":
        _check_declared(lifted.states, {states} if isinstance(states, str) else set(states))
    if not lifted.states:
        raise BuildError(
            f"the module mutates none of its inputs and buffers: it has no state to keep"
            f"{_explain_stateless(exported, lifted)}"
        )
    return lifted


def _failed_call(exported: ExportedProgram, error: Exception) -> str:
    """The call that an error of torch.fx names, with the module's line; empty if it names none."""
    match = re.search(r"While executing %(\w+) ", str(error))
    named = {node.name: node for node in exported.graph.nodes}
    node = named.get(match[1]) if match is not None else None
    return f" because of {node.target}{source_line(node)}" if node is not None else ""


def _adopt_written_constants(exported: ExportedProgram) -> None:
    """Make buffers of constants that the module writes.

    Without ``strict``, torch.export takes a tensor for a constant that the module reaches through
    another Python object (a cache) and not through its own attributes, even if it is the memory of
    a registered buffer. `merge_shared_buffers` then makes one buffer of the two.
    """
    nodes = placeholders_by_name(exported.graph)
    for spec in exported.graph_signature.input_specs:
        if (
            spec.kind is InputKind.CONSTANT_TENSOR
            and first_writer(nodes[spec.arg.name]) is not None
        ):
            spec.kind, spec.persistent = InputKind.BUFFER, False


# Who writes what: the graph before it is functional.


@dataclass(frozen=True)
class FirstWriter:
    """The first operator that writes an input or a buffer.

    Attributes:
        line: the module's line, as `source_line` gives it.
        unmatched_view: if it writes a part through a view that no pattern covers, which one, in
            words with the line; else empty.
    """

    line: str
    unmatched_view: str


def find_first_writers(exported: ExportedProgram) -> dict[str, FirstWriter]:
    """The first writer of each input and buffer that is written, by the name of its placeholder."""
    writers: dict[str, FirstWriter] = {}
    for name, node in placeholders_by_name(exported.graph).items():
        if (first := first_writer(node)) is not None:
            writers[name] = FirstWriter(source_line(first), _unmatched_view(node, first))
    return writers


def first_writer(node: Node) -> Node | None:
    """The first operator that writes a tensor or a view of it, before functionalisation."""
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


_FOLLOWED_VIEWS = frozenset(
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
"""Views that the passes follow, or refuse with a reason of their own."""


def _unmatched_view(node: Node, writer: Node) -> str:
    for written in written_arguments(writer):
        views = []
        current = written
        while (
            current is not node
            and current.op == "call_function"
            and isinstance(current.args[0], Node)
        ):
            views.append(current)
            current = current.args[0]
        whole, part = value(node), value(written)
        unmatched = [view for view in views if view.target not in _FOLLOWED_VIEWS]
        if (
            current is node
            and unmatched
            and whole.numel() * whole.itemsize != part.numel() * part.itemsize
        ):
            return (
                f"a part of it is written through the view {unmatched[-1].target}, which no "
                f"pattern follows{source_line(writer)}"
            )
    return ""


def _explain_stateless(exported: ExportedProgram, lifted: FunctionalGraph) -> str:
    """What a module without state may have meant: it writes a copy, or returns a new version."""
    for node in exported.graph.nodes:
        for written in written_arguments(node):
            if written.op == "call_function" and node.target is not aten.detach_.default:
                return (
                    f"; what it writes{source_line(node)} is a copy that {written.target} made, "
                    f"not the tensor itself"
                )
    for place, node in enumerate(returned_values(lifted.graph_module.graph)):
        if (
            isinstance(node, Node)
            and node.target in _NEW_VERSIONS
            and isinstance(node.args[0], Node)
            and node.args[0].op == "placeholder"
        ):
            name = node.args[0].name
            return (
                f"; output {place} is {name} with something written into it, as a new "
                f"tensor{source_line(node)}: to make it a state, write it in place "
                f"({name}.copy_(…)); then it need not be returned"
            )
    if len(lifted.inputs) > 1:
        return (
            f"; if it returns the new value of one of its inputs {list(lifted.inputs)}, pass "
            f"states={{input: output}}, the output by its place or its key"
        )
    return ""


_NEW_VERSIONS = frozenset(
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


# Memory that two names share.


def merge_shared_buffers(exported: ExportedProgram) -> None:
    """Merge buffers that are one tensor, or parts of one; refuse memory that is shared otherwise.

    Functionalisation treats every input as memory of its own: what is written through one name
    would be missing under the other.

    Raises:
        BuildError: the module writes memory that is shared in another way.
    """
    tensors = _input_tensors(exported)
    merged: set[Node] = set()
    for (first, a), (second, b) in combinations(tensors.items(), 2):
        if first in merged or second in merged or not _overlap(a, b):
            continue
        writer = first_writer(first) or first_writer(second)
        buffers = bool(first.meta.get("buffer") and second.meta.get("buffer"))
        whole, part = (first, second) if a.numel() >= b.numel() else (second, first)
        path = _select_path(tensors[whole], tensors[part])
        if buffers and path is not None and (writer is not None or not path):
            _merge_buffers(exported, whole, part, path)
            merged.add(part)
        elif writer is not None:
            raise BuildError(
                f"{_describe_input(first)} and {_describe_input(second)} share memory, and the "
                f"module writes it{source_line(writer)}: keep one tensor and take views of it in "
                f"forward, or give each memory of its own"
            )


def _describe_input(node: Node) -> str:
    return f"buffer {node.meta['buffer']}" if node.meta.get("buffer") else f"input {node.name}"


def _input_tensors(exported: ExportedProgram) -> dict[Node, Tensor]:
    """The tensor of each placeholder; those of buffers are marked with the buffer's name."""
    nodes = placeholders_by_name(exported.graph)
    leaves = _example_leaves(exported.example_inputs)
    tensors: dict[Node, Tensor] = {}
    for spec in exported.graph_signature.input_specs:
        node = nodes[spec.arg.name]
        if spec.kind is InputKind.USER_INPUT:
            leaf = next(leaves, None)
            if isinstance(leaf, Tensor):
                tensors[node] = leaf
        elif (target := _attribute_target(spec)) is not None:
            tensor = _attribute_tensor(exported, target)
            if isinstance(tensor, Tensor):
                if tensor.layout is not torch.strided:
                    raise BuildError(
                        f"{target} of the module is {tensor.layout}: an engine keeps dense tensors "
                        f"only; keep {target}.to_dense()"
                    )
                if spec.kind is InputKind.BUFFER:
                    node.meta["buffer"] = target
                tensors[node] = tensor
    return tensors


def _example_leaves(example_inputs: Any) -> Iterator[Any]:
    return iter(torch.utils._pytree.tree_leaves(example_inputs or ((), {})))


def _attribute_target(spec: InputSpec) -> str | None:
    """The qualified name of a parameter, buffer or constant; None for another kind of input."""
    kinds = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
    return spec.target if spec.kind in kinds else None


def _attribute_tensor(program: ExportedProgram, target: str) -> Any:
    return program.state_dict.get(target, program.constants.get(target))


def _overlap(a: Tensor, b: Tensor) -> bool:
    if not a.numel() or not b.numel() or a.device != b.device or a.device.type == "meta":
        return False
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    (a_start, a_end), (b_start, b_end) = byte_span(a), byte_span(b)
    return a_start < b_end and b_start < a_end


def _select_path(whole: Tensor, part: Tensor) -> list[int] | None:
    """The indices on the first axes that select a part, ``whole[2, 0]``; None if there are none."""
    axes = whole.dim() - part.dim()
    distance = part.data_ptr() - whole.data_ptr()
    same_layout = (whole.dtype, whole.shape[axes:], whole.stride()[axes:]) == (
        part.dtype,
        part.shape,
        part.stride(),
    )
    if axes < 0 or not same_layout or distance < 0 or distance % part.element_size():
        return None
    left, path = distance // part.element_size(), []
    for extent, stride in zip(whole.shape[:axes], whole.stride()[:axes], strict=True):
        index, left = divmod(left, stride) if stride else (0, left)
        if index >= extent:
            return None
        path.append(index)
    return path if left == 0 else None


def _merge_buffers(exported: ExportedProgram, kept: Node, alias: Node, path: list[int]) -> None:
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


# From the functional program to the function.


def _lift(
    program: ExportedProgram,
    examples: Any,
    writers: dict[str, FirstWriter],
    shared: Collection[str],
) -> FunctionalGraph:
    """Make what is mutated an input, and everything else of the module an attribute."""
    graph, signature = program.graph_module.graph, program.graph_signature
    nodes = placeholders_by_name(graph)
    leaves = _example_leaves(examples)
    written_buffers = set(signature.buffers_to_mutate.values())
    written_inputs = set(signature.user_inputs_to_mutate.values())
    tensors: dict[str, StateTensor] = {}
    attributes: dict[str, Any] = {}
    inputs: list[str] = []
    example_inputs: list[Any] = []
    only_read: dict[str, Node] = {}
    places: list[int] = []
    arguments = itertools.count()
    for spec in signature.input_specs:
        node = nodes[spec.arg.name]
        if spec.kind is InputKind.USER_INPUT:
            leaf, place = next(leaves, None), next(arguments)
            if isinstance(spec.arg, ConstantArgument):
                graph.erase_node(node)  # a Python constant, part of the graph
            elif isinstance(spec.arg, TensorArgument) and node.name in written_inputs:
                tensors[node.name] = _caller_state(node, leaf)
            else:
                inputs.append(node.name)
                example_inputs.append(leaf)
                places.append(place)
        elif (target := _attribute_target(spec)) is not None:
            tensor = _attribute_tensor(program, target)
            reads = target in shared and target not in written_buffers and bool(node.users)
            if spec.kind is InputKind.BUFFER and (target in written_buffers or reads):
                initial = tensor.detach().clone()
                _name_after(graph, node, target, writers)
                tensors[target] = StateTensor(node.name, "module", target, initial, only_read=reads)
                if reads:
                    only_read[target] = node
            else:
                attributes[target] = tensor
                _make_attribute(graph, node, target)
        else:
            raise BuildError(
                f"input {spec.arg.name} is a {spec.kind.name.lower()}, which an engine cannot "
                f"hold; pass tensors only"
            )
    attributes |= _subgraphs(program, attributes)
    outputs, new_values = _split_outputs(program)
    new_values |= only_read
    states = tuple(
        _checked_state(tensors[key], new, writers.get(tensors[key].name))
        for key, new in new_values.items()
    )
    _order_placeholders(graph, [*inputs, *(state.name for state in states)])
    graph.erase_node(graph.output_node())
    graph.output((*outputs, *new_values.values()))
    return FunctionalGraph(
        GraphModule(attributes, graph),
        states,
        tuple(inputs),
        tuple(example_inputs),
        tuple(places),
        len(outputs),
        program.range_constraints,
    )


def _name_after(graph: Graph, node: Node, target: str, writers: dict[str, FirstWriter]) -> None:
    """Name a state as the module does: ``encoder_keys`` for the buffer ``encoder.keys``.

    An input of that name keeps it, and the state the one that torch.export gave it.
    """
    name = "".join(part if part.isalnum() else "_" for part in target)
    others = {other.name: other for other in graph.nodes if other is not node}
    holder = others.get(name)
    inputs = (SLOTS, *dir(builtins), *keyword.kwlist)
    if name in inputs or not name.isidentifier() or (holder and holder.op == "placeholder"):
        return
    if holder is not None:
        suffixes = (f"{name}_{number}" for number in itertools.count(1))
        holder.name = next(free for free in suffixes if free not in others)
    if node.name in writers:
        writers[name] = writers.pop(node.name)
    node.name = node.target = name


def _caller_state(node: Node, example: Any) -> StateTensor:
    """The state of an input that the module writes."""
    extents = tuple(value(node).shape)
    initial = example.detach().clone() if isinstance(example, Tensor) else torch.zeros(extents)
    dynamic = frozenset(axis for axis, extent in enumerate(extents) if not isinstance(extent, int))
    return StateTensor(node.name, "caller", node.name, initial, dynamic)


def _checked_state(state: StateTensor, new: Node, writer: FirstWriter | None) -> StateTensor:
    """A state with what its first writer says of it.

    Raises:
        BuildError: it changes its shape, is not contiguous, or is of a type that no engine takes.
    """
    line = "" if writer is None else writer.line
    old_shape, new_shape = tuple(state.initial.shape), tuple(value(new).shape)
    # extents that only a call knows are left to the call: comparing one here would fix it
    if all(isinstance(extent, int) for extent in new_shape) and old_shape != new_shape:
        raise BuildError(
            f"state {state.source} of {old_shape} becomes {new_shape}{line}: a state is updated in "
            f"its own memory, so it keeps its shape"
        )
    if not state.dynamic_axes and not state.initial.numel():
        raise BuildError(
            f"state {state.source} of {old_shape} has no elements, and the module writes it{line}: "
            f"leave it out"
        )
    if not state.initial.is_contiguous():
        raise BuildError(
            f"state {state.source} of {old_shape} has strides {state.initial.stride()}, and the "
            f"module writes it{line}: a state is updated in its own memory, which must be "
            f"contiguous; pass .contiguous() and keep that tensor"
        )
    try:
        Dtype.of(state.initial.dtype)
    except ValueError:
        raise BuildError(
            f"state {state.source} is {state.initial.dtype}, which no engine takes, and the module "
            f"writes it{line}; the types are {[str(dtype) for dtype in Dtype]}"
        ) from None
    if writer is None:
        return state
    return replace(state, first_write=line, unmatched_view=writer.unmatched_view)


def _split_outputs(program: ExportedProgram) -> tuple[list[Any], dict[str, Any]]:
    """What the module returns; and each state's new value, by its input or buffer."""
    outputs: list[Any] = []
    new_values: dict[str, Any] = {}
    returned = returned_values(program.graph_module.graph)
    for spec, node in zip(program.graph_signature.output_specs, returned, strict=True):
        if spec.kind is OutputKind.USER_OUTPUT:
            outputs.append(node)
        elif (
            spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION)
            and spec.target is not None
        ):
            new_values[spec.target] = node
        else:
            raise BuildError(
                f"output {spec.arg} is a {spec.kind.name.lower()}, which an engine cannot return; "
                f"return tensors only"
            )
    return outputs, new_values


def _subgraphs(program: ExportedProgram, attributes: Collection[str]) -> dict[str, Any]:
    """The graph's other attributes: the branches of torch.cond and the like."""
    names = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
    return {
        name: torch.fx.graph_module._get_attr(program.graph_module, name)
        for name in names - set(attributes)
    }


def _make_attribute(graph: Graph, node: Node, target: str) -> None:
    with graph.inserting_before(node):
        read = graph.create_node("get_attr", target, name=f"{node.name}_")
    read.meta.update(node.meta)
    node.replace_all_uses_with(read)
    graph.erase_node(node)


def _order_placeholders(graph: Graph, names: Sequence[str]) -> None:
    """Put the placeholders first, in this order."""
    nodes = placeholders_by_name(graph)
    first = next(iter(graph.nodes))
    for name in names:
        if first is nodes[name]:
            first = first.next
        else:
            first.prepend(nodes[name])


def _check_declared(states: Sequence[StateTensor], declared: Collection[str]) -> None:
    known = {alias: state for state in states for alias in (state.name, state.source)}
    if unknown := sorted(set(declared) - known.keys()):
        raise BuildError(
            f"the module never writes {unknown}: what it only reads is a constant; its states are "
            f"{[state.source for state in states]}"
        )
    named = {known[name].name for name in declared}
    if missing := [state.source for state in states if state.name not in named]:
        raise BuildError(
            f"the module also writes {missing}: declare them as states too, or leave states='auto'"
        )
