"""A real tritonserver on this machine: the one on PATH, or the one that the package nvidia-pytriton carries."""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import inplace
from inplace.errors import InplaceError
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

AT_ONCE = [(f"grpc.{which}_reconnect_backoff_ms", 200) for which in ("initial", "min", "max")]
"""For a client that waits until a server listens: as built in, gRPC pauses longer after each attempt, up to two minutes."""


STUB = "triton_python_backend_stub"


class ServerError(InplaceError):
    """The server cannot be found or started, or ended by itself."""


@dataclass(frozen=True)
class Ports:
    """Where a server listens; 0 chooses a free port."""

    grpc: int = 8001
    http: int = 8000
    metrics: int = 8002

    def chosen(self) -> "Ports":
        """The same with every 0 replaced by a port that is free now, and that nobody is given for the next minute who does not name it."""
        return Ports(*(port or _reserved() for port in (self.grpc, self.http, self.metrics)))


def _reserved() -> int:
    """A port left in TIME_WAIT: only who names it, with SO_REUSEADDR as tritonserver does, may listen there.

    So servers that are started at the same time never meet. The way of Yelp's ephemeral-port-reserve.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        port: int = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            listener.accept()[0].close()  # who closes first is left in TIME_WAIT
    return port


@dataclass(frozen=True)
class Installation:
    """A tritonserver on this machine.

    Attributes:
        binary: the executable.
        backends: its own backends, the Python backend among them.
        stub: the Python backend's process for this interpreter.
        libraries: shared libraries that it needs beside the system's; None where it needs none.
    """

    binary: Path
    backends: Path
    stub: Path
    libraries: Path | None = None


def installation() -> Installation:
    """The tritonserver on PATH with the backends that belong to it, or the one that the package nvidia-pytriton carries.

    Raises:
        ServerError: there is none, or its Python backend is for another Python than this.
    """
    found = shutil.which("tritonserver")
    if found is not None:
        root = Path(found).resolve().parent.parent
        return _checked(
            Installation(Path(found), root / "backends", root / "backends" / "python" / STUB)
        )
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise ServerError(
            "there is no tritonserver on PATH and the package nvidia-pytriton is not installed: "
            "install inplace-triton[server]"
        )
    package = Path(spec.origin).parent
    root, version = package / "tritonserver", f"{sys.version_info.major}.{sys.version_info.minor}"
    libraries = package.parent / "nvidia_pytriton.libs"
    return _checked(
        Installation(
            root / "bin" / "tritonserver",
            root / "backends",
            root / "python_backend_stubs" / version / STUB,
            libraries,
        )
    )


def _checked(found: Installation) -> Installation:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if not found.stub.is_file():
        raise ServerError(
            f"{found.binary} has no Python backend for Python {version}: there is no {found.stub}"
        )
    linked = {
        number.decode() for number in re.findall(rb"libpython(3\.\d+)\.so", found.stub.read_bytes())
    }
    if version not in linked:
        raise ServerError(
            f"the Python backend of {found.binary} runs Python {' or '.join(sorted(linked))}, this is Python {version}: "
            f"install this package where that Python is used"
        )
    return found


def install_backend(directory: Path) -> None:
    """Make a folder that ``tritonserver --backend-directory`` takes: this backend, the Python backend it runs in, and the server's others.

    Raises:
        ServerError: as `installation`.
    """
    server = installation()
    (directory / "inplace").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(inplace.__file__).parent / "model.py", directory / "inplace" / "model.py")
    shutil.copytree(
        server.backends / "python",
        directory / "python",
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("__pycache__", STUB),
    )
    shutil.copy(server.stub, directory / "python" / STUB)
    for other in server.backends.iterdir():
        link = directory / other.name
        if other.name not in ("inplace", "python") and not link.exists():
            link.symlink_to(other)


@dataclass
class TritonServer:
    """A tritonserver process. Use as a context manager: it is ready inside the block and gone after it.

    Args:
        repository: the model repository.
        ports: where it listens.
        host: the address it listens on.
        log: a file for what the server prints; None leaves it on this process's own output.
        arguments: further arguments for tritonserver.
        backends: an installed backend directory (`install_backend`); a temporary one if None.
        start_timeout: seconds until every model must be ready.
    """

    repository: Path
    ports: Ports = field(default_factory=Ports)
    host: str = "127.0.0.1"
    log: Path | None = None
    arguments: Sequence[str] = ()
    backends: Path | None = None
    start_timeout: float = 300.0

    def __post_init__(self) -> None:
        self.ports = self.ports.chosen()
        self._cleanup = contextlib.ExitStack()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def grpc_url(self) -> str:
        """``host:port`` of the gRPC endpoint."""
        return f"{self.host}:{self.ports.grpc}"

    def command(self) -> list[str]:
        """The command line, as an operator would type it."""
        return [
            str(installation().binary),
            f"--model-repository={self.repository}",
            f"--backend-directory={self.backends}",
            f"--grpc-address={self.host}",
            f"--grpc-port={self.ports.grpc}",
            f"--http-address={self.host}",
            f"--http-port={self.ports.http}",
            f"--metrics-address={self.host}",
            f"--metrics-port={self.ports.metrics}",
            *self.arguments,
        ]

    def start(self) -> None:
        """Start the process. `wait_ready` says when it serves.

        Raises:
            ServerError: there is no repository or no tritonserver.
        """
        if not self.repository.is_dir():
            raise ServerError(
                f"{self.repository} is no model repository; build a model into it: `inplace build … --output {self.repository}/<name>`"
            )
        if self.backends is None:
            self.backends = Path(
                self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="inplace-backends-"))
            )
            install_backend(self.backends)
        sink: IO[bytes] | None = None
        if self.log is not None:
            sink = self._cleanup.enter_context(self.log.open("wb"))
        self.process = subprocess.Popen(
            self.command(),
            env=environment(),
            stdout=sink,
            stderr=subprocess.STDOUT if sink else None,
        )

    def wait_ready(self) -> None:
        """Return when the server and all its models are ready, and HTTP and metrics can be asked too.

        tritonserver opens its endpoints one after the other, gRPC first: one that answers over gRPC may not have metrics yet.

        Raises:
            ServerError: it ended, or was not ready in time; with the last error lines of its log.
        """
        assert self.process is not None
        deadline = time.monotonic() + self.start_timeout
        with InferenceServerClient(self.grpc_url, channel_args=AT_ONCE) as client:
            while True:
                if self.process.poll() is not None:
                    raise ServerError(
                        f"tritonserver ended with status {self.process.returncode}{self._errors()}"
                    )
                with contextlib.suppress(InferenceServerException):
                    if client.is_server_ready(client_timeout=2.0) and self._listens():
                        return
                if time.monotonic() > deadline:
                    raise ServerError(
                        f"tritonserver was not ready after {self.start_timeout:.0f} s{self._errors()}"
                    )
                time.sleep(0.1)

    def _listens(self) -> bool:
        """Whether the endpoints beside gRPC accept connections, as far as ``arguments`` have not turned them off."""
        given = " ".join(self.arguments).replace("=", " ").lower()
        wanted = {"http": self.ports.http, "metrics": self.ports.metrics}
        for port in (
            port
            for name, port in wanted.items()
            if not re.search(rf"--allow-{name} (false|0)\b", given)
        ):
            with socket.socket() as probe:
                if probe.connect_ex((self.host, port)) != 0:
                    return False
        return True

    def stop(self, timeout: float = 45.0) -> int:
        """Ask the server to end, wait for it, and return its exit status; kill it after ``timeout`` seconds."""
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self._cleanup.close()
        return status

    def _errors(self) -> str:
        """The error lines of the log, for an error text."""
        if self.log is None or not self.log.exists():
            return ""
        lines = [
            line
            for line in self.log.read_text(errors="replace").splitlines()
            if "INPLACE-" in line or line.startswith(("E1", "E0", "error"))
        ]
        return "".join(f"\n  {line}" for line in lines[-4:])

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop(timeout=5)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def environment() -> dict[str, str]:
    """The environment tritonserver needs: its libraries, this interpreter's library, and this environment first on PATH.

    The Python backend finds its packages through the first ``python3`` on PATH.

    Raises:
        ServerError: as `installation`.
    """
    own = installation().libraries
    libraries = [
        str(own) if own is not None else "",
        os.environ.get("LD_LIBRARY_PATH", ""),
        str(sysconfig.get_config_var("LIBDIR")),
    ]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return os.environ | {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)), "PATH": path}
