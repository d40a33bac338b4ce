"""The front-end for any module of one sequence: one row for each sequence, by batching rules."""

import functools
import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from inplace.protocol import AUDIO
from inplace.schema.programs import Program
from inplace.schema.schedule import STEP
from inplace.schema.specs import Dtype, Role, StateSpec, TensorSpec, Update
from pydantic import ValidationError
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils._sympy.value_ranges import ValueRanges

from inplace_builder.capture.capture import Capture, complete_program, control_input
from inplace_builder.capture.eager import EagerModule
from inplace_builder.capture.exported import ExportedCapture, capture_exported
from inplace_builder.errors import BuildError, brief, validation_reasons
from inplace_builder.graph.export import (
    InterpretedModule,
    correct_lstm,
    named_extents,
    rename_inputs,
    size_oblivious,
)
from inplace_builder.graph.nodes import placeholders_by_name, returned_values, value
from inplace_builder.packing.rows import RowGraph, make_rows_dynamic
from inplace_builder.states.adapt import States, constant_arguments
from inplace_builder.states.lift import SLOTS
from inplace_builder.states.rewrite import CapturedState


@dataclass(frozen=True)
class RowOptions:
    """What a module is built for.

    Attributes:
        max_rows: maximum number of sequences in a step, at least 2.
        positions: the input that holds the sequence's position, an integer tensor of one entry; the
            runtime fills it with the number of requests so far. None if the module counts by itself
            or needs no position.
        max_requests: maximum number of requests of a sequence; None for as many as the states that
            are appended to have room for.
        outputs: names of the outputs; None for ``output_0``, ….
        limits: inclusive limits of the values of integer inputs, by name. A request beyond them is
            refused; within them the engine is verified, otherwise with 0 and 1.
        roles: what outputs are besides values, by name: ``tokens`` (int64, ``[n]`` a row, negative
            numbers are not tokens), ``done`` (bool, one entry a row) and ``accepted`` (int64, one
            entry a row: how many of the call's tokens count), see `inplace.schema.specs.Role`.
        sample_rate: of a module with the input ``audio``, mono samples in float32: in a second. A
            request may be shorter; zeros are added behind it.
        choices: inputs that a request sets by the parameter of their name, with the values that the
            parameter may have: the module gets the number of the value, int64 ``[1]``, and 0
            without the parameter. An empty first value is none that a request can name.
        max_positions: of a program of several (`capture_programs`) that appends to states: how many
            positions a sequence has room for. A call takes one. The runtime refuses the call that
            would find no room.
        valid_lengths: of a program of several: ``{length: input}``, the input that says how many
            entries of another one count, an integer tensor of one entry, and that other one. The
            runtime fills it: a request may then have fewer entries along the first axis (behind the
            batch axis), and the rest are zeros.
        shorter: which requests may: with ``last`` those with END, for streams in chunks; or
            ``any``.
        lead: of a program with ``audio`` and its valid length: requests have any number of samples
            of a stream, which begins with so many zeros, and the schedule runs for each chunk that
            they complete. None: a request is a chunk.
        restarts: of a program of several: the programs that begin anew at position 0 after a call
            of this one, because it sets their counters back.

    **A shorter last chunk.** A step takes a whole chunk of every row. A module that is fed less at
    the end of a stream takes the number of valid entries as one more input. The client sends it
    with a padded chunk, within limits from 1 to the chunk; or the runtime fills it
    (``valid_lengths``). What is valid only the module knows: it selects what
    its states keep by that number (``torch.where``, ``index_select``). One without such an input
    takes padding for entries: its states are then those of the padded stream, and the outputs of
    valid entries are right where the module is causal.
    """

    max_rows: int
    positions: str | None = None
    max_requests: int | None = None
    outputs: tuple[str, ...] | None = None
    limits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    roles: Mapping[str, Role] = field(default_factory=dict)
    sample_rate: int | None = None
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    max_positions: int | None = None
    valid_lengths: Mapping[str, str] = field(default_factory=dict)
    shorter: Literal["last", "any"] = "last"
    lead: int | None = None
    restarts: tuple[str, ...] = ()


