"""A user's own module as a function: no mutation, the new value of each state an output."""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.fx import GraphModule, Node

from inplace_builder.capture.capture import any_size
from inplace_builder.capture.memory import Writer, check_extents, check_sharing, check_state, first_writer, first_writers, written_elsewhere
from inplace_builder.errors import BuildError, brief
from inplace_builder.passes.copying import copied_graph
from inplace_builder.passes.states import Found, Owner


@dataclass(frozen=True)
class Functional:
    """A module without mutation.

    Attributes:
        graph_module: takes the inputs, then the states (each of the module's own shape); returns the outputs, then the new value of each
            state. Parameters, constants and buffers that never change are its attributes.
        states: in the order of the placeholders.
        inputs: names of the placeholders before them.
        example_inputs: a tensor or a number for each of them.
        outputs: how many outputs stand before the states' values.
        ranges: what torch.export found of each dynamic extent.
    """

    graph_module: GraphModule
    states: tuple[Found, ...]
    inputs: tuple[str, ...]
    example_inputs: tuple[Any, ...]
    outputs: int
    ranges: Mapping[Any, Any]


def lift_mutated_buffers(
    module: torch.nn.Module | ExportedProgram,
    example_inputs: Sequence[Any],
    *,
    states: str | Collection[str] = "auto",
    dynamic_shapes: Any = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Functional:
    """Export a module, or take an exported one, and lift its states, the inputs and buffers that it mutates, to inputs of a function.

    `inplace_builder.capture.buffers.inline_lifted_buffers` is the inverse.

    Raises:
        BuildError: torch.export cannot capture the module; ``states`` names something else than what is mutated; two tensors of which one
            is mutated overlap in memory; a state is not contiguous.
    """
    exported = exported_program(module, example_inputs, dynamic_shapes, kwargs)
    _adopt_constants(exported)
    check_sharing(exported)
    writers = first_writers(exported)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own deprecations
            program = exported.run_decompositions({})
    except Exception as error:
        raise BuildError(f"torch.export cannot make the module functional: {brief(error)}") from error
    made = _lift(program, exported.example_inputs, writers)
    if states != "auto":
        _check_declared(made.states, {states} if isinstance(states, str) else set(states))
    if not made.states:
        raise BuildError(f"the module mutates none of its inputs and buffers: it has no state to keep{written_elsewhere(exported, made)}")
    return made


def exported_program(
    module: torch.nn.Module | ExportedProgram, example_inputs: Sequence[Any], dynamic_shapes: Any, kwargs: Mapping[str, Any] | None
) -> ExportedProgram:
    """Export a module, as it stands; of an exported program a copy with the same tensors, for what captures one changes it.

    Raises:
        BuildError: torch.export cannot capture it.
    """
    if isinstance(module, ExportedProgram):
        return _copied(module)
    plain: Callable[[], AbstractContextManager[None]] = nullcontext
    failures: list[Exception] = []
    for mode in (any_size, plain):  # an extent of 1 stays dynamic where it can; a position passed as a number needs the usual rules
        try:
            with torch.no_grad(), warnings.catch_warnings(), mode():
                warnings.simplefilter("ignore")
                return torch.export.export(module, tuple(example_inputs), dict(kwargs or {}), dynamic_shapes=dynamic_shapes)
        except Exception as error:
            failures.append(error)
    said = example_hint(example_inputs) if dynamic_shapes else ""
    raise BuildError(f"torch.export cannot capture {type(module).__name__}: {failures[-1]}{said}") from failures[-1]


def example_hint(example_inputs: Sequence[Any]) -> str:
    """What may be wrong with example inputs of which an extent varies."""
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(list(example_inputs)) if isinstance(leaf, Tensor)]
    if not any(extent == 1 for tensor in tensors for extent in tensor.shape):
        return ""
    return "; if an extent that is to vary is 1 in the example, give it 2 entries or more: torch.export often takes a 1 for a constant"


