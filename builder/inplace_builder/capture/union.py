"""The states of an engine: those of all its programs."""

from collections.abc import Sequence
from dataclasses import replace

from inplace.schema.specs import StateSpec

from inplace_builder.capture.capture import Capture
from inplace_builder.errors import BuildError
from inplace_builder.graph.export import rename_inputs


def union_of_states(captures: Sequence[Capture]) -> tuple[StateSpec, ...]:
    """The states of all programs, in the order in which they first appear.

    A state is described by a program that writes it.

    Raises:
        BuildError: no program writes a state, or two describe it differently.
    """
    states: dict[str, StateSpec] = {}
    writers: dict[str, str] = {}
    for capture in captures:
        written = {alias.input for alias in capture.program.aliases}
        for spec in capture.states:
            first = states.setdefault(spec.name, spec)
            if first.shape != spec.shape or first.dtype != spec.dtype:
                raise _two_specifications(first, spec)
            if spec.name in writers and spec.name in written and first != spec:
                raise _two_specifications(first, spec)
            if spec.name in written and spec.name not in writers:
                states[spec.name], writers[spec.name] = spec, capture.program.name
    if unwritten := [name for name in states if name not in writers]:
        raise BuildError(
            f"no program writes the states {unwritten}: what is only read is a constant, not a "
            f"state"
        )
    return tuple(states.values())


def _two_specifications(first: StateSpec, second: StateSpec) -> BuildError:
    return BuildError(
        f"state {first.name} has two specifications: {first} and {second}; programs that write a "
        f"state must update it in the same way"
    )


def rename_states(capture: Capture, names: Sequence[str]) -> Capture:
    """The capture with these names of its states; the graph is changed in place."""
    new = dict(zip((state.name for state in capture.states), names, strict=True))
    inputs = [spec.name for spec in capture.program.inputs]
    rename_inputs(capture.exported, [*inputs, *names])
    aliases = tuple(
        alias.model_copy(
            update={"input": new[alias.input], "output": f"{new[alias.input]}_updated"}
        )
        for alias in capture.program.aliases
    )
    return replace(
        capture,
        program=capture.program.model_copy(update={"aliases": aliases}),
        states=tuple(
            spec.model_copy(
                update={"name": new[spec.name], "initial": spec.initial and new[spec.name]}
            )
            for spec in capture.states
        ),
        lowering=tuple(
            each.model_copy(update={"state": new[each.state]}) for each in capture.lowering
        ),
        initial={new[name]: tensor for name, tensor in capture.initial.items()},
    )
