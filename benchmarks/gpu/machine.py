"""What a measurement was made on."""

import importlib
import importlib.metadata
import platform
import subprocess

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
