"""The process that this backend runs in, the stub of Triton's Python backend."""

import atexit
import contextlib
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from inplace.errors import LoadError

SHARED_MEMORY = re.compile(r"/dev/shm/triton_\w+_shm_region_[0-9a-f-]+")
"""Files that Triton's Python backend makes, with the name of the backend that is based on it."""


log = logging.getLogger("inplace")


def start_watchdog() -> subprocess.Popen[bytes] | None:
    """Start a process that cleans up when the server has died (`inplace.server.watchdog`).

    It kills this process and removes its files of shared memory, which would stay otherwise.

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
            [*command, str(server), str(stub), *shared_memory_files()],
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


def shared_memory_files(maps: Path = Path("/proc/self/maps")) -> list[str]:
    """The files of shared memory through which the server and this process exchange messages.

    Args:
        maps: the mappings of the process, as in proc(5).
    """
    paths = {line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines()}
    return sorted(path for path in paths if SHARED_MEMORY.fullmatch(path))


def skip_interpreter_teardown() -> None:
    """End this process as soon as Python begins to finalize, without freeing its modules.

    The server waits for the process when it unloads the model. With PyTorch loaded, freeing
    everything takes seconds; the kernel does it at once.
    """
    atexit.register(_exit_now)


def _exit_now() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # closed already
            stream.flush()
    os._exit(0)


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
