"""Steps of programs whose rows may be any slots: one CUDA graph for each captured size, valid for life."""

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from inplace.arena import Arena
from inplace.engines.base import Finish
from inplace.engines.tensorrt.block import Block
from inplace.engines.tensorrt.contexts import Contexts
from inplace.engines.tensorrt.sizes import Size, decode_sizes, fitting, mixed_sizes
from inplace.errors import LoadError
from inplace.manifest import Program


@dataclass(frozen=True, eq=False)
class _Captured:
    """A size that is ready to run."""

    size: Size
    block: Block
    graph: torch.cuda.CUDAGraph | None


class IndirectSteps:
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

    moves_states, ahead = False, True

    def __init__(self, program: Program, arena: Arena, contexts: Contexts, *, graphs: bool) -> None:
        self._program, self._arena, self._contexts, self._graphs = program, arena, contexts, graphs
        self._sizes = decode_sizes(program) + mixed_sizes(program)
        most = max(size.rows for size in self._sizes)
        self._outputs = {spec.name: torch.empty((most, *spec.shape), dtype=spec.dtype.as_torch, device="cuda") for spec in program.outputs}
        self._always = [spec.name for spec in program.outputs if not spec.on_request]
        self._host = {
            name: torch.empty(self._outputs[name].shape, dtype=self._outputs[name].dtype, pin_memory=True) for name in self._always
        }
        # the same memory for numpy, see `Block`
        self._arrays = {name: tensor.numpy() for name, tensor in self._host.items() if tensor.dtype is not torch.bfloat16}
        self._captured: dict[Size, _Captured] = {}
        self.entered = contexts.entered
        self._aliases = {alias.output: arena.tensors[alias.input].data_ptr() for alias in program.aliases}
        self.memory: dict[str, int] = {}

    def warm(self) -> None:
        """Run every size once with null rows only, compare the aliases that plugins see, and capture.

        Raises:
            LoadError: the engine fails, or a state that the manifest says a plugin aliases is not what any plugin was handed.
        """
        device = self._contexts.stream.device
        try:
            for size in reversed(self._sizes):  # the largest first: whatever libraries allocate on first use fits the rest
                block = Block(self._program, size, device)
                with torch.cuda.stream(self._contexts.stream), self._contexts.observed() as seen:
                    self._enqueue(size, block)
                self._contexts.stream.synchronize()
                self._check_aliases(seen)
                graph = self._contexts.capture(lambda s=size, b=block: self._enqueue(s, b)) if self._graphs else None
                self._captured[size] = _Captured(size, block, graph)
        except RuntimeError as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            raise LoadError(f"the engine fails in its first step: {error}; build the model again") from error
        tensors = [*self._outputs.values(), *(tensor for found in self._captured.values() for tensor in found.block.tensors.values())]
        self.memory = {"steps": sum(tensor.nbytes for tensor in tensors)}

    def launch(self, inputs: Mapping[str, Tensor], wanted: Collection[str]) -> Finish:
        """See `Engine.launch`."""
        rows, tokens = step_size(self._program, inputs)
        size = fitting(self._sizes, rows, tokens)
        if size is None:
            raise RuntimeError(f"a step of {rows} rows and {tokens} tokens is larger than the engine was built for")
        found = self._captured[size]
        found.block.fill(inputs)
        with self.entered():
            if found.graph is not None:
                found.graph.replay()
            else:
                self._enqueue(size, found.block)
        return partial(self._finish, rows, wanted)

    def _finish(self, rows: int, wanted: Collection[str], waiting: AbstractContextManager[object]) -> dict[str, Tensor]:
        with waiting:
            self._contexts.stream.synchronize()
        late = {name: self._outputs[name][:rows].cpu() for name in wanted if name not in self._host}
        return late | {name: self._kept(name, rows) for name in self._always if name in wanted}

    def _kept(self, name: str, rows: int) -> Tensor:
        """A copy of what was downloaded."""
        array = self._arrays.get(name)
        return self._host[name][:rows].clone() if array is None else torch.from_numpy(array[:rows].copy())

    def time(self, inputs: Mapping[str, Tensor], count: int) -> float:
        """Microseconds of one step, the mean of ``count`` back to back, uploads and downloads included: for benchmarks.

        The steps repeat: each appends where the one before did.
        """
        size = fitting(self._sizes, *step_size(self._program, inputs))
        assert size is not None
        found = self._captured[size]
        found.block.fill(inputs)
        return timed(
            self._contexts.stream, lambda: found.graph.replay() if found.graph is not None else self._enqueue(size, found.block), count
        )

    def _enqueue(self, size: Size, block: Block) -> None:
        block.upload()
        outputs = {name: tensor[: size.rows] for name, tensor in self._outputs.items()}
        self._contexts.run(size.rows, size.tokens, {**block.tensors, **self._arena.tensors, **outputs}, self._aliases)
        for name in self._always:
            self._host[name][: size.rows].copy_(outputs[name], non_blocking=True)

    def _check_aliases(self, seen: set[int]) -> None:
        declared = {self._arena.tensors[alias.input].data_ptr(): str(alias) for alias in self._program.aliases if alias.kind == "plugin"}
        if missing := sorted(name for address, name in declared.items() if address not in seen):
            raise LoadError(f"no plugin of the plan was handed the memory of {missing}, which the manifest declares; build the model again")
        if extra := seen - declared.keys():
            raise LoadError(f"the plan updates {len(extra)} buffers in place that the manifest does not declare; build the model again")


def step_size(program: Program, inputs: Mapping[str, Tensor]) -> tuple[int, int]:
    """Rows and tokens of a step, from its inputs."""
    from inplace.specs import Role

    rows = next(len(inputs[spec.name]) for spec in program.inputs if spec.role is Role.SLOTS)
    tokens = next((len(inputs[spec.name]) for spec in program.inputs if spec.role is Role.TOKENS), rows)
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
