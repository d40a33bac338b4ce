"""The benchmark of generations without a server: output of other processes, plots."""

import json
from pathlib import Path

import pytest

from benchmarks import generate
from benchmarks.generation.plots import draw
from benchmarks.record import ROOT


def test_a_process_that_takes_too_long_is_kept_as_far_as_it_came(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(
        "import time; print('{\"rows\": 1}', flush=True); time.sleep(60)"
    )
    (tmp_path / "broken.py").write_text("print('{\"rows\": 1}'); raise SystemExit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert generate._json_lines("slow", 2, 3.0) == [{"rows": 1}, {"failed": "ended after 3 s"}]
    assert generate._json_lines("broken", 3, 60.0) == [
        {"rows": 1},
        {"failed": "status 3"},
        {"failed": "status 3"},
    ]


@pytest.mark.parametrize("shape", ["135m", "1b"])
def test_what_was_measured_is_drawn(tmp_path: Path, shape: str) -> None:
    document = json.loads(
        (ROOT / "benchmarks" / "results" / f"gpu_generate_{shape}.json").read_text()
    )
    draw(document, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
