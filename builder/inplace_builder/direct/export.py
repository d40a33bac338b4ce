"""A user's module as torch.export has it, where the builder can work on it."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from inplace.direct.checks import ALIGNMENT
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from inplace_builder.capture.functional import exported_program
from inplace_builder.errors import BuildError

EngineKind = Literal["torch", "tensorrt", "tensorrt_rtx"]


def alignment(engine: EngineKind) -> int:
    """Bytes that the address of a state must be a multiple of."""
    return ALIGNMENT["cpu" if engine == "torch" else "cuda"]


def export_for(
    module: torch.nn.Module | ExportedProgram,
    example_inputs: Sequence[Any],
    engine: EngineKind,
    *,
    dynamic_shapes: Any = None,
    kwargs: Mapping[str, Any] | None = None,
) -> ExportedProgram:
    """Export a module for an engine of this kind; what lies on a GPU is moved to the CPU for the builder, where the engine runs on one.

    Raises:
        BuildError: it cannot be exported, has no example inputs, or lies on a GPU while the engine runs on the CPU.
    """
    exported = exported_program(module, example_inputs, dynamic_shapes, kwargs)
    if exported.example_inputs is None:
        raise BuildError("the exported program has no example inputs, which the engine is verified with; export it anew")
    leaves = torch.utils._pytree.tree_leaves(exported.example_inputs)
    tensors = {**exported.state_dict, **{f"example input {place}": leaf for place, leaf in enumerate(leaves)}}
    away = {name: x for name, x in tensors.items() if isinstance(x, torch.Tensor) and x.device.type != "cpu"}
    if away and engine == "torch":
        name, tensor = next(iter(away.items()))
        raise BuildError(
            f"{name} lies on {tensor.device}; a PyTorch engine runs on the CPU: move module and inputs with .cpu(), or take TensorRT"
        )
    return move_to_device_pass(exported, "cpu") if away else exported
