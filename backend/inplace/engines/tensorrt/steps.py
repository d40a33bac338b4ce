"""Steps of programs whose rows may be any slots: one CUDA graph for each captured size, valid for life.

Steps of programs in which row r must be slot r: TensorRT's own cache layer, and copied states.

A decode step always has a row for every slot; the rows of slots that take no part are null rows. A row with several tokens runs alone,
with its slot's part of every state bound as a state of one slot. A state of the kind ``copy`` has two buffers: a decode step reads one
and writes the other, then they change places, so there is a captured graph for each order.
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from inplace.engines.arena import Arena
from inplace.engines.base import Finish
from inplace.engines.tensorrt.block import Block
from inplace.engines.tensorrt.contexts import Contexts, Size, decode_sizes, fitting, mixed_sizes
from inplace.errors import LoadError
from inplace.schema.served import Program
from inplace.schema.specs import Role


@dataclass(frozen=True, eq=False)
class _Captured:
    """A size that is ready to run."""

    size: Size
    block: Block
    graph: torch.cuda.CUDAGraph | None


class DynamicSlotSteps:
    """Pads a step to a captured size and replays it.

    Args:
        program: what runs.
        arena: its states.
        contexts: the plan's.
        graphs: capture; False launches every step anew.

    Attributes:
        memory: bytes of device memory: ``steps``.
        moves_states: never; states stay where they were bound.
        entered: see `Contexts.entered`.
    """

    moves_states, overlaps = False, True

    def __init__(self, program: Program, arena: Arena, contexts: Contexts, *, graphs: bool) -> None:
        self._program, self._arena, self._contexts, self._graphs = program, arena, contexts, graphs
        self._sizes = decode_sizes(program) + mixed_sizes(program)
        most = max(size.rows for size in self._sizes)
        self._outputs = {
            spec.name: torch.empty((most, *spec.shape), dtype=spec.dtype.as_torch, device="cuda")
            for spec in program.outputs
        }
        self._always = [spec.name for spec in program.outputs if not spec.on_request]
        self._host = {
            name: torch.empty(
                self._outputs[name].shape, dtype=self._outputs[name].dtype, pin_memory=True
            )
            for name in self._always
        }
        # the same memory for numpy, see `Block`
        self._arrays = {
            name: tensor.numpy()
            for name, tensor in self._host.items()
            if tensor.dtype is not torch.bfloat16
        }
        self._captured: dict[Size, _Captured] = {}
        self.entered = contexts.entered
        self._aliases = {
            alias.output: arena.tensors[alias.input].data_ptr() for alias in program.aliases
        }
        self.memory: dict[str, int] = {}

    def warm(self) -> None:
        """Run every size once with null rows only, compare the aliases that plugins see, and capture.

        Raises:
            LoadError: the engine fails, or a state that the manifest says a plugin aliases is not what any plugin was handed.
        """
        device = self._contexts.stream.device
        try:
            for size in reversed(
                self._sizes
            ):  # the largest first: whatever libraries allocate on first use fits the rest
                block = Block(self._program, size, device)
                with torch.cuda.stream(self._contexts.stream), self._contexts.observed() as seen:
                    self._enqueue(size, block)
                self._contexts.stream.synchronize()
                self._check_aliases(seen)
                graph = (
                    self._contexts.capture(lambda s=size, b=block: self._enqueue(s, b))
                    if self._graphs
                    else None
                )
                self._captured[size] = _Captured(size, block, graph)
        except RuntimeError as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            raise LoadError(
                f"the engine fails in its first step: {error}; build the model again"
            ) from error
        tensors = [
            *self._outputs.values(),
            *(
                tensor
                for found in self._captured.values()
                for tensor in found.block.tensors.values()
            ),
        ]
        self.memory = {"steps": sum(tensor.nbytes for tensor in tensors)}

    def launch(self, inputs: Mapping[str, Tensor], wanted: Collection[str]) -> Finish:
        """See `Engine.launch`."""
        rows, tokens = step_size(self._program, inputs)
        size = fitting(self._sizes, rows, tokens)
        if size is None:
            raise RuntimeError(
                f"a step of {rows} rows and {tokens} tokens is larger than the engine was built for"
            )
        found = self._captured[size]
        found.block.fill(inputs)
        with self.entered():
            if found.graph is not None:
                found.graph.replay()
            else:
                self._enqueue(size, found.block)
        return partial(self._finish, rows, wanted)

    def _finish(
        self, rows: int, wanted: Collection[str], waiting: AbstractContextManager[object]
    ) -> dict[str, Tensor]:
        with waiting:
            self._contexts.stream.synchronize()
        late = {name: self._outputs[name][:rows].cpu() for name in wanted if name not in self._host}
        return late | {name: self._kept(name, rows) for name in self._always if name in wanted}

    def _kept(self, name: str, rows: int) -> Tensor:
        """A copy of what was downloaded."""
        array = self._arrays.get(name)
        return (
            self._host[name][:rows].clone()
            if array is None
            else torch.from_numpy(array[:rows].copy())
        )

    def time(self, inputs: Mapping[str, Tensor], count: int) -> float:
        """Microseconds of one step, the mean of ``count`` back to back, uploads and downloads included: for benchmarks.

        The steps repeat: each appends where the one before did.
        """
        size = fitting(self._sizes, *step_size(self._program, inputs))
        assert size is not None
        found = self._captured[size]
        found.block.fill(inputs)
        return timed(
            self._contexts.stream,
            lambda: (
                found.graph.replay()
                if found.graph is not None
                else self._enqueue(size, found.block)
            ),
            count,
        )

    def _enqueue(self, size: Size, block: Block) -> None:
        block.upload()
        outputs = {name: tensor[: size.rows] for name, tensor in self._outputs.items()}
        self._contexts.run(
            size.rows,
            size.tokens,
            {**block.tensors, **self._arena.tensors, **outputs},
            self._aliases,
        )
        for name in self._always:
            self._host[name][: size.rows].copy_(outputs[name], non_blocking=True)

    def _check_aliases(self, seen: set[int]) -> None:
        declared = {
            self._arena.tensors[alias.input].data_ptr(): str(alias)
            for alias in self._program.aliases
            if alias.kind == "plugin"
        }
        if missing := sorted(name for address, name in declared.items() if address not in seen):
            raise LoadError(
                f"no plugin of the plan was handed the memory of {missing}, which the manifest declares; build the model again"
            )
        if extra := seen - declared.keys():
            raise LoadError(
                f"the plan updates {len(extra)} buffers in place that the manifest does not declare; build the model again"
            )


def step_size(program: Program, inputs: Mapping[str, Tensor]) -> tuple[int, int]:
    """Rows and tokens of a step, from its inputs."""
    from inplace.schema.specs import Role

    rows = next(len(inputs[spec.name]) for spec in program.inputs if spec.role is Role.SLOTS)
    tokens = next(
        (len(inputs[spec.name]) for spec in program.inputs if spec.role is Role.TOKENS), rows
    )
    return rows, tokens


def timed(stream: torch.cuda.Stream, work: Callable[[], object], count: int) -> float:
    """Microseconds of one call's work on the stream, the mean of ``count`` enqueued back to back."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        work()
        begin.record()
        for _ in range(count):
            work()
        end.record()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / count * 1e3


