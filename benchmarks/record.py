"""The head of every result: when, which command, code, machine and versions."""

import importlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "tensorrt",
    "vllm",
    "numpy",
    "nvidia-pytriton",
    "tritonclient",
    "grpcio",
)

_QUERY = {
    "GPU": "name",
    "driver": "driver_version",
    "highest SM clock": "clocks.max.sm",
    "highest memory clock": "clocks.max.mem",
    "power limit": "power.limit",
    "GPU memory": "memory.total",
}


def facts(what: str, program: str, arguments: list[str] | None = None) -> dict[str, Any]:
    """The head of a result.

    Args:
        what: one line of what is measured.
        program: as it is typed, for example ``python -m benchmarks.perf``.
        arguments: what was typed behind it; this process's own if None.
    """
    return {
        "what": what,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(
            [
                *shlex.split(program),
                *map(anywhere, sys.argv[1:] if arguments is None else arguments),
            ]
        ),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
    }


def anywhere(argument: str) -> str:
    """An argument without the folders of this machine: outside the project only the last part."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def commit() -> str:
    """The commit of the code that runs: ``$COMMIT``, else git's.

    A ``+`` marks files that differ from it; ``unknown`` without either.
    """
    if named := os.environ.get("COMMIT"):
        return named
    try:
        head = _output_of("git", "rev-parse", "--short", "HEAD")
        changed = _output_of(
            "git",
            "status",
            "--porcelain",
            "--untracked-files=no",
            "--",
            ".",
            ":!benchmarks/results",
            ":!docs/models.md",  # made of a result
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head + "+" * bool(changed)


def machine() -> dict[str, Any]:
    """The processor, its threads, and the first GPU as nvidia-smi describes it, with units."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
    result: dict[str, Any] = {"processor": processor, "threads": os.cpu_count()}
    try:
        line = _output_of(
            "nvidia-smi",
            f"--query-gpu={','.join(_QUERY.values())}",
            "--format=csv,noheader",
            "--id=0",
        )
    except (OSError, subprocess.SubprocessError):
        return result | {"GPU": "none"}
    return result | dict(zip(_QUERY, (value.strip() for value in line.split(",")), strict=True))


def versions() -> dict[str, str]:
    """Versions of what takes part; a package that is not there is ``none``."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _output_of(*command: str) -> str:
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=30, cwd=ROOT
    ).stdout.strip()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
    # TensorRT's bindings may be installed under another distribution's name: ask the module
    try:
        return str(importlib.import_module(name.replace("-", "_")).__version__)
    except (ImportError, AttributeError):
        return "none"
