"""`inplace serve MODEL`: a model built into a cache, and the OpenAI front end beside the server."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from inplace import __version__
from inplace.errors import InplaceError, LoadError
from inplace.schema.served import Manifest
from inplace.server.command_line import CommandLine
from inplace.server.loopback import ServerOptions

from inplace_builder.capture.sources import ModelFiles, locate_model
from inplace_builder.errors import BuildError
from inplace_builder.served.choose import Report, build_with_best_engine
from inplace_builder.served.model_config import MODEL_VERSION
from inplace_builder.served.options import BuildOptions

FRONT_TIMEOUT = 120.0
"""Seconds within which the front end must answer."""

STOP_MARGIN = 5.0
"""Seconds beyond its own drain timeout after which the front end is killed."""


def default_cache() -> Path:
    """The folder of built models: in that of the user's caches."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "inplace" / "models"


def build_cached(
    source: Path,
    cache: Path,
    options: BuildOptions,
    stage: Callable[[str], None],
    report: Report,
) -> Path:
    """Build a model, unless the cache has it, and return its folder.

    The model repository is the folder around it, and has nothing else but its generate proxy. Its
    name is made of the content of the model's files, the options and what builds and runs them.

    Args:
        source: as of `inplace_builder.build_model`.
        cache: the folder of built models.
        options: what to build for.
        stage: called with the name of each stage of a build.
        report: called with what else there is to say.

    Raises:
        BuildError: the model cannot be built.
    """
    files = locate_model(source)
    stage("read the model's files")
    key = _content_key(files, options)
    folder = cache / key / model_name(source, files)
    try:
        Manifest.load(folder / MODEL_VERSION)
    except LoadError:
        report(f"build into {folder}")
        build_with_best_engine(source, folder, options, stage, report)
    else:
        report(f"built before: {folder}")
    return folder


def model_name(source: Path, files: ModelFiles) -> str:
    """What a model is called when it is served: its folder, or the last part of its id."""
    folder = files.adapter or files.folder
    name = folder.resolve().name
    if folder.parent.name == "snapshots":
        name = folder.parent.parent.name.rpartition("--")[2]
    elif source.suffix == ".gguf":
        name = source.stem
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")
    if not name:
        raise BuildError(f"{source} has no name that a model can have: rename the folder")
    return name


def _content_key(files: ModelFiles, options: BuildOptions) -> str:
    """A digest of all that a built model depends on."""
    digest = hashlib.sha256()
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    for part in (__version__, torch.__version__, device, repr(options), repr(files.gguf)):
        digest.update(f"{part}\0".encode())
    for path in _content(files):
        with path.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name}\0{checksum}\0".encode())
    return digest.hexdigest()[:32]


def _content(files: ModelFiles) -> Iterator[Path]:
    """The files of a model; of a folder with a GGUF file, that one alone."""
    folders = [files.folder]
    if files.adapter is not None and files.adapter != files.folder:
        folders.append(files.adapter)
    for folder in folders:
        for path in sorted(folder.iterdir()):
            other = files.gguf is not None and path.suffix == ".gguf" and path.name != files.gguf
            if path.is_file() and not other:
                yield path


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
