"""A TensorRT plan on this machine: deserialized, its aliases checked, and its execution contexts.

A plan runs on the GPU model and with the TensorRT version that built it. `open_plan` refuses any
other, and `check_native_aliases` compares the aliases that the plan itself reports with the
manifest. `ExecutionContexts` binds tensors and enqueues steps.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Buffer

from inplace.engines.gpus import Gpu, check_plan
from inplace.errors import LoadError
from inplace.schema.artifacts import Plan
from inplace.schema.specs import Alias
from inplace.trt import Log, TensorRT, load_tensorrt


@dataclass(frozen=True)
class OpenPlan:
    """A deserialized plan.

    Attributes:
        tensorrt: the TensorRT that deserialized it.
        engine: ``ICudaEngine``.
        log: the errors that TensorRT reports of it.
        plugins: the registered plugins; None for TensorRT for RTX, which has none.
        runtime: ``IRuntime``, which must outlive the engine.
    """

    tensorrt: TensorRT
    engine: Any
    log: Log
    plugins: Any
    runtime: Any


def open_plan(title: str, read: Callable[[], Buffer], plan: Plan) -> OpenPlan:
    """Deserialize a plan.

    Args:
        title: its name in errors.
        read: returns its content; called only if GPU and TensorRT are the right ones.
        plan: its record in the manifest.

    Raises:
        LoadError: there is no GPU, the plan was built with another TensorRT or for another GPU, or
            TensorRT cannot read it.
    """
    if not torch.cuda.is_available():
        raise LoadError(
            f"{title} was built for a GPU ({plan.gpu or plan.compute_capability}) and PyTorch "
            "finds none on this machine"
        )
    tensorrt = load_tensorrt(plan.flavor)
    _check_machine(title, plan, tensorrt)
    plugins = None
    if not tensorrt.is_rtx:
        from inplace.plugins import plugins as registered

        plugins = registered(tensorrt)
    log = tensorrt.log()
    runtime = log.watch(tensorrt.api.Runtime(log.logger))
    engine = runtime.deserialize_cuda_engine(read())
    if engine is None:
        raise LoadError(
            f"{title} cannot be read by {tensorrt}: {log.last_errors()}; build the model again"
        )
    return OpenPlan(tensorrt, engine, log, plugins, runtime)


def _check_machine(title: str, plan: Plan, tensorrt: TensorRT) -> None:
    installed = tensorrt.api.__version__
    if installed != plan.version:
        raise LoadError(
            f"{title} was built with {plan.flavor} {plan.version}, this machine has {installed}: "
            "a plan runs only with the version that built it; install that one, or build the "
            "model again here"
        )
    check_plan(title, plan, Gpu.current())


def check_native_aliases(title: str, engine: Any, aliases: Sequence[Alias]) -> None:
    """Compare the aliases of TensorRT's cache layers with those that the plan reports.

    Plans of TensorRT 10.15 and later and of TensorRT for RTX report them. Aliases of plugins are
    compared in the first step (`ExecutionContexts.observe_aliases`).

    Raises:
        LoadError: the plan reports another alias, or this TensorRT reports none.
    """
    for alias in (alias for alias in aliases if alias.kind == "kv_cache_update"):
        aliased_input = getattr(engine, "get_aliased_input_tensor", None)
        if aliased_input is None:
            raise LoadError(
                f"{title} needs a TensorRT with cache layers (10.15 or later): the manifest "
                f"declares the alias {alias}; build it again"
            )
        reported = aliased_input(alias.output)
        if reported != alias.input:
            raise LoadError(
                f"{title}: output {alias.output} is the memory of {reported or 'no input'}, the "
                f"manifest declares the alias {alias}; build the model again"
            )


def input_names(engine: Any) -> frozenset[str]:
    """The names of an engine's inputs; its other tensors are outputs."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return frozenset(name for name in names if "INPUT" in str(engine.get_tensor_mode(name)))


class ExecutionContexts:
    """The execution contexts of a plan, one for each profile, over one scratch memory.

    Args:
        opened: the deserialized plan.
        plan: its record in the manifest.
        weights: inputs that are bound once.

    Attributes:
        stream: the CUDA stream that steps run on.
        memory: bytes of device memory by what they are for: ``scratch``.

    Raises:
        LoadError: TensorRT refuses a context, a profile or a weight.
    """

    def __init__(self, opened: OpenPlan, plan: Plan, weights: Mapping[str, Tensor]) -> None:
        self._opened, self._plan, self._weights = opened, plan, weights
        engine, tensorrt, log = opened.engine, opened.tensorrt, opened.log
        self.stream = torch.cuda.Stream()
        self._inputs = input_names(engine)
        size = int(engine.device_memory_size_v2)
        self._scratch = torch.empty(max(size, 1), dtype=torch.uint8, device="cuda")
        self._contexts = []
        for index in range(len(plan.profiles)):
            context = engine.create_execution_context(
                tensorrt.api.ExecutionContextAllocationStrategy.USER_MANAGED
            )
            if context is None:
                raise LoadError(
                    f"{tensorrt} cannot create an execution context: {log.last_errors()}"
                )
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

    def enqueue(
        self, rows: int, tokens: int, tensors: Mapping[str, Tensor], addresses: Mapping[str, int]
    ) -> None:
        """Enqueue one step on `stream`.

        Args:
            rows, tokens: the size of the step, which chooses the profile.
            tensors: inputs and outputs by name; inputs have their step's shape.
            addresses: device addresses of further outputs by name.

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
            if name in self._inputs and not context.set_input_shape(name, tuple(tensor.shape)):
                raise RuntimeError(
                    f"input {name} of shape {tuple(tensor.shape)} was refused: "
                    f"{self._last_errors()}"
                )
            self._bind(context, name, tensor.data_ptr())
        for name, address in addresses.items():
            self._bind(context, name, address)
        failures = self._plugin_failures()
        enqueued = context.execute_async_v3(self.stream.cuda_stream)
        if not enqueued or self._plugin_failures() != failures:
            raise RuntimeError(f"the step failed: {self._last_errors()}")

    def _bind(self, context: Any, name: str, address: int) -> None:
        if not context.set_tensor_address(name, address):
            raise RuntimeError(
                f"the address of {name}, {address:#x}, was refused: {self._last_errors()}"
            )

    @contextlib.contextmanager
    def observe_aliases(self) -> Iterator[set[int]]:
        """Collect the addresses of aliased inputs that plugins get inside the block."""
        if self._opened.plugins is None:
            yield set()
            return
        with self._opened.plugins.observe_aliases() as addresses:
            yield addresses

    def capture(self, enqueue: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """A CUDA graph of what ``enqueue()`` puts on `stream`; it must have run once before.

        Garbage collection is off meanwhile: it could free the memory of an engine that was
        dropped, and CUDA invalidates the capture of a thread that frees memory
        (``cudaErrorStreamCaptureInvalidated``).
        """
        graph = torch.cuda.CUDAGraph()
        with (
            _no_garbage_collection(),
            torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"),
        ):
            enqueue()
        return graph

    def _plugin_failures(self) -> int:
        plugins = self._opened.plugins
        return 0 if plugins is None else int(plugins.failures)

    def _last_errors(self) -> str:
        plugins = self._opened.plugins
        plugin_errors = [] if plugins is None else list(plugins.errors)[-1:]
        return " / ".join([*plugin_errors, self._opened.log.last_errors()])


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Turn Python's cyclic garbage collector off inside the block."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
