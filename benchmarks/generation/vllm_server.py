"""vLLM's OpenAI server, in an environment of its own."""

import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from inplace_builder.tools.tritonserver import Ports

MODEL = "m"
"""What the model is called there."""

OPTIONS = (
    "--no-enable-prefix-caching",
    "--disable-uvicorn-access-log",
    "--generation-config=vllm",
    "--skip-tokenizer-init",
    "--seed=0",
    "--dtype=bfloat16",
)
"""Beside the sizes. Its prompts and answers are token ids, so it needs no tokenizer."""

VERSIONS = """
import json
from importlib.metadata import PackageNotFoundError, version
found = {}
for name in ("vllm", "torch", "triton", "transformers", "uvicorn", "httptools", "uvloop"):
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        found[name] = "none"
print(json.dumps(found))
"""


@dataclass(frozen=True)
class VllmOptions:
    """How a model is served.

    Attributes:
        python: the interpreter of the environment that has vLLM.
        model: a Hugging Face folder.
        capacity: tokens of a prompt and its answer (``--max-model-len``).
        seats: requests that are computed at the same time (``--max-num-seqs``).
        memory: the share of the GPU's memory that it takes.
        caches: a folder for what it compiles.
        log: the file for its output.
        extra: further arguments of ``vllm serve``.
        patience: seconds within which it must be ready.
    """

    python: Path
    model: Path
    capacity: int
    seats: int
    memory: float
    caches: Path
    log: Path
    extra: tuple[str, ...] = ()
    patience: float = 240.0

    def command(self, port: int) -> list[str]:
        """The command line."""
        return [
            str(self.python),
            *("-m", "vllm.entrypoints.cli.main", "serve", str(self.model)),
            "--host=127.0.0.1",
            f"--port={port}",
            f"--served-model-name={MODEL}",
            f"--max-model-len={self.capacity}",
            f"--max-num-seqs={self.seats}",
            f"--gpu-memory-utilization={self.memory}",
            *OPTIONS,
            *self.extra,
        ]

    def environment(self) -> dict[str, str]:
        """This process's, without our packages, and offline."""
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        caches = self.caches.resolve()
        return kept | {
            "PATH": f"{self.python.parent}{os.pathsep}{kept.get('PATH', '')}",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(caches / "hf"),
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_CACHE_ROOT": str(caches / "vllm"),
            "VLLM_CONFIG_ROOT": str(caches / "config"),
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
            "TRITON_CACHE_DIR": str(caches / "triton"),
            "XDG_CACHE_HOME": str(caches / "xdg"),
            "VLLM_USE_FLASHINFER_SAMPLER": "0",  # greedy sampling does not use it
            "TVM_FFI_DISABLE_TORCH_C_DLPACK": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "VLLM_HOST_IP": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_IFNAME": "lo",
        }


class VllmServer:
    """A server as a child process. Inside its block it is ready, and after it it is gone.

    Raises:
        RuntimeError: it ended, or was not ready in time; with the end of its log.
    """

    def __init__(self, options: VllmOptions) -> None:
        self.options = options
        self.port = Ports(0).resolve().grpc
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """``host:port``."""
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self.options.log.parent.mkdir(parents=True, exist_ok=True)
        with self.options.log.open("w") as log:
            self._process = subprocess.Popen(
                self.options.command(self.port),
                env=self.options.environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_ready(self._process)
        except BaseException:
            self.stop()
            raise
        return self

    def _wait_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + self.options.patience
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise RuntimeError(f"vLLM ended with status {process.returncode}: {self._logged()}")
            try:
                with urllib.request.urlopen(f"http://{self.url}/health", timeout=2) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                time.sleep(0.25)
        raise RuntimeError(
            f"vLLM was not ready after {self.options.patience:.0f} s: {self._logged()}"
        )

    def _logged(self) -> str:
        return self.options.log.read_text(errors="replace")[-3000:]

    def stop(self) -> None:
        """End it and its children, which have a session of their own."""
        process = self._process
        if process is None:
            return
        for number, seconds in ((signal.SIGINT, 15), (signal.SIGTERM, 8)):
            if process.poll() is None:
                process.send_signal(number)
                try:
                    process.wait(seconds)
                except subprocess.TimeoutExpired:
                    continue
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def versions_of(python: Path) -> dict[str, str]:
    """Versions of an environment's packages."""
    output = subprocess.run(
        [str(python), "-c", VERSIONS], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, str] = json.loads(output)
    return found