def capture_exported_rows(
    module: torch.nn.Module | ExportedProgram,
    options: RowOptions,
    example_inputs: Sequence[Any] = (),
    *,
    kwargs: Mapping[str, Any] | None = None,
    states: States = "auto",
) -> Capture:
    """Capture a module of one sequence for an engine that steps several, one request of each.

    States are the inputs and buffers that the module writes, inputs whose new values it returns
    (``y, *new = f(x, *states)``, the new values are not outputs then), and Python attributes with
    tensors that it changes. Each sequence begins with their values at capture.
    Inputs and outputs ``[1, …]`` lose that axis, which a server has for its batch; others get one.

    Args:
        module: the module, or ``torch.export.export`` of it; every extent is fixed.
        options: what to build for.
        example_inputs: positional arguments of the module.
        kwargs: keyword arguments.
        states: ``{input: output}`` for states that are passed in and returned: an output by its
            place, or by its key or field. With ``auto``, if the module writes nothing, they are
            matched by their keys or fields, else by shape, and the match is printed. Or the names
            of exactly what is written.

    Raises:
        BuildError: torch.export cannot capture the module; an operator cannot be run for several
            rows, which is named with the module's line; an extent varies; or the module appends,
            and neither ``positions`` nor ``max_requests`` limits the length of a sequence.
    """
    return capture_rows(module, options, example_inputs, kwargs=kwargs, states=states).capture


@dataclass(frozen=True)
class CapturedRows:
    """A module over rows, and the module of one sequence that it was made of.

    Attributes:
        capture: the capture.
        rows: the module.
    """

    capture: Capture
    rows: "RowsModule"


def capture_rows(
    module: torch.nn.Module | ExportedProgram,
    options: RowOptions,
    example_inputs: Sequence[Any],
    *,
    kwargs: Mapping[str, Any] | None = None,
    states: States = "auto",
    name: str = STEP,
    shared: Collection[str] | None = None,
) -> CapturedRows:
    """Capture a module as `capture_exported_rows` does, as one program of several.

    Args:
        module: the module.
        options: what to build for.
        example_inputs: its positional arguments.
        kwargs: its keyword arguments.
        states: as for `capture_exported_rows`.
        name: the program's name.
        shared: of a program of several, the names of buffers that are states of others too.
    """
    # 1. Capture the module as it is, for one sequence.
    capture = capture_exported(
        module,
        example_inputs,
        kwargs=kwargs,
        states=states,
        shared=shared or (),
        batched=True,
    )
    for argument, number in constant_arguments(module, example_inputs, kwargs).items():
        print(
            f"argument {argument} is {number!r} in every request: it is not a tensor, so it is a "
            f"constant of the graph",
            file=sys.stderr,
        )
    if capture.rows != 1:
        raise BuildError(
            f"the module already steps {capture.rows} rows, each at its own position; give one of "
            f"a single sequence"
        )
    # 2. Describe its states, inputs and outputs for one row.
    specs = tuple(row_spec(state, options) for state in capture.states)
    if shared is None:
        _check_alone(options)
        capacity = _capacity(capture, specs, options)
    else:
        _check_positions(capture, options)
        capacity = options.max_requests
    rows = RowsModule(capture, options)
    if shared is None and not rows.outputs:
        raise BuildError(
            "the module returns no tensor: a request is answered with outputs; return at least one"
        )
    try:
        program = Program(
            name=name,
            row_layout="rectangular",
            inputs=(*rows.inputs, control_input(SLOTS, Role.SLOTS)),
            outputs=rows.outputs,
            aliases=(),
            max_rows=options.max_rows,
            chunk=1,
            max_positions=options.max_positions,
            restarts=options.restarts,
        )
    except ValidationError as error:
        raise BuildError(validation_reasons(error)) from error
    # 3. Run every operator for many rows, and export that with dynamic numbers of rows and slots.
    exported = _export_rows(rows, program, specs, unused_primes(capture.graph_module))
    # 4. Clean the graph, check it against the description, read off what it writes.
    read_only = [state.name for state in capture.states if state.tensor.source in (shared or ())]
    program, lowering = complete_program(exported, program, specs, read_only)
    weights = next(
        (Dtype.of(weight.dtype) for weight in capture.graph_module.parameters()), specs[0].dtype
    )
    initial = {
        spec.name: state.bound_initial()[0]
        for spec, state in zip(specs, capture.states, strict=True)
        if spec.initial is not None
    }
    result = Capture(
        exported,
        program,
        specs,
        capacity,
        weights,
        lowering,
        functools.partial(rows.reference, capture.eager()),
        initial=initial,
        caveat=_CAVEAT,
    )
    return CapturedRows(result, rows)


