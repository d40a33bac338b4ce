"""A standalone engine that PyTorch runs on the CPU."""

import io
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from inplace.engines.torch_engine import prepack_linears
from inplace.errors import LoadError
from inplace.operators import written_states
from inplace.schema.dtypes import Dtype
from inplace.schema.extents import symbols
from inplace.schema.standalone import SLOTS, Result, StandaloneManifest


class TorchGraph:
    """Runs a ``torch.export`` program on the CPU.

    Args:
        content: ``engine.pt2``, the whole file.
        manifest: describes the program.
        title: what errors call the program.

    Raises:
        LoadError: the program cannot be read, or it takes, returns or writes something else than
            the manifest says.
    """

    def __init__(self, content: memoryview, manifest: StandaloneManifest, title: str) -> None:
        try:
            with warnings.catch_warnings():
                # The reader warns that tensors share its read-only buffers; no weight is written.
                warnings.simplefilter("ignore")
                exported = torch.export.load(io.BytesIO(content))
        except Exception as error:  # torch.export raises whatever the archive reader raises
            raise LoadError(
                f"{title} cannot be read as a torch.export program ({error}); "
                "if it has operators of your own, import the module that registers the operators "
                "before loading; else build the engine again"
            ) from error
        _check_states(exported, manifest, title)
        _check_call(exported, manifest, title)
        module = exported.module(check_guards=False)
        assert isinstance(module, GraphModule)
        self._graph = _plain(module)
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


def _check_states(
    exported: torch.export.ExportedProgram, manifest: StandaloneManifest, title: str
) -> None:
    """Compare the inputs of the graph and the states it writes with the manifest."""
    inputs = list(exported.graph_signature.user_inputs)
    expected = [
        *(argument.name for argument in manifest.graph_inputs),
        SLOTS,
        *(state.name for state in manifest.states),
    ]
    if inputs != expected:
        raise LoadError(
            f"{title} takes {inputs}, the manifest says {expected}; build the engine again"
        )
    written = set(written_states(exported.graph))
    declared = {alias.input for alias in manifest.parsed_aliases}
    if written != declared:
        raise LoadError(
            f"{title}: the states that the graph writes in place and the aliases of the manifest "
            f"differ in {sorted(written ^ declared)}; build the engine again"
        )
    _check_kinds(exported, manifest, title)
    values = _placeholders(exported)
    for state in manifest.states:
        value = values[state.name]
        slot = state.view_shape[1:] if state.has_slot_axis else state.view_shape
        if (dtype_and_shape(value)[1][1:], value.dtype) != (slot, state.dtype.as_torch):
            raise LoadError(
                f"{title} has state {state.name} as {value}, the manifest says {state}; "
                "build the engine again"
            )


def _check_kinds(
    exported: torch.export.ExportedProgram, manifest: StandaloneManifest, title: str
) -> None:
    """Compare what updates each state with the manifest."""
    by_user = set(written_states(exported.graph, include_inplace=False))
    for alias in manifest.parsed_aliases:
        kind = "user" if alias.input in by_user else "operator"
        if alias.kind != kind:
            writer = (
                "written by an operator of the user's own"
                if kind == "user"
                else "updated by operators of a PyTorch graph"
            )
            raise LoadError(
                f"{title}: state {alias.input} is {writer}, the manifest says {alias}; "
                "build the engine again"
            )


def _check_call(
    exported: torch.export.ExportedProgram, manifest: StandaloneManifest, title: str
) -> None:
    """Compare types, shapes and ranges of inputs and results with the manifest."""
    values = _placeholders(exported)
    for argument in manifest.graph_inputs:
        value = values[argument.name]
        dtype = argument.dtype.as_torch if argument.dtype is not None else None
        if isinstance(value, Tensor) != (argument.kind == "tensor") or dtype_and_shape(value) != (
            dtype,
            argument.shape,
        ):
            raise LoadError(
                f"{title} takes {argument.name} as {value}, the manifest says {argument}; "
                "build the engine again"
            )
    ranges = symbol_ranges(exported, [argument.shape for argument in manifest.call.arguments])
    if manifest.call.ranges != ranges:
        raise LoadError(
            f"{title} has the ranges {ranges}, the manifest says {manifest.call.ranges}; "
            "build the engine again"
        )
    results = result_records(exported)
    if results != manifest.call.results:
        raise LoadError(
            f"{title} returns {results}, the manifest says {manifest.call.results}; "
            "build the engine again"
        )


def _placeholders(exported: torch.export.ExportedProgram) -> dict[str, Any]:
    return {
        node.name: node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"
    }


def dtype_and_shape(value: Any) -> tuple[torch.dtype | None, tuple[int | str, ...]]:
    """The dtype and the shape of a graph's value, as the manifest records them.

    A number has no dtype, and itself as the one extent.
    """
    numbers = value.shape if isinstance(value, Tensor) else (value,)
    return (value.dtype if isinstance(value, Tensor) else None), tuple(
        number if isinstance(number, int) else str(number.node.expr) for number in numbers
    )


def symbol_ranges(
    exported: torch.export.ExportedProgram, shapes: Iterable[tuple[int | str, ...]]
) -> dict[str, tuple[int | None, int | None]]:
    """The smallest and largest value of each symbol in these shapes; None is no limit."""
    texts = {
        symbol
        for shape in shapes
        for extent in shape
        if isinstance(extent, str)
        for symbol in symbols(extent)
    }
    return {
        str(symbol): _limits(limits)
        for symbol, limits in exported.range_constraints.items()
        if str(symbol) in texts
    }


def _limits(limits: Any) -> tuple[int | None, int | None]:
    low, high = (
        int(limit) if -(2**62) < limit < 2**62 else None for limit in (limits.lower, limits.upper)
    )
    return low, high


def result_records(exported: torch.export.ExportedProgram) -> tuple[Result, ...]:
    """Describe the leaves of what a graph returns.

    Raises:
        LoadError: a result has a type that no engine returns.
    """
    returned = pytree.tree_leaves(exported.graph.output_node().args[0])
    records = []
    for leaf in returned:
        if not isinstance(leaf, torch.fx.Node):
            records.append(Result(kind="constant", value=leaf))
            continue
        dtype, shape = dtype_and_shape(leaf.meta["val"])
        if dtype is None:
            records.append(Result(kind="number", shape=shape))
        else:
            try:
                records.append(Result(kind="tensor", dtype=Dtype.of(dtype), shape=shape))
            except ValueError:
                raise LoadError(
                    f"output {leaf} is {dtype}, which no engine returns; convert it"
                ) from None
    return tuple(records)


def _plain(module: GraphModule) -> GraphModule:
    """The module with flat inputs and outputs, and prepacked weights."""
    module.graph.set_codegen(CodeGen())  # the engine flattens its arguments itself
    last = module.graph.output_node()
    last.args = (tuple(pytree.tree_leaves(last.args[0])),)
    prepack_linears(module)
    return GraphModule(module, module.graph)
