"""Decoders compiled for a GPU that this machine does not have, up to an engine directory."""

from pathlib import Path
from typing import Literal

import pytest
from inplace.schema.served import Manifest
from inplace_builder.served.decoder import build_decoder
from inplace_builder.served.model_config import MODEL_VERSION
from inplace_builder.served.options import BuildOptions
from support.long import long_except
from support.models import tiny_llama

pytestmark = pytest.mark.slow

pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX, which compiles without a GPU")


@pytest.mark.parametrize("alias", long_except(["kv_cache_update"], ["copy", "kv_cache_update"]))
def test_a_decoder_is_compiled_into_an_engine_directory(
    tmp_path: Path, alias: Literal["copy", "kv_cache_update"]
) -> None:
    tiny_llama(tmp_path / "llama")
    options = BuildOptions(
        engine="tensorrt_rtx",
        device="cuda",
        compute_capability="8.9",
        alias=alias,
        capacity=32,
        chunk=8,
        slots=4,
        max_rows=4,
    )
    build_decoder(tmp_path / "llama", tmp_path / "model", options)
    manifest = Manifest.load(tmp_path / "model" / MODEL_VERSION)
    program = manifest.program("step")
    assert manifest.verified == "compiled_only"
    assert {entry.kind for entry in program.aliases} == {alias}
    assert program.vocab_size == 0, "only plugins sample"
    assert program.decoder_io == ("input_ids", "next_token")
    assert {spec.name: spec.argmax_of for spec in program.outputs}["next_token"] == "logits"
