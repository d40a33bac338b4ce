"""Steps of a TensorRT plan: padded to a captured size, replayed as a CUDA graph.

`DynamicSlotSteps` runs programs whose rows may use any slots,
`inplace.engines.tensorrt.static_steps` the others.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inplace.engines.arena import Arena
from inplace.engines.base import Finish
from inplace.engines.tensorrt.plan import ExecutionContexts
from inplace.errors import LoadError
from inplace.operators.float8 import FLOAT8
from inplace.schema.programs import CompiledProgram, Program
from inplace.schema.specs import (
    CLIENT_ROLES,
    PACKED_ROLES,
    PROMPT_LOGPROB_ROLES,
    Role,
    TensorSpec,
)

DECODE_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Rows of captured decode steps; a step is padded to the next."""


MIN_MIXED_TOKENS = 16
"""Tokens of the smallest captured mixed step."""


ALIGNMENT = 256
"""Bytes; TensorRT requires every binding at a multiple."""


ADJUSTMENT_ROLES = (Role.ADJUSTED_TOKENS, Role.ADJUSTMENTS, Role.TOKEN_MASK)
"""Roles of inputs that lie in `AdjustmentBuffers`."""


def on_stream(stream: torch.cuda.Stream) -> AbstractContextManager[object]:
    """Make a stream that of the thread inside the block.

    Work on it starts after what the thread has enqueued on its present stream.
    """
    caller = torch.cuda.current_stream()
    if caller == stream:
        return contextlib.nullcontext()
    stream.wait_stream(caller)
    return torch.cuda.stream(stream)


@dataclass(frozen=True)
class StepSize:
    """The size of a step.

    Attributes:
        rows: how many rows it has.
        tokens: tokens of all rows together: ``rows`` in a decode step, more in a mixed step.
    """

    rows: int
    tokens: int

    @property
    def is_decode(self) -> bool:
        """Whether every row has exactly one token."""
        return self.rows == self.tokens


def step_size(program: Program, inputs: Mapping[str, Tensor]) -> StepSize:
    """The size of the step that has these inputs."""
    rows = next(len(inputs[spec.name]) for spec in program.inputs if spec.role is Role.SLOTS)
    tokens = next(
        (len(inputs[spec.name]) for spec in program.inputs if spec.role is Role.TOKENS), rows
    )
    return StepSize(rows, tokens)


def decode_sizes(program: Program) -> list[StepSize]:
    """The decode steps to capture, smallest first; the largest has every row."""
    rows = [count for count in DECODE_ROWS if count < program.max_rows]
    return [StepSize(count, count) for count in (*rows, program.max_rows)]


def mixed_sizes(program: Program) -> list[StepSize]:
    """The mixed steps to capture, smallest first.

    Each has one row more than a step can have: a null row that owns the padding tokens.
    """
    if program.chunk == 1:
        return []
    rows, tokens = program.max_rows + 1, MIN_MIXED_TOKENS
    while tokens <= rows:
        tokens *= 2
    counts = [tokens]
    while counts[-1] < program.token_budget:
        counts.append(min(2 * counts[-1], max(program.token_budget, rows + 1)))
    return [StepSize(rows, count) for count in counts]


def smallest_fit(sizes: list[StepSize], step: StepSize) -> StepSize | None:
    """The first of these sizes that a step fits into; a decode step fits only a decode size."""
    for size in sizes:
        if (
            size.is_decode == step.is_decode
            and size.rows >= step.rows
            and size.tokens >= step.tokens
        ):
            return size
    return None


def output_shape(spec: TensorSpec, size: StepSize) -> tuple[int, ...]:
    """The shape of an output in steps of a size: of its rows, or of its tokens."""
    if spec.role in PROMPT_LOGPROB_ROLES:
        return (size.tokens, *spec.shape[1:])
    return (size.rows, *spec.shape)


def _as_words(state: Tensor) -> Tensor:
    """The memory of a state as a network has it: four 8-bit floats are a word of 32 bits."""
    return state.view(torch.int32) if state.dtype == FLOAT8 else state


