"""The process that this backend runs in, Triton's Python backend stub: what it can take, and when it must end."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from inplace.errors import LoadError

PERIOD = 1.0
"""Seconds between two looks at the server."""


def end_with_server(end: Callable[[int], object] = os._exit) -> None:
    """End this process, from a thread of its own, when the server that started it is gone.

    A stub whose server was killed while it was sending waits for ever, and keeps its memory, the GPU's too (seen with Triton 24.10).

    Args:
        end: ends the process with an exit status, at once: its other threads wait for a server that will not answer.
    """
    server = os.getppid()

    def watch() -> None:
        while os.getppid() == server:
            time.sleep(PERIOD)
        end(1)

    threading.Thread(target=watch, name="inplace-orphan", daemon=True).start()


def check_numpy(stub: Path, numpy: str) -> None:
    """Refuse to send texts through a stub that sends them empty.

    A stub compiled with pybind11 before 2.12 reads the size of an array from where NumPy 1 had it: with NumPy 2 every output that is made
    of an array is empty, without an error (seen with the stub of Triton 24.10). Later pybind11 looks for the module ``numpy._core``.

    Args:
        stub: its executable.
        numpy: the version in its environment.

    Raises:
        LoadError: they do not fit.
    """
    if int(numpy.partition(".")[0]) >= 2 and b"numpy._core" not in stub.read_bytes():
        raise LoadError(
            f"this server's Python backend was made for NumPy 1 and sends empty texts with NumPy {numpy}: "
            f'install "numpy<2" in the server\'s environment, or use a newer Triton'
        )
