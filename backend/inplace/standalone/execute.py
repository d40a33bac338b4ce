"""Running a step of a standalone engine, and ``inplace::execute``, which does it as an operator.

`torch.export` of an engine yields a program with one ``inplace::execute``. The engine file is one
of its tensors and the manifest one of its strings, so a saved program needs nothing else. The
operator returns nothing: it writes states and results, which `ExportedProgram.run_decompositions`
can make functional.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import Buffer

from inplace.engines.graph_reader import LoadedGraph, byte_span, finish_module, read_graph
from inplace.errors import CallError, LoadError
from inplace.operators.library import LIBRARY, define
from inplace.schema.graph import GraphValue
from inplace.schema.standalone import (
    ALIGNMENT,
    SLOTS,
    Result,
    StandaloneManifest,
    StandaloneState,
)


class Runner(Protocol):
    """A loaded engine file."""

    def run(self, inputs: Sequence[Any], states: Sequence[Tensor]) -> list[Any]:
        """Run one step.

        Args:
            inputs: the values of `StandaloneManifest.graph_inputs`, checked: tensors, and Python
                integers.
            states: in the manifest's order, each of its `StandaloneState.view_shape`; updated in
                place.

        Returns:
            The values of the manifest's ``results``; no tensor shares memory with a state.
        """
        ...


def open_runner(
    content: memoryview, manifest: StandaloneManifest, title: str, *, cuda_graphs: bool
) -> Runner:
    """Load an engine file.

    Args:
        content: the whole file.
        manifest: the manifest that names it.
        title: what errors call it.
        cuda_graphs: whether a TensorRT engine replays repeated steps as CUDA graphs.

    Raises:
        LoadError: the file cannot be read, disagrees with the manifest, or was built for another
            machine.
    """
    if manifest.engine.kind == "torch":
        return TorchGraph(content, manifest, title)
    from inplace.standalone.tensorrt_plan import TensorRtPlan  # imports TensorRT

    return TensorRtPlan(content, manifest, title, cuda_graphs=cuda_graphs)


define(
    "execute",
    "(Tensor engine, str manifest, SymInt[] numbers, Tensor[] inputs, "
    "Tensor(a!)[] states, Tensor(b!)[] results) -> ()",
)


MAX_LOADED = 8
"""Engines that stay loaded for exported programs; the least recently used is dropped first."""


_loaded: OrderedDict[tuple[str, str], tuple[StandaloneManifest, Runner]] = OrderedDict()
"""By the checksum of the engine file, and the manifest as text."""


def add_loaded(manifest: StandaloneManifest, text: str, runner: Runner) -> None:
    """Let exported programs with this engine use a runner that is loaded already.

    Args:
        manifest: the engine's manifest.
        text: the same, as the program has it.
        runner: the loaded engine.
    """
    _loaded[manifest.file(manifest.engine.file).sha256, text] = manifest, runner
    if len(_loaded) > MAX_LOADED:
        _loaded.popitem(last=False)


def _load(engine: Tensor, text: str) -> tuple[StandaloneManifest, Runner]:
    """The engine of a program, loaded at its first call."""
    manifest = StandaloneManifest.model_validate_json(text)
    recorded = manifest.file(manifest.engine.file).sha256
    key = recorded, text
    if key not in _loaded:
        content = engine.cpu().clone().numpy().data  # a copy: the checked bytes are loaded
        checksum = hashlib.sha256(content).hexdigest()
        if checksum != recorded:
            raise RuntimeError(
                f"the engine of inplace::execute has the checksum {checksum[:12]}…, "
                f"its manifest says {recorded[:12]}…: export it again"
            )
        runner = open_runner(content, manifest, "the engine of inplace::execute", cuda_graphs=True)
        add_loaded(manifest, text, runner)
    _loaded.move_to_end(key)
    return _loaded[key]


@torch.library.impl(LIBRARY, "execute", "CompositeExplicitAutograd")
def _execute(
    engine: Tensor,
    manifest: str,
    numbers: Sequence[int],
    inputs: Sequence[Tensor],
    states: Sequence[Tensor],
    results: Sequence[Tensor],
) -> None:
    record, runner = _load(engine, manifest)
    number, tensor_input = iter(numbers), iter(inputs)
    given = [
        next(number) if argument.kind == "number" else next(tensor_input)
        for argument in record.graph_inputs
    ]
    for state, tensor in zip(record.bases, states, strict=True):
        if not state.matches(tensor) or tensor.device.type != record.engine.device:
            raise RuntimeError(
                f"state {state.source} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, "
                f"the engine has {state}"
            )
        if not tensor.is_contiguous():
            raise RuntimeError(
                f"state {state.source} has strides {tensor.stride()}; it must be contiguous"
            )
    views = record.views(states)
    others = {
        f"input {argument.where}": value
        for argument, value in zip(record.graph_inputs, given, strict=True)
    }
    check_memory(list(zip(record.states, views, strict=True)), others)
    values = runner.run(given, views)
    targets = iter(results)
    for result, value in zip(record.call.results, values, strict=True):
        if result.kind == "tensor":
            next(targets).copy_(value)


@torch.library.register_fake("inplace::execute", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _execute_fake(
    engine: Tensor,
    manifest: str,
    numbers: Sequence[int],
    inputs: Sequence[Tensor],
    states: Sequence[Tensor],
    results: Sequence[Tensor],
) -> None:
    return None


def check_memory(
    states: Sequence[tuple[StandaloneState, Tensor]], others: Mapping[str, object]
) -> None:
    """Check that no state overlaps another tensor of the call, as the graph assumes.

    Args:
        states: each state and its tensor.
        others: the other arguments, by their title in an error.

    Raises:
        CallError: a state shares memory with another tensor, or its address is not aligned.
    """
    for state, tensor in states:
        _check_alignment(state, tensor)
    titled: list[tuple[str, Tensor, StandaloneState | None]] = [
        (state.label, tensor, state) for state, tensor in states
    ]
    titled += [(title, value, None) for title, value in others.items() if isinstance(value, Tensor)]
    spans = sorted(
        (
            (*_address_span(tensor), title, state)
            for title, tensor, state in titled
            if tensor.numel()
        ),
        key=lambda span: span[:2],
    )
    # The tensor and the state that reach farthest so far.
    last_end, last_title = 0, ""
    state_end = 0
    last_state: StandaloneState | None = None
    for start, end, title, written_state in spans:
        other = None
        if last_state is not None and start < state_end:
            other = last_state.label
        elif written_state is not None and start < last_end:
            other = last_title
        if other is not None:
            written = written_state or last_state
            assert written is not None
            raise CallError(
                f"{other} and {title} share memory, and one of them is a state, "
                f"which the call writes: pass a copy of one{written.write_note}"
            )
        if end > last_end:
            last_end, last_title = end, title
        if written_state is not None and end > state_end:
            state_end, last_state = end, written_state


def _check_alignment(state: StandaloneState, tensor: Tensor) -> None:
    alignment = ALIGNMENT[tensor.device.type]
    if tensor.data_ptr() % alignment:
        raise CallError(
            f"{state.label} begins at {tensor.data_ptr():#x}, "
            f"the engine takes states at multiples of {alignment} bytes: "
            f"allocate it by itself instead of as a part of another tensor{state.write_note}"
        )


def _address_span(tensor: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte, and of the first byte after its last."""
    address = tensor.untyped_storage().data_ptr()
    begin, end = byte_span(tensor)
    return address + begin, address + end


