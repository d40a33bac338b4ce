"""The kernels of convolutions and recurrences in Triton's interpreter.

`tests/unit/test_operator_recurrent.py` runs this file.
"""

import pytest
import torch
from inplace.operators.convolution import _causal_conv1d_on_gpu
from inplace.operators.recurrence import (
    _delta_rule_on_gpu,
    _linear_recurrence_on_gpu,
    _selective_scan_on_gpu,
)

from support.recurrent_case import CHECKS, Operators

pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim > 0:DeprecationWarning"
)  # Triton's own

KERNELS: Operators = {
    "causal_conv1d": _causal_conv1d_on_gpu,
    "selective_scan": _selective_scan_on_gpu,
    "delta_rule": _delta_rule_on_gpu,
    "linear_recurrence": _linear_recurrence_on_gpu,
}


@pytest.mark.parametrize("name", CHECKS)
def test_the_kernels_continue_each_row_from_its_slot(name: str) -> None:
    CHECKS[name](KERNELS)


@pytest.mark.parametrize("name", CHECKS)
def test_so_do_those_that_go_from_chunk_to_chunk(name: str) -> None:
    CHECKS[name](KERNELS, torch.float16, 1e-2)