class InputBuffers:
    """The inputs of one captured size.

    All but those of `AdjustmentBuffers` lie in one pinned buffer on the host and one buffer on the
    device, so a step uploads them with one copy.

    Args:
        program: the program whose inputs they are.
        size: the captured size.
        device: where the device buffer is.

    Attributes:
        tensors: the device tensors by name; their addresses never change.
    """

    def __init__(self, program: Program, size: StepSize, device: torch.device) -> None:
        self._size = size
        self._specs = [spec for spec in program.inputs if spec.role not in ADJUSTMENT_ROLES]
        offsets, end = [], 0
        for spec in self._specs:
            offsets.append(end)
            count = torch.Size(self._shape(spec)).numel() * spec.dtype.as_torch.itemsize
            end += -(-max(count, 1) // ALIGNMENT) * ALIGNMENT
        self._pinned = torch.zeros(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.zeros(end, dtype=torch.uint8, device=device)
        self._host = self._views(self._pinned, offsets)
        # NumPy views of the pinned buffer: NumPy keeps the GIL while it copies a few numbers, so
        # a step need not wait for it once for each input.
        self._arrays = _numpy_views(self._host)
        self._filled: Mapping[str, Tensor] = {}
        self.tensors: Mapping[str, Tensor] = self._views(self._device, offsets)
        self.fill({})

    def _shape(self, spec: TensorSpec) -> tuple[int, ...]:
        match spec.role:
            case Role.TOKENS:
                return (self._size.tokens, *spec.shape[1:])
            case role if role in PACKED_ROLES:
                return (self._size.tokens,)
            case Role.ROW_OFFSETS:
                return (self._size.rows + 1,)
            case _:
                return (self._size.rows, *spec.shape)

    def _views(self, memory: Tensor, offsets: list[int]) -> dict[str, Tensor]:
        views = {}
        for spec, offset in zip(self._specs, offsets, strict=True):
            shape, dtype = self._shape(spec), spec.dtype.as_torch
            count = torch.Size(shape).numel() * dtype.itemsize
            views[spec.name] = memory[offset : offset + count].view(dtype).view(shape)
        return views

    def fill(self, inputs: Mapping[str, Tensor]) -> None:
        """Write a step's inputs into the pinned buffer and pad them with null rows.

        Inputs that are not given are padding throughout. A tensor that the step before had too is
        not written again: callers never change a tensor that they have passed.
        """
        previous, self._filled = self._filled, {}
        for spec in self._specs:
            target, source = self._arrays.get(spec.name), inputs.get(spec.name)
            if source is not None and source is previous.get(spec.name):
                continue
            if target is None:
                self._fill_bfloat16(spec, source)
                continue
            count = 0 if source is None else source.shape[0]
            if source is not None:
                target[:count] = source.numpy()
            if count < len(target):
                is_offsets = spec.role is Role.ROW_OFFSETS
                last_offset = int(source[-1]) if is_offsets and source is not None else 0
                target[count:] = self._padding(spec, last_offset)
                if is_offsets:
                    self._pad_offsets(target, count)
        self._filled = inputs

    def _fill_bfloat16(self, spec: TensorSpec, source: Tensor | None) -> None:
        """Fill an input of a type that NumPy does not have."""
        target, count = self._host[spec.name], 0 if source is None else source.shape[0]
        if source is not None:
            target[:count].copy_(source)
        target[count:].fill_(self._padding(spec, 0))

    def _padding(self, spec: TensorSpec, last_offset: int) -> int:
        if spec.role is Role.SLOTS:
            return -1
        if spec.role is Role.ROW_OFFSETS:
            return last_offset
        if spec.role in CLIENT_ROLES:
            return max(spec.minimum or 0, 0)
        return 0

    def _pad_offsets(self, offsets: NDArray[Any], count: int) -> None:
        """Give each null row of a decode step one token, and the last of a mixed step the rest."""
        if self._size.is_decode:
            offsets[count:] = np.arange(count, len(offsets))
        else:
            offsets[-1] = self._size.tokens

    def upload(self) -> None:
        """Copy the pinned buffer to the device, on the current stream."""
        self._device.copy_(self._pinned, non_blocking=True)


class AdjustmentBuffers:
    """The inputs that say how scores are adjusted: large, and used by few requests.

    All captured sizes share one buffer. A step uploads the lists only if it has rows with entries,
    the masks only if it has rows with masks, and both only if they have changed.

    Args:
        program: the program whose inputs they are.
        rows: the most rows of a step.
        device: where the device buffers are.
    """

    def __init__(self, program: Program, rows: int, device: torch.device) -> None:
        specs = [spec for spec in program.inputs if spec.role in ADJUSTMENT_ROLES]
        counts = [spec.name for spec in program.inputs if spec.role is Role.NUM_ADJUSTED]
        self._num_adjusted = counts[0] if counts else None
        self._host, self._device = (
            {
                spec.name: torch.zeros(
                    (rows, *spec.shape),
                    dtype=spec.dtype.as_torch,
                    device=place,
                    pin_memory=place.type == "cpu" and device.type == "cuda",
                )
                for spec in specs
            }
            for place in (torch.device("cpu"), device)
        )
        self._masks = [spec.name for spec in specs if spec.role is Role.TOKEN_MASK]
        self._uploaded: dict[str, Tensor] = {}

    def tensors(self, rows: int) -> dict[str, Tensor]:
        """The device tensors of so many rows by name; their addresses never change."""
        return {name: tensor[:rows] for name, tensor in self._device.items()}

    def upload(self, inputs: Mapping[str, Tensor]) -> None:
        """Copy a step's inputs to the device, on the current stream, if that is needed."""
        if self._num_adjusted is None:
            return
        numbers = inputs[self._num_adjusted].numpy()
        if not numbers.any():
            return
        masked = numbers < 0
        listed = (numbers != 0) & (numbers != -1)
        for name in self._host:
            used = (masked if name in self._masks else listed).nonzero()[0]
            source = inputs[name]
            if not len(used) or source is self._uploaded.get(name):
                continue
            rows = slice(int(used[0]), int(used[-1]) + 1)
            self._host[name][rows].copy_(source[rows])
            self._device[name][rows].copy_(self._host[name][rows], non_blocking=True)
            self._uploaded[name] = source


def _numpy_views(tensors: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """NumPy arrays over the same memory, without tensors of a type that NumPy does not have."""
    return {
        name: tensor.numpy()
        for name, tensor in tensors.items()
        if tensor.dtype is not torch.bfloat16
    }


@contextlib.contextmanager
def first_step() -> Iterator[None]:
    """Raise what goes wrong in the block as a LoadError, but for exhausted device memory."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise LoadError(
            f"the engine fails in its first step: {error}; build the model again"
        ) from error


@dataclass(frozen=True, eq=False)
class CapturedStep:
    """A size that is ready to run.

    Attributes:
        size: the size.
        inputs: its inputs.
        graph: its CUDA graph; None where steps are launched kernel by kernel.
    """

    size: StepSize
    inputs: InputBuffers
    graph: torch.cuda.CUDAGraph | None


class DynamicSlotSteps:
    """Pads a step to a captured size and replays its CUDA graph.

    Args:
        program: the program to run.
        arena: its states.
        contexts: the execution contexts of its plan.
        graphs: whether to capture; False launches every step kernel by kernel.

    Attributes:
        memory: bytes of device memory by what they are for: ``steps``.
        moves_states: False: states stay where they were bound.
        on_stream: `on_stream` of the contexts' stream.
        overlaps: True, see `inplace.engines.base.StepEngine`.
    """

    moves_states, overlaps = False, True

    def __init__(
        self,
        program: CompiledProgram,
        arena: Arena,
        contexts: ExecutionContexts,
        *,
        graphs: bool,
    ) -> None:
        self._program, self._arena, self._contexts, self._graphs = program, arena, contexts, graphs
        self._sizes = decode_sizes(program) + mixed_sizes(program)
        largest = StepSize(
            max(size.rows for size in self._sizes), max(size.tokens for size in self._sizes)
        )
        self._adjustments = AdjustmentBuffers(program, largest.rows, contexts.stream.device)
        self._outputs = {
            spec.name: torch.empty(
                output_shape(spec, largest), dtype=spec.dtype.as_torch, device="cuda"
            )
            for spec in program.outputs
        }
        self._per_token = {
            spec.name for spec in program.outputs if spec.role in PROMPT_LOGPROB_ROLES
        }
        self._downloaded = [spec.name for spec in program.outputs if not spec.on_request]
        self._host = {
            name: torch.empty(
                self._outputs[name].shape, dtype=self._outputs[name].dtype, pin_memory=True
            )
            for name in self._downloaded
        }
        self._arrays = _numpy_views(self._host)  # see `InputBuffers`
        self._captured: dict[StepSize, CapturedStep] = {}
        self._repeated: dict[str, Tensor] = {}
        self.on_stream = partial(on_stream, contexts.stream)
        self._states = {name: _as_words(arena.tensors[name]) for name in program.states}
        self._aliases = {
            alias.output: arena.tensors[alias.input].data_ptr() for alias in program.aliases
        }
        self.memory: dict[str, int] = {}

    def warm_up(self) -> None:
        """Run every size once with null rows only, compare the aliases of plugins, and capture.

        Raises:
            LoadError: the engine fails, or no plugin got the memory of a state that the manifest
                says a plugin aliases.
        """
        device = self._contexts.stream.device
        with first_step():
            # The largest size comes first: what libraries allocate for it is enough for the rest.
            for size in reversed(self._sizes):
                inputs = InputBuffers(self._program, size, device)
                with (
                    torch.cuda.stream(self._contexts.stream),
                    self._contexts.observe_aliases() as addresses,
                ):
                    self._enqueue(size, inputs)
                self._contexts.stream.synchronize()
                self._check_aliases(addresses)
                graph = (
                    self._contexts.capture(partial(self._enqueue, size, inputs))
                    if self._graphs
                    else None
                )
                self._captured[size] = CapturedStep(size, inputs, graph)
        tensors = [
            *self._outputs.values(),
            *self._adjustments.tensors(self._sizes[-1].rows).values(),
            *(
                tensor
                for captured in self._captured.values()
                for tensor in captured.inputs.tensors.values()
            ),
        ]
        self.memory = {"steps": sum(tensor.nbytes for tensor in tensors)}

    def launch(self, inputs: Mapping[str, Tensor], requested: Collection[str]) -> Finish:
        """Launch a step, see `inplace.engines.base.StepEngine.launch`.

        Raises:
            RuntimeError: no captured size fits, or TensorRT or a plugin failed.
        """
        step, captured = self._fill(inputs)
        with self.on_stream():
            self._adjustments.upload(inputs)
            self._replay(captured)
        return partial(self._finish, step, requested)

    def launch_repeated(
        self, inputs: Mapping[str, Tensor], requested: Collection[str], count: int
    ) -> Finish:
        """Launch several steps, see `inplace.engines.base.StepEngine.launch_repeated`.

        Each replay writes its outputs to the same memory, so they are copied to the host in
        between, on the stream.

        Raises:
            RuntimeError: as `launch`.
        """
        step, captured = self._fill(inputs)
        kept = {name: self._repeated_memory(name, count) for name in requested}
        with self.on_stream():
            for index in range(count):
                self._replay(captured)
                for name, memory in kept.items():
                    copied = self._outputs[name][: step.rows]
                    memory[index, : step.rows].copy_(copied, non_blocking=True)
        return partial(self._finish_repeated, step.rows, kept)

    def _fill(self, inputs: Mapping[str, Tensor]) -> tuple[StepSize, CapturedStep]:
        """The size of a step, and the captured one that it was written to."""
        step = step_size(self._program, inputs)
        size = smallest_fit(self._sizes, step)
        if size is None:
            raise RuntimeError(
                f"a step of {step.rows} rows and {step.tokens} tokens is larger than the engine "
                "was built for"
            )
        captured = self._captured[size]
        captured.inputs.fill(inputs)
        return step, captured

    def _repeated_memory(self, name: str, count: int) -> Tensor:
        """Pinned memory for an output of so many steps, ``[count, rows, ...]``."""
        memory, output = self._repeated.get(name), self._outputs[name]
        if memory is None or memory.shape[0] < count:
            memory = self._repeated[name] = torch.empty(
                (count, *output.shape), dtype=output.dtype, pin_memory=True
            )
        return memory[:count]

    def _finish_repeated(
        self,
        rows: int,
        kept: Mapping[str, Tensor],
        while_waiting: AbstractContextManager[object],
    ) -> dict[str, Tensor]:
        with while_waiting:
            self._contexts.stream.synchronize()
        return {name: memory[:, :rows].clone() for name, memory in kept.items()}

    def _finish(
        self,
        step: StepSize,
        requested: Collection[str],
        while_waiting: AbstractContextManager[object],
    ) -> dict[str, Tensor]:
        with while_waiting:
            self._contexts.stream.synchronize()
        on_request = {
            name: self._outputs[name][: self._entries(name, step)].cpu()
            for name in requested
            if name not in self._host
        }
        return on_request | {
            name: self._host_copy(name, step.rows) for name in self._downloaded if name in requested
        }

    def _entries(self, name: str, step: StepSize) -> int:
        """How many entries an output has in a step."""
        return step.tokens if name in self._per_token else step.rows

    def _host_copy(self, name: str, rows: int) -> Tensor:
        """A copy of a downloaded output, which the next step overwrites."""
        array = self._arrays.get(name)
        return (
            self._host[name][:rows].clone()
            if array is None
            else torch.from_numpy(array[:rows].copy())
        )

    def time(self, inputs: Mapping[str, Tensor], count: int) -> float:
        """Microseconds of one step, the mean of ``count`` back to back; for benchmarks.

        Uploads and downloads are included. The steps repeat: each appends where the one before did.
        """
        size = smallest_fit(self._sizes, step_size(self._program, inputs))
        assert size is not None
        captured = self._captured[size]
        captured.inputs.fill(inputs)
        return timed(self._contexts.stream, partial(self._replay, captured), count)

    def _replay(self, captured: CapturedStep) -> None:
        if captured.graph is not None:
            captured.graph.replay()
        else:
            self._enqueue(captured.size, captured.inputs)

    def _enqueue(self, size: StepSize, inputs: InputBuffers) -> None:
        inputs.upload()
        outputs = {
            name: tensor[: self._entries(name, size)] for name, tensor in self._outputs.items()
        }
        self._contexts.enqueue(
            size.rows,
            size.tokens,
            {
                **inputs.tensors,
                **self._adjustments.tensors(size.rows),
                **self._states,
                **outputs,
            },
            self._aliases,
        )
        for name in self._downloaded:
            self._host[name][: size.rows].copy_(outputs[name], non_blocking=True)

    def _check_aliases(self, addresses: set[int]) -> None:
        declared = {
            self._arena.tensors[alias.input].data_ptr(): str(alias)
            for alias in self._program.aliases
            if alias.kind == "plugin"
        }
        if missing := sorted(alias for at, alias in declared.items() if at not in addresses):
            raise LoadError(
                f"no plugin of the plan got the memory of {missing}, which the manifest declares; "
                "build the model again"
            )
        if extra := addresses - declared.keys():
            raise LoadError(
                f"the plan updates {len(extra)} buffers in place that the manifest does not "
                "declare; build the model again"
            )


def timed(stream: torch.cuda.Stream, enqueue: Callable[[], object], count: int) -> float:
    """Microseconds that ``enqueue()`` takes on the stream, the mean of ``count`` back to back."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        enqueue()
        begin.record()
        for _ in range(count):
            enqueue()
        end.record()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / count * 1e3
