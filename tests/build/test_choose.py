"""The engine that a build takes where none is named."""

from pathlib import Path

import pytest
import torch
from inplace_builder.errors import BuildError, LoweringError
from inplace_builder.served import choose
from inplace_builder.served.choose import build_with_best_engine, first_engine
from inplace_builder.served.options import BuildOptions


def test_a_gpu_is_what_tensorrt_needs() -> None:
    assert first_engine("cpu") == "torch"
    assert first_engine(None) == ("tensorrt" if torch.cuda.is_available() else "torch")


def test_the_choice_is_reported_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[str, str]] = []

    def refuse(source: Path, output: Path, options: BuildOptions, stage: object) -> None:
        tried.append((options.engine, options.device))
        raise LoweringError(f"{options.engine} cannot run it")

    monkeypatch.setattr(choose, "build_model", refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reports: list[str] = []
    options = BuildOptions(engine="tensorrt", device="cuda")
    with pytest.raises(LoweringError, match="torch cannot run it"):
        build_with_best_engine(tmp_path, tmp_path, options, report=reports.append)
    assert tried == [("tensorrt", "cuda"), ("torch", "cuda")]
    assert reports[0].startswith("engine tensorrt")
    assert reports[1].endswith("TensorRT cannot run the model: tensorrt cannot run it")
    tried.clear()
    strict = BuildOptions(engine="tensorrt", device="cuda", strict=True)
    with pytest.raises(LoweringError, match="tensorrt cannot run it"):
        build_with_best_engine(tmp_path, tmp_path, strict, report=reports.append)
    assert tried == [("tensorrt", "cuda")]


def test_only_a_model_that_tensorrt_cannot_run_gets_the_other_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reports: list[str] = []
    source, output = tmp_path / "nothing", tmp_path / "out"
    options = BuildOptions(engine="tensorrt", device="cuda")
    with pytest.raises(BuildError, match="nothing"):
        build_with_best_engine(source, output, options, report=reports.append)
    assert reports == ["engine tensorrt: PyTorch sees a GPU here"]
