"""What a directly called engine has on disk beside its graph."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from inplace.artifacts import File
from inplace.direct.manifest import FILE_NAME
from inplace.errors import LoadError
from inplace.files import occupied

HELD_FILE = "states.pt"


def write_held(folder: Path, states: Mapping[str, Tensor]) -> File | None:
    """Write the values of the states that an engine holds; None where it holds none."""
    if not states:
        return None
    torch.save({name: tensor.detach().clone() for name, tensor in states.items()}, folder / HELD_FILE)
    return File.of(folder / HELD_FILE)


def check_target(target: Path) -> None:
    """LoadError if ``target`` holds something that is not an engine to replace."""
    if (reason := occupied(target, Path(FILE_NAME))) is not None:
        raise LoadError(reason)
