"""Write the files of an engine: a PyTorch archive, or a TensorRT plan with its weights."""

import importlib.metadata
import io
import platform
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Self, cast

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

TORCH_FILE, PLAN_FILE, WEIGHTS_FILE = "engine.pt2", "engine.plan", "weights.safetensors"


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
        OSError: it cannot be written.
    """
    if device != "cpu":
        exported = move_to_device_pass(exported, device)
    save_archive(exported, folder / TORCH_FILE)
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


def save_archive(exported: ExportedProgram, path: Path) -> None:
    """Write a graph and its weights in the format that ``torch.export.load`` reads.

    The weights go to the file one by one, so that no copy of the archive is held in memory.
    PyTorch's own serializer pickles all of them once on the way and drops that copy again.

    Raises:
        OSError: the file cannot be written; what is there then is not an archive.
    """
    with ArchiveFile(path) as file:
        torch.export.save(exported, cast("IO[bytes]", file))


class ArchiveFile(io.RawIOBase):
    """A file whose write errors are kept, and raised at the end of its ``with`` block.

    PyTorch's archive writer is C++ and finishes the archive in its destructor: an exception out of
    ``write`` ends the process with SIGABRT. So the first error is kept, everything after it is
    dropped, and the writer gets no error. It ignores how much a ``write`` took, so each ``write``
    takes everything.

    Args:
        path: the file; created, or overwritten.

    Raises:
        OSError: it cannot be opened; or, at the end of the block, the first error of a write.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("wb")
        self._error: OSError | None = None

    def writable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True: the writer goes back to the start when it is done."""
        return True

    def write(self, data: Buffer, /) -> int:
        """Write all of ``data``, or drop it if an earlier write failed; its size in bytes."""
        size = memoryview(data).nbytes
        if self._error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self._error = error
        return size

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Go to a position, unless a write has failed."""
        if self._error is None:
            try:
                return self._file.seek(offset, whence)
            except OSError as error:  # buffered data is written first
                self._error = error
        return 0

    def close(self) -> None:
        """Close the file; it is then complete on disk, or its error is kept."""
        if not self.closed:
            try:
                self._file.close()
            except OSError as error:
                self._error = self._error or error
            super().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        if self._error is not None:
            raise self._error
