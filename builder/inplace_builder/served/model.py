"""Build a Hugging Face model of any kind that can be served; its configuration says which."""

import json
from pathlib import Path

from inplace.schema.served import Manifest

from inplace_builder.capture.sources import locate_model
from inplace_builder.served.build import Stage
from inplace_builder.served.decoder import build_decoder
from inplace_builder.served.options import BuildOptions
from inplace_builder.served.speech import SPEECH_MODELS, build_speech_model


def build_model(
    source: Path | str,
    output: Path | str,
    options: BuildOptions,
    stage: Stage = lambda _: None,
) -> Manifest:
    """Build a model into a Triton repository: a decoder, or a speech model.

    Args:
        source: files of this machine, as `load_decoder` takes them.
        output: the folder to write; its name is the model's.
        options: what to build for.
        stage: called with the name of each stage as it begins.

    Raises:
        BuildError: with nothing written.
        LoadError: TensorRT is not installed.
    """
    if _model_type(Path(source)) in SPEECH_MODELS:
        return build_speech_model(source, output, options, stage)
    return build_decoder(source, output, options, stage)


def _model_type(source: Path) -> str:
    """The type that the configuration names; empty if there is none to read."""
    files = locate_model(source)
    if files.gguf is not None:
        return ""
    try:
        config = json.loads((files.folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(config.get("model_type", "")) if isinstance(config, dict) else ""
