"""A small process that cleans up after a tritonserver that has died.

It kills the Python backend stub that started it, and removes the files of shared memory that the
server had made for the stub. `inplace.server.stub` starts it. It imports only the standard library.

    python watchdog.py SERVER STUB [FILE ...]

The first arguments are file descriptors of processes (pidfd_open(2)): unlike process ids, they are
never reused for another process.
"""

import contextlib
import os
import select
import signal
import sys
from pathlib import Path

GRACE_MILLISECONDS = 2000
"""Time from the server's end until the stub is killed; a stub may notice and exit by itself."""


CHECK_MILLISECONDS = 5000
"""Time between two checks whether the server has removed the files of a stub that has ended."""


def main(server: int, stub: int, files: list[str]) -> None:
    """Wait for the end of the server or of the stub, and clean up if the server has died."""
    processes = select.poll()
    processes.register(server, select.POLLIN)
    processes.register(stub, select.POLLIN)
    ended = [process for process, _ in processes.poll()]
    if server in ended:
        processes.unregister(server)
        if stub not in ended and not processes.poll(GRACE_MILLISECONDS):
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                signal.pidfd_send_signal(stub, signal.SIGKILL)
    else:
        processes.unregister(stub)
        # A server that lives removes the files when it unloads the model.
        while any(map(os.path.exists, files)) and not processes.poll(CHECK_MILLISECONDS):
            pass
        if not processes.poll(0):
            return
    for file in files:
        with contextlib.suppress(OSError):  # the server has removed it
            Path(file).unlink()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
