"""The states of an engine: those of all its programs."""

from collections.abc import Sequence

from inplace.schema.specs import StateSpec

from inplace_builder.capture.capture import Capture
from inplace_builder.errors import BuildError


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
