"""A model in a GGUF file is parsed once, though transformers asks for it several times."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from inplace_builder.capture.gguf_files import parsed_once
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint


def test_inside_the_block_transformers_parses_a_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    parsed, reader = [], gguf.GGUFReader

    def count(given: str) -> Any:
        parsed.append(given)
        return reader(given)

    monkeypatch.setattr(gguf, "GGUFReader", count)
    with parsed_once():
        first, second = (load_gguf_checkpoint(str(path))["config"] for _ in range(2))
        assert first == second
        assert first["num_hidden_layers"] == 3
        fields = gguf.GGUFReader(str(path)).fields.values()
        assert {type(part) for field in fields for part in field.parts} == {np.ndarray}
        assert parsed == [str(path)]
    load_gguf_checkpoint(str(path))
    assert parsed == [str(path)] * 2
    assert gguf.GGUFReader is count
