"""A tritonserver on this machine: the one on PATH, or the one in the package nvidia-pytriton."""

import contextlib
import importlib.util
import json
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
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import inplace
from inplace.errors import InplaceError
from inplace.server.command_line import CommandLine
from inplace.server.loopback import ServerOptions, channel_credentials
from inplace.server.trust import TRUST_MODELS
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

FAST_RECONNECT = [
    (f"grpc.{which}_reconnect_backoff_ms", 200) for which in ("initial", "min", "max")
]
"""gRPC options of a client that waits until a server listens; by default the pause between two
attempts grows to two minutes."""


ASKED_PROTOCOLS = ("health", "model-repository")
"""The protocols that are used to find out whether a server is ready, as Triton names them where it
restricts them."""


STUB = "triton_python_backend_stub"


ASK_TIMEOUT = 2.0
"""Seconds within which a server must answer whether it is ready."""


STOP_MARGIN = 15.0
"""Seconds after its exit timeout at which a server that has not ended is killed."""


ERROR_LINE = re.compile(
    r"E\d{4} |error\b|\S*tritonserver: |Bad option|Invalid option|Signal \(|terminate called"
)
"""How a line of the server's log begins that may say why it ended."""


HARMLESS = ("CudaDriverHelper has not been initialized", "NVML", "PinnedMemory")
"""In error lines that every server without a GPU writes."""


class ServerError(InplaceError):
    """The server cannot be found or started, or it ended by itself."""


@dataclass(frozen=True)
class Ports:
    """The ports of a server; 0 chooses a free one."""

    grpc: int = 8001
    http: int = 8000
    metrics: int = 8002

    def resolve(self) -> "Ports":
        """The same with every 0 replaced by a free port.

        For the next minute the kernel gives such a port only to processes that ask for it by
        number.
        """
        return Ports(*(port or _reserve_port() for port in (self.grpc, self.http, self.metrics)))


