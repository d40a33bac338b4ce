"""What a directly called engine has on disk beside its graph."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from inplace.artifacts import File
from inplace.direct.manifest import FILE_NAME, DirectManifest
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


def held_tensors(folder: Path, manifest: DirectManifest) -> dict[str, Tensor]:
    """The states that the module owned, with the values that were saved.

    Raises:
        LoadError: the file is missing, changed, or holds something else.
    """
    if manifest.held is None:
        return {}
    path = manifest.held.checked(folder)
    found = torch.load(path, weights_only=True, map_location=manifest.engine.device)
    wanted = {state.source: (state.shape, state.dtype.as_torch) for state in manifest.states if state.owner == "module"}
    if {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in found.items()} != wanted:
        raise LoadError(f"{path} does not hold the states {wanted} of the manifest; build the engine again")
    return {name: tensor.contiguous() for name, tensor in found.items()}
