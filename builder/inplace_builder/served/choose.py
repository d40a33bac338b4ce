"""Choose the engine of a build: TensorRT where it can run the model, else PyTorch."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from inplace.errors import LoadError
from inplace.schema.served import Manifest

from inplace_builder.choices import Device, EngineKind
from inplace_builder.errors import LoweringError
from inplace_builder.served.build import Stage
from inplace_builder.served.model import build_model
from inplace_builder.served.options import BuildOptions

Report = Callable[[str], None]
"""Called with the engine that was chosen, and why."""


def first_engine(device: Device | None) -> EngineKind:
    """The engine that ``auto`` tries first: TensorRT where PyTorch sees a GPU."""
    return "torch" if device == "cpu" or not torch.cuda.is_available() else "tensorrt"


def build_with_best_engine(
    source: Path | str,
    output: Path | str,
    options: BuildOptions,
    stage: Stage = lambda _: None,
    report: Report = lambda _: None,
) -> Manifest:
    """Build a model with TensorRT, and where that cannot run it with PyTorch on the same GPU.

    Args:
        source, output, stage: as of `build_model`.
        options: what to build for, with the engine of `first_engine`.
        report: called with the engine that is tried, and with the reason if another one is needed.

    Raises:
        BuildError: as of `build_model`, with nothing written. A `LoweringError` only where the
            options demand ``alias`` or ``strict``, which the PyTorch engine does not have.
        LoadError: they do, and TensorRT is not installed.
    """
    if options.engine == "torch":
        report(f"engine torch on {options.device}: no GPU was asked for, or PyTorch sees none here")
        return build_model(source, output, options, stage)
    report("engine tensorrt: PyTorch sees a GPU here")
    try:
        return build_model(source, output, options, stage)
    except (LoweringError, LoadError) as error:
        if options.alias is not None or options.strict:
            raise
        what = "run the model" if isinstance(error, LoweringError) else "be loaded"
        report(f"engine torch on cuda, because TensorRT cannot {what}: {error}")
    return build_model(source, output, replace(options, engine="torch"), stage)
