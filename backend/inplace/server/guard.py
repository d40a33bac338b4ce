"""A small process that ends a Triton Python backend stub whose server is gone; `inplace.server.stub` starts it. It imports nothing of ours.

    python guard.py SERVER STUB

Both are file descriptors of processes (pidfd_open(2)), which no later process can be mistaken for.
"""

import contextlib
import select
import signal
import sys

GRACE = 2000
"""Milliseconds from the end of the server until the stub is killed: one that notices by itself ends in order."""


def main(server: int, stub: int) -> None:
    """Wait until one of them ends; kill the stub if it outlives its server by `GRACE`."""
    ends = select.poll()
    ends.register(server, select.POLLIN)
    ends.register(stub, select.POLLIN)
    if any(ended == stub for ended, _ in ends.poll()):
        return
    ends.unregister(server)
    if not ends.poll(GRACE):
        with contextlib.suppress(ProcessLookupError):  # it has ended this very moment
            signal.pidfd_send_signal(stub, signal.SIGKILL)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
