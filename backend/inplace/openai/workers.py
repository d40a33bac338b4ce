"""Front ends in several processes: they share a port, the limits of keys, and their counters.

The kernel distributes connections among the processes (``SO_REUSEPORT``). What they share is in
files that all of them map into memory, in a folder that goes with the front end. Nothing stays
locked where a process is killed: it writes numbers of its own and reads those of all, or has a lock
that the kernel takes back.
"""

import contextlib
import fcntl
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
from collections.abc import Callable, Iterator, Sequence
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

RESTART_PAUSE, MAX_RESTART_PAUSE = 1.0, 60.0
"""Seconds before a process that ended is started again: at first, doubled each time, at most."""

SIGNAL_INTERVAL = 1.0
"""Seconds between two signals to a process that is to end."""

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
            if os.fstat(descriptor).st_size < length * 8:
                os.ftruncate(descriptor, length * 8)
            return np.frombuffer(mmap.mmap(descriptor, length * 8), np.int64)
        finally:
            os.close(descriptor)

    def running(self, name: str, further: int = 0) -> "tuple[Sum, NDArray[np.int64]]":
        """How many of something all processes have now, and further numbers in the same file.

        The part of a process that ends goes with it.

        Args:
            name: of the number.
            further: how many numbers are behind it, see `shared`.
        """
        numbers = self.shared(f"running-{name}", self.count + further)
        return Sum(numbers[: self.count], self.index), numbers[self.count :]

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """No other process is inside such a block at the same time; for a moment only."""
        if self.folder is None:
            yield
            return
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # the kernel takes it back from a killed process
            yield
        finally:
            os.close(descriptor)

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


Serve = Callable[[Worker, list[socket.socket], Callable[[], None]], None]
"""What a process runs: serves on sockets until SIGTERM, and calls when it has begun. Picklable."""


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
        self._addresses = _reserve(host, port, self._stack)
        self.port = int(self._addresses[0][1][1])

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
            self._stack.callback(os.environ.pop, METRICS_FOLDER)
            first = Worker(0, self._count, Path(folder))
            workers = [replace(first, index=index) for index in range(self._count)]
            try:
                self._wait_until_begun([self._start(worker) for worker in workers])
                self._watch(workers)
            finally:
                self._end()

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _start(self, worker: Worker) -> Connection:
        """Start a process; returns what it says that it has begun with."""
        receiving, sending = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=_run_worker,
            args=(self._serve, worker, self._addresses, sending),
            name=f"inplace-openai-{worker.index}",
            daemon=True,
        )
        process.start()
        self._processes[worker.index : worker.index + 1] = [process]
        sending.close()  # so that its end is noticed
        return receiving

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
        pause, last = RESTART_PAUSE, time.monotonic()
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
                worker.forget_running()
                if time.monotonic() - last > 2 * MAX_RESTART_PAUSE:
                    pause = RESTART_PAUSE
                last = time.monotonic()
                while not self._stopping and time.monotonic() < last + pause:
                    time.sleep(POLL_INTERVAL)
                pause = min(2 * pause, MAX_RESTART_PAUSE)
                if not self._stopping:
                    self._start(worker).close()

    def _end(self) -> None:
        deadline = time.monotonic() + self._drain_seconds + STOP_MARGIN
        left = self._processes
        while left and time.monotonic() < deadline:
            for process in left:
                process.terminate()  # again: one that was just starting may have missed it
            wait([process.sentinel for process in left], SIGNAL_INTERVAL)
            left = [process for process in left if process.exitcode is None]
        for process in left:
            process.kill()
            process.join()


Address = tuple[socket.AddressFamily, Any]


def _reserve(host: str, port: int, stack: contextlib.ExitStack) -> list[Address]:
    """Take a port that nobody listens on, until the stack is closed; of each address of the host.

    Raises:
        WorkersError: somebody does, or the host is not an address of this machine.
    """
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses: list[Address] = []
        for family, _, _, _, given in dict.fromkeys(infos):
            address: Any = (given[0], port, *given[2:])
            with _bound((family, address), shared=False) as alone:  # refused where somebody listens
                address = alone.getsockname()
            stack.enter_context(_bound((family, address), shared=True))
            addresses.append((family, address))
            port = address[1]
    except OSError as error:
        raise WorkersError(f"cannot listen on {host}, port {port}: {error}") from None
    return addresses


def _bound(address: Address, *, shared: bool) -> socket.socket:
    made = socket.socket(address[0], socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address[0] == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if shared:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind(address[1])
    except BaseException:
        made.close()
        raise
    return made


def _run_worker(
    serve: Serve, worker: Worker, addresses: Sequence[Address], begun: Connection
) -> None:
    """The main function of a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # until it serves: the parent tells it to end
    logging.basicConfig(
        level=logging.INFO, format=f"%(levelname)s [process {worker.index}] %(message)s"
    )
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.ExitStack() as stack:
        listening = [stack.enter_context(_bound(each, shared=True)) for each in addresses]
        serve(worker, listening, lambda: _tell_parent(begun))


def _tell_parent(begun: Connection) -> None:
    with contextlib.suppress(OSError):  # nobody waits for a process that was started again
        begun.send(True)
    begun.close()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    while True:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(SIGNAL_INTERVAL)
