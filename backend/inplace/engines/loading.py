"""From an engine directory to an engine bound to an arena."""

from pathlib import Path

from inplace.arena import Arena
from inplace.engines.base import Engine
from inplace.engines.torch_engine import TorchEngine
from inplace.engines.warming import warm
from inplace.manifest import Manifest


def load_engine(folder: Path, manifest: Manifest, arena: Arena) -> Engine:
    """Load the engine file that the manifest names, whole and unchanged, bind its states to the arena, and warm it.

    Raises:
        LoadError: the file is missing, truncated or changed, disagrees with the manifest or was built for another machine; or the engine
            fails when it is warmed.
    """
    if manifest.engine.kind == "torch":
        engine = TorchEngine(manifest.engine.checked(folder), manifest, arena)
        warm(engine, manifest.program("step"))
        return engine
    from inplace.engines.tensorrt import TensorRtEngine  # imports TensorRT

    return TensorRtEngine(folder, manifest, arena)
