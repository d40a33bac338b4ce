"""What a frontend hands to the rest of the builder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from inplace.operators import written_states
from inplace.schema.dtypes import Dtype
from inplace.schema.served import Alias, Lowering, Program
from inplace.schema.specs import Role, StateSpec, TensorSpec
from torch import Tensor

from inplace_builder.errors import BuildError
from inplace_builder.graph.nodes import check_state_uses, remove_no_ops

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
        precise: makes the same model in float32, to tell what its own rounding does from what an engine does wrong; None where its weights
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
    precise: Callable[[], Reference] | None = None


def described(
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


def control(name: str, role: Role) -> TensorSpec:
    """The description of an input that the runtime fills."""
    return TensorSpec(name=name, role=role, dtype=_SAMPLING_DTYPES.get(role, CONTROL_DTYPE))


_SAMPLING_DTYPES = {
    Role.TEMPERATURE: Dtype.FLOAT32,
    Role.TOP_P: Dtype.FLOAT32,
    Role.SEED: Dtype.INT64,
}
