"""A thread that an engine is loaded on and stepped by."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

Result = TypeVar("Result")


class Worker:
    """Runs what it is given, one thing after the other.

    Who steps an engine on the CPU should have loaded it: OpenMP keeps threads for each thread that has ever computed something large, and
    where it keeps more than there are processors they no longer wait for work but sleep between two operators (libgomp).
    """

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="inplace-engine", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], Result]) -> "Future[Result]":
        """Have something run; its result, or what it raised."""
        future: Future[Result] = Future()
        self._work.put((future, work))
        return future

    def close(self) -> None:
        """End the thread when it has run everything."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (given := self._work.get()) is not None:
            future, work = given
            try:
                future.set_result(work())
            except BaseException as error:  # it is the caller's
                future.set_exception(error)
