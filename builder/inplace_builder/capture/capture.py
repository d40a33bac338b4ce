"""A captured model, and the front-end for modules that are written on the operators.

Every front-end returns a `Capture`: a graph on the ``inplace::`` operators with its description.
`capture_module` is the simplest one: the module calls the operators itself.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from inplace.engines.arena import Arena
from inplace.errors import LoadError
from inplace.operators import written_states
from inplace.schema.programs import Program
from inplace.schema.specs import Alias, Dtype, Lowering, Role, StateSpec, TensorSpec, Update
from torch import Tensor
from torch.export import Dim

from inplace_builder.errors import BuildError
from inplace_builder.graph.export import correct_lstm, named_extents, size_oblivious
from inplace_builder.graph.passes import check_state_uses, remove_no_ops

Reference = Callable[[Sequence[Mapping[str, Tensor]]], Mapping[str, Tensor]]
"""The original model on one sequence.

It takes the client inputs of all requests of the sequence so far, in order, and returns the outputs
of the last one by name. No tensor has a batch axis.
"""


@dataclass(frozen=True)
class Capture:
    """A captured model.

    Attributes:
        exported: the graph; its placeholders are the program's inputs, then the states.
        program: its description, aliases included.
        states: the states, in the order of the placeholders.
        capacity: maximum number of positions of a sequence; None if nothing grows.
        dtype: the element type of the weights.
        lowering: how each state is updated.
        reference: the original model, to verify against.
        min_capacity: the smallest capacity that may be chosen at load; None if it is fixed.
        initial: the tensors that `StateSpec.initial` names, of one slot each.
        float32_reference: makes the same model in float32, to tell its own rounding from an
            engine's error; None if neither its weights nor its caches are rounded, or if there is
            no such model.
        perturbed_reference: makes the model with its token embeddings rounded otherwise, at random,
            by a seed: what it computes may differ as much from one rounding to another; None where
            there is no float32_reference.
        thresholds: positions at which the model states that something changes; verification runs
            past them, whatever was captured.
        notes: what the build records of how it was captured.
        caveat: what may explain a difference from the reference; ends the error of one.
        prompt_logprobs: of a language model, the program with log-probabilities of every fed token;
            None without it.
    """

    exported: torch.export.ExportedProgram
    program: Program
    states: tuple[StateSpec, ...]
    capacity: int | None
    dtype: Dtype
    lowering: tuple[Lowering, ...]
    reference: Reference
    min_capacity: int | None = None
    initial: Mapping[str, Tensor] = field(default_factory=dict)
    float32_reference: Callable[[], Reference] | None = None
    perturbed_reference: Callable[[int], Reference] | None = None
    thresholds: frozenset[int] = frozenset()
    notes: Mapping[str, str] = field(default_factory=dict)
    caveat: str = ""
    prompt_logprobs: "Capture | None" = None


def capture_module(
    module: torch.nn.Module,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    states: Sequence[StateSpec],
    *,
    max_rows: int,
    initial: Mapping[str, Tensor] | None = None,
) -> Capture:
    """Capture a rectangular module: each step takes one entry of every input for each row.

    Args:
        module: its ``forward`` takes the inputs, ``[rows, *shape]`` each, then the states,
            ``[slots, *shape]`` each, by these names, and returns the outputs, ``[rows, *shape]``
            each. It uses the states only through `inplace.operators`.
        inputs: what a client sends (role ``row``) and what the runtime fills.
        outputs: what it returns.
        states: what it keeps.
        max_rows: maximum number of rows of a step, at least 2.
        initial: the tensors that `StateSpec.initial` names: what a slot of such a state holds when
            a sequence starts, of the state's ``shape``.

    Raises:
        BuildError: torch.export cannot capture it, or it uses a state outside the operators.
    """
    module, initial = module.eval(), dict(initial or {})
    # 1. Export one step, with a dynamic number of rows and of slots.
    exported = _export_step(module, inputs, states, max_rows, initial)
    # 2. Clean the graph, check it against the description, read off what it writes.
    program = Program(
        name="step",
        row_layout="rectangular",
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        aliases=(),
        max_rows=max_rows,
        chunk=1,
    )
    program, lowering = complete_program(exported, program, tuple(states))
    # 3. The module itself on one sequence is the reference.
    reference = _module_reference(module, inputs, outputs, states, initial)
    ends = [
        spec.shape[spec.axis]
        for spec in states
        if spec.update is Update.APPEND and spec.axis is not None
    ]
    weights = next((Dtype.of(p.dtype) for p in module.parameters()), states[0].dtype)
    return Capture(
        exported,
        program,
        tuple(states),
        min(ends, default=None),
        weights,
        lowering,
        reference,
        initial=initial,
    )


def _export_step(
    module: torch.nn.Module,
    inputs: Sequence[TensorSpec],
    states: Sequence[StateSpec],
    max_rows: int,
    initial: Mapping[str, Tensor],
) -> torch.export.ExportedProgram:
    rows, slots = Dim("rows", min=1, max=max_rows), Dim("slots", min=1)
    arguments = [torch.zeros((2, *spec.shape), dtype=spec.dtype.as_torch) for spec in inputs]
    shapes: tuple[Any, ...] = (*({0: rows} for _ in inputs), *({0: slots} for _ in states))
    try:
        with torch.no_grad(), correct_lstm(), size_oblivious(), named_extents():
            return torch.export.export(
                module, (*arguments, *_fresh_states(states, 2, initial)), dynamic_shapes=shapes
            )
    except Exception as error:
        raise BuildError(f"torch.export cannot capture {type(module).__name__}: {error}") from error


def _fresh_states(
    states: Sequence[StateSpec], slots: int, initial: Mapping[str, Tensor]
) -> list[Tensor]:
    """What that many fresh slots hold: as the runtime makes them."""
    try:
        arena = Arena(tuple(states), slots, torch.device("cpu"), initial)
    except LoadError as error:
        raise BuildError(str(error)) from error
    return list(arena.tensors.values())


def _module_reference(
    module: torch.nn.Module,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    states: Sequence[StateSpec],
    initial: Mapping[str, Tensor],
) -> Reference:
    """The module with one sequence, in slot 0 of states of its own."""

    def reference(requests: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        memory = _fresh_states(states, 1, initial)
        results: tuple[Tensor, ...] = ()
        with torch.no_grad():
            for index, request in enumerate(requests):
                arguments = [_reference_input(spec, request, index) for spec in inputs]
                returned = module(*arguments, *memory)
                results = returned if isinstance(returned, tuple) else (returned,)
        return {spec.name: result[0] for spec, result in zip(outputs, results, strict=True)}

    return reference


def _reference_input(spec: TensorSpec, request: Mapping[str, Tensor], index: int) -> Tensor:
    """An input of a sequence in slot 0, at its ``index``-th request."""
    match spec.role:
        case Role.ROW | Role.AUDIO | Role.OPTION:
            return request[spec.name][None]
        case Role.SLOTS:
            return torch.zeros(1, dtype=spec.dtype.as_torch)
        case Role.WRITE_INDICES | Role.POSITIONS:
            return torch.full((1,), index, dtype=spec.dtype.as_torch)
        case Role.VALID_LENGTHS:
            return torch.ones(1, dtype=spec.dtype.as_torch)
        case _:
            raise BuildError(
                f"input {spec.name} has the role {spec.role}, which a rectangular program does not "
                f"take"
            )


def complete_program(
    exported: torch.export.ExportedProgram,
    program: Program,
    states: tuple[StateSpec, ...],
    read_only: Collection[str] = (),
) -> tuple[Program, tuple[Lowering, ...]]:
    """Clean a graph, check it against its description, and add what it writes.

    Args:
        exported: the graph; cleaned in place.
        program: its description, without aliases.
        states: the states that it takes after the inputs.
        read_only: names of states that another program writes, so that this one need not.

    Returns:
        The program with an alias for each state that it writes, and how each state is updated.

    Raises:
        BuildError: the graph takes other inputs, returns more or fewer outputs, uses a state
            outside the operators, or never writes one.
    """
    remove_no_ops(exported)
    # they would be saved with the program, and example states are as large as slots
    exported._example_inputs = None
    inputs = list(exported.graph_signature.user_inputs)
    described = [spec.name for spec in program.inputs] + [state.name for state in states]
    if inputs != described:
        raise BuildError(f"the captured graph takes {inputs}, but its description has {described}")
    num_outputs = len(exported.graph_signature.user_outputs)
    if num_outputs != len(program.outputs):
        raise BuildError(
            f"the captured graph returns {num_outputs} outputs, but its description has "
            f"{[spec.name for spec in program.outputs]}"
        )
    names = [state.name for state in states]
    check_state_uses(exported.graph, names)
    written = written_states(exported.graph)
    if unwritten := sorted(set(names) - set(written) - set(read_only)):
        raise BuildError(
            f"the model never writes {unwritten}: what it only reads is a constant, not a state; "
            f"make it a buffer"
        )
    names = [name for name in names if name in written]
    aliases = tuple(Alias(output=f"{name}_updated", input=name, kind="operator") for name in names)
    reason = (
        "the PyTorch engine runs the inplace:: operators themselves, which write the bound tensor"
    )
    lowering = tuple(Lowering(state=name, kind="operator", reason=reason) for name in names)
    return program.model_copy(update={"aliases": aliases}), lowering


_CONTROL_DTYPES = {
    Role.TEMPERATURE: Dtype.FLOAT32,
    Role.TOP_P: Dtype.FLOAT32,
    Role.SEED: Dtype.INT64,
    Role.MIN_P: Dtype.FLOAT32,
    Role.ADJUSTMENTS: Dtype.FLOAT32,
}


def control_input(name: str, role: Role, shape: tuple[int, ...] = ()) -> TensorSpec:
    """The description of an input that the runtime fills.

    It is int32 unless its role needs another type: TensorRT's own cache layer takes int32 indices,
    and every position fits.

    Args:
        name: of the module's argument.
        role: what the runtime fills it with.
        shape: its extents behind the rows or tokens of a step.

    Raises:
        ValueError: there is no such role.
    """
    return TensorSpec(
        name=name, role=role, dtype=_CONTROL_DTYPES.get(role, Dtype.INT32), shape=shape
    )
