"""What a measurement was made on."""

import importlib
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
COPIED = 4 << 30
"""Bytes copied, many times what an L2 cache holds."""

_QUERY = {
    "GPU": "name",
    "driver": "driver_version",
    "highest SM clock": "clocks.max.sm",
    "highest memory clock": "clocks.max.mem",
    "power limit": "power.limit",
    "GPU memory": "memory.total",
}


def machine() -> dict[str, str]:
    """The first GPU as nvidia-smi describes it, with units; without one, the reason."""
    query = ["nvidia-smi", f"--query-gpu={','.join(_QUERY.values())}", "--format=csv,noheader", "--id=0"]
    try:
        line = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return {"GPU": f"unknown ({type(error).__name__}: nvidia-smi gave no answer)"}
    return dict(zip(_QUERY, (value.strip() for value in line.strip().split(",")), strict=True))


def bandwidth() -> float:
    """Bytes a second of a device-to-device copy, reads and writes counted: the best of ten copies of 4 GB. In a process of its own.

    Raises:
        subprocess.CalledProcessError: there is no GPU.
    """
    said = subprocess.run([sys.executable, "-m", "benchmarks.gpu.machine"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return float(said.split()[-1])


def main() -> None:
    """Print the bandwidth."""
    source = torch.empty(COPIED, dtype=torch.uint8, device="cuda").zero_()
    target = torch.empty_like(source)
    times = []
    for _ in range(11):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    print(2 * COPIED / min(times[1:]))


def versions() -> dict[str, str]:
    """Versions of what the engines run on; a package that is not there is ``none``."""
    return {"python": platform.python_version()} | {
        name: _version(name) for name in ("torch", "triton", "transformers", "tensorrt", "numpy")
    }


def _version(name: str) -> str:
    # TensorRT's bindings may lie on the path under another distribution's name: the module itself knows
    try:
        return str(importlib.import_module(name).__version__)
    except (ImportError, AttributeError):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "none"


if __name__ == "__main__":
    main()
