"""Write the files of an engine, a graph or a plan with its weights, and put them in their place.

The folder appears whole, after the engine was verified, or not at all.
"""

import contextlib
import importlib.metadata
import platform
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from inplace import __version__
from inplace.errors import LoadError
from inplace.schema.artifacts import EngineFile, Plan
from inplace.schema.files import RestoreError, publish, replace_conflict
from inplace.schema.graph import METADATA
from inplace.schema.specs import Dtype
from inplace.schema.tensor_file import write_tensors
from torch import Tensor
from torch.export import ExportedProgram
from typing_extensions import Buffer

from inplace_builder.choices import Device
from inplace_builder.errors import BuildError, rejected
from inplace_builder.graph.program import move_to_device
from inplace_builder.graph.writer import save_graphs

NO_PROGRAMS: Mapping[str, ExportedProgram] = {}
NO_SCALES: Mapping[str, str] = {}
NO_WEIGHTS: Mapping[str, Mapping[str, Tensor]] = {}
TORCH_FILE, PLAN_FILE, WEIGHTS_FILE = "engine.safetensors", "engine.plan", "weights.safetensors"


def write_program(
    exported: ExportedProgram,
    folder: Path,
    device: Device,
    dtype: Dtype,
    file: str = TORCH_FILE,
    others: Mapping[str, ExportedProgram] = NO_PROGRAMS,
) -> EngineFile:
    """Write a captured graph for PyTorch.

    Args:
        exported: the graph.
        folder: where to write it.
        device: where the engine runs.
        dtype: element type of the weights.
        file: the name of the file.
        others: further graphs of the file by name. Constants that they share are written once.

    Raises:
        BuildError: a graph calls or holds something that an engine file cannot hold.
        OSError: it cannot be written.
    """
    programs = {METADATA: exported, **others}
    if device != "cpu":
        moved = move_to_device(exported, device)
        programs = {METADATA: moved} | {
            name: _share_moved(move_to_device(other, device), other, moved, exported)
            for name, other in others.items()
        }
    scales = save_graphs(programs, folder / file)
    return EngineFile(file=file, kind="torch", device=device, dtype=dtype, scales=scales)


def _share_moved(
    moved: ExportedProgram,
    original: ExportedProgram,
    first_moved: ExportedProgram,
    first: ExportedProgram,
) -> ExportedProgram:
    """Let a program that was moved to a device have the tensors of another one there, in place.

    Those that they had in common before.
    """
    for name, tensor in original.state_dict.items():
        other = first.state_dict.get(name)
        if other is not None and other.data_ptr() == tensor.data_ptr():
            moved.state_dict[name] = first_moved.state_dict[name]
    return moved


def write_plan(
    content: Buffer,
    record: Plan,
    weights: Mapping[str, Tensor],
    folder: Path,
    dtype: Dtype,
    files: tuple[str, str] = (PLAN_FILE, WEIGHTS_FILE),
    written: Mapping[str, Mapping[str, Tensor]] = NO_WEIGHTS,
    scales: Mapping[str, str] = NO_SCALES,
) -> EngineFile:
    """Write a plan, and the weights that it takes as inputs beside it.

    Args:
        content: the plan.
        record: what it was compiled for.
        weights: the weights that it takes as inputs, by name.
        folder: where to write it.
        dtype: element type of the weights.
        files: the names of the plan's file and of the weights'.
        written: the weights of files that are there already, by their names.
        scales: the names of weights that are scales of others, by the names of these.

    Raises:
        OSError: it cannot be written.
    """
    plan_file, weights_file = files
    (folder / plan_file).write_bytes(content)
    if weights:
        same = [name for name, tensors in written.items() if _are_same(tensors, weights)]
        if not same:
            write_tensors(folder / weights_file, weights)
        record = record.model_copy(update={"weights": [*same, weights_file][0]})
    return EngineFile(
        file=plan_file,
        kind="tensorrt",
        device="cuda",
        dtype=dtype,
        plan=record,
        scales=dict(scales),
    )


def _are_same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name])
        for name in first
    )


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


def check_target(target: Path, mark: Path) -> None:
    """Raise BuildError if ``target`` cannot be written, before the work of a build is done.

    It can if it is free or an engine that may be replaced, and a folder can be made beside it.

    Args:
        target: the folder to write.
        mark: the file, relative to it, that an engine directory has.
    """
    if target.name in ("", ".."):
        raise BuildError(f"{target} has no name of its own; name the folder to write")
    try:
        if (reason := replace_conflict(target, mark)) is not None:
            raise BuildError(reason)
        parent = target.parent
        while not parent.exists():
            parent = parent.parent
        # access rights do not show it for root, or on a read-only file system
        Path(tempfile.mkdtemp(prefix=".inplace-", dir=parent)).rmdir()
    except OSError as error:
        raise BuildError(f"{target} cannot be written: {error}; choose another place") from error


@contextlib.contextmanager
def publish_engine(target: Path) -> Iterator[Path]:
    """A draft folder that takes the place of ``target`` when the block ends without an error.

    Errors of the block pass through; the draft is removed then, and ``target`` stays as it was.

    Raises:
        BuildError: the draft cannot be made, or cannot be moved into place.
    """
    with contextlib.ExitStack() as stack:
        with disk_errors(target):
            draft = stack.enter_context(publish(target))
        yield draft
        with disk_errors(target):
            stack.close()


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn the OSError of a failed write into a BuildError."""
    try:
        yield
    except RestoreError as error:
        raise BuildError(str(error)) from error
    except OSError as error:
        raise BuildError(
            f"{target} cannot be written: {error}; free space there or choose another place "
            f"(nothing was left behind)"
        ) from error


@contextlib.contextmanager
def load_errors() -> Iterator[None]:
    """Turn the LoadError of an engine that was just written into a BuildError."""
    try:
        yield
    except LoadError as error:
        raise rejected(f"the engine cannot be loaded: {error}") from error
