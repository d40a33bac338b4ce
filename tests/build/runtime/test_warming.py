"""A loaded engine is warmed up, which changes no memory of the arena."""

from collections.abc import Collection, Mapping

import pytest
import torch
from inplace.engines import Finish
from inplace.engines.arena import Arena
from inplace.engines.torch_engine import TorchEngine
from inplace.errors import LoadError
from inplace.runtime.loading import load_engine
from inplace.schema.files import EngineFolder
from inplace.schema.served import Manifest
from support.models import CHUNK, SLOTS, Repository
from torch import Tensor


@pytest.mark.parametrize(
    ("model", "sizes"),
    [("llama", [(1, 1), (SLOTS, SLOTS), (1, CHUNK)]), ("accumulator", [(1, 1), (4, 4)])],
)
def test_loading_runs_every_kind_of_step_on_null_rows(
    repository: Repository,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    sizes: list[tuple[int, int]],
) -> None:
    seen: list[tuple[int, int]] = []
    launch = TorchEngine.launch

    def watched(
        engine: TorchEngine, inputs: Mapping[str, Tensor], requested: Collection[str]
    ) -> Finish:
        assert inputs["slots"].eq(-1).all()
        assert set(requested) == {spec.name for spec in manifest.program("step").outputs}
        seen.append(
            (len(inputs["slots"]), len(inputs["input_ids" if model == "llama" else "value"]))
        )
        return launch(engine, inputs, requested)

    monkeypatch.setattr(TorchEngine, "launch", watched)
    folder = repository.path / model / "1"
    manifest = Manifest.load(folder)
    arena = Arena(manifest.states, 3, torch.device("cpu"))
    for tensor in arena.tensors.values():
        tensor.view(torch.uint8).fill_(0xA5)
    load_engine(EngineFolder(folder), manifest, arena)
    assert seen == sizes
    assert all(tensor.view(torch.uint8).eq(0xA5).all() for tensor in arena.tensors.values())


def test_an_engine_that_fails_while_it_is_warmed_up_is_a_load_error(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(
        engine: TorchEngine, inputs: Mapping[str, Tensor], requested: Collection[str]
    ) -> Finish:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(TorchEngine, "launch", fails)
    folder = repository.path / "llama" / "1"
    manifest = Manifest.load(folder)
    with pytest.raises(
        LoadError,
        match=r"fails in its first step \(RuntimeError: no kernel\); build the model again",
    ):
        load_engine(EngineFolder(folder), manifest, Arena(manifest.states, 1, torch.device("cpu")))
