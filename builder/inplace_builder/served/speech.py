"""Build a streaming speech model: load, capture its programs, then write them as an engine."""

from pathlib import Path

from inplace.schema.served import Manifest

from inplace_builder.capture.checkpoint import load_tokenizer, load_weights, read_config
from inplace_builder.capture.nemotron_asr_streaming import (
    MODEL_TYPE,
    ModelClass,
    ProcessorConfig,
    capture_nemotron_asr_streaming,
)
from inplace_builder.capture.sources import locate_model
from inplace_builder.errors import BuildError
from inplace_builder.served.build import Stage, check_output, write_engine
from inplace_builder.served.decoder import save_tokenizer
from inplace_builder.served.options import BuildOptions

SPEECH_MODELS = (MODEL_TYPE,)
"""The types of models that `build_speech_model` builds."""


def build_speech_model(
    source: Path | str,
    output: Path | str,
    options: BuildOptions,
    stage: Stage = lambda _: None,
) -> Manifest:
    """Build a streaming speech model into a model of a Triton repository.

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
    processor = ProcessorConfig.read(files.folder, config)
    lookahead = processor.choose_lookahead(options.lookahead)
    stage("load the model")
    tokenizer, tokenizer_note = load_tokenizer(source)
    model, notes = load_weights(source, files, options.dtype, config, ModelClass)
    model.eval()
    stage("capture the programs")
    return write_engine(
        capture_nemotron_asr_streaming(model, lookahead, options.max_rows, processor.extraction),
        output,
        options,
        stage,
        notes={
            **notes,
            "source": files.name,
            "architecture": type(model).__name__,
            "tokenizer": tokenizer_note,
            "lookahead": str(lookahead),
        },
        extras=lambda folder: save_tokenizer(tokenizer, folder),
    )
