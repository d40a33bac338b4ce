"""Build a speech model: load, capture its programs, then write them as an engine."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from inplace.schema.served import Manifest
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from inplace_builder.capture import nemotron_asr_streaming as nemotron
from inplace_builder.capture import whisper
from inplace_builder.capture.checkpoint import load_tokenizer, load_weights, read_config
from inplace_builder.capture.programs import ProgramsCapture
from inplace_builder.capture.sources import locate_model
from inplace_builder.errors import BuildError
from inplace_builder.served.build import Stage, check_output, write_engine
from inplace_builder.served.decoder import save_tokenizer
from inplace_builder.served.options import BuildOptions


@dataclass(frozen=True)
class SpeechBuild:
    """How a model is built.

    Attributes:
        model_class: the class of transformers that loads it.
        capture: captures its programs.
        notes: what else to record in ``built_with``.
        text_tokens: prepares its tokenizer, so that decoding leaves out what is no text.
    """

    model_class: Any
    capture: Callable[[Any], ProgramsCapture]
    notes: Mapping[str, str] = field(default_factory=dict)
    text_tokens: Callable[[Any, PreTrainedTokenizerBase], None] = lambda model, tokenizer: None


def _nemotron(folder: Path, config: PretrainedConfig, options: BuildOptions) -> SpeechBuild:
    processor = nemotron.ProcessorConfig.read(folder, config)
    lookahead = processor.choose_lookahead(options.lookahead)
    return SpeechBuild(
        nemotron.ModelClass,
        lambda model: nemotron.capture_nemotron_asr_streaming(
            model, lookahead, options.max_rows, processor.extraction
        ),
        {"lookahead": str(lookahead)},
    )


def _whisper(folder: Path, config: PretrainedConfig, options: BuildOptions) -> SpeechBuild:
    if options.lookahead is not None:
        raise BuildError(
            f"{folder} holds a {config.model_type!r} model, which encodes a window of audio as a "
            f"whole: leave lookahead out"
        )
    extractor = whisper.load_extractor(folder, config)
    return SpeechBuild(
        whisper.ModelClass,
        partial(whisper.capture_whisper, extractor=extractor, max_rows=options.max_rows),
        text_tokens=whisper.hide_timestamps,
    )


SPEECH_MODELS: Mapping[str, Callable[[Path, PretrainedConfig, BuildOptions], SpeechBuild]] = {
    nemotron.MODEL_TYPE: _nemotron,
    whisper.MODEL_TYPE: _whisper,
}
"""How `build_speech_model` builds models, by their type."""


def build_speech_model(
    source: Path | str,
    output: Path | str,
    options: BuildOptions,
    stage: Stage = lambda _: None,
) -> Manifest:
    """Build a speech model into a model of a Triton repository.

    Args:
        source: a folder with its weights, or its id in the cache of ``hf download``.
        output: the folder to write; its name is the model's.
        options: what to build for. Its sizes of sequences of tokens do not apply.
        stage: called with the name of each stage as it begins.

    Raises:
        BuildError: with nothing written.
        LoadError: TensorRT is not installed.
    """
    source, output = Path(source), Path(output)
    check_output(output, options)
    files = locate_model(source)
    config = read_config(source, files)
    if files.adapter is not None:
        raise BuildError(f"{source} has an adapter, which cannot be merged into a speech model")
    if options.min_capacity is not None or options.step_tokens is not None:
        raise BuildError(
            "min_capacity and step_tokens are sizes of sequences of tokens; a stream of speech "
            "keeps what its model looks back to, however long it is: leave them out"
        )
    build = SPEECH_MODELS[config.model_type](files.folder, config, options)
    stage("load the model")
    tokenizer, tokenizer_note = load_tokenizer(source)
    model, notes = load_weights(source, files, options.dtype, config, build.model_class)
    model.eval()
    if tokenizer is not None:
        build.text_tokens(model, tokenizer)
    stage("capture the programs")
    return write_engine(
        build.capture(model),
        output,
        options,
        stage,
        notes={
            **notes,
            **build.notes,
            "source": files.name,
            "architecture": type(model).__name__,
            "tokenizer": tokenizer_note,
        },
        extras=lambda folder: save_tokenizer(tokenizer, folder),
    )