_CAVEAT = (
    "; a number, a list or another Python object that the module changes is held fast: keep it in "
    "a buffer"
)
"""What else may explain that an engine differs from the module."""


def _capacity(
    capture: ExportedCapture, states: Sequence[StateSpec], options: RowOptions
) -> int | None:
    """Maximum number of requests of a sequence; None if nothing grows."""
    if options.max_requests is not None or not any(
        appends(state, options.limits) for state in capture.states
    ):
        return options.max_requests
    ends = [spec.shape[spec.axis] for spec in states if spec.axis is not None]
    if not ends:
        raise BuildError(
            "the module appends to its states: name the input that holds the position "
            "(positions), or the maximum number of requests (max_requests), or the limits of the "
            "inputs that it indexes by (limits)"
        )
    return min(ends)


def _check_alone(options: RowOptions) -> None:
    if options.max_positions is not None or options.restarts or options.valid_lengths:
        raise BuildError(
            "max_positions, valid_lengths and restarts are of programs that a schedule calls "
            "(capture_programs): a module alone has max_requests"
        )


def _check_positions(capture: ExportedCapture, options: RowOptions) -> None:
    """Refuse a program that appends to states and does not say how often it can."""
    room = {
        state.tensor.source: state.spec().shape[state.axis]
        for state in capture.states
        if appends(state, options.limits) and state.axis is not None
    }
    if not room:
        return
    name, extent = min(room.items(), key=lambda item: item[1])
    if options.max_positions is None:
        raise BuildError(
            f"the module appends to {name}, which has room for {extent} entries: give "
            f"RowOptions(max_positions=…), after how many calls it is full"
        )
    if options.max_positions > extent:
        raise BuildError(
            f"max_positions is {options.max_positions}, and {name}, which the module appends to, "
            f"has room for {extent} entries only"
        )


def appends(state: CapturedState, limits: Collection[str]) -> bool:
    """Whether a step writes behind what earlier ones wrote, until the state is full.

    Not where its places start over, or are inputs of which the limits are given.
    """
    sources = state.index_sources
    within = state.is_fixed or bool(sources and sources <= set(limits))
    return state.update is Update.APPEND and not within and not state.tensor.only_read


def row_spec(state: CapturedState, options: RowOptions) -> StateSpec:
    """The manifest's description of a state."""
    if state.tensor.dynamic_axes:
        raise BuildError(
            f"state {state.tensor.source} has extents that vary; slots are all of one size"
        )
    initial, spec = state.tensor.initial, state.spec()
    if initial.numel() and not bool((initial == spec.fill).all()):
        spec = spec.model_copy(update={"initial": spec.name})
    if spec.update is Update.APPEND and (
        options.positions is None or not appends(state, options.limits)
    ):
        # only the module knows where it writes
        return spec.model_copy(update={"update": Update.REPLACE, "axis": None})
    return spec


EXAMPLE_PRIMES = (9973, 9967, 9949, 9941, 9931, 9929, 9923, 9907, 9901, 9887, 9883, 9871)
"""Numbers of rows and slots to build with.

A multiple of the number of rows is taken for a multiple of rows. So both are primes that divide no
number of the module.
"""


