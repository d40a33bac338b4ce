"""Steps of a TensorRT plan in which row r must be slot r.

TensorRT's own cache layer needs that, and so do copied states.
"""

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

from inplace.engines.arena import Arena
from inplace.engines.base import Finish
from inplace.engines.tensorrt.plan import ExecutionContexts
from inplace.engines.tensorrt.steps import (
    InputBuffers,
    StepSize,
    first_step,
    on_stream,
    timed,
)
from inplace.schema.programs import Program
from inplace.schema.specs import PACKED_ROLES, Role


class StaticSlotSteps:
    """Runs a step as one decode step over all slots, and one step for each row with more tokens.

    A decode step has a row for every slot; slots that take no part are null rows. A row with
    several tokens runs by itself, with its slot of every state bound as a state of one slot.

    A state of the kind ``copy`` has two buffers. A decode step reads one and writes the other, then
    they swap, so there is a captured graph for each order.

    Args:
        program: the program to run.
        arena: its states.
        contexts: the execution contexts of its plan.
        graphs: whether to capture decode steps; False launches every step kernel by kernel.

    Attributes:
        memory: bytes of device memory by what they are for: ``steps``, and ``copies``, the second
            buffers.
        moves_states: whether states swap with their second buffers.
        on_stream: `inplace.engines.tensorrt.steps.on_stream` of the contexts' stream.
        overlaps: False, see `inplace.engines.base.StepEngine`.
    """

    overlaps = False

    def __init__(
        self, program: Program, arena: Arena, contexts: ExecutionContexts, *, graphs: bool
    ) -> None:
        self._program, self._arena, self._contexts, self._capture = program, arena, contexts, graphs
        self._size = StepSize(arena.slots, arena.slots)
        self._names = {spec.role: spec.name for spec in program.inputs}
        self._copied = {alias.input for alias in program.aliases if alias.kind == "copy"}
        first = dict(arena.tensors)
        second = {
            name: tensor.clone() if name in self._copied else tensor
            for name, tensor in first.items()
        }
        self._buffers = (first, second)
        self._current = 0
        self.moves_states = bool(self._copied)
        self.on_stream = partial(on_stream, contexts.stream)
        self._outputs = {
            spec.name: torch.empty(
                (arena.slots, *spec.shape), dtype=spec.dtype.as_torch, device="cuda"
            )
            for spec in program.outputs
        }
        self._inputs = InputBuffers(program, self._size, contexts.stream.device)
        self._graphs: list[torch.cuda.CUDAGraph | None] = []
        copies = sum(second[name].nbytes for name in self._copied)
        steps = sum(
            tensor.nbytes for tensor in (*self._outputs.values(), *self._inputs.tensors.values())
        )
        self.memory = {"copies": copies, "steps": steps}

    def warm_up(self) -> None:
        """Run a decode step of null rows in each order of the buffers, and capture it.

        Raises:
            LoadError: the engine fails.
        """
        with first_step():
            for current in range(2 if self._copied else 1):
                self._inputs.fill({})
                with torch.cuda.stream(self._contexts.stream):
                    self._enqueue_decode(current)
                self._contexts.stream.synchronize()
                self._graphs.append(
                    self._contexts.capture(partial(self._enqueue_decode, current))
                    if self._capture
                    else None
                )

    def launch(self, inputs: Mapping[str, Tensor], requested: Collection[str]) -> Finish:
        """Prepare a step, see `inplace.engines.base.StepEngine.launch`; it runs when finished."""
        return partial(self._step, inputs, requested)

    def _step(
        self,
        inputs: Mapping[str, Tensor],
        requested: Collection[str],
        while_waiting: AbstractContextManager[object],
    ) -> dict[str, Tensor]:
        slots = self._values(inputs, Role.SLOTS)
        offsets = (
            self._values(inputs, Role.ROW_OFFSETS)
            if Role.ROW_OFFSETS in self._names
            else list(range(len(slots) + 1))
        )
        decoding = [row for row in range(len(slots)) if offsets[row + 1] - offsets[row] == 1]
        results: dict[str, Tensor] = {
            spec.name: torch.empty((len(slots), *spec.shape), dtype=spec.dtype.as_torch)
            for spec in self._program.outputs
            if spec.name in requested
        }
        with while_waiting, self.on_stream():
            for row in sorted(set(range(len(slots))) - set(decoding)):
                outputs = self._prefill(inputs, row, slots[row], offsets[row], offsets[row + 1])
                for name, result in results.items():
                    result[row] = outputs[name][0].cpu()
            if decoding:
                self._decode(inputs, decoding, slots, offsets)
                places = [slots[row] for row in decoding]
                for name, result in results.items():
                    result[decoding] = self._outputs[name].cpu()[places]
        self._contexts.stream.synchronize()
        return results

    def _decode(
        self, inputs: Mapping[str, Tensor], rows: list[int], slots: list[int], offsets: list[int]
    ) -> None:
        """Run one decode step; row r of the request becomes row ``slots[r]`` of it."""
        places = torch.tensor([slots[row] for row in rows])
        tokens = torch.tensor([offsets[row] for row in rows])
        scattered: dict[str, Tensor] = {}
        for spec in self._program.inputs:
            source = inputs[spec.name]
            if spec.role in (Role.ROW_OFFSETS, Role.LAST_TOKENS):
                scattered[spec.name] = torch.arange(
                    self._size.rows + (spec.role is Role.ROW_OFFSETS), dtype=source.dtype
                )
                continue
            target = torch.full(
                (self._size.rows, *source.shape[1:]),
                -1 if spec.role is Role.SLOTS else 0,
                dtype=source.dtype,
            )
            target[places] = source[tokens] if spec.role in PACKED_ROLES else source[rows]
            scattered[spec.name] = target
        self._inputs.fill(scattered)
        self._replay()

    def time(self, inputs: Mapping[str, Tensor], count: int) -> float:
        """As `DynamicSlotSteps.time`, for a step of one token a row."""
        slots = self._values(inputs, Role.SLOTS)
        self._decode(inputs, list(range(len(slots))), slots, list(range(len(slots) + 1)))
        return timed(self._contexts.stream, self._replay, 2 * count)

    def _replay(self) -> None:
        graph = self._graphs[self._current]
        if graph is None:
            self._enqueue_decode(self._current)
        else:
            graph.replay()
        if self._copied:
            self._current = 1 - self._current
            for name in self._copied:
                self._arena.rebind(name, self._buffers[self._current][name])

    def _enqueue_decode(self, current: int) -> None:
        self._inputs.upload()
        read, written = self._read_and_written(current)
        aliases = {alias.output: written[alias.input].data_ptr() for alias in self._program.aliases}
        self._contexts.enqueue(
            self._size.rows,
            self._size.tokens,
            {**self._inputs.tensors, **read, **self._outputs},
            aliases,
        )

    def _read_and_written(self, current: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The states that a step reads and writes; the same where nothing is copied."""
        return self._buffers[current], self._buffers[1 - current if self._copied else current]

    def _prefill(
        self, inputs: Mapping[str, Tensor], row: int, slot: int, start: int, end: int
    ) -> dict[str, Tensor]:
        """Run one row of several tokens, its slot bound as a state of one slot."""
        read, written = self._read_and_written(self._current)
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
        states = {name: tensor[slot : slot + 1] for name, tensor in read.items()}
        aliases = {
            alias.output: written[alias.input][slot].data_ptr() for alias in self._program.aliases
        }
        self._contexts.enqueue(1, end - start, {**tensors, **states, **outputs}, aliases)
        for name in self._copied:
            read[name][slot].copy_(written[name][slot])
        return outputs

    def _values(self, inputs: Mapping[str, Tensor], role: Role) -> list[int]:
        """The numbers in the input with this role."""
        values: list[int] = inputs[self._names[role]].tolist()
        return values
