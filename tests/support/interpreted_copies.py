"""Copies of slots in Triton's interpreter; `tests/unit/test_kernels.py` runs this file."""

import pytest

from support.copy_cases import CAPACITY, check_copies

pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim > 0:DeprecationWarning"
)  # Triton's own


@pytest.mark.parametrize("length", [0, 1, 17, CAPACITY, None])
def test_copies_have_the_bytes_of_pytorch(length: int | None) -> None:
    check_copies("cpu", length)
