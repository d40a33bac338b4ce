"""A standalone engine that PyTorch runs on the CPU."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Buffer

from inplace.engines.graph_reader import LoadedGraph, read_graph
from inplace.engines.torch_engine import finish_module
from inplace.errors import LoadError
from inplace.schema.graph import GraphValue
from inplace.schema.standalone import SLOTS, Result, StandaloneManifest

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
