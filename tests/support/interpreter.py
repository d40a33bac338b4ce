"""Kernels on a CPU: files of tests that run in Triton's interpreter, in a process of their own: Triton reads the variable at import."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy
import pytest

TESTS = Path(__file__).resolve().parent


def interpreter_works() -> bool:
    """Triton's interpreter (3.6) takes loop bounds from arrays of one element, which NumPy has deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return int(numpy.ones(1)) == 1
        except TypeError:
            return False


needs_interpreter = pytest.mark.skipif(
    not interpreter_works(),
    reason=f"Triton's interpreter does not run with NumPy {numpy.__version__}",
)


def run_interpreted(name: str) -> None:
    """Run the tests of a file of this folder; AssertionError with what they printed if one fails."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--noconftest",
        "-p",
        "no:cacheprovider",
        str(TESTS / name),
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=TESTS.parent
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
