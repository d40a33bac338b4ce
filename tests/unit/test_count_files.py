"""What `tools/count_files.py` takes for an entered file."""

import importlib
import sys

import pytest
import torch
from inplace.kernels.linear_kernels import gemv_kernel
from inplace.operators import ACTIVATIONS

from tools.count_files import Walk


def walked(function: object, *arguments: object) -> list[str]:
    walk = Walk()
    walk.start()
    try:
        function(*arguments)  # type: ignore[operator]
    finally:
        walk.stop()
    return walk.files()


def test_a_function_of_the_project_enters_its_file() -> None:
    from inplace.engines.tensorrt.plan import input_names

    class Engine:
        num_io_tensors = 0

    assert walked(input_names, Engine()) == ["inplace/engines/tensorrt/plan.py"]


def test_an_import_enters_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "inplace.kernels.update", raising=False)
    assert walked(importlib.import_module, "inplace.kernels.update") == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="would launch the kernel without arguments")
def test_a_launch_enters_the_kernel_and_its_device_functions() -> None:
    def launch() -> None:
        with pytest.raises(RuntimeError, match="driver"):
            gemv_kernel[(1,)](ACTIVATION=ACTIVATIONS[0])

    assert walked(launch) == ["inplace/kernels/linear_kernels.py", "inplace/kernels/memory.py"]
