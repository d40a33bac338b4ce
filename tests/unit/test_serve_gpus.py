"""`inplace serve --gpus`: the model repository that the server gets, and what is refused."""

from pathlib import Path

import pytest
import torch
from google.protobuf import text_format
from inplace.errors import InplaceError
from inplace_builder.__main__ import app
from inplace_builder.tools.gpus import checked_gpus, on_gpus
from tritonclient.grpc import model_config_pb2 as pb
from typer.testing import CliRunner

GPU, CPU = pb.ModelInstanceGroup.KIND_GPU, pb.ModelInstanceGroup.KIND_CPU


def model(repository: Path, name: str, kind: "pb.ModelInstanceGroup.Kind") -> None:
    folder = repository / name
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "engine.json").write_text(name)
    config = pb.ModelConfig(name=name, backend="inplace")
    config.instance_group.add(kind=kind, count=2)
    (folder / "config.pbtxt").write_text(text_format.MessageToString(config))


def test_models_for_a_gpu_are_served_on_those_that_are_named(tmp_path: Path) -> None:
    model(tmp_path, "fast", GPU)
    model(tmp_path, "slow", CPU)
    before = (tmp_path / "fast" / "config.pbtxt").read_text()
    with on_gpus(tmp_path, (0, 3)) as repository:
        for name, gpus in (("fast", [0, 3]), ("slow", [])):
            folder = repository / name
            config = text_format.Parse((folder / "config.pbtxt").read_text(), pb.ModelConfig())
            [group] = config.instance_group
            assert (config.name, group.count, list(group.gpus)) == (name, 2, gpus)
            assert (folder / "1" / "engine.json").resolve() == (
                tmp_path / name / "1" / "engine.json"
            )
    assert not repository.exists()
    assert (tmp_path / "fast" / "config.pbtxt").read_text() == before


def test_models_that_run_on_no_gpu_or_cannot_be_read_are_refused(tmp_path: Path) -> None:
    model(tmp_path, "slow", CPU)
    with (
        pytest.raises(InplaceError, match="runs on a GPU"),
        on_gpus(tmp_path, (0,)),
    ):
        pass
    (tmp_path / "slow" / "config.pbtxt").write_text("name: {")
    with pytest.raises(InplaceError, match=r"config.pbtxt cannot be read"), on_gpus(tmp_path, (0,)):
        pass


def test_gpus_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert checked_gpus((1, 0)) == (1, 0)
    assert checked_gpus(()) == (0, 1)
    with pytest.raises(InplaceError, match=r"\[0, 2\]; PyTorch sees 2 GPUs, from 0 to 1 here"):
        checked_gpus((0, 2))
    with pytest.raises(InplaceError, match="name each once"):
        checked_gpus((1, 1))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InplaceError, match="PyTorch sees no GPU here"):
        checked_gpus(())


@pytest.mark.parametrize(
    ("gpus", "text"), [("0;1", "expected all, or numbers"), ("99", "[99]; PyTorch sees")]
)
def test_the_command_says_what_is_wrong_before_it_starts_anything(gpus: str, text: str) -> None:
    result = CliRunner().invoke(app, ["serve", "--gpus", gpus])
    assert result.exit_code == 1
    assert text in result.output
