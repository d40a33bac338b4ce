"""Modules as people write them, with a row for each of several sequences, beside eager PyTorch."""

from pathlib import Path

import pytest
from support.row_cases import ROW_CASES, RowCase
from support.row_checks import check_rows
from support.value_cases import VALUE_CASES


@pytest.mark.parametrize("case", [*ROW_CASES, *VALUE_CASES], ids=lambda case: case.name)
def test_rows_compute_what_the_module_computes_for_each_sequence_alone(
    case: RowCase, tmp_path: Path
) -> None:
    check_rows(case, tmp_path)
