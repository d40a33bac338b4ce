"""Decoders as transformers exports them, on TensorRT: a plugin updates the caches in place."""

from pathlib import Path

import pytest
import torch
from inplace.runtime.instance import ModelInstance
from inplace.schema.served import Manifest
from inplace_builder import DecoderOptions, capture_exported_decoder
from inplace_builder.served.build import write_engine
from inplace_builder.served.model_config import MODEL_VERSION
from inplace_builder.served.options import BuildOptions

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use; there is none here"
)
pytest.importorskip("tensorrt", reason="needs TensorRT; it is not installed")

from support.exported_decoders import PROMPTS, decoder, exported, generate_as_rows  # noqa: E402
from support.models import greedy  # noqa: E402


@pytest.mark.parametrize(
    ("family", "dynamic"), [("llama", False), ("gemma2", True), ("gpt2", True)]
)
def test_eight_ragged_rows_generate_what_transformers_does(
    family: str, dynamic: bool, tmp_path: Path
) -> None:
    """At the smallest capacity that the plan was built for; the build has verified both ends."""
    model = decoder(family)
    capture = capture_exported_decoder(
        exported(model, dynamic=dynamic),
        DecoderOptions(capacity=48, max_rows=8, chunk=6, min_capacity=37),
    )
    options = BuildOptions(
        device="cuda",
        engine="tensorrt",
        alias="plugin",
        capacity=48,
        min_capacity=37,
        chunk=6,
        slots=9,
        max_rows=8,
    )
    manifest = write_engine(capture, tmp_path / family, options)
    assert {alias.kind for alias in manifest.program("step").aliases} == {"plugin"}
    folder = tmp_path / family / MODEL_VERSION
    instance = ModelInstance.open(folder, Manifest.load(folder).at_capacity(37))
    addresses = instance.arena.addresses()
    assert generate_as_rows(instance, PROMPTS, 20) == [
        greedy(model, prompt, 20) for prompt in PROMPTS
    ]
    assert instance.arena.addresses() == addresses
