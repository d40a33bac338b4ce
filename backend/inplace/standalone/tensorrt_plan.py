"""A TensorRT plan that is bound to the caller's memory in each call, and replayed as a CUDA graph where the same call comes again."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inplace.engines.tensorrt.plan import ExecutionContexts, check_native_aliases, open_plan
from inplace.errors import LoadError
from inplace.schema.extents import evaluate
from inplace.schema.standalone import Argument, StandaloneManifest, StandaloneState, result_name
from inplace.standalone.checks import ALIGNMENT

GRAPHS = 16
"""CUDA graphs that are kept; the least recently used one goes first."""


IN_PLACE = ("plugin", "user", "kv_cache_update")


Key = tuple[object, ...]
"""The shapes of a call's inputs and the addresses of its states: what a captured graph is valid for."""


@dataclass(frozen=True, eq=False)
class _Captured:
    """A graph and the memory that it takes its inputs from and leaves its results in."""

    graph: torch.cuda.CUDAGraph
    inputs: Mapping[str, Tensor]
    results: Mapping[str, Tensor]


class TensorRtPlan:
    """Runs a plan on states wherever they lie.

    States are bound by address in each call. Where a plan does not update them in place (the kind ``copy``), new values are copied back.
    With ``cuda_graphs`` a call that comes a second time is captured when it has run, and replayed from then on; a caller that alternates
    between two caches has two graphs.

    Args:
        content: the plan.
        manifest: what it is said to be.
        title: its name in errors.
        cuda_graphs: whether to capture.

    Raises:
        LoadError: it was built for another machine, cannot be read, takes or returns something else than the manifest says, or does not
            update a state in the memory it is bound to.
    """

    def __init__(
        self, content: bytes, manifest: StandaloneManifest, title: str, *, cuda_graphs: bool
    ) -> None:
        if manifest.engine.plan is None:
            raise LoadError(
                f"{title}: the manifest says nothing of the TensorRT plan it names; build the engine again"
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
        self._graphs: OrderedDict[Key, _Captured | None] = OrderedDict()
        self._cuda_graphs = cuda_graphs
        self._warm()

    def run(self, inputs: Sequence[Any], states: Sequence[Tensor]) -> list[Any]:
        """See `inplace.standalone.execute.EngineLoop`; runs behind what the caller's stream has queued, and what comes after waits for it."""
        caller, stream = torch.cuda.current_stream(), self._contexts.stream
        given = dict(
            zip((argument.name for argument in self._manifest.graph_inputs), inputs, strict=True)
        )
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            found = self._step(given, states)
        caller.wait_stream(stream)
        for tensor in (*states, *given.values()):
            tensor.record_stream(stream)
        for tensor in found.values():
            tensor.record_stream(caller)
        names = (result_name(place) for place in range(len(self._manifest.call.results)))
        return [
            found[name] if result.kind == "tensor" else result.value
            for name, result in zip(names, self._manifest.call.results, strict=True)
        ]

    def _step(self, inputs: Mapping[str, Tensor], states: Sequence[Tensor]) -> Mapping[str, Tensor]:
        key: Key = (
            *(tuple(tensor.shape) for tensor in inputs.values()),
            *(tensor.data_ptr() for tensor in states),
        )
        if not self._cuda_graphs or torch.cuda.is_current_stream_capturing():
            return self._launched(inputs, states)
        if key not in self._graphs:
            self._graphs[key] = None
            if len(self._graphs) > GRAPHS:
                self._graphs.popitem(last=False)
            return self._launched(inputs, states)
        self._graphs.move_to_end(key)
        captured = self._graphs[key]
        if captured is None:
            own = {
                name: tensor.clone(memory_format=torch.contiguous_format)
                for name, tensor in inputs.items()
            }
            results = self._launched(
                own, states
            )  # the step itself; TensorRT wants one with these shapes ahead of a capture
            first = {name: tensor.clone() for name, tensor in results.items()}
            graph = self._contexts.capture(lambda: self._enqueue(own, states, results))
            self._graphs[key] = _Captured(graph, own, results)
            return first
        for name, tensor in inputs.items():
            captured.inputs[name].copy_(tensor)
        captured.graph.replay()
        return {name: tensor.clone() for name, tensor in captured.results.items()}

    def _launched(
        self, inputs: Mapping[str, Tensor], states: Sequence[Tensor]
    ) -> Mapping[str, Tensor]:
        """One step launched kernel by kernel, its results in new memory."""
        bindable = {name: _bindable(tensor) for name, tensor in inputs.items()}
        results = self._results(inputs)
        self._enqueue(bindable, states, results)
        return results

    def _results(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        known = {
            text: extent
            for argument in self._manifest.graph_inputs
            for text, extent in zip(argument.shape, inputs[argument.name].shape, strict=True)
            if isinstance(text, str) and text.isidentifier()
        }
        return {
            result_name(place): torch.empty(
                [evaluate(extent, known) for extent in result.shape],
                dtype=result.dtype.as_torch,
                device="cuda",
            )
            for place, result in enumerate(self._manifest.call.results)
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
        """The plan is the truth: its inputs, outputs and states must be the manifest's. TensorRT drops inputs that nothing uses."""
        engine, manifest = self._opened.engine, self._manifest
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        outputs = {name for name in names if "OUTPUT" in str(engine.get_tensor_mode(name))}
        results = {
            result_name(place)
            for place, result in enumerate(manifest.call.results)
            if result.kind == "tensor"
        }
        wanted = results | {alias.output for alias in manifest.parsed_aliases}
        known = (
            wanted
            | {argument.name for argument in manifest.graph_inputs}
            | {state.name for state in manifest.states}
        )
        if (
            outputs != wanted
            or not set(names) <= known
            or not {state.name for state in manifest.states} <= set(names)
        ):
            raise LoadError(
                f"{self._title} has the tensors {sorted(names)}, the manifest says {sorted(known)}; build the engine again"
            )
        self._shapes: dict[str, tuple[int, ...]] = {}
        for state in manifest.states:
            shape = tuple(engine.get_tensor_shape(state.name))
            if shape not in (_fixed(state), (1, *_fixed(state))):
                raise LoadError(
                    f"{self._title} has state {state.name} as {list(shape)}, the manifest says {state}; build the engine again"
                )
            self._shapes[state.name] = shape
        return frozenset(names)

    def _warm(self) -> None:
        """Run a step on memory of its own, and compare the addresses that plugins are handed with what the manifest declares.

        Raises:
            LoadError: the engine fails, or a state that a plugin updates is not what any plugin was handed.
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
                self._launched(inputs, states)
            self._contexts.stream.synchronize()
        except RuntimeError as error:
            raise LoadError(
                f"{self._title} fails in its first step: {error}; build the engine again"
            ) from error
        kinds = {alias.input: alias.kind for alias in self._manifest.parsed_aliases}
        at = {
            tensor.data_ptr(): state.name
            for state, tensor in zip(self._manifest.states, states, strict=True)
        }
        handed = {at[address] for address in aliased if address in at}
        if missing := sorted(
            name for name, kind in kinds.items() if kind == "plugin" and name not in handed
        ):
            raise LoadError(
                f"{self._title}: no plugin was handed the memory of {missing}, which the manifest declares; build it again"
            )
        if extra := sorted({name for name in handed if kinds[name] not in ("plugin", "user")}):
            raise LoadError(
                f"{self._title} updates {extra} in place, which the manifest does not declare; build it again"
            )

    def _smallest(self, argument: Argument) -> Tensor:
        assert argument.dtype is not None
        least = {
            symbol: max(low or 0, 1) for symbol, (low, _) in self._manifest.call.ranges.items()
        }
        return torch.zeros(
            [evaluate(extent, least) for extent in argument.shape],
            dtype=argument.dtype.as_torch,
            device="cuda",
        )


def _fixed(state: StandaloneState) -> tuple[int, ...]:
    """A state's extents: the builder makes no plan of one whose extents vary."""
    return tuple(int(extent) for extent in state.view_shape)


def _bindable(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy where TensorRT cannot be bound to it."""
    if tensor.is_contiguous() and not tensor.data_ptr() % ALIGNMENT["cuda"]:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
