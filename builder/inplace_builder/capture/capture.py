"""What a frontend hands to the rest of the builder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from inplace.operators import written_states
from inplace.schema.dtypes import Dtype
from inplace.schema.served import Alias, Lowering, Program
from inplace.schema.specs import Role, StateSpec, TensorSpec, Update
from torch import Tensor
from torch.export import Dim

from inplace_builder.errors import BuildError
from inplace_builder.graph.nodes import check_state_uses, remove_no_ops
from inplace_builder.graph.reexport import size_oblivious

Reference = Callable[[Sequence[Mapping[str, Tensor]]], Mapping[str, Tensor]]
"""The original model on one sequence: the client inputs of all its requests so far, in order (no batch axis), to the outputs of
the last request, by name and without a batch axis."""


@dataclass(frozen=True)
class Capture:
    """A captured model.

    Attributes:
        exported: the graph; its placeholders are the program's inputs, then the states.
        program: its description, aliases included.
        states: the states, in placeholder order.
        capacity: positions a sequence may hold; None where nothing grows.
        min_capacity: the least capacity that may be chosen at load; None where it is fixed.
        dtype: the element type of the weights.
        lowering: how each state is updated.
        reference: the original model, to verify against.
        float32_reference: makes the same model in float32, to tell what its own rounding does from what an engine does wrong; None where its weights
            are not rounded, or where it cannot be had.
    """

    exported: torch.export.ExportedProgram
    program: Program
    states: tuple[StateSpec, ...]
    capacity: int | None
    dtype: Dtype
    lowering: tuple[Lowering, ...]
    reference: Reference
    min_capacity: int | None = None
    float32_reference: Callable[[], Reference] | None = None


def complete_program(
    exported: torch.export.ExportedProgram, program: Program, states: tuple[StateSpec, ...]
) -> tuple[Program, tuple[Lowering, ...]]:
    """Clean the graph, check it against its description, and complete the program with the aliases read off the graph.

    Raises:
        BuildError: the graph takes other inputs, returns more or fewer outputs, touches a state outside the operators, or leaves a state
            unwritten.
    """
    remove_no_ops(exported)
    exported._example_inputs = (
        None  # would be saved with the program: example states are as large as slots
    )
    graph = exported.graph
    found = list(exported.graph_signature.user_inputs)
    wanted = [spec.name for spec in program.inputs] + [state.name for state in states]
    if found != wanted:
        raise BuildError(f"the captured graph takes {found}, its description says {wanted}")
    if len(exported.graph_signature.user_outputs) != len(program.outputs):
        names = [spec.name for spec in program.outputs]
        raise BuildError(
            f"the captured graph returns {len(exported.graph_signature.user_outputs)} outputs, its description names {names}"
        )
    names = [state.name for state in states]
    check_state_uses(graph, names)
    written = written_states(graph)
    if unwritten := sorted(set(names) - set(written)):
        raise BuildError(
            f"the model never writes {unwritten}: what it only reads is a constant, not a state; make it a buffer"
        )
    aliases = tuple(Alias(output=f"{name}_updated", input=name, kind="operator") for name in names)
    because = (
        "the PyTorch engine runs the inplace:: operators themselves, which write the bound tensor"
    )
    lowering = tuple(Lowering(state=name, kind="operator", reason=because) for name in names)
    return program.model_copy(update={"aliases": aliases}), lowering


CONTROL_DTYPE = Dtype.INT32
"""Element type of everything the runtime fills in: what TensorRT's own cache layer takes, and enough for any position."""


def control_input(name: str, role: Role) -> TensorSpec:
    """The description of an input that the runtime fills."""
    return TensorSpec(name=name, role=role, dtype=_SAMPLING_DTYPES.get(role, CONTROL_DTYPE))


_SAMPLING_DTYPES = {
    Role.TEMPERATURE: Dtype.FLOAT32,
    Role.TOP_P: Dtype.FLOAT32,
    Role.SEED: Dtype.INT64,
}


def capture_module(
    module: torch.nn.Module,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    states: Sequence[StateSpec],
    *,
    max_rows: int,
) -> Capture:
    """Export a rectangular module: each step takes one entry of every input a row.

    Args:
        module: its ``forward`` takes the inputs, ``[rows, *shape]`` each, then the states, ``[slots, *shape]`` each, by these names,
            and returns the outputs, ``[rows, *shape]`` each; it touches the states through ``inplace.operators`` only.
        inputs: what a client sends (role ``row``) and what the runtime fills.
        outputs: what it returns.
        states: what it keeps.
        max_rows: most rows of one step, at least 2.

    Raises:
        BuildError: torch.export cannot capture it, or it touches a state outside the operators.
    """
    module = module.eval()
    rows = Dim("rows", min=1, max=max_rows)
    arguments = [torch.zeros((2, *spec.shape), dtype=spec.dtype.as_torch) for spec in inputs]
    tensors = [
        torch.full((2, *spec.shape), spec.fill, dtype=spec.dtype.as_torch) for spec in states
    ]
    slots = Dim("slots", min=1)
    shapes: tuple[Any, ...] = (*({0: rows} for _ in inputs), *({0: slots} for _ in states))
    try:
        with torch.no_grad(), size_oblivious():
            exported = torch.export.export(module, (*arguments, *tensors), dynamic_shapes=shapes)
    except Exception as error:
        raise BuildError(f"torch.export cannot capture {type(module).__name__}: {error}") from error
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

    def reference(requests: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        memory = [
            torch.full((1, *spec.shape), spec.fill, dtype=spec.dtype.as_torch) for spec in states
        ]
        results: tuple[Tensor, ...] = ()
        with torch.no_grad():
            for index, request in enumerate(requests):
                found = module(
                    *(_reference_input(spec, request, index) for spec in inputs), *memory
                )
                results = found if isinstance(found, tuple) else (found,)
        return {spec.name: result[0] for spec, result in zip(outputs, results, strict=True)}

    ends = [
        spec.shape[spec.axis]
        for spec in states
        if spec.update is Update.APPEND and spec.axis is not None
    ]
    weights = next((Dtype.of(p.dtype) for p in module.parameters()), states[0].dtype)
    return Capture(
        exported, program, tuple(states), min(ends, default=None), weights, lowering, reference
    )


def _reference_input(spec: TensorSpec, request: Mapping[str, Tensor], index: int) -> Tensor:
    """The input of a sequence that is alone in slot 0, at its ``index``-th request."""
    match spec.role:
        case Role.ROW:
            return request[spec.name][None]
        case Role.SLOTS:
            return torch.zeros(1, dtype=spec.dtype.as_torch)
        case Role.WRITE_INDICES | Role.POSITIONS:
            return torch.full((1,), index, dtype=spec.dtype.as_torch)
        case _:
            raise BuildError(
                f"input {spec.name} has the role {spec.role}, which a rectangular program does not take"
            )
