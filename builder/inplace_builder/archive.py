"""Writing a graph as PyTorch's archive, straight to its file."""

import io
from pathlib import Path
from types import TracebackType
from typing import IO, Self, cast

import torch
from typing_extensions import Buffer


def save(exported: torch.export.ExportedProgram, path: Path) -> None:
    """Write a graph and its weights to ``path`` in the format that ``torch.export.load`` reads.

    The weights go to the file one by one; PyTorch's own serializer still pickles all of them once more on the way, for nothing.

    Raises:
        OSError: the file cannot be written; what lies there then is no archive.
    """
    with ArchiveFile(path) as file:
        torch.export.save(exported, cast("IO[bytes]", file))


class ArchiveFile(io.RawIOBase):
    """A file whose write errors are held back until the end of its ``with`` block, and raised there.

    PyTorch's archive writer is C++ and finishes the archive in its destructor: an exception out of ``write`` ends the process with
    SIGABRT. So the first error is kept, everything after it is dropped, and the writer believes all went well. It ignores how much
    a ``write`` took, so each one takes everything.

    Args:
        path: the file; created, or overwritten.

    Raises:
        OSError: it cannot be opened; later, on leaving the block, the first error of a write.
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
        """Write all of ``data``, or drop it when an earlier write failed."""
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
            except OSError as error:  # what was buffered is written before
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
