"""The OpenAI front end as a process beside a server.

It needs what a server needs, not what builds models.
"""

import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from inplace.errors import InplaceError
from inplace.server.command_line import CommandLine
from inplace.server.loopback import ServerOptions

FRONT_TIMEOUT = 120.0
"""Seconds within which the front end must answer."""

STOP_MARGIN = 5.0
"""Seconds beyond its own drain timeout after which the front end is killed."""


@dataclass(frozen=True)
class FrontOptions:
    """How the front end beside a server runs.

    Attributes:
        host, port: where it listens.
        keys: the file of API keys, if there is one.
    """

    host: str
    port: int
    keys: Path | None = None

    @property
    def url(self) -> str:
        """Of its API."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"


def check_plain(arguments: Sequence[str]) -> None:
    """Refuse arguments of tritonserver with which the front end beside it cannot reach it.

    Raises:
        InplaceError: it has no gRPC endpoint, or one with TLS or a restricted protocol.
    """
    options = ServerOptions.of(CommandLine.parse(arguments))
    if options.tls or options.headers or not options.target:
        raise InplaceError(
            "the front end reaches the server over gRPC, in plain text and without a header: leave "
            "out tritonserver's options for TLS, restricted protocols and --allow-grpc, or start "
            "without the front end (--no-openai) and run `inplace openai` by itself"
        )


class FrontProcess:
    """The front end as a child process. Inside its block it answers, and after it it is gone.

    Args:
        options: where it listens.
        server: ``host:port`` of the server's gRPC endpoint.
        repository: the model repository.
        arguments: further arguments of `inplace openai`.

    Raises:
        InplaceError: it ended, or did not answer in time.
    """

    def __init__(
        self,
        options: FrontOptions,
        server: str,
        repository: Path,
        arguments: Sequence[str] = (),
    ) -> None:
        self.options = options
        keys = () if options.keys is None else (f"--keys={options.keys}",)
        self._command = [
            *(sys.executable, "-m", "inplace_builder", "openai"),
            f"--server={server}",
            f"--model-repository={repository}",
            f"--host={options.host}",
            f"--port={options.port}",
            *keys,
            *arguments,
        ]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the process, inside the block."""
        assert self._process is not None
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Its exit status; None while it runs."""
        return None if self._process is None else self._process.poll()

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command)
        deadline = time.monotonic() + FRONT_TIMEOUT
        while not self._answers():
            if self.status is not None:
                raise InplaceError(f"the front end ended with status {self.status}, see above")
            if time.monotonic() > deadline:
                self.stop()
                raise InplaceError(f"the front end does not answer after {FRONT_TIMEOUT:g} s")
            time.sleep(0.1)
        return self

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.options.url}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def stop(self) -> None:
        """Stop it; running requests may finish."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(30.0 + STOP_MARGIN)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
