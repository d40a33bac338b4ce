"""What runs a step of a directly called engine: a graph of PyTorch, or a TensorRT plan."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from inplace.direct.manifest import DirectManifest
from inplace.direct.torch_graph import TorchGraph


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


def open_runner(source: Path | bytes, manifest: DirectManifest, title: str, *, cuda_graphs: bool) -> Runner:
    """Load an engine file, given by its path or its content.

    Raises:
        LoadError: it cannot be read, is not what the manifest says, or was built for another machine.
    """
    if manifest.engine.kind == "torch":
        return TorchGraph(source if isinstance(source, Path) else io.BytesIO(source), manifest, title)
    from inplace.direct.tensorrt_plan import TensorRtPlan  # imports TensorRT

    return TensorRtPlan(source if isinstance(source, bytes) else source.read_bytes(), manifest, title, cuda_graphs=cuda_graphs)
