"""What the server's Python backend cannot take is refused when a model is loaded."""

from pathlib import Path

import pytest
from inplace.errors import LoadError
from inplace.stub import check_numpy
from inplace_builder.server import installation

STUB = installation().stub


def test_the_stub_of_24_10_takes_numpy_1_only() -> None:
    check_numpy(STUB, "1.26.4")
    with pytest.raises(LoadError, match=r'made for NumPy 1 and sends empty texts with NumPy 2\.5\.2: install "numpy<2"'):
        check_numpy(STUB, "2.5.2")


def test_a_stub_that_knows_numpy_2_takes_both(tmp_path: Path) -> None:
    newer = tmp_path / "stub"
    newer.write_bytes(STUB.read_bytes() + b"numpy._core.multiarray")
    check_numpy(newer, "1.26.4")
    check_numpy(newer, "2.5.2")
