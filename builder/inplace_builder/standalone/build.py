"""Build an engine from a user's own module, to be called without a server."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from inplace.errors import LoadError
from inplace.schema.publish import publish
from inplace.schema.served import AliasKind
from inplace.standalone import Engine
from inplace.standalone.engine import check_replaceable
from torch.export import ExportedProgram

from inplace_builder.capture.exported import capture_exported
from inplace_builder.choices import EngineKind
from inplace_builder.errors import BuildError, brief
from inplace_builder.standalone.call import alignment, describe_call, export_for
from inplace_builder.standalone.plan import build_standalone_plan
from inplace_builder.standalone.serialize import Binding, Serialized, serialize
from inplace_builder.standalone.verify import verify_standalone
from inplace_builder.standalone.write import write_standalone

__all__ = ["Binding", "EngineKind", "Serialized", "build", "serialize"]


def build(
    module: torch.nn.Module | ExportedProgram,
    example_inputs: Sequence[Any] = (),
    *,
    path: Path | str,
    kwargs: Mapping[str, Any] | None = None,
    engine: EngineKind = "torch",
    states: str | Collection[str] = "auto",
    dynamic_shapes: Any = None,
    assume_consecutive: Collection[str] = (),
    alias: AliasKind | None = None,
    strict: bool = False,
    optimization_level: int | None = None,
) -> Engine:
    """Build a module that mutates its inputs or buffers into an engine that is called like it, and write that.

    Before it is put in its place the engine is loaded from its files and called against the module, outputs and states compared after each
    of four calls. Neither the module nor the example inputs are changed. The engine's own states begin with the buffers' values.

    Args:
        module: the module; or ``torch.export.export`` of it, whose example inputs are taken. For a TensorRT engine on the CPU or a GPU.
        example_inputs: positional arguments; dicts, tuples and registered dataclasses of tensors too.
        path: the folder to write; an engine there is replaced, anything else refused.
        kwargs: keyword arguments.
        engine: ``torch``, which runs on the CPU; ``tensorrt``, built for the GPU of this machine and run there; ``tensorrt_rtx``, the same
            with TensorRT for RTX.
        states: as in `capture_exported`.
        dynamic_shapes: as in `capture_exported`.
        assume_consecutive: as in `capture_exported`.
        alias: the mechanism that must update every state (TensorRT); None is the first that can.
        strict: refuse what copies a state: a write that no pattern covers, and the mechanism ``copy``.
        optimization_level: how long TensorRT searches for fast kernels, from 0 to 5; None is its own choice, 3.

    Raises:
        BuildError: with nothing written.
        LoadError: the TensorRT that was asked for is not installed.
    """
    target = Path(path)
    try:
        check_replaceable(target)
    except LoadError as error:
        raise BuildError(str(error)) from error
    if engine == "torch" and alias is not None:
        raise BuildError(
            "alias belongs to TensorRT engines; the PyTorch engine has no choice of mechanism"
        )
    exported = export_for(
        module, example_inputs, engine, dynamic_shapes=dynamic_shapes, kwargs=kwargs
    )
    given = (
        (tuple(example_inputs), dict(kwargs or {}))
        if isinstance(module, torch.nn.Module)
        else module.example_inputs
    )
    arguments = deepcopy(given)  # (args, kwargs), where the module takes them
    reference = _reference(module)
    capture = capture_exported(
        exported,
        states=states,
        assume_consecutive=assume_consecutive,
        strict=strict,
        alignment=alignment(engine),
    )
    call = describe_call(exported, capture)
    plan = (
        None
        if engine == "torch"
        else build_standalone_plan(
            capture, call, engine, alias=alias, strict=strict, optimization_level=optimization_level
        )
    )
    try:
        with publish(target) as folder:
            manifest = write_standalone(folder, capture, call, plan)
            notes = verify_standalone(_loaded(folder), reference, arguments, assume_consecutive)
            manifest.model_copy(update={"built_with": manifest.built_with | notes}).save(folder)
    except OSError as error:
        raise BuildError(
            f"{target} cannot be written: {error}; free space there or choose another place"
        ) from error
    return Engine.load(target)


def _reference(module: torch.nn.Module | ExportedProgram) -> torch.nn.Module:
    """A copy to compare with, whose buffers change as the engine's states do."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # of torch's own, where an exported program is copied
            copied = deepcopy(module)
    except Exception as error:
        raise BuildError(
            f"the module cannot be copied, which verification needs: {brief(error)}"
        ) from error
    return copied.module() if isinstance(copied, ExportedProgram) else copied


def _loaded(folder: Path) -> Engine:
    try:
        return Engine.load(folder)
    except LoadError as error:
        raise BuildError(f"the engine cannot be loaded as it was written: {error}") from error