def _reserve_port() -> int:
    """A free port in TIME_WAIT: only a process that names it, with SO_REUSEADDR, can listen there.

    tritonserver does, and the kernel gives the port to no other process, so servers that start at
    the same time do not collide. This is how Yelp's ephemeral-port-reserve works.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        port: int = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            listener.accept()[0].close()  # the end that closes first is left in TIME_WAIT
    return port


@dataclass(frozen=True)
class Installation:
    """A tritonserver on this machine.

    Attributes:
        binary: the executable.
        backends: its own backends, the Python backend among them.
        stub: the process that the Python backend starts, for this version of Python.
        libraries: folder of shared libraries that it needs beside the system's; None if it needs
            none.
    """

    binary: Path
    backends: Path
    stub: Path
    libraries: Path | None = None


def installation() -> Installation:
    """The tritonserver on PATH with its own backends, or the one in the package nvidia-pytriton.

    Raises:
        ServerError: there is none, or its Python backend is for another version of Python.
    """
    on_path = shutil.which("tritonserver")
    if on_path is not None:
        backends = Path(on_path).resolve().parent.parent / "backends"
        server = Installation(Path(on_path), backends, backends / "python" / STUB)
    else:
        spec = importlib.util.find_spec("pytriton")
        if spec is None or spec.origin is None:
            raise ServerError(
                "there is no tritonserver on PATH, and the package nvidia-pytriton is not "
                "installed: install inplace-triton[server]"
            )
        package = Path(spec.origin).parent
        root = package / "tritonserver"
        server = Installation(
            root / "bin" / "tritonserver",
            root / "backends",
            root / "python_backend_stubs" / _python_version() / STUB,
            package.parent / "nvidia_pytriton.libs",
        )
    _check_stub(server)
    return server


def _python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _check_stub(server: Installation) -> None:
    """Check that the Python backend runs this version of Python."""
    version = _python_version()
    if not server.stub.is_file():
        raise ServerError(
            f"{server.binary} has no Python backend for Python {version}: "
            f"{server.stub} does not exist"
        )
    linked = {
        number.decode()
        for number in re.findall(rb"libpython(3\.\d+)\.so", server.stub.read_bytes())
    }
    if version not in linked:
        raise ServerError(
            f"the Python backend of {server.binary} runs Python {' or '.join(sorted(linked))}, "
            f"this is Python {version}: install this package for the Python that the server uses"
        )


def install_backend(directory: Path | str) -> None:
    """Write a folder for ``tritonserver --backend-directory``: this backend and the server's own.

    Raises:
        ServerError: as `installation`.
    """
    directory, server = Path(directory), installation()
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


class TritonServer:
    """A tritonserver process. As a context manager it is ready inside the block and gone after it.

    Args:
        repository: the model repository.
        ports: where it listens.
        host: the address it listens on.
        log: file for the server's output; None leaves it on this process's own output.
        arguments: further arguments for tritonserver.
        backends: a backend directory (`install_backend`); a temporary one if None.
        start_timeout: seconds within which every model must be ready.
        trust_models: folders from which TensorRT plans are loaded, because a plan is code; None
            takes ``INPLACE_TRUST_MODELS`` of this process, or else the repository.

    Attributes:
        process: the process; None before `start`.
    """

    def __init__(
        self,
        repository: Path | str,
        ports: Ports | None = None,
        host: str = "127.0.0.1",
        log: Path | str | None = None,
        arguments: Sequence[str] = (),
        backends: Path | str | None = None,
        start_timeout: float = 300.0,
        trust_models: Sequence[Path | str] | None = None,
    ) -> None:
        self.repository = Path(repository)
        self.ports = (ports or Ports()).resolve()
        self.host = host
        self.log = Path(log) if log is not None else None
        self.arguments = arguments
        self.backends = Path(backends) if backends is not None else None
        self.start_timeout = start_timeout
        self.trust_models = trust_models
        self.process: subprocess.Popen[bytes] | None = None
        self._cleanup = contextlib.ExitStack()

    @property
    def grpc_url(self) -> str:
        """``host:port`` of the gRPC endpoint."""
        return f"{self.host}:{self.ports.grpc}"

    def command(self) -> list[str]:
        """The command line."""
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

    def _trust(self) -> dict[str, str]:
        """The environment variable with the folders whose plans are loaded."""
        if self.trust_models is None and TRUST_MODELS in os.environ:
            return {}
        folders = [self.repository] if self.trust_models is None else self.trust_models
        return {TRUST_MODELS: os.pathsep.join(str(Path(each).resolve()) for each in folders)}

    def start(self) -> None:
        """Start the process; `wait_ready` returns when it serves.

        Raises:
            ServerError: there is no repository or no tritonserver.
        """
        if not self.repository.is_dir():
            raise ServerError(
                f"the model repository {self.repository} does not exist; build a model into it: "
                f"`inplace build … --output {self.repository}/<name>`"
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
            env=environment() | self._trust(),
            stdout=sink,
            stderr=subprocess.STDOUT if sink else None,
        )

    def wait_ready(self) -> None:
        """Return when the server, its models and all its endpoints are ready.

        tritonserver opens gRPC first: when that answers, HTTP and metrics may not listen yet. With
        ``--exit-on-error=false`` it serves without models that cannot be loaded (`failed_models`).
        It is asked over gRPC, also under TLS and where the protocol is restricted; without gRPC
        over HTTP.

        Raises:
            ServerError: it ended, was not ready in time, or cannot be asked; with the lines of its
                log that say why.
        """
        assert self.process is not None
        deadline = time.monotonic() + self.start_timeout
        with self._connect() as endpoint:
            while True:
                if self.process.poll() is not None:
                    raise ServerError(
                        f"tritonserver ended {_how(self.process.returncode)}{self._logged_errors()}"
                    )
                with contextlib.suppress(InferenceServerException, OSError):
                    if _serves(endpoint) and self._endpoints_open():
                        return
                if time.monotonic() > deadline:
                    raise ServerError(
                        f"tritonserver was not ready after {self.start_timeout:.0f} s"
                        f"{self._logged_errors()}"
                    )
                time.sleep(0.1)

    def failed_models(self) -> dict[str, str]:
        """The models that could not be loaded, and why; none if the server does not say."""
        try:
            with self._connect() as endpoint:
                return _failed_models(endpoint)
        except (InferenceServerException, OSError):
            return {}

    def _connect(self) -> "_Grpc | _Http":
        """Its gRPC endpoint; its HTTP endpoint if that is turned off.

        Raises:
            ServerError: both are turned off, or a file of its TLS cannot be read.
        """
        options = self.options
        if self._allows("grpc"):
            try:
                return _Grpc(self.grpc_url, options)
            except OSError as error:
                raise ServerError(f"the server's TLS files cannot be read: {error}") from error
        if self._allows("http"):
            return _Http(f"{self.host}:{self.ports.http}")
        raise ServerError(
            "the server has neither gRPC nor HTTP, so nobody can use it: leave out --allow-grpc or "
            "--allow-http"
        )

    def _endpoints_open(self) -> bool:
        """Whether HTTP and metrics accept connections, unless ``arguments`` turn them off."""
        for name, port in (("http", self.ports.http), ("metrics", self.ports.metrics)):
            if not self._allows(name):
                continue
            with socket.socket() as probe:
                if probe.connect_ex((self.host, port)) != 0:
                    return False
        return True

    def _allows(self, endpoint: str) -> bool:
        return CommandLine.parse(self.arguments).is_true(f"allow-{endpoint}", True)

    @property
    def options(self) -> ServerOptions:
        """Those of its options that say how to reach it."""
        return ServerOptions.of(CommandLine.parse(self.arguments, Path.cwd()), ASKED_PROTOCOLS)

    @property
    def exit_timeout(self) -> float:
        """Seconds for which it lets requests finish when it is stopped."""
        return self.options.exit_timeout

    def stop(self, timeout: float | None = None) -> int:
        """Stop the process and return its exit status.

        Args:
            timeout: seconds after which it is killed; None for its exit timeout and `STOP_MARGIN`.
        """
        if self.process is None:
            return 0
        if timeout is None:
            timeout = self.exit_timeout + STOP_MARGIN
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self._cleanup.close()
        return status

    def _logged_errors(self) -> str:
        """The lines of the log that say why it ended, for an error text."""
        if self.log is None:
            return "; its output above says why"
        if not self.log.exists():
            return ""
        lines = error_lines(self.log.read_text(errors="replace"))
        return "".join(f"\n  {line}" for line in lines) + f"\n  (log: {self.log})"

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


def error_lines(log: str) -> list[str]:
    """The lines of a tritonserver's log that say why it could not start, at most four.

    Errors of this backend come first, each once, though the server repeats them.
    """
    lines = [line.strip() for line in log.splitlines() if ERROR_LINE.match(line.strip())]
    lines = [line for line in lines if not any(text in line for text in HARMLESS)]
    own = [match[0] for line in lines if (match := re.search(r"INPLACE-[^|]*", line))]
    if own:
        reasons = (text.partition("\\n")[0].strip() for text in own)
        return list(dict.fromkeys(reasons))[:4]
    return lines[-4:]


def _how(status: int) -> str:
    """The exit status of a process, in words."""
    return f"with status {status}" if status >= 0 else f"by {signal.Signals(-status).name}"


class _Grpc:
    """The gRPC endpoint of a server, as far as it tells whether it is ready."""

    def __init__(self, url: str, options: ServerOptions) -> None:
        arguments: dict[str, Any] = {"channel_args": list[tuple[str, Any]](FAST_RECONNECT)}
        if options.tls:
            arguments["creds"], more = channel_credentials(options)
            arguments["channel_args"] += more
        self._asking = {"headers": dict(options.headers), "client_timeout": ASK_TIMEOUT}
        self._client = InferenceServerClient(url, **arguments)

    def is_ready(self) -> bool:
        return bool(self._client.is_server_ready(**self._asking))

    def is_live(self) -> bool:
        return bool(self._client.is_server_live(**self._asking))

    def models(self) -> list[dict[str, str]]:
        """The models with ``name``, ``state`` and ``reason``."""
        index = self._client.get_model_repository_index(**self._asking).models
        return [{"name": m.name, "state": m.state, "reason": m.reason} for m in index]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()


class _Http:
    """The same of the HTTP endpoint."""

    def __init__(self, address: str) -> None:
        self._url = f"http://{address}/v2"

    def is_ready(self) -> bool:
        return self._answers("health/ready")

    def is_live(self) -> bool:
        return self._answers("health/live")

    def models(self) -> list[dict[str, str]]:
        request = urllib.request.Request(f"{self._url}/repository/index", b"{}")
        with urllib.request.urlopen(request, timeout=ASK_TIMEOUT) as answer:
            return [{"state": "", "reason": ""} | each for each in json.load(answer)]

    def _answers(self, path: str) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/{path}", timeout=ASK_TIMEOUT) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError as error:
            error.close()
            return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _serves(endpoint: _Grpc | _Http) -> bool:
    """Whether a server is ready, or cannot become ready: a model could not be loaded."""
    return endpoint.is_ready() or (endpoint.is_live() and bool(_failed_models(endpoint)))


def _failed_models(endpoint: _Grpc | _Http) -> dict[str, str]:
    """The models of a server that could not be loaded, and why."""
    models = endpoint.models()
    if any(model["state"] == "LOADING" for model in models):
        return {}
    return {
        model["name"]: model["reason"]
        for model in models
        if model["state"] == "UNAVAILABLE" and model["reason"] not in ("", "unloaded")
    }


def environment() -> dict[str, str]:
    """The environment variables for tritonserver.

    LD_LIBRARY_PATH has its libraries and this interpreter's. PATH begins with this environment,
    since the Python backend finds its packages through the first ``python3`` there.

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