def _copied(program: ExportedProgram) -> ExportedProgram:
    return ExportedProgram(
        root=program.graph_module,
        graph=copied_graph(program.graph),
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
        if spec.kind is InputKind.CONSTANT_TENSOR and first_writer(nodes[spec.arg.name]) is not None:
            spec.kind, spec.persistent = InputKind.BUFFER, False


def _lift(program: ExportedProgram, examples: Any, writers: Mapping[str, Writer]) -> Functional:
    """What is mutated becomes an input, everything else of the module an attribute."""
    graph, signature = program.graph_module.graph, program.graph_signature
    nodes = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    leaves = iter(torch.utils._pytree.tree_leaves(examples or ((), {})))
    written_buffers, written_inputs = set(signature.buffers_to_mutate.values()), set(signature.user_inputs_to_mutate.values())
    found: dict[str, Found] = {}
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
                initial = leaf.detach().clone() if isinstance(leaf, Tensor) else torch.zeros(tuple(node.meta["val"].shape))
                varies = frozenset(axis for axis, extent in enumerate(node.meta["val"].shape) if not isinstance(extent, int))
                found[node.name] = Found(node.name, Owner.CALLER, node.name, initial, varies)
            else:
                inputs.append(node.name)
                passed.append(leaf)
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR) and spec.target is not None:
            tensor = program.state_dict[spec.target] if spec.target in program.state_dict else program.constants[spec.target]
            if spec.kind is InputKind.BUFFER and spec.target in written_buffers:
                found[spec.target] = Found(node.name, Owner.MODULE, spec.target, tensor.detach().clone())
            else:
                held[spec.target] = tensor
                _as_attribute(graph, node, spec.target)
        else:
            raise BuildError(f"input {spec.arg.name} is a {spec.kind.name.lower()}, which an engine cannot hold; pass tensors only")
    held |= _branches(program, held)
    outputs, values = _outputs(program)
    states = tuple(found[key] for key in values)
    for state, result in zip(states, values.values(), strict=True):
        check_extents(state, result, writers.get(state.name))
        check_state(state, writers.get(state.name))
    states = tuple(
        replace(state, line=writers[state.name].line, through=writers[state.name].through) if state.name in writers else state
        for state in states
    )
    _reorder(graph, [*inputs, *(state.name for state in states)])
    last = graph.output_node()
    graph.erase_node(last)
    graph.output((*outputs, *values.values()))
    return Functional(GraphModule(held, graph), states, tuple(inputs), tuple(passed), len(outputs), program.range_constraints)


def _outputs(program: ExportedProgram) -> tuple[list[Any], dict[str, Any]]:
    """What the module returns, and the new value of each state by the input or buffer that it belongs to."""
    returned = program.graph_module.graph.output_node().args[0]
    assert isinstance(returned, tuple | list)
    outputs: list[Any] = []
    values: dict[str, Any] = {}
    for spec, node in zip(program.graph_signature.output_specs, returned, strict=True):
        if spec.kind is OutputKind.USER_OUTPUT:
            outputs.append(node)
        elif spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION) and spec.target is not None:
            values[spec.target] = node
        else:
            raise BuildError(f"output {spec.arg} is a {spec.kind.name.lower()}, which an engine cannot return; return tensors only")
    return outputs, values


def _branches(program: ExportedProgram, held: Collection[str]) -> dict[str, Any]:
    """What the graph holds beside what it is ``held`` now: the branches of torch.cond and the like."""
    names = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"} - set(held)
    return {name: torch.fx.graph_module._get_attr(program.graph_module, name) for name in names}


def _as_attribute(graph: torch.fx.Graph, node: Node, target: str) -> None:
    with graph.inserting_before(node):
        read = graph.create_node("get_attr", target, name=f"{node.name}_")
    read.meta.update(node.meta)
    node.replace_all_uses_with(read)
    graph.erase_node(node)


def _reorder(graph: torch.fx.Graph, names: Sequence[str]) -> None:
    """Put the placeholders first, in this order."""
    nodes = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    first = next(iter(graph.nodes))
    for name in names:
        first.prepend(nodes[name]) if first is not nodes[name] else None
        if first is nodes[name]:
            first = first.next


def _check_declared(states: Sequence[Found], declared: Collection[str]) -> None:
    known = {alias: state for state in states for alias in (state.name, state.source)}
    if unknown := sorted(set(declared) - known.keys()):
        raise BuildError(
            f"the module never writes {unknown}: what it only reads is a constant; its states are {[s.source for s in states]}"
        )
    named = {known[name].name for name in declared}
    if missing := [state.source for state in states if state.name not in named]:
        raise BuildError(f"the module also writes {missing}: declare them as states too, or leave states='auto'")
