"""The facts that every result records of itself."""

import subprocess
from pathlib import Path

import pytest

from benchmarks import record
from benchmarks.record import ROOT, commit, facts, machine


def git(folder: Path, *command: str) -> str:
    name = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]
    return subprocess.run(
        ["git", *name, *command], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_a_commit_is_the_one_that_runs_and_says_where_files_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COMMIT", raising=False)
    monkeypatch.setattr(record, "ROOT", tmp_path)
    (tmp_path / "file").write_text("one")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "first")
    head = git(tmp_path, "rev-parse", "--short", "HEAD")
    assert commit() == head
    (tmp_path / "file").write_text("two")
    assert commit() == head + "+"
    monkeypatch.setenv("COMMIT", "named")
    assert commit() == "named"


def test_without_git_the_commit_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMMIT", raising=False)
    monkeypatch.setattr(record, "ROOT", tmp_path)
    assert commit() == "unknown"


def test_a_result_has_its_command_its_machine_and_its_versions() -> None:
    result = facts("what", "python -m benchmarks.perf", ["all", "--out", "two words"])
    assert result["command"] == "python -m benchmarks.perf all --out 'two words'"
    assert set(result) == {"what", "date", "command", "commit", "machine", "versions"}
    assert result["versions"]["torch"].startswith("2.")
    assert machine()["threads"] >= 1


def test_a_command_is_kept_without_the_paths_of_its_machine() -> None:
    typed = [
        "--model",
        "/somewhere/built/smollm2",
        "--out",
        f"{ROOT}/benchmarks/results/x.json",
        "--input-data",
        "a/b.json",
    ]
    kept = facts("what", "python -m benchmarks.perf", typed)["command"]
    assert (
        kept == "python -m benchmarks.perf --model smollm2 --out benchmarks/results/x.json "
        "--input-data a/b.json"
    )
