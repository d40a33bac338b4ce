"""Decoders as transformers exports them, as TensorRT engines whose caches a plugin updates in place."""

from pathlib import Path

import pytest
import torch
from inplace.arena import Arena
from inplace.engines import load_engine
from inplace.instance import ModelInstance
from inplace.manifest import Manifest
from inplace_builder.build import VERSION, BuildOptions, write_engine
from inplace_builder.capture import DecoderOptions, capture_exported_decoder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use; there is none here")
pytest.importorskip("tensorrt", reason="needs TensorRT; it is not installed")

from exported_decoders import PROMPTS, decoder, exported, rows_say  # noqa: E402
from models import greedy  # noqa: E402


@pytest.mark.parametrize(("family", "dynamic"), [("llama", False), ("gemma2", True), ("gpt2", True)])
def test_eight_ragged_rows_say_what_generate_says(family: str, dynamic: bool, tmp_path: Path) -> None:
    model = decoder(family)
    capture = capture_exported_decoder(exported(model, dynamic=dynamic), DecoderOptions(capacity=40, max_rows=8, chunk=6))
    options = BuildOptions(device="cuda", engine="tensorrt", alias="plugin", capacity=40, chunk=6, slots=9, max_rows=8)
    manifest = write_engine(capture, tmp_path / family, options)
    assert {alias.kind for alias in manifest.program("step").aliases} == {"plugin"}
    arena = Arena(manifest.states, manifest.slots, torch.device("cuda"))
    folder = tmp_path / family / VERSION
    instance = ModelInstance(Manifest.load(folder), arena, load_engine(folder, manifest, arena), idle_timeout=600.0)
    addresses = arena.addresses()
    assert rows_say(instance, PROMPTS, 20) == [greedy(model, prompt, 20) for prompt in PROMPTS]
    assert arena.addresses() == addresses
