"""Whose turn it is to run Python."""

import threading

PATIENCE = 0.005
"""Seconds after which who waits goes on all the same: the engine's thread may come back before a busy machine has woken anybody."""


class Turn:
    """Held by the engine's thread, except while the device computes and while it has nothing to do; others work meanwhile.

    Python hands its interpreter lock to any thread that waits for it. An engine's thread that meets senders with a response in hand gets it
    after them, once for every call that lets go of it, and the device waits. What is said meanwhile goes with the next response.

    As a context manager it is given up inside the block. The engine's thread alone uses it so, and `take` and `give`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = False

    def take(self) -> None:
        """The engine's thread goes on; who is in the middle of something may finish it."""
        self._taken = True
        self._lock.acquire()

    def give(self) -> None:
        """The engine's thread waits."""
        self._taken = False
        self._lock.release()

    def wait(self) -> None:
        """Return when the engine's thread waits, or has kept its turn for long. From any other thread, before each piece of work."""
        if self._taken and self._lock.acquire(timeout=PATIENCE):
            self._lock.release()

    def __enter__(self) -> None:
        self.give()

    def __exit__(self, *_: object) -> None:
        self.take()