PACKED = (Role.TOKENS, Role.POSITIONS)


class StaticSlotSteps:
    """Runs a step as one decode step over all slots, and one step for each row with more tokens.

    Args:
        program: what runs.
        arena: its states.
        contexts: the plan's.
        graphs: capture decode steps; False launches every step anew.

    Attributes:
        memory: bytes of device memory: ``steps``, and ``copies``, the second buffers.
        moves_states: whether states change places with their second buffer.
        entered: see `Contexts.entered`.
    """

    overlaps = False

    def __init__(self, program: Program, arena: Arena, contexts: Contexts, *, graphs: bool) -> None:
        self._program, self._arena, self._contexts, self._capture = program, arena, contexts, graphs
        self._size = Size(arena.slots, arena.slots)
        self._copied = {alias.input for alias in program.aliases if alias.kind == "copy"}
        first = dict(arena.tensors)
        second = {
            name: tensor.clone() if name in self._copied else tensor
            for name, tensor in first.items()
        }
        self._buffers = (first, second)
        self._turn = 0
        self.moves_states = bool(self._copied)
        self.entered = contexts.entered
        self._outputs = {
            spec.name: torch.empty(
                (arena.slots, *spec.shape), dtype=spec.dtype.as_torch, device="cuda"
            )
            for spec in program.outputs
        }
        self._block = Block(program, self._size, contexts.stream.device)
        self._graphs: list[torch.cuda.CUDAGraph | None] = []
        copies = sum(second[name].nbytes for name in self._copied)
        steps = sum(
            tensor.nbytes for tensor in (*self._outputs.values(), *self._block.tensors.values())
        )
        self.memory = {"copies": copies, "steps": steps}

    def warm(self) -> None:
        """Run a decode step of null rows in each order of the buffers, and capture it.

        Raises:
            LoadError: the engine fails.
        """
        try:
            for turn in range(2 if self._copied else 1):
                self._block.fill({})
                with torch.cuda.stream(self._contexts.stream):
                    self._decode(turn)
                self._contexts.stream.synchronize()
                self._graphs.append(
                    self._contexts.capture(lambda t=turn: self._decode(t))
                    if self._capture
                    else None
                )
        except RuntimeError as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            raise LoadError(
                f"the engine fails in its first step: {error}; build the model again"
            ) from error

    def launch(self, inputs: Mapping[str, Tensor], wanted: Collection[str]) -> Finish:
        """See `Engine.launch`."""
        return partial(self._step, inputs, wanted)

    def _step(
        self,
        inputs: Mapping[str, Tensor],
        wanted: Collection[str],
        waiting: AbstractContextManager[object],
    ) -> dict[str, Tensor]:
        slots = self._of(inputs, Role.SLOTS)
        bounds = (
            self._of(inputs, Role.ROW_OFFSETS)
            if self._has(Role.ROW_OFFSETS)
            else list(range(len(slots) + 1))
        )
        single = [row for row in range(len(slots)) if bounds[row + 1] - bounds[row] == 1]
        found: dict[str, Tensor] = {
            spec.name: torch.empty((len(slots), *spec.shape), dtype=spec.dtype.as_torch)
            for spec in self._program.outputs
            if spec.name in wanted
        }
        with waiting, self.entered():
            for row in sorted(set(range(len(slots))) - set(single)):
                outputs = self._alone(inputs, row, slots[row], bounds[row], bounds[row + 1])
                for name, target in found.items():
                    target[row] = outputs[name][0].cpu()
            if single:
                self._together(inputs, single, slots, bounds)
                places = [slots[row] for row in single]
                for name, target in found.items():
                    target[single] = self._outputs[name].cpu()[places]
        self._contexts.stream.synchronize()
        return found

    def _together(
        self, inputs: Mapping[str, Tensor], rows: list[int], slots: list[int], bounds: list[int]
    ) -> None:
        """One decode step; row r of the step becomes row ``slots[r]``."""
        places = torch.tensor([slots[row] for row in rows])
        tokens = torch.tensor([bounds[row] for row in rows])
        spread: dict[str, Tensor] = {}
        for spec in self._program.inputs:
            source = inputs[spec.name]
            if spec.role in (Role.ROW_OFFSETS, Role.LAST_TOKENS):
                spread[spec.name] = torch.arange(
                    self._size.rows + (spec.role is Role.ROW_OFFSETS), dtype=source.dtype
                )
                continue
            target = torch.full(
                (self._size.rows, *source.shape[1:]),
                -1 if spec.role is Role.SLOTS else 0,
                dtype=source.dtype,
            )
            target[places] = source[tokens] if spec.role in PACKED else source[rows]
            spread[spec.name] = target
        self._block.fill(spread)
        self._replay()

    def time(self, inputs: Mapping[str, Tensor], count: int) -> float:
        """As `DynamicSlotSteps.time`, for a step of one token a row."""
        slots = self._of(inputs, Role.SLOTS)
        self._together(inputs, list(range(len(slots))), slots, list(range(len(slots) + 1)))
        return timed(self._contexts.stream, self._replay, 2 * count)

    def _replay(self) -> None:
        graph = self._graphs[self._turn]
        if graph is None:
            self._decode(self._turn)
        else:
            graph.replay()
        if self._copied:
            self._turn = 1 - self._turn
            for name in self._copied:
                self._arena.rebind(name, self._buffers[self._turn][name])

    def _decode(self, turn: int) -> None:
        self._block.upload()
        now, then = self._buffers[turn], self._buffers[1 - turn if self._copied else turn]
        aliases = {alias.output: then[alias.input].data_ptr() for alias in self._program.aliases}
        self._contexts.run(
            self._size.rows,
            self._size.tokens,
            {**self._block.tensors, **now, **self._outputs},
            aliases,
        )

    def _alone(
        self, inputs: Mapping[str, Tensor], row: int, slot: int, start: int, end: int
    ) -> dict[str, Tensor]:
        """A row of several tokens, its slot bound as a state of one slot."""
        now, then = (
            self._buffers[self._turn],
            self._buffers[1 - self._turn if self._copied else self._turn],
        )
        tensors: dict[str, Tensor] = {}
        for spec in self._program.inputs:
            source = inputs[spec.name]
            match spec.role:
                case Role.TOKENS | Role.POSITIONS:
                    value = source[start:end]
                case Role.ROW_OFFSETS:
                    value = torch.tensor([0, end - start], dtype=source.dtype)
                case Role.LAST_TOKENS:
                    value = torch.tensor([end - start - 1], dtype=source.dtype)
                case Role.SLOTS:
                    value = torch.zeros(1, dtype=source.dtype)
                case _:
                    value = source[row : row + 1]
            tensors[spec.name] = value.to("cuda")
        outputs = {name: tensor[:1] for name, tensor in self._outputs.items()}
        states = {name: tensor[slot : slot + 1] for name, tensor in now.items()}
        aliases = {
            alias.output: then[alias.input][slot].data_ptr() for alias in self._program.aliases
        }
        self._contexts.run(1, end - start, {**tensors, **states, **outputs}, aliases)
        for name in self._copied:
            now[name][slot].copy_(then[name][slot])
        return outputs

    def _has(self, role: Role) -> bool:
        return any(spec.role is role for spec in self._program.inputs)

    def _of(self, inputs: Mapping[str, Tensor], role: Role) -> list[int]:
        found: list[int] = next(
            inputs[spec.name] for spec in self._program.inputs if spec.role is role
        ).tolist()
        return found
