"""Writing a directly called engine: into a draft that takes its place whole, or not at all."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from inplace.artifacts import File
from inplace.direct_manifest import FILE_NAME
from inplace.errors import LoadError

HELD_FILE = "states.pt"


def write_held(folder: Path, states: Mapping[str, Tensor]) -> File | None:
    """Write the values of the states that an engine holds; None where it holds none."""
    if not states:
        return None
    torch.save({name: tensor.detach().clone() for name, tensor in states.items()}, folder / HELD_FILE)
    return File.of(folder / HELD_FILE)


def check_target(target: Path) -> None:
    """LoadError if ``target`` holds something that is not an engine to replace."""
    if target.exists() and not target.is_dir():
        raise LoadError(f"{target} is a file; choose the folder to write the engine into")
    if target.is_dir() and any(target.iterdir()) and not (target / FILE_NAME).is_file():
        raise LoadError(f"{target} is a folder with other files in it; choose a new or empty one, or an engine to replace")


@contextlib.contextmanager
def published(target: Path) -> Iterator[Path]:
    """A draft beside ``target`` that takes its place when the block succeeds and vanishes when it fails.

    Raises:
        OSError: it cannot be written or moved; what stood there stands.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    draft.chmod(0o755)
    old = draft.with_name(f"{draft.name}.old")
    try:
        yield draft
        if target.exists():
            target.rename(old)
        try:
            draft.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