ADVICE = "build the engine again"


class TorchGraph:
    """Runs a captured graph on the CPU.

    Args:
        content: the engine file.
        manifest: describes the program.
        title: what errors call the program.

    Raises:
        LoadError: the program cannot be read, or it takes, returns or writes something else than
            the manifest says.
    """

    def __init__(self, content: Buffer, manifest: StandaloneManifest, title: str) -> None:
        graph = read_graph(content, title, advice=ADVICE)
        _check_states(graph, manifest, title)
        _check_call(graph, manifest, title)
        self._graph = finish_module(graph.module, torch.device("cpu"))
        self._states = manifest.states
        self._slots = torch.arange(manifest.rows, dtype=torch.int32)

    def run(self, inputs: Sequence[Any], states: Sequence[Tensor]) -> list[Any]:
        """Run one step, as `Runner.run`.

        Raises:
            IndexError: a position is outside its state. Writes before that one stay.
        """
        bound = (
            tensor if state.has_slot_axis else tensor.unsqueeze(0)
            for state, tensor in zip(self._states, states, strict=True)
        )
        with torch.no_grad():
            return list(self._graph(*inputs, self._slots, *bound))


def _check_states(graph: LoadedGraph, manifest: StandaloneManifest, title: str) -> None:
    """Compare the inputs of the graph and the states it writes with the manifest."""
    inputs = list(graph.inputs)
    expected = [
        *(argument.name for argument in manifest.graph_inputs),
        SLOTS,
        *(state.name for state in manifest.states),
    ]
    if inputs != expected:
        raise LoadError(f"{title} takes {inputs}, the manifest says {expected}; {ADVICE}")
    written = graph.written_inputs()
    declared = {alias.input for alias in manifest.parsed_aliases}
    if written != declared:
        raise LoadError(
            f"{title}: the states that the graph writes in place and the aliases of the manifest "
            f"differ in {sorted(written ^ declared)}; {ADVICE}"
        )
    _check_kinds(graph, manifest, title)
    values = {value.name: value for value in graph.record.graph.inputs}
    for state in manifest.states:
        value = values[state.name]
        slot = state.view_shape[1:] if state.has_slot_axis else state.view_shape
        if (value.shape[1:], value.dtype) != (slot, state.dtype):
            raise LoadError(
                f"{title} has state {state.name} as {value}, the manifest says {state}; {ADVICE}"
            )


