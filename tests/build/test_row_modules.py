"""Modules as people write them, with a row for each of several sequences, beside eager PyTorch."""

from pathlib import Path

import pytest
from support.long import long_except
from support.row_cases import ROW_CASES
from support.row_checks import check_rows
from support.value_cases import VALUE_CASES

CASES = {case.name: case for case in (*ROW_CASES, *VALUE_CASES)}
KEPT = [
    "batch norm",
    "gru",
    "projected lstm",
    "attention",
    "encoder, norm first",
    "transposed",
    "int8",
    "rolled",
    "spectrum and back",
    "ring",
    "masked",
    "at a number",
    "buffers",
    "bags",
    "means of bags",
    "places",
    "fresh",
    "hooks",
    "parts",
]


@pytest.mark.parametrize("name", long_except(KEPT, CASES))
def test_rows_compute_what_the_module_computes_for_each_sequence_alone(
    name: str, tmp_path: Path
) -> None:
    check_rows(CASES[name], tmp_path)
