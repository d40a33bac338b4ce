"""Failures that tests cause: a TCP connection that is cut, and a server that is killed."""

import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self

import psutil
from inplace_builder.tools.tritonserver import TritonServer

CONTROL = 50
"""Bytes that a server sends at most without answering a request: HTTP/2 window updates, pings."""


class Cable:
    """Forwards connections to a server.

    Args:
        url: ``host:port`` of the server.
    """

    def __init__(self, url: str) -> None:
        host, _, port = url.rpartition(":")
        self._target = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._drop = False
        self.url = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break what is connected; new connections are forwarded."""
        with self._lock:
            ends, self._open = self._open, set()
        for end in ends:
            _end(end)

    def lose_the_next_answer(self) -> None:
        """Requests arrive; the first answer is lost with the connection."""
        self._drop = True

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(self._target)
                except OSError:  # there is no server any more
                    near.close()
                    continue
                with self._lock:
                    self._open |= {near, far}
                for source, sink, answers in ((near, far, False), (far, near, True)):
                    threading.Thread(
                        target=self._forward, args=(source, sink, answers), daemon=True
                    ).start()

    def _forward(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if answers and self._drop and len(data) > CONTROL:
                    self._drop = False
                    break
                sink.sendall(data)
        _end(sink)
        source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listener.close()
        self.cut()


def _end(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


def killed(server: TritonServer) -> None:
    """kill -9 of a server, and of the stubs it leaves behind."""
    assert server.process is not None
    stubs = psutil.Process(server.process.pid).children(recursive=True)
    server.process.kill()
    server.process.wait()
    for stub in stubs:
        if stub.is_running():
            stub.kill()
