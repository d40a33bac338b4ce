"""Build an engine from a module, to be called without a server: plan, write, verify, publish."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from inplace.schema.specs import AliasKind
from inplace.schema.standalone import FILE_NAME
from inplace.standalone import Engine
from torch.export import ExportedProgram

from inplace_builder.capture.exported import capture_exported
from inplace_builder.choices import EngineKind
from inplace_builder.engine_files import check_target, disk_errors, load_errors, publish_engine
from inplace_builder.errors import BuildError, brief
from inplace_builder.standalone.call import alignment, describe_call, export_for, write_files
from inplace_builder.standalone.verify import verify
from inplace_builder.states.adapt import States, adapt_states


def build(
    module: torch.nn.Module | ExportedProgram,
    example_inputs: Sequence[Any] = (),
    *,
    path: Path | str,
    kwargs: Mapping[str, Any] | None = None,
    engine: EngineKind = "torch",
    states: States = "auto",
    dynamic_shapes: Any = None,
    assume_consecutive: Collection[str] = (),
    alias: AliasKind | None = None,
    strict: bool = False,
    optimization_level: int | None = None,
) -> Engine:
    """Build an engine that is called like the module, and write it to ``path``.

    What the module mutates, its inputs or buffers, becomes the engine's states. Before the engine
    is published it is loaded from its files and called beside the module; outputs and states are
    compared after each call. Neither the module nor the example inputs are changed. The engine's
    own states begin with the buffers' values.

    Args:
        module: the module; or ``torch.export.export`` of it, whose example inputs are taken. On the
            CPU or, for a TensorRT engine, on a GPU.
        example_inputs: positional arguments; dicts, tuples and registered dataclasses of tensors
            too.
        path: the folder to write; an engine there is replaced, anything else refused.
        kwargs: keyword arguments.
        engine: ``torch``, which runs on the CPU; ``tensorrt``, built for the GPU of this machine
            and run there; ``tensorrt_rtx``, the same with TensorRT for RTX.
        states: as in `capture_exported`.
        dynamic_shapes: as in `capture_exported`.
        assume_consecutive: as in `capture_exported`.
        alias: the only mechanism allowed to update states (TensorRT); None takes the first that
            can.
        strict: refuse what copies a state: a write that no pattern covers, and the mechanism
            ``copy``.
        optimization_level: how long TensorRT searches for fast kernels, from 0 to 5; None is its
            own default, 3.

    Raises:
        BuildError: with nothing written.
        LoadError: the TensorRT that was asked for is not installed.
    """
    target = Path(path)
    check_target(target, Path(FILE_NAME))
    if engine == "torch" and alias is not None:
        raise BuildError(
            "alias belongs to TensorRT engines; the PyTorch engine has no choice of mechanism"
        )
    if isinstance(module, torch.nn.Module):
        module, states = adapt_states(module, example_inputs, kwargs, states)
    exported = export_for(
        module, example_inputs, engine, dynamic_shapes=dynamic_shapes, kwargs=kwargs
    )
    arguments = (
        (tuple(example_inputs), dict(kwargs or {}))
        if isinstance(module, torch.nn.Module)
        else module.example_inputs
    )
    arguments = deepcopy(arguments)  # on the device where the module takes them
    reference = _reference(module)
    capture = capture_exported(
        exported,
        states=states,
        assume_consecutive=assume_consecutive,
        strict=strict,
        alignment=alignment(engine),
    )
    call = describe_call(exported, capture)
    with publish_engine(target) as folder:
        plan = None
        if engine != "torch":  # importing the converters takes as long as importing PyTorch
            from inplace_builder.lower.compile import Target
            from inplace_builder.standalone.plan import build_plan

            plan = build_plan(
                capture,
                call,
                Target.of(engine),
                alias=alias,
                strict=strict,
                optimization_level=optimization_level,
            )
        with disk_errors(target):
            manifest = write_files(folder, capture, call, plan)
        with load_errors():
            loaded = Engine.load(folder)
        notes = verify(loaded, reference, arguments, assume_consecutive=assume_consecutive)
        manifest = manifest.model_copy(update={"built_with": manifest.built_with | notes})
        with disk_errors(target):
            manifest.save(folder)
    return Engine.load(target)


def _reference(module: torch.nn.Module | ExportedProgram) -> torch.nn.Module:
    """A copy to compare with, whose buffers change as the engine's states do.

    Raises:
        BuildError: the module cannot be copied.
    """
    try:
        with warnings.catch_warnings():
            # torch warns of itself where an exported program is copied
            warnings.simplefilter("ignore", FutureWarning)
            copied = deepcopy(module)
    except Exception as error:
        raise BuildError(
            f"the module cannot be copied, which verification needs: {brief(error)}"
        ) from error
    return copied.module() if isinstance(copied, ExportedProgram) else copied
