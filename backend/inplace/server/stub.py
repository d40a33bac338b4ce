"""The process that this backend runs in, Triton's Python backend stub: what it can take, and when it must end."""

import logging
import os
import shutil
import subprocess
from pathlib import Path

from inplace.errors import LoadError

log = logging.getLogger("inplace")


def end_with_server() -> subprocess.Popen[bytes] | None:
    """Have this process killed when the server that started it is gone.

    A stub whose server was killed while it was sending waits for ever, and keeps its memory, the GPU's too (seen with Triton 24.10). It
    may wait with the interpreter's lock, so no thread of Python's can end it: a small process (`inplace.server.guard`) does.

    Returns:
        that process, which ends with this one; None where it could not be started, which is logged.
    """
    python = shutil.which(
        "python3"
    )  # the interpreter that the stub itself took its environment from
    command = [python or "python3", "-I", "-S", str(Path(__file__).with_name("guard.py"))]
    try:
        server, stub = os.pidfd_open(os.getppid()), os.pidfd_open(os.getpid())
    except OSError as error:
        log.warning(
            "this process stays if the server is killed: no descriptors of processes (pidfd_open): %s",
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
            "this process stays if the server is killed: its guard did not start (%s): %s",
            " ".join(command),
            error,
        )
        return None
    finally:
        os.close(server)
        os.close(stub)


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
