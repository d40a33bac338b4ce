"""The kernels in Triton's interpreter equal the operators: `tests/support/interpreted_*.py`.

One process runs them all: it imports PyTorch and Triton once.
"""

import pytest
from support.interpreter import needs_interpreter, run_interpreted
from support.long import long_except


@needs_interpreter
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("marked", long_except(["not long"], ["not long", "long"]))
def test_kernels_equal_the_operators(marked: str) -> None:
    run_interpreted(marked)
