"""The process that this backend runs in, the stub of Triton's Python backend."""

import logging
import os
import shutil
import subprocess
from pathlib import Path

from inplace.errors import LoadError

log = logging.getLogger("inplace")


def start_watchdog() -> subprocess.Popen[bytes] | None:
    """Start a process that kills this one when its server has died (`inplace.server.watchdog`).

    If a server is killed while a stub sends a response, the stub waits forever and keeps its
    memory, also on the GPU (seen with Triton 24.10). It may hold the GIL meanwhile, so no Python
    thread in it could end it.

    Returns:
        The watchdog, which ends with this process; None if it cannot be started, which is logged.
    """
    # The stub takes its environment from this interpreter too.
    python = shutil.which("python3")
    command = [python or "python3", "-I", "-S", str(Path(__file__).with_name("watchdog.py"))]
    try:
        server, stub = os.pidfd_open(os.getppid()), os.pidfd_open(os.getpid())
    except OSError as error:
        log.warning(
            "this process keeps running if the server is killed: pidfd_open failed: %s",
            error,
        )
        return None
    try:
        quiet = subprocess.DEVNULL
        return subprocess.Popen(
            [*command, str(server), str(stub)],
            pass_fds=(server, stub),
            stdin=quiet,
            stdout=quiet,
            start_new_session=True,
        )
    except OSError as error:
        log.warning(
            "this process keeps running if the server is killed: "
            "its watchdog did not start (%s): %s",
            " ".join(command),
            error,
        )
        return None
    finally:
        os.close(server)
        os.close(stub)


def check_numpy(stub: Path, numpy: str) -> None:
    """Refuse a stub that would send empty texts with this version of NumPy.

    pybind11 before 2.12 reads the size of an array at its offset in NumPy 1. In a stub compiled
    with it, every output made from an array of NumPy 2 is empty, without an error (seen with the
    stub of Triton 24.10). Later versions of pybind11 look for the module ``numpy._core``.

    Args:
        stub: its executable.
        numpy: the version of NumPy in its environment.

    Raises:
        LoadError: the stub was compiled for NumPy 1, and this is NumPy 2.
    """
    if int(numpy.partition(".")[0]) >= 2 and b"numpy._core" not in stub.read_bytes():
        raise LoadError(
            "this server's Python backend was made for NumPy 1 and sends empty texts with NumPy "
            f'{numpy}: install "numpy<2" in the server\'s environment, or use a newer Triton'
        )
