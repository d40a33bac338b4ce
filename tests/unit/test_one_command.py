"""The cache of `inplace serve MODEL`: what a built model is named after."""

from dataclasses import replace
from pathlib import Path

import pytest
from inplace.errors import InplaceError
from inplace_builder.capture.sources import locate_model
from inplace_builder.errors import BuildError
from inplace_builder.served.options import BuildOptions
from inplace_builder.tools.front_process import check_plain
from inplace_builder.tools.one_command import _content_key, model_name

OPTIONS = BuildOptions(serve="stream")


def test_content_and_options_are_the_key(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    files = locate_model(folder)
    key = _content_key(files, OPTIONS)
    copy = tmp_path / "other"
    folder.rename(copy)
    assert _content_key(locate_model(copy), OPTIONS) == key  # not where it is
    keys = {key, _content_key(locate_model(copy), replace(OPTIONS, capacity=512))}
    for name, content in (("model.safetensors", b"weightS"), ("generation_config.json", b"{}")):
        (copy / name).write_bytes(content)
        keys.add(_content_key(locate_model(copy), OPTIONS))
    assert len(keys) == 4


def test_a_model_is_called_as_its_folder(tmp_path: Path) -> None:
    def named(path: str, source: str = "") -> str:
        folder = tmp_path / path
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        return model_name(folder, locate_model(folder))

    assert named("SmolLM2-135M-Instruct") == "SmolLM2-135M-Instruct"
    assert named("models--org--Tiny-1B/snapshots/abc") == "Tiny-1B"
    assert named("a model (new)") == "a-model-new"
    with pytest.raises(BuildError, match="rename the folder"):
        named("é")


def test_a_front_end_that_could_not_reach_its_server_is_refused() -> None:
    check_plain(["--exit-on-error=false", "--grpc-restricted-protocol=trace:key=value"])
    restricted = "--grpc-restricted-protocol=health:key=value"
    for option in ("--grpc-use-ssl=true", "--allow-grpc=false", restricted):
        with pytest.raises(InplaceError, match="--no-openai"):
            check_plain([option])
