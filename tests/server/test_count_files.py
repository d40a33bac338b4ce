"""A reader of one streamed token walks through few files (`tools/count_files.py`)."""

from pathlib import Path

import pytest
from support.served import MODEL

from tools.count_files import count_token

pytestmark = pytest.mark.server

MAX_FILES = 25
"""From the request's arrival in Triton to the last response, with the PyTorch engine.

A TensorRT engine has five more, its kernels and plugins instead of PyTorch's operators:
`tests/gpu/test_server.py` asks for 30.
"""


def test_a_streamed_token_enters_few_files(stream_models: Path) -> None:
    files = count_token(stream_models, MODEL)["files"]
    assert "inplace/drivers/stream_driver.py" in files
    assert len(files) <= MAX_FILES, "\n".join(files)
