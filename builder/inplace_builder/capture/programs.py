"""Several modules over shared states, as the programs of one engine.

A buffer that is the same tensor in several modules is one state: what one program writes, the
others read.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from inplace.runtime.progress import CallOutputs, ScheduleProgress
from inplace.schema.programs import check_interfaces, check_schedules, schedule_inputs
from inplace.schema.schedule import Call, Loop, Schedule
from inplace.schema.specs import Role
from pydantic import ValidationError
from torch import Tensor

from inplace_builder.capture.capture import Capture
from inplace_builder.capture.exported_rows import (
    CapturedRows,
    RowOptions,
    RowsModule,
    appends,
    capture_rows,
)
from inplace_builder.capture.union import rename_states, union_of_states
from inplace_builder.compare import same_bits
from inplace_builder.errors import BuildError, brief, validation_reasons

ProgramModule = tuple[torch.nn.Module, RowOptions, Sequence[Any]]
"""A module of one sequence, what it is built for, and example inputs."""


@dataclass(frozen=True)
class ProgramsCapture:
    """Captured programs, and in which order a request calls them.

    Attributes:
        captures: one for each program; a state that several use has one name in all.
        schedules: what requests run.
        modules: by program, the original module and the names of its states, to verify against.
        examples: inputs of requests to verify with; random ones without any.
        constant_tokens: the modules may give the same tokens for all requests.
    """

    captures: tuple[Capture, ...]
    schedules: tuple[Schedule, ...]
    modules: Mapping[str, tuple[RowsModule, tuple[str, ...]]]
    examples: tuple[Mapping[str, Tensor], ...] = ()
    constant_tokens: bool = False

    def fresh_states(self) -> dict[str, Tensor]:
        """What the states of a sequence hold when it starts, in the modules' own shapes."""
        return {
            name: state.tensor.initial.clone()
            for rows, names in self.modules.values()
            for name, state in zip(names, rows.states, strict=True)
        }

    def appended(self) -> dict[str, tuple[str, ...]]:
        """By program, the states that its module writes as one appends to them."""
        return {
            program: tuple(
                name
                for name, state in zip(names, rows.states, strict=True)
                if appends(state, rows.limits)
            )
            for program, (rows, names) in self.modules.items()
        }

    def run(
        self, states: dict[str, Tensor], inputs: Mapping[str, Tensor], loops: tuple[Loop, ...]
    ) -> dict[str, Tensor]:
        """Run a request through the original modules.

        Args:
            states: of its sequence; changed to what they are afterwards.
            inputs: the request's, by name, without a batch axis.
            loops: the schedule.

        Returns:
            What the schedule produces, as `ScheduleProgress.answer`.
        """
        programs = {capture.program.name: capture.program for capture in self.captures}
        progress = ScheduleProgress(loops)
        while not progress.finished:
            name = progress.next_call.program
            rows, names = self.modules[name]
            outputs, new = rows.call(inputs, [states[state] for state in names])
            states |= dict(zip(names, new, strict=True))
            rowed = {output: tensor[None] for output, tensor in outputs.items()}
            progress.add(CallOutputs(programs[name], rowed), 0)
        return progress.answer()


def capture_programs(
    programs: Mapping[str, ProgramModule],
    schedule: Sequence[Call | Loop] | Sequence[Schedule],
    *,
    examples: Sequence[Mapping[str, Tensor]] = (),
    constant_tokens: bool = False,
) -> ProgramsCapture:
    """Capture modules of one sequence as the programs of one engine.

    A state is a buffer that some module writes. Buffers that are the same tensor are one state,
    with the shortest of their qualified names (the first, if there are several; with the program's
    name in front, if another state has it).

    Args:
        programs: by name: the module, its options and example inputs. Outputs of the role
            ``tokens`` are joined over the calls of a request, of others the last call's are sent;
            outputs of different programs have different names. Inputs of the same name are one.
        schedule: the calls of a request, in order, and at most one level of loops. ``until`` names
            an output of the role ``done``. Or several schedules, for different requests: a START, a
            later one, an END; or for different inputs.
        examples: inputs of requests by name, as a module takes them. Verification sends them one
            after another instead of random numbers, of which some models make little.
        constant_tokens: the schedule may give the same tokens whatever it is sent. Without it, a
            verification that sees fewer than two different tokens fails: an answer that is always
            the same would be compared with itself.

    Raises:
        BuildError: a module cannot be captured, see `capture_exported_rows`; the schedule names
            an unknown program or output, or leaves a program out; programs have different inputs
            of one name, or an output of the same name; modules share memory otherwise than as one
            tensor, or have different initial values of one; a program takes positions, or is an
            exported program; an example has other inputs than a request.
    """
    _check_names(programs)
    _check_modules(programs)
    try:
        schedules = _schedules(schedule)
    except ValidationError as error:
        raise BuildError(validation_reasons(error)) from error
    _check_called(schedules, programs)
    _check_options(programs)
    buffers = _Buffers(programs)
    captured: dict[str, CapturedRows] = {}
    for name, (module, options, arguments) in programs.items():
        try:
            captured[name] = capture_rows(
                module, options, arguments, name=name, shared=buffers.shared(name)
            )
        except BuildError as error:
            raise BuildError(f"program {name}: {error}") from error
    names = _state_names(captured, buffers)
    captures = tuple(rename_states(each.capture, names[name]) for name, each in captured.items())
    _check_done(schedules, captures)
    union_of_states(captures)
    try:
        check_interfaces([capture.program for capture in captures])
        check_schedules(schedules, [capture.program for capture in captures])
    except ValueError as error:
        raise BuildError(str(error)) from error
    modules = {name: (each.rows, names[name]) for name, each in captured.items()}
    result = ProgramsCapture(
        captures,
        schedules,
        modules,
        tuple(_example(schedules, captures, example) for example in examples),
        constant_tokens,
    )
    _check_initial(result)
    return result


