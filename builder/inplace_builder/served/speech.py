"""Build a speech model: load, capture its programs, then write them as an engine."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from inplace.schema.served import Manifest
from transformers import (
    NemotronAsrStreamingForRNNT,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    WhisperForConditionalGeneration,
)

from inplace_builder.capture import nemotron_asr_streaming as nemotron
from inplace_builder.capture import whisper
from inplace_builder.capture.checkpoint import load_tokenizer, load_weights, read_config
from inplace_builder.capture.programs import ProgramsCapture
from inplace_builder.capture.quantized import check_quantization
from inplace_builder.capture.sources import locate_model
from inplace_builder.errors import BuildError
from inplace_builder.served.build import Stage, check_output, load_target, write_engine
from inplace_builder.served.decoder import save_tokenizer
from inplace_builder.served.options import BuildOptions


@dataclass(frozen=True)
class SpeechBuild:
    """How a model is built.

    Attributes:
        model_class: the class of transformers that loads it.
        capture: captures its programs.
        notes: what else to record in ``built_with``.
        text_tokens: prepares its tokenizer, so that decoding leaves out what is not text.
    """

    model_class: Any
    capture: Callable[[Any], ProgramsCapture]
    notes: Mapping[str, str] = field(default_factory=dict)
    text_tokens: Callable[[Any, PreTrainedTokenizerBase], None] = lambda model, tokenizer: None


def _nemotron(folder: Path, config: PretrainedConfig, options: BuildOptions) -> SpeechBuild:
    processor = nemotron.ProcessorConfig.read(folder, config)
    lookahead = processor.choose_lookahead(options.lookahead)
    return SpeechBuild(
        NemotronAsrStreamingForRNNT,
        lambda model: nemotron.capture_nemotron_asr_streaming(
            model, lookahead, options.max_rows, processor.extraction
        ),
        {"lookahead": str(lookahead)},
    )


def _whisper(folder: Path, config: PretrainedConfig, options: BuildOptions) -> SpeechBuild:
    options.check_no_lookahead(folder, config.model_type)  # a window is encoded as a whole
    extractor = whisper.load_extractor(folder, config)
    return SpeechBuild(
        WhisperForConditionalGeneration,
        partial(whisper.capture_whisper, extractor=extractor, max_rows=options.max_rows),
        text_tokens=whisper.hide_timestamps,
    )


SPEECH_MODELS: Mapping[str, Callable[[Path, PretrainedConfig, BuildOptions], SpeechBuild]] = {
    nemotron.MODEL_TYPE: _nemotron,
    whisper.MODEL_TYPE: _whisper,
}
"""How `build_speech_model` builds models, by their type."""


TOKEN_OPTIONS = ("capacity", "min_capacity", "chunk", "step_tokens", "prompt_logprobs")
"""Options of models whose requests are tokens."""


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
        options: what to build for; `TOKEN_OPTIONS` keep their defaults.
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
    given = [
        name for name in TOKEN_OPTIONS if getattr(options, name) != getattr(BuildOptions, name)
    ]
    if given:
        raise BuildError(
            f"the options {given} are for sequences of tokens; the sizes of a speech model are "
            f"those of its configuration: leave them out"
        )
    options.check_no_draft(source, config.model_type)
    options.check_no_fp8(source, config.model_type)
    check_quantization(config, source)
    build = SPEECH_MODELS[config.model_type](files.folder, config, options)
    load_target(options)  # raises before the model is loaded
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
