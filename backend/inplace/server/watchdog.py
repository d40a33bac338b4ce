"""A small process that kills a Python backend stub whose tritonserver has died.

`inplace.server.stub` starts it. It imports only the standard library.

    python watchdog.py SERVER STUB

Both arguments are file descriptors of processes (pidfd_open(2)): unlike process ids, they are never
reused for another process.
"""

import contextlib
import select
import signal
import sys

GRACE_MILLISECONDS = 2000
"""Time from the server's end until the stub is killed; a stub may notice and exit by itself."""


def main(server: int, stub: int) -> None:
    """Kill the stub if it is still running `GRACE_MILLISECONDS` after the server has ended."""
    processes = select.poll()
    processes.register(server, select.POLLIN)
    processes.register(stub, select.POLLIN)
    if any(ended == stub for ended, _ in processes.poll()):
        return
    processes.unregister(server)
    if not processes.poll(GRACE_MILLISECONDS):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            signal.pidfd_send_signal(stub, signal.SIGKILL)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
