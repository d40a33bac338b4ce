"""Verify an engine with a schedule: requests of three sequences against the original modules.

Requests begin at different times, so rows of one call are at different counts of their loops.
Every byte of a slot that has not been started is NaN, or the largest integer. What is done is
called again, a program as well as a whole round of a loop, and may change nothing. What requests
are answered with is compared; of an engine in 16 bits single calls are (`verify_calls`).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from inplace.engines import NO_OTHER_THREADS
from inplace.errors import Code, RequestError
from inplace.parameters import Parameter
from inplace.protocol import SAMPLE_RATE
from inplace.runtime.batcher import ActiveRequest, form_batch
from inplace.runtime.progress import CallOutputs
from inplace.runtime.requests import Request
from inplace.runtime.schedules import ScheduledInstance, saved_states
from inplace.schema.programs import Program
from inplace.schema.schedule import Call, Loop, RequestFlag, Schedule
from inplace.schema.served import Manifest
from inplace.schema.specs import Role
from torch import Tensor

from inplace_builder.capture.programs import ProgramsCapture
from inplace_builder.compare import fill_with_sentinel, relative_error, same_bits, tolerance
from inplace_builder.engine_files import load_errors
from inplace_builder.errors import BuildError, rejected
from inplace_builder.served.verify import NUM_SEQUENCES, SPARE_SLOTS, random_input
from inplace_builder.served.verify_calls import CallComparison, rounds_tokens

MIN_REQUESTS = 4
"""Requests of each sequence, at least. The last one has END, if a schedule is for it, and runs with
a limit of 1 for every ``until``."""


LIMITED_START = 2
"""The sequence whose first request runs with these limits too."""


MOST_CALLS = 32
"""Most calls, or rounds, for an ``until`` in all other requests but the first: a decoder of
hundreds of tokens would otherwise be verified for many minutes."""


STAGGER = 2
"""Calls between the starts of two sequences, so that they are at different loop counts."""


CALLS_TAKEN_BACK = 3
"""Calls of a request that are taken back."""


def verify_schedule(folder: Path, manifest: Manifest, programs: ProgramsCapture) -> dict[str, str]:
    """Run the engine in ``folder`` against the original modules in the same schedule.

    Returns:
        The largest relative error of an output; how many rows were called again after they were
        done; how many calls had rows at different counts of a loop; how many times a limit
        (``at_most``) ended what was not done; and how many different tokens there were.

    Raises:
        BuildError: the engine cannot be loaded or fails; an output differs by more than rounding
            explains; a call changed states that its program does not write, or slots of other
            rows; a row that was done changed when it was called again; or all tokens were the same.
    """
    check = _Verification(_open(folder, manifest), programs)
    check.run()
    check.check_tokens()
    return check.notes()


def with_appended(folder: Path, manifest: Manifest, programs: ProgramsCapture) -> Manifest:
    """The manifest with the states to which programs append (`CompiledProgram.appended`).

    Only if the engine bears it out: calls of requests are taken back, and what follows must be what
    the original modules give that never had those calls.
    """
    names = programs.appended()
    candidate = manifest.model_copy(
        update={
            "programs": tuple(
                program.model_copy(update={"appended": names[program.name]})
                for program in manifest.programs
            )
        }
    )
    saved = [saved_states(candidate, schedule) for schedule in manifest.schedules]
    if not any(names.values()) or saved.count(None) == len(saved):
        return manifest
    try:
        _Verification(_open(folder, candidate), programs, takes_back=True).run()
    except BuildError:
        return manifest
    return candidate


def _open(folder: Path, manifest: Manifest) -> ScheduledInstance:
    with load_errors():
        instance = ScheduledInstance.open(
            folder, manifest, slots=NUM_SEQUENCES + SPARE_SLOTS, idle_timeout=float("inf")
        )
    instance.loop_calls = 1  # every call is looked at
    for tensor in instance.arena.tensors.values():
        fill_with_sentinel(tensor)
    return instance


@dataclass
class _Sequence:
    """A sequence: its states in the original modules, and what is left to do.

    Attributes:
        id: its number.
        states: in the original modules.
        num_requests: how many it has had.
        active: the one that runs.
        starts: whether the next one is a START.
    """

    id: int
    states: dict[str, Tensor]
    num_requests: int = 0
    active: ActiveRequest | None = None
    starts: bool = True


@dataclass
class _Verification:
    """One run.

    Attributes:
        instance: the engine.
        programs: what it is compared with.
        max_error: the largest relative error so far.
        tokens: all tokens that were produced.
        num_fixed_points: how many rows were called again after they were done.
        num_mixed_calls: how many calls had rows at different counts of a loop.
        num_limits: how many times a limit ended what was not done.
        num_runs: by schedule, how many requests ran it.
        num_examples: how many of them had an example.
        num_compared: how many of them were compared.
        takes_back: take calls of another request back before each one that is not a START.
    """

    instance: ScheduledInstance
    programs: ProgramsCapture
    max_error: float = 0.0
    tokens: set[int] = field(default_factory=set)
    num_fixed_points: int = 0
    num_mixed_calls: int = 0
    num_limits: int = 0
    num_runs: Counter[str] = field(default_factory=Counter)
    num_examples: int = 0
    num_compared: int = 0
    takes_back: bool = False

    def __post_init__(self) -> None:
        self.calls: CallComparison | None = None
        manifest = self.instance.manifest
        # calls that were taken back must not show in the answers that follow
        if rounds_tokens(manifest) and not self.takes_back:
            self.calls = CallComparison(manifest, self.programs)

    def run(self) -> None:
        """Run all requests of all sequences; the first sequence then starts anew."""
        generator = torch.Generator().manual_seed(0)
        requests = self.requests
        sequences = [
            _Sequence(number + 1, self.programs.fresh_states()) for number in range(NUM_SEQUENCES)
        ]
        num_calls = 0
        while True:
            for sequence in sequences:
                started = num_calls >= STAGGER * (sequence.id - 1)
                if started and sequence.active is None and sequence.num_requests < requests:
                    self._admit(sequence, generator)
            waiting = [each.active for each in sequences if each.active is not None]
            if not waiting:
                if num_calls >= STAGGER * NUM_SEQUENCES:
                    break
                num_calls += 1
                continue
            self._call(self.instance.next_rows(waiting))
            num_calls += 1
            for sequence in sequences:
                if sequence.active is not None and sequence.active.finished:
                    self._compare(sequence, sequence.active)
            sequences = sequences[1:] + sequences[:1]  # another one waits longest
        if unused := [
            each.name for each in self.instance.manifest.schedules if not self.num_runs[each.name]
        ]:
            raise rejected(f"the schedules {unused} were not run: no request came to them")
        if not self.num_compared:
            raise rejected(
                "no request was done before its sequence was full: raise max_positions, or lower "
                "at_most"
            )

    @property
    def requests(self) -> int:
        """Requests of each sequence: enough for every schedule of those that are not START."""
        return max(MIN_REQUESTS, 3 + len(self._schedules("next")))

    def _schedules(self, flag: RequestFlag) -> list[Schedule]:
        return [each for each in self.instance.manifest.schedules if flag in each.requests]

    def _admit(self, sequence: _Sequence, generator: torch.Generator) -> None:
        sequence.num_requests += 1
        last = sequence.num_requests == self.requests
        if sequence.id == 1 and sequence.num_requests == self.requests - 1:
            sequence.starts = True  # a slot that is used again
        if not self._schedules("next") and not (last and self._schedules("end")):
            sequence.starts = True
        if self.takes_back and not sequence.starts and self._schedules("next"):
            self._take_back(sequence, generator)
        try:
            sequence.active = self.instance.admit(self._request(sequence, generator))
        except RequestError as error:
            if error.code is not Code.CAPACITY:
                raise
            sequence.starts = True
            sequence.active = self.instance.admit(self._request(sequence, generator))
        if sequence.starts:
            sequence.states = self.programs.fresh_states()
        progress = sequence.active.progress
        assert progress is not None
        if last or (sequence.starts and sequence.id == LIMITED_START):
            progress.loops = _limited(progress.loops, 1)
        elif sequence.id > 1 or sequence.num_requests > 1:
            progress.loops = _limited(progress.loops, MOST_CALLS)
        sequence.starts = False

    def _request(
        self, sequence: _Sequence, generator: torch.Generator, *, last: bool | None = None
    ) -> Request:
        """The next request of a sequence; its schedules take turns.

        Args:
            sequence: the sequence.
            generator: of random inputs.
            last: whether it is the last one; None if its number says so.
        """
        end = sequence.num_requests == self.requests if last is None else last
        end = end and bool(self._schedules("end")) and not sequence.starts
        schedules = self._schedules("start" if sequence.starts else "end" if end else "next")
        schedule = schedules[(sequence.id + sequence.num_requests) % len(schedules)]
        self.num_runs[schedule.name] += 1
        interface = self.instance.interfaces[schedule.name]
        inputs = self._inputs(interface, generator, last=end)
        tensors, parameters = _as_sent(interface, inputs)
        return Request(
            sequence.id,
            start=sequence.starts,
            end=end,
            inputs=tensors,
            parameters=parameters,
            requested_outputs=frozenset(spec.name for spec in interface.outputs),
        )

    def _inputs(
        self, interface: Program, generator: torch.Generator, *, last: bool
    ) -> Mapping[str, Tensor]:
        """What a request has: an example, or random numbers; fewer entries where it may."""
        specs = interface.inputs
        names = {spec.name for spec in specs}
        examples = [example for example in self.programs.examples if example.keys() == names]
        if examples:
            self.num_examples += 1
            return examples[self.num_examples % len(examples)]
        inputs = {spec.name: random_input(spec, 1, generator) for spec in specs}
        for spec in specs:
            if spec.shorter == "any" or (spec.shorter == "last" and last):
                # each request of a stream completes one chunk
                most = spec.shape[0] - (spec.lead or 0)
                count = int(torch.randint(1, most + 1, (1,), generator=generator))
                inputs[spec.name] = inputs[spec.name][:, :count]
        return inputs

    def _take_back(self, sequence: _Sequence, generator: torch.Generator) -> None:
        """Make some calls of a request, and take them back."""
        request = self._request(sequence, generator, last=False)
        try:
            active = self.instance.admit(request)
        except RequestError:  # it is full
            return
        for _ in range(CALLS_TAKEN_BACK):
            if not active.finished:
                self.instance.step([active])
        if active.error is None:
            self.instance.restore(active)
        self.instance.finish(active)

    def _call(self, rows: list[ActiveRequest]) -> None:
        """Make a call; check what it changed, and that rows which are done stay as they are."""
        instance = self.instance
        places = [_SchedulePosition.of(row) for row in rows]
        program = instance.programs[places[0].call.program]
        before, inputs = self._memory(), [row.inputs for row in rows]
        outputs = instance.step(rows)
        for row in rows:
            if row.error is not None and row.error.code is not Code.CAPACITY:
                raise rejected(str(row.error))
        for index, row in enumerate(rows):
            if self.calls is not None and row.error is None:
                slot = row.sequence.slot
                used = {name: instance.arena.tensors[name] for name in program.states}
                self.calls.compare(
                    program,
                    inputs[index],
                    {name: before[name][slot].cpu() for name in used},
                    {name: tensor[index].cpu() for name, tensor in outputs.items()},
                    {name: tensor[slot].cpu() for name, tensor in used.items()},
                )
        written = {alias.input for alias in program.aliases}
        for name, tensor in instance.arena.tensors.items():
            if name in written:
                for row in rows:
                    before[name][row.sequence.slot].copy_(tensor[row.sequence.slot])
            if not same_bits(before[name], tensor):
                raise rejected(
                    f"program {program.name} changed bytes of state {name} outside the rows of its "
                    f"call, or which it only reads"
                )
        self.num_mixed_calls += len({place.count for place in places}) > 1
        for index, (place, row) in enumerate(zip(places, rows, strict=True)):
            self._check_end(place, row, {name: bool(outputs[name][index]) for name in place.untils})

    def _check_end(
        self, place: "_SchedulePosition", row: ActiveRequest, done: Mapping[str, bool]
    ) -> None:
        """Call again what a call has ended: its program, and the loop that it is the last of."""
        progress, call, loop = row.progress, place.call, place.loop
        assert progress is not None
        if call.until is not None and done[call.until]:
            self._call_again((call,), call.until, row)
        moved = (progress.loop, progress.rounds, progress.call) != place.indices
        self.num_limits += call.until is not None and moved and not done[call.until]
        if loop.until is None or not moved or not place.is_last:
            return
        if done[loop.until]:
            self._call_again(loop.calls, loop.until, row)
        self.num_limits += progress.loop != place.indices[0] and not done[loop.until]

    def _call_again(self, calls: Sequence[Call], until: str, row: ActiveRequest) -> None:
        """Call programs again for a row that is done: nothing may change."""
        if any(self.instance.full(call.program, row.sequence) for call in calls):
            return  # no row is called that has no room
        before = self._memory()
        self.num_fixed_points += 1
        for call in calls:
            for _ in range(1 if call.until else call.at_most or 1):
                outputs = self._repeat(call.program, until, row)
        where = f"{_title(calls)}, called again for a row that is done ({until}),"
        for state, tensor in self.instance.arena.tensors.items():
            if not same_bits(before[state], tensor):
                raise rejected(
                    f"{where} changes state {state}: a module whose row is done must keep its "
                    f"states (torch.where)"
                )
        if not bool(outputs[until]):
            raise rejected(f"{where} is not done any more")

    def _repeat(self, name: str, until: str, row: ActiveRequest) -> dict[str, Tensor]:
        """Call a program for a row that is done; it may produce no token."""
        program = self.instance.programs[name]
        outputs = self.instance.engines[name].launch(
            form_batch(program, [row]).inputs, [spec.name for spec in program.outputs]
        )(NO_OTHER_THREADS)
        where = f"program {name}, called again for a row that is done ({until}),"
        for spec in program.outputs:
            if spec.role is Role.ACCEPTED and bool(outputs[spec.name].any()):
                raise rejected(f"{where} accepts {outputs[spec.name].tolist()} tokens")
        called = CallOutputs(program, outputs)
        for spec in program.outputs:
            if spec.role is Role.TOKENS and called.tokens[spec.name][0]:
                raise rejected(f"{where} produces the tokens {outputs[spec.name].tolist()}")
        return outputs

    def _memory(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.instance.arena.tensors.items()}

    def _compare(self, sequence: _Sequence, active: ActiveRequest) -> None:
        """Compare a finished request with the original modules."""
        assert active.progress is not None
        sequence.active = None
        self.instance.finish(active)
        if active.error is not None:  # its sequence is full
            sequence.starts = True
            return
        self.num_compared += 1
        if self.calls is not None:
            for spec in self.instance.program.outputs:
                if spec.role is Role.TOKENS:
                    self.tokens |= set(active.outputs[spec.name].flatten().tolist())
            return
        expected = self.programs.run(sequence.states, active.inputs, active.progress.loops)
        for spec in self.instance.program.outputs:
            if spec.name not in expected:
                continue
            output, reference = active.outputs[spec.name], expected[spec.name]
            where = f"output {spec.name} of request {sequence.num_requests} of {sequence.id}"
            if output.dtype.is_floating_point:
                self._check_close(where, output, reference)
            elif not torch.equal(output, reference):
                raise rejected(f"{where} is {output.tolist()}, expected {reference.tolist()}")
            if spec.role is Role.TOKENS:
                self.tokens |= set(output.flatten().tolist())

    def _check_close(self, where: str, output: Tensor, expected: Tensor) -> None:
        if output.shape != expected.shape:
            raise rejected(
                f"{where} has the shape {tuple(output.shape)}, the model's is "
                f"{tuple(expected.shape)}"
            )
        error = relative_error(output, expected)
        self.max_error = max(self.max_error, error)
        manifest = self.instance.manifest
        most = max(tolerance(manifest, program) for program in manifest.programs)
        if not error <= most:
            raise rejected(f"{where} differs from the model by {error:.1e}, more than {most}")

    def check_tokens(self) -> None:
        """BuildError if the tokens prove nothing, because all of them are the same."""
        has_tokens = any(spec.role is Role.TOKENS for spec in self.instance.program.outputs)
        if not has_tokens or len(self.tokens) > 1 or self.programs.constant_tokens:
            return
        sent = "the examples" if self.programs.examples else "random inputs"
        raise rejected(
            f"{sent} gave the tokens {sorted(self.tokens)} only, and an answer that is always the "
            f"same proves nothing: give examples that have different answers "
            f"(capture_programs(examples=…)), or constant_tokens=True if the schedule has but one"
        )

    def notes(self) -> dict[str, str]:
        """What the manifest records."""
        calls = self.calls
        error = self.max_error if calls is None else calls.max_error
        return {
            "verified_error": f"{error:.1e}",
            **({} if calls is None else {"verified_ties": calls.ties}),
            "verified_fixed_points": str(self.num_fixed_points),
            "verified_mixed_calls": str(self.num_mixed_calls),
            "verified_limits": str(self.num_limits),
            "verified_tokens": str(len(self.tokens)),
        }


def _as_sent(
    interface: Program, inputs: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Parameter]]:
    """What a client sends so that programs have these inputs: tensors, and parameters."""
    tensors: dict[str, Tensor] = {}
    parameters: dict[str, Parameter] = {}
    for spec in interface.client_inputs:
        tensor = inputs[spec.name]
        if spec.role is not Role.OPTION:
            tensors[spec.name] = tensor
        elif choice := spec.choices[int(tensor)]:
            parameters[spec.name] = choice
        if spec.sample_rate is not None:
            parameters[SAMPLE_RATE] = spec.sample_rate
    return tensors, parameters


@dataclass(frozen=True)
class _SchedulePosition:
    """Where a request is in its schedule before a call.

    Attributes:
        loop, call: what is called next.
        is_last: whether the call is the last one of a round.
        indices: the indices of loop, round and call.
        count: finished calls at this place.
    """

    loop: Loop
    call: Call
    is_last: bool
    indices: tuple[int, int, int]
    count: int

    @classmethod
    def of(cls, row: ActiveRequest) -> "_SchedulePosition":
        """The place of a request."""
        progress = row.progress
        assert progress is not None
        loop = progress.loops[progress.loop]
        return cls(
            loop,
            progress.next_call,
            progress.call == len(loop.calls) - 1,
            (progress.loop, progress.rounds, progress.call),
            progress.count,
        )

    @property
    def untils(self) -> list[str]:
        """The outputs of the call that say whether something is done."""
        untils = [self.call.until, self.loop.until if self.is_last else None]
        return [until for until in untils if until is not None]


def _title(calls: Sequence[Call]) -> str:
    names = list(dict.fromkeys(call.program for call in calls))
    return f"program {names[0]}" if len(names) == 1 else f"the loop of {', '.join(names)}"


def _limited(loops: tuple[Loop, ...], most: int) -> tuple[Loop, ...]:
    """The same schedule with at most so many calls, and rounds, wherever there is an ``until``."""

    def at_most(each: Call | Loop) -> dict[str, int | None]:
        return {"at_most": min(each.at_most or most, most) if each.until else each.at_most}

    return tuple(
        loop.model_copy(
            update={
                **at_most(loop),
                "calls": tuple(call.model_copy(update=at_most(call)) for call in loop.calls),
            }
        )
        for loop in loops
    )
