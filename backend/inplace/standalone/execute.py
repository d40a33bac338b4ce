"""Running a step of a standalone engine, and ``inplace::execute``, which does it as an operator.

`torch.export` of an engine yields a program with one ``inplace::execute``. The engine file is one
of its tensors and the manifest one of its strings, so a saved program needs nothing else. The
operator returns nothing: it writes states and results, which `ExportedProgram.run_decompositions`
can make functional.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from inplace.operators.library import LIBRARY, define
from inplace.schema.standalone import StandaloneManifest
from inplace.standalone.checks import check_memory
from inplace.standalone.torch_graph import TorchGraph


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
