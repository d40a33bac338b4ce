"""Front ends in several processes: they share a port, the limits of keys, and their counters.

The kernel distributes connections among the processes (``SO_REUSEPORT``). What they share is in
files that all of them map into memory, in a folder that goes with the front end. There are no
locks: each process writes numbers of its own, and reads those of all.
"""

import contextlib
import logging
import mmap
import multiprocessing
import os
import secrets
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inplace.errors import InplaceError

log = logging.getLogger("inplace.openai")

METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""The environment variable by which prometheus-client keeps metrics in files of a folder."""

START_TIMEOUT = 120.0
"""Seconds within which a process must listen."""

POLL_INTERVAL = 0.2
"""Seconds between two looks at the processes."""

RESTART_PAUSE = 1.0
"""Seconds before a process that ended is started again."""

STOP_MARGIN = 5.0
"""Seconds beyond the drain timeout after which a process is killed."""


class WorkersError(InplaceError):
    """The processes cannot be started."""


@dataclass(frozen=True)
class Worker:
    """One process of a front end, and what it shares with the others.

    Attributes:
        index: its number.
        count: of processes.
        folder: where the shared files are; None for a front end of one process.
        secret: known to all of them, and to nobody else.
    """

    index: int = 0
    count: int = 1
    folder: Path | None = None
    secret: str = field(default_factory=lambda: secrets.token_hex(32), repr=False)

    def shared(self, name: str, length: int) -> NDArray[np.int64]:
        """Whole numbers of 64 bits that all processes see, zeros at first.

        Args:
            name: of the numbers.
            length: how many.
        """
        if self.folder is None:
            return np.zeros(length, np.int64)
        descriptor = os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(descriptor, length * 8)
            return np.frombuffer(mmap.mmap(descriptor, length * 8), np.int64)
        finally:
            os.close(descriptor)

    def sum(self, name: str) -> "Sum":
        """A number that is the sum of one of each process; it stays when a process ends."""
        return Sum(self.shared(f"sum-{name}", self.count), self.index)

    def running(self, name: str) -> "Sum":
        """As `sum`, of what a process has now: the part of a process that ends goes with it."""
        return Sum(self.shared(f"running-{name}", self.count), self.index)

    def forget_running(self) -> None:
        """Set this process's parts of what processes have now to zero, as after it was killed."""
        if self.folder is not None:
            for path in self.folder.glob("running-*"):
                self.shared(path.name, self.count)[self.index] = 0


class Sum:
    """A whole number that is the sum of one of each process.

    Args:
        parts: of each process.
        own: which of them is this process's.
    """

    def __init__(self, parts: NDArray[np.int64], own: int) -> None:
        self._parts, self._own = parts, own

    def add(self, number: int) -> None:
        """Add to this process's part."""
        self._parts[self._own] += number

    @property
    def total(self) -> int:
        """The sum."""
        return int(self._parts.sum())


Serve = Callable[[Worker, socket.socket, Callable[[], None]], None]
"""What a process runs: serves on a socket until SIGTERM, and says when it has begun. Picklable."""


class Workers:
    """Processes that serve the same port. One that ends is started again.

    Args:
        serve: what each of them runs.
        count: of processes.
        host, port: where they listen; port 0 for a free one.
        drain_seconds: how long they may take to end after SIGTERM.

    Attributes:
        port: where they listen.

    Raises:
        WorkersError: another program listens there.
    """

    def __init__(
        self, serve: Serve, count: int, host: str, port: int, drain_seconds: float
    ) -> None:
        self._serve, self._count, self._drain_seconds = serve, count, drain_seconds
        self._context = multiprocessing.get_context("spawn")
        self._stack = contextlib.ExitStack()
        self._stopping = False
        self._processes: list[BaseProcess] = []
        self._address = _reserve(host, port, self._stack)
        self.port = int(self._address[1][1])

    def run(self) -> None:
        """Run them until SIGTERM or SIGINT.

        Raises:
            WorkersError: one of them ended while it started.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        with self._stack:
            folder = self._stack.enter_context(
                tempfile.TemporaryDirectory(prefix="inplace-openai-")
            )
            os.environ[METRICS_FOLDER] = folder
            first = Worker(0, self._count, Path(folder))
            workers = [replace(first, index=index) for index in range(self._count)]
            try:
                started = [self._start(worker) for worker in workers]
                self._processes = [process for process, _ in started]
                self._wait_until_begun([begun for _, begun in started])
                self._watch(workers)
            finally:
                self._end()

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _start(self, worker: Worker) -> tuple[BaseProcess, Connection]:
        receiving, sending = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=_run_worker,
            args=(self._serve, worker, self._address, sending),
            name=f"inplace-openai-{worker.index}",
            daemon=True,
        )
        process.start()
        sending.close()  # so that its end is noticed
        return process, receiving

    def _wait_until_begun(self, begun: list[Connection]) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        for process, connection in zip(self._processes, begun, strict=True):
            while not self._stopping and not connection.poll(POLL_INTERVAL):
                if time.monotonic() > deadline:
                    raise WorkersError(f"a process does not listen after {START_TIMEOUT:g} s")
            if not self._stopping:
                try:
                    connection.recv()
                except EOFError:
                    process.join()
                    raise WorkersError(
                        f"a process ended with status {process.exitcode} while it started, see "
                        "above"
                    ) from None
            connection.close()

    def _watch(self, workers: Sequence[Worker]) -> None:
        from prometheus_client.multiprocess import mark_process_dead

        while not self._stopping:
            wait([process.sentinel for process in self._processes], POLL_INTERVAL)
            for worker in workers:
                process = self._processes[worker.index]
                if self._stopping or process.exitcode is None:
                    continue
                log.error(
                    "process %d ended with status %s; its requests are lost; it is started again",
                    worker.index,
                    process.exitcode,
                )
                mark_process_dead(process.pid, str(worker.folder))  # type: ignore[no-untyped-call]
                worker.forget_running()
                time.sleep(RESTART_PAUSE)
                self._processes[worker.index], begun = self._start(worker)
                begun.close()

    def _end(self) -> None:
        for process in self._processes:
            process.terminate()
        deadline = time.monotonic() + self._drain_seconds + STOP_MARGIN
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join()


Address = tuple[socket.AddressFamily, Any]


def _reserve(host: str, port: int, stack: contextlib.ExitStack) -> Address:
    """Take a port that nobody listens on, until the stack is closed.

    Raises:
        WorkersError: somebody does, or the host is not an address of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with _bound((family, address), shared=False) as alone:  # refused where somebody listens
            address = alone.getsockname()
        stack.enter_context(_bound((family, address), shared=True))
    except OSError as error:
        raise WorkersError(f"cannot listen on {host}, port {port}: {error}") from None
    return family, address


def _bound(address: Address, *, shared: bool) -> socket.socket:
    made = socket.socket(address[0], socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind(address[1])
    except BaseException:
        made.close()
        raise
    return made


def _run_worker(serve: Serve, worker: Worker, address: Address, begun: Connection) -> None:
    """The main function of a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; the parent tells this one to end
    logging.basicConfig(
        level=logging.INFO, format=f"%(levelname)s [process {worker.index}] %(message)s"
    )
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with _bound(address, shared=True) as listening:
        serve(worker, listening, lambda: _say(begun))


def _say(begun: Connection) -> None:
    with contextlib.suppress(OSError):  # nobody waits for a process that was started again
        begun.send(True)
    begun.close()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
