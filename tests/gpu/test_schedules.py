"""A schedule on TensorRT: one CUDA graph a program, and loops without a round trip."""

from pathlib import Path

import pytest
import torch
from inplace.drivers import StepDriver
from inplace.runtime.schedules import ScheduledInstance
from inplace_builder import BuildOptions, write_engine
from support.transducing import check_streams
from transducer import capture, modules

pytest.importorskip("tensorrt", reason="needs TensorRT")
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use; there is none here"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("schedules") / "transducer"
    options = BuildOptions(slots=4, max_rows=4, device="cuda", engine="tensorrt")
    write_engine(capture(*modules()), path, options)
    return path / "1"


@pytest.mark.parametrize("loop_calls", [1, 3, 8])
def test_streams_get_the_tokens_of_greedy_search(folder: Path, loop_calls: int) -> None:
    instance = ScheduledInstance.open(folder)
    assert instance.loop_calls == 8
    instance.loop_calls = loop_calls
    driver = StepDriver(instance)
    try:
        check_streams(driver, modules(), 12)
    finally:
        driver.close()
