"""``inplace::execute``: one step of a directly called engine as an operator, so that `torch.export` of the engine holds it whole.

The engine file is one of its tensors and the manifest one of its texts: a program that was saved needs nothing else. It returns nothing;
states and results are tensors that it writes, which is what `ExportedProgram.run_decompositions` can make functional.

What runs a step of a directly called engine: a graph of PyTorch, or a TensorRT plan.
"""

import hashlib
import io
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
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
            inputs: the manifest's ``graph_inputs``: tensors, and Python numbers; checked.
            states: in the manifest's order, of their own extents; updated where they lie.

        Returns:
            The manifest's ``results``; tensors of their own.
        """
        ...


def open_runner(
    source: Path | bytes, manifest: StandaloneManifest, title: str, *, cuda_graphs: bool
) -> Runner:
    """Load an engine file, given by its path or its content.

    Raises:
        LoadError: it cannot be read, is not what the manifest says, or was built for another machine.
    """
    if manifest.engine.kind == "torch":
        return TorchGraph(
            source if isinstance(source, Path) else io.BytesIO(source), manifest, title
        )
    from inplace.standalone.tensorrt_plan import TensorRtPlan  # imports TensorRT

    return TensorRtPlan(
        source if isinstance(source, bytes) else source.read_bytes(),
        manifest,
        title,
        cuda_graphs=cuda_graphs,
    )


define(
    "execute",
    "(Tensor engine, str manifest, SymInt[] numbers, Tensor[] inputs, Tensor(a!)[] states, Tensor(b!)[] results) -> ()",
)


KEPT = 8
"""Engines that stay loaded for programs that hold them; the least recently used one goes first."""


_loaded: OrderedDict[tuple[str, str], tuple[StandaloneManifest, Runner]] = OrderedDict()


def keep(manifest: StandaloneManifest, text: str, runner: Runner) -> None:
    """Let programs that hold this engine run with the one that is loaded already."""
    _loaded[manifest.engine.sha256, text] = manifest, runner
    if len(_loaded) > KEPT:
        _loaded.popitem(last=False)


def _opened(engine: Tensor, text: str) -> tuple[StandaloneManifest, Runner]:
    # The manifest names the checksum of its engine file; a program that was saved carries both.
    manifest = StandaloneManifest.model_validate_json(text)
    key = manifest.engine.sha256, text
    if key not in _loaded:
        content = engine.cpu().numpy().tobytes()
        if (found := hashlib.sha256(content).hexdigest()) != manifest.engine.sha256:
            raise RuntimeError(
                f"the engine of inplace::execute has the checksum {found[:12]}…, its manifest says another: export it again"
            )
        keep(
            manifest,
            text,
            open_runner(content, manifest, "the engine of inplace::execute", cuda_graphs=True),
        )
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
    record, runner = _opened(engine, manifest)
    whole, tensors = iter(numbers), iter(inputs)
    given = [
        next(whole) if argument.kind == "number" else next(tensors)
        for argument in record.graph_inputs
    ]
    for state, tensor in zip(record.bases, states, strict=True):
        if not state.matches(tensor) or tensor.device.type != record.engine.device:
            raise RuntimeError(
                f"state {state.source} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, the engine has {state}"
            )
        if not tensor.is_contiguous():
            raise RuntimeError(
                f"state {state.source} has strides {tensor.stride()}; it must be contiguous"
            )
    parts = record.views(states)
    check_memory(
        list(zip(record.states, parts, strict=True)),
        {
            f"input {argument.where}": value
            for argument, value in zip(record.graph_inputs, given, strict=True)
        },
    )
    found = runner.run(given, parts)
    targets = iter(results)
    for result, value in zip(record.call.results, found, strict=True):
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