def unused_primes(module: GraphModule) -> tuple[int, int]:
    """Two primes that divide no number in the module's graph: for the rows, and for the slots.

    Raises:
        BuildError: there are no two.
    """
    numbers: set[int] = set()

    def note(argument: Any) -> None:
        if type(argument) is int:
            numbers.add(argument)

    for node in module.graph.nodes:
        torch.fx.node.map_aggregate((node.args, dict(node.kwargs)), note)
        tensor = node.meta.get("val")
        if isinstance(tensor, Tensor):
            numbers |= {extent for extent in tensor.shape if isinstance(extent, int)}
    unused = [
        prime
        for prime in EXAMPLE_PRIMES
        if not any(number and number % prime == 0 for number in numbers)
    ]
    if len(unused) < 2:
        raise BuildError(
            f"the module has multiples of all but {len(unused)} of {list(EXAMPLE_PRIMES)}, and two "
            f"are needed to tell rows and slots apart"
        )
    return unused[0], unused[1]


def _export_rows(
    rows: "RowsModule", program: Program, states: Sequence[StateSpec], example: tuple[int, int]
) -> ExportedProgram:
    """Export the module over rows, built with these numbers of rows and slots."""
    batched = rows.graph_over_rows(states, example)
    make_rows_dynamic(batched, example[0])
    arguments = [
        torch.zeros((2, *spec.shape), dtype=spec.dtype.as_torch) for spec in program.inputs
    ]
    memory = [torch.full((2, *spec.shape), spec.fill, dtype=spec.dtype.as_torch) for spec in states]
    # from 2: torch's own bookkeeping of strides tells 1 apart, which changes no operator
    num_rows, slots = Dim("rows", min=2, max=max(3, program.max_rows)), Dim("slots", min=1)
    shapes = ((*({0: num_rows} for _ in arguments), *({0: slots} for _ in memory)),)
    try:
        with torch.no_grad(), correct_lstm(), size_oblivious(), named_extents():
            exported = torch.export.export(
                InterpretedModule(batched), (*arguments, *memory), dynamic_shapes=shapes
            )
    except Exception as error:
        raise BuildError(f"torch.export cannot make rows of the module: {brief(error)}") from error
    rename_inputs(exported, [spec.name for spec in program.inputs] + [spec.name for spec in states])
    symbol = value(placeholders_by_name(exported.graph)[program.inputs[0].name]).shape[0].node.expr
    exported.range_constraints[symbol] = ValueRanges(1, max(2, program.max_rows))
    return exported