def _check_names(programs: Mapping[str, ProgramModule]) -> None:
    if not programs:
        raise BuildError("capture_programs needs at least one program")
    if wrong := [name for name in programs if not (name.isidentifier() and name.isascii())]:
        raise BuildError(f"programs {wrong} have names that are not ASCII identifiers")


def _check_modules(programs: Mapping[str, ProgramModule]) -> None:
    for name, (module, _, _) in programs.items():
        if isinstance(module, torch.export.ExportedProgram):
            raise BuildError(
                f"program {name} is an exported program, whose tensors are no longer those of "
                f"other modules, so it can share no states: give the module that was exported"
            )


def _check_options(programs: Mapping[str, ProgramModule]) -> None:
    for name, (_, options, _) in programs.items():
        if options.positions is not None:
            raise BuildError(
                f"program {name} has the positions {options.positions!r}: a program of several "
                f"counts its own calls in a buffer, because a request may call it any number of "
                f"times"
            )
        if unknown := [each for each in options.restarts if each not in programs]:
            raise BuildError(
                f"program {name} restarts {unknown}; the programs are {list(programs)}"
            )


def _schedules(schedule: Sequence[Call | Loop] | Sequence[Schedule]) -> tuple[Schedule, ...]:
    schedules = [each for each in schedule if isinstance(each, Schedule)]
    calls = [each for each in schedule if not isinstance(each, Schedule)]
    if schedules and calls:
        raise BuildError("give either calls and loops, or schedules with names")
    return tuple(schedules) or (Schedule(name="default", calls=tuple(calls)),)


