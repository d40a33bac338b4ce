"""The benchmark of several GPUs without a server: what it makes of its measurements."""

from typing import Any

import pytest

from benchmarks.gpus.__main__ import MUST, ratios


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({}, {}),
        ({"generations_all": {"tokens_per_second": 50.0}}, {}),
        ({"steps_all": {"failed": "x"}, "steps_one": {"requests_per_second": 5.0}}, {}),
        (
            {
                "generations_all": {"tokens_per_second": 57.0},
                "generations_one": {"tokens_per_second": 30.0},
                "steps_all": {"requests_per_second": 8.0},
                "steps_one": {"requests_per_second": 5.0},
            },
            {"generations": 1.9, "steps": 1.6},
        ),
    ],
)
def test_ratios_are_those_of_what_was_measured_with_all_and_with_one(
    line: dict[str, Any], expected: dict[str, float]
) -> None:
    found = ratios(line)
    assert {kind: each["ratio"] for kind, each in found.items()} == pytest.approx(expected)
    assert all(each["must"] == MUST[kind] for kind, each in found.items())
