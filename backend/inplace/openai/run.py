"""Running the front end as a process."""

import functools
import ipaddress
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from tritonclient.grpc.aio import InferenceServerClient

from inplace.client.connections import CHANNEL_ARGUMENTS
from inplace.errors import InplaceError
from inplace.openai.app import create_app
from inplace.openai.keys import Keys
from inplace.openai.limits import Limits
from inplace.openai.models import load_models
from inplace.openai.replicas import Replicas
from inplace.openai.workers import Worker, Workers

KEEP_ALIVE = 75
"""Seconds for which a connection without a request stays open: longer than common proxies keep it,
so that it is not closed under a request of theirs."""


class FrontendError(InplaceError):
    """The front end cannot be started as it was asked to."""


@dataclass(frozen=True)
class Frontend:
    """How a front end runs.

    Attributes:
        servers: ``host:port`` of each tritonserver's gRPC endpoint.
        model_repository: where the models' folders are, for their tokenizers and chat templates.
        host, port: where it listens.
        keys: the file of API keys; None lets everyone in, and is for the loopback interface only.
        hosts: further names of this server that requests may have in their header Host.
        certificate, private_key: files for TLS; None for plain HTTP.
        server_ca: the file of the certificate authority of the servers' endpoints; None for plain
            gRPC.
        drain_seconds: how long running requests may take after SIGTERM.
        call_formats: how models call tools, see `load_models`.
        limits: of requests.
        workers: processes; see `inplace.openai.workers`.
    """

    servers: Sequence[str]
    model_repository: Path
    host: str = "127.0.0.1"
    port: int = 9000
    keys: Path | None = None
    hosts: Sequence[str] = ()
    certificate: Path | None = None
    private_key: Path | None = None
    server_ca: Path | None = None
    drain_seconds: float = 30.0
    call_formats: Sequence[str] = ()
    limits: Limits = field(default_factory=Limits)
    workers: int = 1

    def check(self) -> None:
        """Refuse what is not safe.

        Raises:
            FrontendError: it would let everyone in on the network, or TLS lacks a file.
        """
        if self.keys is None and not _is_loopback(self.host):
            raise FrontendError(
                f"without keys the front end listens on the loopback interface only, not on "
                f"{self.host}: make a key with `inplace openai-key` and name its file with --keys"
            )
        if (self.certificate is None) != (self.private_key is None):
            raise FrontendError("TLS needs both a certificate and its private key")

    def server(self, worker: Worker | None = None) -> uvicorn.Server:
        """The HTTP server of one process, not started yet.

        Args:
            worker: the process; None if there is only one.

        Raises:
            LoadError: a model or the file of keys cannot be read, or there is no such format of
                calls.
            FrontendError: see `check`.
        """
        self.check()
        keys = None if self.keys is None else Keys(self.keys, worker)
        models = load_models(self.model_repository, self.call_formats)
        connect = None if self.server_ca is None else self._connect
        app = create_app(
            Replicas(self.servers, models, connect, worker=worker),
            models,
            limits=self.limits,
            keys=keys,
            hosts=self.hosts,
            worker=worker,
        )
        return uvicorn.Server(
            uvicorn.Config(
                app,
                host=self.host,
                port=self.port,
                ssl_certfile=self.certificate,
                ssl_keyfile=self.private_key,
                timeout_graceful_shutdown=round(self.drain_seconds),
                timeout_keep_alive=KEEP_ALIVE,
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="on",
            )
        )

    def _connect(self, url: str) -> InferenceServerClient:
        return InferenceServerClient(
            url, ssl=True, root_certificates=str(self.server_ca), channel_args=CHANNEL_ARGUMENTS
        )


def run(frontend: Frontend) -> None:
    """Run a front end until SIGTERM or SIGINT; running requests may finish.

    Raises:
        LoadError, FrontendError: see `Frontend.server`.
        WorkersError: see `Workers`.
    """
    if frontend.workers == 1:
        _run(frontend.server(), None)
        return
    frontend.server()  # refuses what is wrong before processes are started
    serve = functools.partial(_serve, frontend)
    seconds = frontend.drain_seconds
    Workers(serve, frontend.workers, frontend.host, frontend.port, seconds).run()


def _serve(
    frontend: Frontend, worker: Worker, listening: list[socket.socket], begun: Callable[[], None]
) -> None:
    """Run one of several processes."""
    server = frontend.server(worker)
    startup = server.startup

    async def start(sockets: list[socket.socket] | None = None) -> None:
        await startup(sockets)
        begun()

    server.startup = start  # type: ignore[method-assign]
    _run(server, listening)


def _run(server: uvicorn.Server, sockets: list[socket.socket] | None) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn handles both while it runs, and raises them again at its end
        signal.signal(number, signal.SIG_IGN)
    server.run(sockets)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