class RowsModule:
    """A captured module over rows.

    Attributes:
        inputs, outputs: their descriptions for one row.
        returned: the places of the outputs among what the module returns.
    """

    def __init__(self, capture: ExportedCapture, options: RowOptions) -> None:
        self.body = capture.graph_module
        self.original = capture.original
        self.states = capture.states
        self.limits = frozenset(options.limits)
        graph = capture.exported.graph
        values = {name: node.meta["val"] for name, node in placeholders_by_name(graph).items()}
        self.inputs = tuple(_input_spec(name, values[name], options) for name in capture.inputs)
        _check_position_input(self.inputs, options)
        _check_lengths(self.inputs, options)
        _check_speech(self.inputs, options)
        limited = {spec.name for spec in self.inputs if spec.minimum is not None}
        if unlimited := sorted(options.limits.keys() - limited):
            raise BuildError(
                f"limits were given for {unlimited}; the module's integer inputs are "
                f"{[spec.name for spec in self.inputs if _is_integer(spec)]}"
            )
        self.shapes = [tuple(values[name].shape) for name in capture.inputs]
        self.num_returned = len(returned_values(graph))
        returned = _returned_tensors(returned_values(graph))
        self.returned = tuple(returned)
        names = options.outputs
        if names is None:
            names = tuple(f"output_{place}" for place in range(len(returned)))
        if len(names) != len(returned):
            raise BuildError(
                f"the module returns {len(returned)} outputs, {len(names)} names were given: "
                f"{list(names)}"
            )
        self.outputs = tuple(
            _output_spec(name, value(node), options)
            for name, node in zip(names, returned.values(), strict=True)
        )
        if unknown := sorted(options.roles.keys() - set(names)):
            raise BuildError(f"roles were given for {unknown}; the outputs are {list(names)}")

    def graph_over_rows(self, states: Sequence[StateSpec], example: tuple[int, int]) -> GraphModule:
        """The graph over ``inputs [rows, …]``, ``slots [rows]`` and ``states [slots, …]``."""
        rows, slots = example
        graph = RowGraph(self.body, rows)
        inputs = [
            graph.placeholder(spec.name, (rows, *spec.shape), spec.dtype.as_torch, per_row=True)
            for spec in self.inputs
        ]
        slot = graph.placeholder(SLOTS, (rows,), torch.int32, per_row=True)
        memory = [
            graph.placeholder(spec.name, (slots, *spec.shape), spec.dtype.as_torch, per_row=False)
            for spec in states
        ]
        shaped = [graph.reshaped(*each) for each in zip(inputs, self.shapes, strict=True)]
        results = graph.run(self.body, [*shaped, graph.reshaped(slot, (1,)), *memory])
        return graph.finish(
            [
                graph.reshaped(results[place], spec.shape)
                for place, spec in zip(self.returned, self.outputs, strict=True)
            ]
        )

    def reference(
        self, eager: EagerModule, requests: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """A `Reference`, of the module itself on one sequence."""
        given = [
            {
                spec.name: _reference_input(spec, shape, request, index)
                for spec, shape in zip(self.inputs, self.shapes, strict=True)
            }
            for index, request in enumerate(requests)
        ]
        returned = eager.run(given)
        results: dict[str, Tensor] = {}
        for spec, place in zip(self.outputs, self.returned, strict=True):
            result = torch.as_tensor(returned[place])
            if result.numel() != math.prod(spec.shape) or result.dtype != spec.dtype.as_torch:
                raise BuildError(
                    f"output {spec.name} of the module is {list(result.shape)} {result.dtype} at "
                    f"request {len(requests)} of a sequence, and {list(spec.shape)} "
                    f"{spec.dtype.as_torch} at its export: its extents depend on values, or a "
                    f"Python branch on what no graph has; use torch.where, and masks over fixed "
                    f"extents"
                )
            results[spec.name] = result.reshape(spec.shape)
        return results

    def call(
        self,
        request: Mapping[str, Tensor],
        states: Sequence[Tensor],
        index: int = 0,
        run: Callable[..., Any] | None = None,
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Run the original module once.

        Args:
            request: its inputs by name, without a batch axis.
            states: in their own shapes and order.
            index: how many requests the sequence has had.
            run: runs the module in another way.

        Returns:
            The outputs by name, and the states' new values.
        """
        inputs = [
            _reference_input(spec, shape, request, index)
            for spec, shape in zip(self.inputs, self.shapes, strict=True)
        ]
        with torch.no_grad():
            results = torch.utils._pytree.tree_leaves((run or self.original)(*inputs, *states))
        outputs = {
            spec.name: results[place].reshape(spec.shape)
            for spec, place in zip(self.outputs, self.returned, strict=True)
        }
        return outputs, results[self.num_returned :]


def _returned_tensors(returned: Sequence[Any]) -> dict[int, Node]:
    """What a module returns that is a tensor, by its place; None is left out.

    Raises:
        BuildError: it returns something else.
    """
    tensors: dict[int, Node] = {}
    for place, node in enumerate(returned):
        if isinstance(node, Node) and isinstance(value(node), Tensor):
            tensors[place] = node
        elif node is not None:
            kind = "a number that depends on a tensor's value" if isinstance(node, Node) else node
            raise BuildError(
                f"output {place} of the module is {kind!s}, which is not a tensor; return "
                f"tensors only"
            )
    return tensors


def _reference_input(
    spec: TensorSpec, shape: tuple[int, ...], request: Mapping[str, Tensor], index: int
) -> Tensor:
    """The module's own input for a sequence's ``index``-th request."""
    if spec.role is Role.WRITE_INDICES:
        return torch.full(shape, index, dtype=spec.dtype.as_torch)
    return request[spec.name].to(spec.dtype.as_torch).reshape(shape)


def _input_spec(name: str, example: Any, options: RowOptions) -> TensorSpec:
    if not isinstance(example, Tensor) or any(
        not isinstance(extent, int) for extent in example.shape
    ):
        raise BuildError(
            f"input {name} is not a tensor of fixed extents; a row of a step has one entry of "
            f"every input"
        )
    element_type = Dtype.of(example.dtype)
    if name == options.positions:
        if example.numel() != 1 or example.is_floating_point():
            raise BuildError(
                f"input {name} {tuple(example.shape)} of {example.dtype} is not a position: an "
                f"integer tensor of one entry"
            )
        return TensorSpec(name=name, role=Role.WRITE_INDICES, dtype=element_type)
    if name in options.valid_lengths:
        if example.numel() != 1 or example.is_floating_point():
            raise BuildError(
                f"input {name} {tuple(example.shape)} of {example.dtype} is not a length: an "
                f"integer tensor of one entry"
            )
        return TensorSpec(name=name, role=Role.VALID_LENGTHS, dtype=element_type)
    length = next((key for key, of in options.valid_lengths.items() if of == name), None)
    role, is_audio = Role.ROW, options.sample_rate is not None and name == AUDIO
    if is_audio or name in options.choices:
        role = Role.AUDIO if is_audio else Role.OPTION
    try:
        spec = TensorSpec(
            name=name,
            role=role,
            dtype=element_type,
            shape=_shape_without_batch(example),
            sample_rate=options.sample_rate if is_audio else None,
            choices=options.choices.get(name, ()),
            shorter=options.shorter if is_audio or length is not None else "never",
            length_input=length,
            lead=options.lead if is_audio else None,
        )
    except ValidationError as error:
        raise BuildError(validation_reasons(error)) from error
    if name not in options.limits or not _is_integer(spec):
        return spec
    low, high = options.limits[name]
    if low > high:
        raise BuildError(f"input {name} has the limits {low} to {high}, which no value is within")
    return spec.model_copy(update={"minimum": low, "maximum": high})


def _check_speech(inputs: Sequence[TensorSpec], options: RowOptions) -> None:
    names = [spec.name for spec in inputs]
    if options.lead is not None and options.sample_rate is None:
        raise BuildError("a lead belongs to a stream of audio: give its sample_rate")
    expected = {*options.choices, *([AUDIO] if options.sample_rate is not None else [])}
    if unknown := sorted(expected - set(names)):
        raise BuildError(
            f"choices or a sample rate were given for {unknown}; the module's inputs are {names}"
        )


def _check_position_input(inputs: Sequence[TensorSpec], options: RowOptions) -> None:
    names = [spec.name for spec in inputs]
    if options.positions is not None and options.positions not in names:
        raise BuildError(
            f"positions names {options.positions!r}; the module's inputs are {names}: give it an "
            f"integer tensor of one entry as example (a Python number is a constant of the graph)"
        )


def _check_lengths(inputs: Sequence[TensorSpec], options: RowOptions) -> None:
    names = [spec.name for spec in inputs]
    for length, padded in options.valid_lengths.items():
        if unknown := [name for name in (length, padded) if name not in names]:
            raise BuildError(f"valid_lengths names {unknown}; the module's inputs are {names}")
    if len(options.valid_lengths) > 1:
        raise BuildError(
            f"valid_lengths has {sorted(options.valid_lengths)}; a program has one such input"
        )


def _is_integer(spec: TensorSpec) -> bool:
    dtype = spec.dtype.as_torch
    return spec.role is Role.ROW and not dtype.is_floating_point and dtype is not torch.bool


def _output_spec(name: str, example: Any, options: RowOptions) -> TensorSpec:
    if not isinstance(example, Tensor):
        raise BuildError(f"output {name} is {example!r}, which is not a tensor")
    if any(not isinstance(extent, int) for extent in example.shape):
        raise BuildError(
            f"output {name} has extents {tuple(map(str, example.shape))} that depend on values; "
            f"return a tensor of fixed extents, with a mask"
        )
    return TensorSpec(
        name=name,
        role=options.roles.get(name, Role.VALUE),
        dtype=Dtype.of(example.dtype),
        shape=_shape_without_batch(example),
    )


def _shape_without_batch(tensor: Tensor) -> tuple[int, ...]:
    """The extents of one request: without a batch of one; at least one axis."""
    extents = tuple(tensor.shape)
    return (extents[1:] if len(extents) > 1 and extents[0] == 1 else extents) or (1,)
