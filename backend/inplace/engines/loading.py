"""From an engine directory to an engine bound to an arena."""

from pathlib import Path

from inplace.arena import Arena
from inplace.engines.base import Engine
from inplace.engines.torch_engine import TorchEngine
from inplace.manifest import Manifest


def load_engine(folder: Path, manifest: Manifest, arena: Arena) -> Engine:
    """Load the engine file that the manifest names, whole and unchanged, bind its states to the arena, and warm it.

    Raises:
        LoadError: the file is missing, truncated or changed, disagrees with the manifest, or was built for another machine.
    """
    if manifest.engine.kind == "torch":
        return TorchEngine(manifest.engine.checked(folder), manifest, arena)
    from inplace.engines.tensorrt import TensorRtEngine  # imports TensorRT

    return TensorRtEngine(folder, manifest, arena)
