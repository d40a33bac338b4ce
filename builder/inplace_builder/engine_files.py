"""Write the files of an engine: a graph for PyTorch, or a TensorRT plan with its weights."""

import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path

import torch
from inplace import __version__
from inplace.schema.artifacts import EngineFile, Plan
from inplace.schema.dtypes import Dtype
from inplace.schema.tensors import write_tensors
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass
from typing_extensions import Buffer

from inplace_builder.choices import Device
from inplace_builder.graph.writer import save_graph

TORCH_FILE, PLAN_FILE, WEIGHTS_FILE = "engine.safetensors", "engine.plan", "weights.safetensors"


def write_program(
    exported: ExportedProgram, folder: Path, device: Device, dtype: Dtype
) -> EngineFile:
    """Write a captured graph for PyTorch.

    Args:
        exported: the graph.
        folder: where to write it.
        device: where the engine runs.
        dtype: element type of the weights.

    Raises:
        BuildError: the graph calls or holds something that an engine file cannot hold.
        OSError: it cannot be written.
    """
    if device != "cpu":
        exported = move_to_device_pass(exported, device)
    save_graph(exported, folder / TORCH_FILE)
    return EngineFile(file=TORCH_FILE, kind="torch", device=device, dtype=dtype)


def write_plan(
    content: Buffer, record: Plan, weights: Mapping[str, Tensor], folder: Path, dtype: Dtype
) -> EngineFile:
    """Write a plan, and the weights that it takes as inputs beside it.

    Args:
        content: the plan.
        record: what it was compiled for.
        weights: the weights that it takes as inputs, by name.
        folder: where to write it.
        dtype: element type of the weights.

    Raises:
        OSError: it cannot be written.
    """
    (folder / PLAN_FILE).write_bytes(content)
    if weights:
        write_tensors(folder / WEIGHTS_FILE, weights)
        record = record.model_copy(update={"weights": WEIGHTS_FILE})
    return EngineFile(file=PLAN_FILE, kind="tensorrt", device="cuda", dtype=dtype, plan=record)


def built_with(plan: Plan | None = None) -> dict[str, str]:
    """The versions of what built an engine, as its manifest records them."""
    versions = {
        "inplace": __version__,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    return versions if plan is None else versions | {plan.flavor: plan.version}
