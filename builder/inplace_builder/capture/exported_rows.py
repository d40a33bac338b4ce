"""Frontend for any module of one sequence: served with a row for each sequence, by `torch.vmap` over slots."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from inplace.schema.dtypes import Dtype
from inplace.schema.served import Program
from inplace.schema.specs import Role, StateSpec, TensorSpec, Update
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

from inplace_builder.capture.capture import Capture, complete_program, control_input
from inplace_builder.capture.exported import ExportedCapture, capture_exported
from inplace_builder.errors import BuildError, brief
from inplace_builder.graph.reexport import InterpretedModule, rename_inputs, size_oblivious
from inplace_builder.packing.vmap_rules import (
    DECOMPOSITIONS,  # it also registers what vmap does with the operators on states
)
from inplace_builder.states.rewrite import SLOTS
from inplace_builder.states.state import CapturedState

EXAMPLE_PRIMES = (9973, 9967, 9949, 9941, 9931, 9929, 9923, 9907, 9901, 9887, 9883, 9871)
"""Numbers of example rows and slots: tracing takes equal extents for one, and a multiple of the first is a number of rows."""


@dataclass(frozen=True)
class RowOptions:
    """What a module is built for.

    Attributes:
        max_rows: most sequences in one step, at least 2.
        positions: the input that says where the sequence is, an integer tensor of one entry: the runtime fills it with the number of
            requests so far. None where the module counts for itself or does not care.
        max_requests: most requests of one sequence; None is what the states that are appended to have room for.
        outputs: names of the outputs; None is ``output_0``, ….
    """

    max_rows: int
    positions: str | None = None
    max_requests: int | None = None
    outputs: tuple[str, ...] | None = None


def capture_exported_rows(
    module: torch.nn.Module | ExportedProgram,
    options: RowOptions,
    example_inputs: Sequence[Any] = (),
    *,
    kwargs: Mapping[str, Any] | None = None,
) -> Capture:
    """Capture a module of one sequence for an engine that steps several, one request of each.

    States are found as by `capture_exported`; each sequence begins with what they held at capture. Inputs and outputs ``[1, …]`` lose
    that axis, which a server has for its batch; others get one.

    Args:
        module: the module, or ``torch.export.export`` of it; every extent is fixed.
        options: what to build for.
        example_inputs: positional arguments of the module.
        kwargs: keyword arguments.

    Raises:
        BuildError: torch.export cannot capture the module or its `torch.vmap`; an extent varies; a state begins with different numbers; the
            module appends, and neither ``positions`` nor ``requests`` says how long a sequence may be.
    """
    found = capture_exported(module, example_inputs, kwargs=kwargs)
    if found.rows != 1:
        raise BuildError(
            f"the module already steps {found.rows} rows, each at its own position; give one of a single sequence"
        )
    states = tuple(_row_spec(state, options) for state in found.states)
    capacity = options.max_requests
    if capacity is None and any(state.update is Update.APPEND for state in found.states):
        ends = [spec.shape[spec.axis] for spec in states if spec.axis is not None]
        if not ends:
            raise BuildError(
                "the module appends to its states: name the input that says where (positions), or how often it may (requests)"
            )
        capacity = min(ends)
    rows = _RowsModule(found, options)
    program = Program(
        name="step",
        row_layout="rectangular",
        inputs=(*rows.inputs, control_input(SLOTS, Role.SLOTS)),
        outputs=rows.outputs,
        aliases=(),
        max_rows=options.max_rows,
        chunk=1,
    )
    count, slots = Dim("rows", min=1, max=max(2, options.max_rows)), Dim("slots", min=1)
    example_rows, example_slots = _unused_primes(found.graph_module)
    arguments = [
        torch.zeros((example_rows, *spec.shape), dtype=spec.dtype.as_torch)
        for spec in program.inputs
    ]
    memory = [
        torch.full((example_slots, *spec.shape), spec.fill, dtype=spec.dtype.as_torch)
        for spec in states
    ]
    shapes = ((*({0: count} for _ in arguments), *({0: slots} for _ in memory)),)
    try:
        with torch.no_grad(), size_oblivious():
            # torch.export would keep what vmap is made of; traced below it, only operators are left
            traced = make_fx(rows, tracing_mode="symbolic", _allow_non_fake_inputs=True)(
                *arguments, *memory
            )
            _make_rows_dynamic(traced, example_rows)
            examples = (*(x[:2] for x in arguments), *(x[:2] for x in memory))
            exported = torch.export.export(
                InterpretedModule(traced), examples, dynamic_shapes=shapes
            )
    except Exception as error:
        raise BuildError(f"torch.vmap cannot make rows of the module: {brief(error)}") from error
    rename_inputs(
        exported, [*(spec.name for spec in program.inputs), *(spec.name for spec in states)]
    )
    program, lowering = complete_program(exported, program, states)
    weights = next(
        (Dtype.of(held.dtype) for held in found.graph_module.parameters()), states[0].dtype
    )
    return Capture(exported, program, states, capacity, weights, lowering, rows.alone)


def _unused_primes(module: GraphModule) -> tuple[int, int]:
    """Two primes of which no number in the module's graph is a multiple.

    Raises:
        BuildError: there are no two.
    """
    numbers: set[int] = set()

    def note(argument: Any) -> None:
        if type(argument) is int:
            numbers.add(argument)

    for node in module.graph.nodes:
        torch.fx.node.map_aggregate((node.args, dict(node.kwargs)), note)
        held = node.meta.get("val")
        numbers |= (
            {extent for extent in held.shape if isinstance(extent, int)}
            if isinstance(held, Tensor)
            else set()
        )
    free = [
        prime
        for prime in EXAMPLE_PRIMES
        if not any(number and number % prime == 0 for number in numbers)
    ]
    if len(free) < 2:
        raise BuildError(
            f"the module has multiples of all but {len(free)} of {list(EXAMPLE_PRIMES)}, by which rows and slots are told apart"
        )
    return free[0], free[1]


def _make_rows_dynamic(traced: GraphModule, rows: int) -> None:
    """Let the graph ask for the number of rows wherever a batching rule of torch's wrote down that of the example, ``rows``."""
    graph = traced.graph
    graph.eliminate_dead_code()  # questions about extents, which would fix them
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(inputs[-1]):
        count = graph.call_function(torch.ops.aten.sym_size.int, (inputs[0], 0))
    for node in list(graph.nodes):

        def free(number: Any, node: Node = node) -> Any:
            if type(number) is not int or number == 0 or number % rows or abs(number) >= 2**31:
                return number
            with graph.inserting_before(node):
                return (
                    count
                    if number == rows
                    else graph.call_function(operator.mul, (count, number // rows))
                )

        if node.op == "call_function" and node is not count:
            node.args, node.kwargs = (
                torch.fx.node.map_aggregate(given, free) for given in (node.args, node.kwargs)
            )
    traced.recompile()


def _row_spec(state: CapturedState, options: RowOptions) -> StateSpec:
    """What the manifest says of a state."""
    if state.tensor.dynamic_axes:
        raise BuildError(
            f"state {state.tensor.source} has extents that vary; slots are all of one size"
        )
    initial, spec = state.tensor.initial, state.spec()
    if initial.numel() and not bool((initial == spec.fill).all()):
        raise BuildError(
            f"state {state.tensor.source} begins with different numbers; a fresh slot holds one number everywhere"
        )
    if (
        spec.update is Update.APPEND and options.positions is None
    ):  # where it writes is known to the module alone
        return spec.model_copy(update={"update": Update.REPLACE, "axis": None})
    return spec


class _DecomposingInterpreter(Interpreter):
    """Runs a graph under `torch.vmap`; operators without a batching rule are written out."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run one operator."""
        return super().call_function(DECOMPOSITIONS.get(target, target), args, kwargs)


class _RowsModule(torch.nn.Module):
    """The module over rows: ``forward(*inputs [rows, …], slots [rows], *states [slots, …])``."""

    def __init__(self, found: ExportedCapture, options: RowOptions) -> None:
        super().__init__()
        self.body = found.graph_module
        self.original = [found.original]  # not a part of what is traced
        values = {
            node.name: node.meta["val"]
            for node in found.exported.graph.nodes
            if node.op == "placeholder"
        }
        self.inputs = tuple(_input_spec(name, values[name], options) for name in found.inputs)
        self.shapes = [tuple(values[name].shape) for name in found.inputs]
        returned = found.exported.graph.output_node().args[0]
        assert isinstance(returned, tuple | list)
        names = (
            options.outputs
            if options.outputs is not None
            else tuple(f"output_{place}" for place in range(len(returned)))
        )
        if len(names) != len(returned):
            raise BuildError(
                f"the module returns {len(returned)} outputs, {len(names)} names were given: {list(names)}"
            )
        self.outputs = tuple(
            _output_spec(name, node.meta["val"]) for name, node in zip(names, returned, strict=True)
        )
        self.states = found.states

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """One request of each row."""
        count = len(self.inputs) + 1
        per_row, states = given[:count], given[count:]

        def one(*arguments: Tensor) -> tuple[Tensor, ...]:
            *inputs, slot = arguments
            shaped = [x.reshape(shape) for x, shape in zip(inputs, self.shapes, strict=True)]
            with torch.fx.traceback.preserve_node_meta():
                results = torch.utils._pytree.tree_leaves(
                    _DecomposingInterpreter(self.body).run(*shaped, slot.reshape(1), *states)
                )
            return tuple(
                x.reshape(spec.shape) for x, spec in zip(results, self.outputs, strict=True)
            )

        found = torch.vmap(one)(*per_row)
        return found if isinstance(found, tuple) else (found,)

    def alone(self, requests: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The last of a sequence's requests, from the beginning, by the module itself: nothing of it was rewritten yet."""
        held = [state.tensor.initial.clone() for state in self.states]
        results: list[Tensor] = []
        for index, request in enumerate(requests):
            inputs = [
                _reference_input(spec, shape, request, index)
                for spec, shape in zip(self.inputs, self.shapes, strict=True)
            ]
            with torch.no_grad():
                results = torch.utils._pytree.tree_leaves(self.original[0](*inputs, *held))
            held = results[len(self.outputs) :]
        return {
            spec.name: x.reshape(spec.shape) for spec, x in zip(self.outputs, results, strict=False)
        }


def _reference_input(
    spec: TensorSpec, shape: tuple[int, ...], request: Mapping[str, Tensor], index: int
) -> Tensor:
    """The module's own input for a sequence's ``index``-th request."""
    if spec.role is Role.WRITE_INDICES:
        return torch.full(shape, index, dtype=spec.dtype.as_torch)
    return request[spec.name].reshape(shape)


def _input_spec(name: str, held: Any, options: RowOptions) -> TensorSpec:
    if not isinstance(held, Tensor) or any(not isinstance(extent, int) for extent in held.shape):
        raise BuildError(
            f"input {name} is no tensor of fixed extents; a row of a step has one entry of every input"
        )
    if name == options.positions:
        if held.numel() != 1 or held.is_floating_point():
            raise BuildError(
                f"input {name} {tuple(held.shape)} of {held.dtype} is no position: an integer tensor of one entry"
            )
        return TensorSpec(name=name, role=Role.WRITE_INDICES, dtype=Dtype.of(held.dtype))
    return TensorSpec(
        name=name, role=Role.ROW, dtype=Dtype.of(held.dtype), shape=_shape_without_batch(held)
    )


def _output_spec(name: str, held: Any) -> TensorSpec:
    if not isinstance(held, Tensor):
        raise BuildError(f"output {name} is {held!r}, which is no tensor")
    return TensorSpec(
        name=name, role=Role.ROW, dtype=Dtype.of(held.dtype), shape=_shape_without_batch(held)
    )


def _shape_without_batch(held: Tensor) -> tuple[int, ...]:
    """The extents of one request: without a batch of one; at least one axis."""
    extents = tuple(held.shape)
    return (extents[1:] if len(extents) > 1 and extents[0] == 1 else extents) or (1,)
