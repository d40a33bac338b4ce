"""A standalone engine that is a TensorRT plan.

Each call binds the plan to the caller's memory. Repeated calls are replayed as CUDA graphs.
"""

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inplace.engines.tensorrt.plan import ExecutionContexts, check_native_aliases, open_plan
from inplace.errors import LoadError
from inplace.schema.specs import evaluate_extent
from inplace.schema.standalone import (
    ALIGNMENT,
    Argument,
    StandaloneManifest,
    StandaloneState,
    result_name,
)

MAX_GRAPHS = 16
"""CUDA graphs that are kept; the least recently used is dropped first."""


IN_PLACE = ("plugin", "user", "kv_cache_update")
"""Alias kinds that update a state in its own memory."""


GraphKey = tuple[object, ...]
"""The shapes of a call's inputs and the addresses of its states: a captured graph needs both."""


@dataclass(frozen=True, eq=False)
class _Captured:
    """A CUDA graph and the tensors that it reads its inputs from and writes its results to."""

    graph: torch.cuda.CUDAGraph
    inputs: Mapping[str, Tensor]
    results: Mapping[str, Tensor]


class TensorRtPlan:
    """Runs a plan on the caller's states.

    Each call binds the addresses of the states. If the plan does not update a state in place (alias
    kind ``copy``), its new value is copied back. With ``cuda_graphs``, the second call with the
    same key runs and is then captured, and later ones are replayed. A caller that alternates
    between two caches has two graphs.

    Args:
        content: the plan.
        manifest: describes the plan.
        title: what errors call the plan.
        cuda_graphs: whether to capture calls.

    Raises:
        LoadError: the plan was built for another machine, cannot be read, disagrees with the
            manifest, or does not update a state in the memory that it is bound to.
    """

    def __init__(
        self, content: memoryview, manifest: StandaloneManifest, title: str, *, cuda_graphs: bool
    ) -> None:
        if manifest.engine.plan is None:
            raise LoadError(
                f"{title}: the manifest does not describe the TensorRT plan that it names; "
                "build the engine again"
            )
        self._manifest, self._title = manifest, title
        self._opened = open_plan(title, lambda: content, manifest.engine.plan)
        self._names = self._check_names()
        check_native_aliases(title, self._opened.engine, manifest.parsed_aliases)
        self._contexts = ExecutionContexts(self._opened, manifest.engine.plan, {})
        aliases = {alias.input: alias for alias in manifest.parsed_aliases}
        self._outputs = {alias.input: alias.output for alias in aliases.values()}
        self._second = {
            state.name: torch.empty(_fixed(state), dtype=state.dtype.as_torch, device="cuda")
            for state in manifest.states
            if aliases[state.name].kind not in IN_PLACE
        }
        self._graphs: OrderedDict[GraphKey, _Captured | None] = OrderedDict()
        self._cuda_graphs = cuda_graphs
        self._warm()

    def run(self, inputs: Sequence[Any], states: Sequence[Tensor]) -> list[Any]:
        """Run one step, as `Runner.run`, in the order of the caller's CUDA stream."""
        caller, stream = torch.cuda.current_stream(), self._contexts.stream
        given = dict(
            zip((argument.name for argument in self._manifest.graph_inputs), inputs, strict=True)
        )
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            results = self._step(given, states)
        caller.wait_stream(stream)
        for tensor in (*states, *given.values()):
            tensor.record_stream(stream)
        for tensor in results.values():
            tensor.record_stream(caller)
        return [
            results[result_name(index)] if result.kind == "tensor" else result.value
            for index, result in enumerate(self._manifest.call.results)
        ]

    def _step(self, inputs: Mapping[str, Tensor], states: Sequence[Tensor]) -> Mapping[str, Tensor]:
        key: GraphKey = (
            *(tuple(tensor.shape) for tensor in inputs.values()),
            *(tensor.data_ptr() for tensor in states),
        )
        if not self._cuda_graphs or torch.cuda.is_current_stream_capturing():
            return self._launch(inputs, states)
        if key not in self._graphs:
            self._graphs[key] = None
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
            return self._launch(inputs, states)
        self._graphs.move_to_end(key)
        captured = self._graphs[key]
        if captured is None:
            own = {
                name: tensor.clone(memory_format=torch.contiguous_format)
                for name, tensor in inputs.items()
            }
            # The step itself. TensorRT requires one with these shapes before a capture.
            results = self._launch(own, states)
            first = {name: tensor.clone() for name, tensor in results.items()}
            graph = self._contexts.capture(lambda: self._enqueue(own, states, results))
            self._graphs[key] = _Captured(graph, own, results)
            return first
        for name, tensor in inputs.items():
            captured.inputs[name].copy_(tensor)
        captured.graph.replay()
        return {name: tensor.clone() for name, tensor in captured.results.items()}

    def _launch(
        self, inputs: Mapping[str, Tensor], states: Sequence[Tensor]
    ) -> Mapping[str, Tensor]:
        """Run one step without a graph; the results are new tensors."""
        bindable = {name: _bindable(tensor) for name, tensor in inputs.items()}
        results = self._allocate_results(inputs)
        self._enqueue(bindable, states, results)
        return results

    def _allocate_results(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        known = {
            text: extent
            for argument in self._manifest.graph_inputs
            for text, extent in zip(argument.shape, inputs[argument.name].shape, strict=True)
            if isinstance(text, str) and text.isidentifier()
        }
        return {
            result_name(index): torch.empty(
                [evaluate_extent(extent, known) for extent in result.shape],
                dtype=result.dtype.as_torch,
                device="cuda",
            )
            for index, result in enumerate(self._manifest.call.results)
            if result.kind == "tensor" and result.dtype is not None
        }

    def _enqueue(
        self, inputs: Mapping[str, Tensor], states: Sequence[Tensor], results: Mapping[str, Tensor]
    ) -> None:
        tensors, addresses = {**inputs, **results}, {}
        for state, tensor in zip(self._manifest.states, states, strict=True):
            tensors[state.name] = tensor.view(self._shapes[state.name])
            addresses[self._outputs[state.name]] = self._second.get(state.name, tensor).data_ptr()
        tensors = {name: tensor for name, tensor in tensors.items() if name in self._names}
        rows = self._manifest.rows
        self._contexts.enqueue(rows, rows, tensors, addresses)
        for state, tensor in zip(self._manifest.states, states, strict=True):
            if state.name in self._second:
                tensor.copy_(self._second[state.name])

    def _check_names(self) -> frozenset[str]:
        """Compare the plan's inputs, outputs and states with the manifest.

        TensorRT drops unused inputs.

        Returns:
            The names of the plan's tensors.
        """
        engine, manifest = self._opened.engine, self._manifest
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        outputs = {name for name in names if "OUTPUT" in str(engine.get_tensor_mode(name))}
        results = {
            result_name(index)
            for index, result in enumerate(manifest.call.results)
            if result.kind == "tensor"
        }
        expected_outputs = results | {alias.output for alias in manifest.parsed_aliases}
        known = (
            expected_outputs
            | {argument.name for argument in manifest.graph_inputs}
            | {state.name for state in manifest.states}
        )
        if (
            outputs != expected_outputs
            or not set(names) <= known
            or not {state.name for state in manifest.states} <= set(names)
        ):
            raise LoadError(
                f"{self._title} has the tensors {sorted(names)}, "
                f"the manifest says {sorted(known)}; build the engine again"
            )
        self._shapes: dict[str, tuple[int, ...]] = {}
        for state in manifest.states:
            shape = tuple(engine.get_tensor_shape(state.name))
            if not _is_merged(_fixed(state), shape):
                raise LoadError(
                    f"{self._title} has state {state.name} as {list(shape)}, "
                    f"the manifest says {state}; build the engine again"
                )
            self._shapes[state.name] = shape
        return frozenset(names)

    def _warm(self) -> None:
        """Run a step on temporary states, and compare what plugins update with the manifest.

        Raises:
            LoadError: the step fails, or the states whose addresses the plugins received are not
                those that the manifest declares.
        """
        states = [
            torch.zeros(_fixed(state), dtype=state.dtype.as_torch, device="cuda")
            for state in self._manifest.states
        ]
        inputs = {
            argument.name: self._smallest(argument) for argument in self._manifest.graph_inputs
        }
        try:
            torch.cuda.synchronize()
            with (
                torch.cuda.stream(self._contexts.stream),
                self._contexts.observe_aliases() as aliased,
            ):
                self._launch(inputs, states)
            self._contexts.stream.synchronize()
        except RuntimeError as error:
            raise LoadError(
                f"{self._title} fails in its first step: {error}; build the engine again"
            ) from error
        self._check_updates(states, aliased)

    def _check_updates(self, states: Sequence[Tensor], aliased: Collection[int]) -> None:
        """Compare the addresses that plugins received as aliases with the manifest."""
        kinds = {alias.input: alias.kind for alias in self._manifest.parsed_aliases}
        by_address = {
            tensor.data_ptr(): state.name
            for state, tensor in zip(self._manifest.states, states, strict=True)
        }
        passed = {by_address[address] for address in aliased if address in by_address}
        if missing := sorted(
            name for name, kind in kinds.items() if kind == "plugin" and name not in passed
        ):
            raise LoadError(
                f"{self._title}: no plugin received the memory of {missing}, "
                "which the manifest declares; build it again"
            )
        if extra := sorted({name for name in passed if kinds[name] not in ("plugin", "user")}):
            raise LoadError(
                f"{self._title} updates {extra} in place, "
                "which the manifest does not declare; build it again"
            )

    def _smallest(self, argument: Argument) -> Tensor:
        """A tensor of the smallest shape that an argument may have."""
        assert argument.dtype is not None
        smallest = {
            symbol: max(low or 0, 1) for symbol, (low, _) in self._manifest.call.ranges.items()
        }
        return torch.zeros(
            [evaluate_extent(extent, smallest) for extent in argument.shape],
            dtype=argument.dtype.as_torch,
            device="cuda",
        )


def _fixed(state: StandaloneState) -> tuple[int, ...]:
    """A state's shape: the builder makes no plan with states of dynamic shape."""
    return tuple(int(extent) for extent in state.view_shape)


def _is_merged(shape: tuple[int, ...], bound: tuple[int, ...]) -> bool:
    """Whether a shape is another with neighbouring axes merged, and axes of extent 1.

    TensorRT's cache layer takes ``[batch, heads, capacity, dim]``, whatever a state looks like.
    """
    ends = {torch.Size(shape[:axis]).numel() for axis in range(len(shape) + 1)}
    merged = {torch.Size(bound[:axis]).numel() for axis in range(len(bound) + 1)}
    return max(ends) == max(merged) and merged <= ends


def _bindable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if TensorRT cannot bind it."""
    if tensor.is_contiguous() and not tensor.data_ptr() % ALIGNMENT["cuda"]:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