def _check_kinds(graph: LoadedGraph, manifest: StandaloneManifest, title: str) -> None:
    """Compare what updates each state with the manifest."""
    by_user = graph.written_inputs(include_inplace=False)
    for alias in manifest.parsed_aliases:
        kind = "user" if alias.input in by_user else "operator"
        if alias.kind != kind:
            writer = (
                "written by an operator of the user's own"
                if kind == "user"
                else "updated by operators of a PyTorch graph"
            )
            raise LoadError(
                f"{title}: state {alias.input} is {writer}, the manifest says {alias}; {ADVICE}"
            )


def _check_call(graph: LoadedGraph, manifest: StandaloneManifest, title: str) -> None:
    """Compare types, shapes and ranges of inputs and results with the manifest."""
    record = graph.record
    values = {value.name: value for value in record.graph.inputs}
    for argument in manifest.graph_inputs:
        value = values[argument.name]
        if (value.dtype, value.shape) != (argument.dtype, argument.shape):
            raise LoadError(
                f"{title} takes {argument.name} as {value}, the manifest says {argument}; {ADVICE}"
            )
    ranges = manifest.call.ranges
    if any(record.ranges.get(symbol) != limits for symbol, limits in ranges.items()):
        raise LoadError(
            f"{title} has the ranges {record.ranges}, the manifest says {ranges}; {ADVICE}"
        )
    results = tuple(_result(value) for value in record.graph.outputs)
    if results != manifest.call.results:
        raise LoadError(
            f"{title} returns {results}, the manifest says {manifest.call.results}; {ADVICE}"
        )


def _result(value: GraphValue) -> Result:
    """A value that the graph returns, as the manifest records it."""
    if not value.name:
        return Result(kind="constant", value=value.value)
    if value.dtype is None:
        return Result(kind="number", shape=value.shape)
    return Result(kind="tensor", dtype=value.dtype, shape=value.shape)
