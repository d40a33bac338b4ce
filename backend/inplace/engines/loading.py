"""From an engine directory to an engine bound to an arena."""

import hashlib
from pathlib import Path

from inplace.arena import Arena
from inplace.engines.base import Engine
from inplace.engines.torch_engine import TorchEngine
from inplace.errors import LoadError
from inplace.manifest import Manifest


def load_engine(folder: Path, manifest: Manifest, arena: Arena) -> Engine:
    """Load the engine file that the manifest names, whole and unchanged, and bind its states to the arena.

    Raises:
        LoadError: the file is missing, truncated or changed, or disagrees with the manifest.
    """
    path = folder / manifest.engine.file
    check_file(path, manifest)
    return TorchEngine(path, manifest, arena)


def check_file(path: Path, manifest: Manifest) -> None:
    """LoadError unless the file has the size and the checksum that the manifest recorded."""
    if not path.is_file():
        raise LoadError(f"{path} is missing; the manifest beside it names it as the engine: build the model again")
    size = path.stat().st_size
    if size != manifest.engine.bytes:
        raise LoadError(
            f"{path} has {size:,} bytes, the manifest says {manifest.engine.bytes:,}: it is truncated or replaced; build the model again"
        )
    if (found := sha256(path)) != manifest.engine.sha256:
        raise LoadError(
            f"{path} has the checksum {found[:12]}…, the manifest says {manifest.engine.sha256[:12]}…: changed; build the model again"
        )


def sha256(path: Path) -> str:
    """The file's SHA-256, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
