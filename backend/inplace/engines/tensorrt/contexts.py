"""Execution contexts: one for each profile of a plan, over one scratch memory.

The step sizes that CUDA graphs are captured for, and how a step is padded to one with null rows.
"""

import contextlib
import gc
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inplace.engines.base import NO_OTHER_THREADS
from inplace.errors import LoadError
from inplace.schema.artifacts import Plan
from inplace.schema.served import Program
from inplace.trt import Log, TensorRT


class Contexts:
    """Runs a deserialized engine; tensors are bound by name, weights once.

    Args:
        tensorrt: its TensorRT.
        engine: ``ICudaEngine``.
        plan: its profiles.
        weights: bound for good.
        log: what TensorRT says goes here.
        plugins: those of this TensorRT, or None.

    Attributes:
        stream: everything runs on it.
        memory: bytes of device memory: ``scratch``.
    """

    def __init__(
        self,
        tensorrt: TensorRT,
        engine: Any,
        plan: Plan,
        weights: Mapping[str, Tensor],
        log: Log,
        plugins: Any,
    ) -> None:
        self._engine, self._plan, self._weights, self._log, self._plugins = (
            engine,
            plan,
            weights,
            log,
            plugins,
        )
        self.stream = torch.cuda.Stream()
        size = int(engine.device_memory_size_v2)
        self._scratch = torch.empty(max(size, 1), dtype=torch.uint8, device="cuda")
        self._contexts = []
        for index in range(len(plan.profiles)):
            context = engine.create_execution_context(
                tensorrt.api.ExecutionContextAllocationStrategy.USER_MANAGED
            )
            if context is None:
                raise LoadError(f"{tensorrt} cannot make an execution context: {log.last_errors()}")
            context.set_device_memory(self._scratch.data_ptr(), size)
            if index and not context.set_optimization_profile_async(index, self.stream.cuda_stream):
                raise LoadError(f"{tensorrt} refused profile {index}: {log.last_errors()}")
            for name, tensor in weights.items():
                if not context.set_tensor_address(name, tensor.data_ptr()):
                    raise LoadError(
                        f"{tensorrt} refused the address of weight {name}: {log.last_errors()}"
                    )
            self._contexts.append(context)
        self.stream.synchronize()
        self.memory = {"scratch": self._scratch.nbytes}

    def run(
        self, rows: int, tokens: int, tensors: Mapping[str, Tensor], addresses: Mapping[str, int]
    ) -> None:
        """Enqueue one step on `stream`.

        Args:
            rows, tokens: the step's size, which chooses the profile.
            tensors: inputs and outputs by name; inputs have their step's shape.
            addresses: further outputs, bound where they say.

        Raises:
            RuntimeError: no profile holds the size, or TensorRT or a plugin failed.
        """
        index = next(
            (i for i, profile in enumerate(self._plan.profiles) if profile.covers(rows, tokens)),
            None,
        )
        if index is None:
            raise RuntimeError(f"no profile of the plan holds {rows} rows and {tokens} tokens")
        context = self._contexts[index]
        for name, tensor in tensors.items():
            if "INPUT" in str(self._engine.get_tensor_mode(name)) and not context.set_input_shape(
                name, tuple(tensor.shape)
            ):
                raise RuntimeError(
                    f"input {name} of shape {tuple(tensor.shape)} was refused: {self._said()}"
                )
            self._bind(context, name, tensor.data_ptr())
        for name, address in addresses.items():
            self._bind(context, name, address)
        before = self._failures()
        if not context.execute_async_v3(self.stream.cuda_stream) or self._failures() != before:
            raise RuntimeError(f"the step failed: {self._said()}")

    def _bind(self, context: Any, name: str, address: int) -> None:
        if not context.set_tensor_address(name, address):
            raise RuntimeError(f"the address of {name}, {address:#x}, was refused: {self._said()}")

    def entered(self) -> AbstractContextManager[object]:
        """Have the thread enqueue on `stream` inside the block, behind what it has enqueued on the stream it comes from."""
        caller = torch.cuda.current_stream()
        if caller == self.stream:
            return NO_OTHER_THREADS
        self.stream.wait_stream(caller)
        return torch.cuda.stream(self.stream)

    @contextlib.contextmanager
    def observed(self) -> Iterator[set[int]]:
        """The addresses of aliased inputs that plugins are handed inside the block."""
        if self._plugins is None:
            yield set()
            return
        with self._plugins.observed() as seen:
            yield seen

    def capture(self, work: Any) -> torch.cuda.CUDAGraph:
        """A CUDA graph of what ``work()`` enqueues on `stream`; it must have run once before.

        Nothing is collected meanwhile: an engine that was dropped would free its memory then, and CUDA ends the capture of a thread that
        does (``cudaErrorStreamCaptureInvalidated``).
        """
        graph = torch.cuda.CUDAGraph()
        with (
            _uncollected(),
            torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"),
        ):
            work()
        return graph

    def _failures(self) -> int:
        return 0 if self._plugins is None else int(self._plugins.failures)

    def _said(self) -> str:
        failed = list(self._plugins.errors)[-1:] if self._plugins is not None else []
        return " / ".join([*failed, self._log.last_errors()])


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Python's collector of cycles does not run inside the block."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


DECODE_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Rows of captured decode steps; a step is padded to the next."""


SMALLEST_MIXED = 16
"""Tokens of the smallest captured mixed step."""


@dataclass(frozen=True)
class Size:
    """A step: ``rows`` rows with ``tokens`` tokens together: one each in a decode step, more than rows in a mixed one."""

    rows: int
    tokens: int

    @property
    def decode(self) -> bool:
        """Whether every row has exactly one token."""
        return self.rows == self.tokens


def decode_sizes(program: Program) -> list[Size]:
    """The decode steps to capture, smallest first; the largest has every row."""
    rows = [count for count in DECODE_ROWS if count < program.max_rows]
    return [Size(count, count) for count in (*rows, program.max_rows)]


def mixed_sizes(program: Program) -> list[Size]:
    """The mixed steps to capture, smallest first. Each has a row more than a step can have: it owns the tokens that pad it."""
    if program.chunk == 1:
        return []
    rows, tokens = program.max_rows + 1, SMALLEST_MIXED
    while tokens <= rows:
        tokens *= 2
    found = [tokens]
    while found[-1] < program.token_budget:
        found.append(min(2 * found[-1], max(program.token_budget, rows + 1)))
    return [Size(rows, count) for count in found]


def fitting(sizes: list[Size], rows: int, tokens: int) -> Size | None:
    """The smallest of these sizes that a step fits into; a decode step only into a decode size."""
    for size in sizes:
        if size.decode == (rows == tokens) and size.rows >= rows and size.tokens >= tokens:
            return size
    return None