def _example(
    schedules: Sequence[Schedule], captures: Sequence[Capture], example: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The inputs of a request, with the batch axis of a server, ``[1, ...]``."""
    programs = [capture.program for capture in captures]
    taken = [schedule_inputs(schedule, programs) for schedule in schedules]
    specs = next((inputs for inputs in taken if inputs.keys() == example.keys()), None)
    if specs is None:
        expected = " or ".join(dict.fromkeys(str(sorted(inputs)) for inputs in taken))
        raise BuildError(f"an example has the inputs {sorted(example)}; a request has {expected}")
    result = {}
    for name, spec in specs.items():
        tensor = torch.as_tensor(example[name])
        shape = torch.Size(spec.shape)
        if spec.length_input is not None:  # it may be shorter
            count = tensor.numel() // max(1, shape[1:].numel())
            shape = torch.Size((min(count, shape[0]), *shape[1:]))
        if tensor.numel() != shape.numel() or tensor.dtype != spec.dtype.as_torch:
            raise BuildError(
                f"an example has input {name} of shape {list(tensor.shape)} and {tensor.dtype}; "
                f"the program takes {list(spec.shape)} {spec.dtype}"
            )
        result[name] = tensor.reshape(1, *shape)
    return result


def _check_called(schedules: Sequence[Schedule], programs: Mapping[str, ProgramModule]) -> None:
    called = frozenset[str]().union(*(schedule.programs for schedule in schedules))
    if unknown := sorted(called - programs.keys()):
        raise BuildError(f"the schedule calls {unknown}; the programs are {list(programs)}")
    if uncalled := [name for name in programs if name not in called]:
        raise BuildError(f"the schedule does not call the programs {uncalled}: leave them out")


def _check_done(schedules: Sequence[Schedule], captures: Sequence[Capture]) -> None:
    done = {
        capture.program.name: [
            spec.name for spec in capture.program.outputs if spec.role is Role.DONE
        ]
        for capture in captures
    }
    for loop in (loop for schedule in schedules for loop in schedule.loops):
        named = [(loop.until, loop.calls[-1].program)]
        named += [(call.until, call.program) for call in loop.calls]
        for until, program in named:
            if until is not None and until not in done[program]:
                raise BuildError(
                    f"the schedule runs {program} until {until!r}; its outputs of the role done "
                    f"are {done[program]}: name one in RowOptions(outputs=…, roles={{…: "
                    f"Role.DONE}})"
                )


class _Buffers:
    """The buffers of all modules, and which are one tensor.

    Args:
        programs: the modules.
    """

    def __init__(self, programs: Mapping[str, ProgramModule]) -> None:
        self.tensors = {
            name: dict(module.named_buffers(remove_duplicate=False))
            for name, (module, _, _) in programs.items()
        }
        self.written = {
            key
            for name, (module, _, examples) in programs.items()
            for key in _written(name, module, examples)
        }
        self._check_overlaps()

    def _items(self) -> Iterator[tuple[str, str, Tensor]]:
        for program, buffers in self.tensors.items():
            for name, tensor in buffers.items():
                yield program, name, tensor

    def _check_overlaps(self) -> None:
        """BuildError if modules share memory that is written, otherwise than as one tensor."""
        by_storage: dict[int, tuple[str, str, Tensor]] = {}
        for program, name, tensor in self._items():
            if not tensor.numel():
                continue
            storage = tensor.untyped_storage().data_ptr()
            other, other_name, first = by_storage.setdefault(storage, (program, name, tensor))
            keys = {_key(first), _key(tensor)}
            if other != program and len(keys) == 2 and keys & self.written:
                raise BuildError(
                    f"buffer {name} of program {program} and buffer {other_name} of program "
                    f"{other} share memory, but are not the same tensor: share one buffer and "
                    f"take views of it in forward"
                )

    def shared(self, program: str) -> list[str]:
        """The names in one module of the states that other modules have too."""
        others = {_key(tensor) for other, _, tensor in self._items() if other != program}
        return [
            name
            for name, tensor in self.tensors[program].items()
            if _key(tensor) in others & self.written
        ]

    def names_of(self, program: str, source: str) -> list[str]:
        """All qualified names of the tensor of a buffer, in the order of the programs."""
        tensor = self.tensors[program].get(source)
        if tensor is None:
            return []
        return [name for _, name, other in self._items() if _key(other) == _key(tensor)]

    def key(self, program: str, source: str) -> object:
        """What is the same for the same state."""
        tensor = self.tensors[program].get(source)
        return (program, source) if tensor is None else _key(tensor)


def _key(tensor: Tensor) -> tuple[object, ...]:
    """What two names of one tensor have in common."""
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _written(
    program: str, module: torch.nn.Module, examples: Sequence[Any]
) -> list[tuple[object, ...]]:
    """The buffers that one call of a module writes, whose values are put back afterwards."""
    buffers = list(module.buffers())
    values = [tensor.clone() for tensor in buffers]
    versions = [tensor._version for tensor in buffers]
    inputs = torch.utils._pytree.tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tuple(examples)
    )
    try:
        with torch.no_grad():
            module(*inputs)
    except Exception as error:
        raise BuildError(
            f"program {program}: the module cannot be called with its example inputs: "
            f"{brief(error)}"
        ) from error
    changed = [
        tensor for tensor, old in zip(buffers, versions, strict=True) if tensor._version != old
    ]
    with torch.no_grad():
        for tensor, value in zip(buffers, values, strict=True):
            if any(tensor is each for each in changed):
                tensor.copy_(value)
    return [_key(tensor) for tensor in changed]


def _state_names(
    captured: Mapping[str, CapturedRows], buffers: _Buffers
) -> dict[str, tuple[str, ...]]:
    """The names of each program's states in the engine."""
    chosen: dict[object, str] = {}
    inputs = {spec.name for each in captured.values() for spec in each.rows.inputs}
    taken = inputs | {"slots"}
    result: dict[str, tuple[str, ...]] = {}
    for program, each in captured.items():
        names = []
        for state in each.rows.states:
            source = state.tensor.module_tensor.source
            key = (buffers.key(program, source), state.tensor.selects)
            if key not in chosen:
                name = state.name
                if not state.tensor.selects and (all_names := buffers.names_of(program, source)):
                    shortest = min(all_names, key=len)
                    name = "".join(c if c.isalnum() else "_" for c in shortest)
                    name = name if name.isidentifier() else state.name
                while name in taken:
                    name = f"{program}_{name}"
                chosen[key] = name
                taken.add(name)
            names.append(chosen[key])
        result[program] = tuple(names)
    return result


def _check_initial(programs: ProgramsCapture) -> None:
    """BuildError if two programs have different initial values of one state."""
    first = programs.fresh_states()
    for program, (rows, names) in programs.modules.items():
        for name, state in zip(names, rows.states, strict=True):
            if not same_bits(first[name].reshape(-1), state.tensor.initial.reshape(-1)):
                raise BuildError(
                    f"state {name} has other initial values in program {program}: a call of a "
                    f"module changed it while the others were captured"
                )
