"""Runs files of tests in Triton's interpreter, on a CPU.

In a process of their own: Triton reads ``TRITON_INTERPRET`` when it is imported.
"""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy
import pytest

TESTS = Path(__file__).resolve().parent


def interpreter_works() -> bool:
    """Whether NumPy converts arrays of one element to numbers, as Triton 3.6's interpreter does."""
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


def run_interpreted(marked: str) -> None:
    """Run the tests of all files ``interpreted_*.py`` of this folder, in one process.

    Args:
        marked: which tests, as pytest's ``-m`` takes it.

    Raises:
        AssertionError: one fails; the text has its output.
    """
    files = sorted(str(path) for path in TESTS.glob("interpreted_*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
    command += ["-p", "support.interpreter_patches"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [*command, "-m", marked, *files],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=TESTS.parent,
    )
    assert process.returncode == 0, process.stdout[-8000:] + process.stderr[-2000:]
    assert " passed" in process.stdout
