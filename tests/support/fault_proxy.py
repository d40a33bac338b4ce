"""Failures that tests cause: a proxy that breaks connections, and a killed server."""

import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self

import psutil
from inplace_builder.tools.tritonserver import TritonServer

MAX_CONTROL_BYTES = 50
"""Maximum size of what a server sends beside responses: HTTP/2 window updates, pings."""


class FaultProxy:
    """Forwards TCP connections to a server, and breaks them on demand.

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

    def disconnect(self) -> None:
        """Break all connections; new ones are forwarded."""
        with self._lock:
            connections, self._open = self._open, set()
        for connection in connections:
            _shut_down(connection)

    def drop_next_response(self) -> None:
        """Deliver requests, but break the connection instead of delivering the next response."""
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
                for source, sink, from_server in ((near, far, False), (far, near, True)):
                    threading.Thread(
                        target=self._forward, args=(source, sink, from_server), daemon=True
                    ).start()

    def _forward(self, source: socket.socket, sink: socket.socket, from_server: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if from_server and self._drop and len(data) > MAX_CONTROL_BYTES:
                    self._drop = False
                    break
                sink.sendall(data)
        _shut_down(sink)
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
        self.disconnect()


def _shut_down(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def kill_server(server: TritonServer) -> None:
    """Kill a server, and the stub processes that it leaves behind, with SIGKILL."""
    assert server.process is not None
    stubs = psutil.Process(server.process.pid).children(recursive=True)
    server.process.kill()
    server.process.wait()
    for stub in stubs:
        if stub.is_running():
            stub.kill()
