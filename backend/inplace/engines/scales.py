"""Weights of 8-bit floats: the manifest names their scales, and the files have both."""

from collections.abc import Mapping

import torch

from inplace.errors import LoadError
from inplace.operators.float8 import FLOAT8
from inplace.schema.artifacts import EngineFile


def check_scales(title: str, engine: EngineFile, dtypes: Mapping[str, torch.dtype]) -> None:
    """Compare the weights with scales that a manifest names with what a file has.

    Args:
        title: what errors call the file.
        engine: the manifest's record of it.
        dtypes: the element types of its tensors by their names.

    Raises:
        LoadError: a weight is not one of 8-bit floats, or its scales are not float32.
    """
    for weight, scale in engine.scales.items():
        for name, expected in ((weight, FLOAT8), (scale, torch.float32)):
            if (found := dtypes.get(name)) != expected:
                raise LoadError(
                    f"{title} has {'no tensor' if found is None else found} {name}, the manifest "
                    f"says that it is {expected} (the scales of {weight} are {scale}); build the "
                    f"model again"
                )
