"""Build a Hugging Face decoder: load, capture, then write it as an engine."""

from pathlib import Path

from inplace.drivers.detokenizer import TOKENIZER_FOLDER
from inplace.schema.served import Manifest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from inplace_builder.capture.cache_scales import quantize_cache
from inplace_builder.capture.capture import Capture
from inplace_builder.capture.checkpoint import check_checkpoint, load_model, load_tokenizer
from inplace_builder.capture.decoder import DecoderOptions
from inplace_builder.capture.drafted import SpeculativeCapture
from inplace_builder.capture.gguf_files import parsed_once
from inplace_builder.capture.huggingface import capture_decoder
from inplace_builder.capture.sources import locate_model
from inplace_builder.capture.speculative import capture_speculative, first_layers
from inplace_builder.choices import Device
from inplace_builder.compare import move_to_engine_device
from inplace_builder.served.build import Stage, check_output, load_target, write_engine
from inplace_builder.served.options import BuildOptions


def build_decoder(
    source: Path | str,
    output: Path | str,
    options: BuildOptions,
    stage: Stage = lambda _: None,
) -> Manifest:
    """Build a Hugging Face decoder into a model of a Triton repository.

    Args:
        source: files of this machine, as `load_decoder` takes them.
        output: the folder to write; its name is the model's. An engine directory there is replaced,
            anything else refused.
        options: what to build for.
        stage: called with the name of each stage as it begins.

    Raises:
        BuildError: with nothing written.
        LoadError: TensorRT is not installed.
    """
    source, output = Path(source), Path(output)
    check_output(output, options)
    with parsed_once():
        config = check_checkpoint(source, options.capacity)
        options.check_no_lookahead(source, config.model_type)
        load_target(options)  # raises before the model is loaded
        stage("load the model")
        tokenizer, tokenizer_note = load_tokenizer(source)
        model, notes = load_model(source, options.dtype, config, options.weight_options)
        if options.cache == "fp8":
            stage("find the scales of keys and values")
            notes["cache"] = quantize_cache(model, source, tokenizer, options.capacity)
    capture: Capture | SpeculativeCapture
    if options.has_draft:
        draft, name = load_draft(model, options, tokenizer)
        stage("capture the graphs of model and draft")
        limits, tokens = decoder_options(options), options.tokens_per_round - 1
        capture = capture_speculative(model, draft, limits, tokens)
        notes = {**notes, "draft": f"{name}, {tokens} tokens a round"}
    else:
        draft = None
        stage("capture the graph")
        capture = capture_decoder(model, decoder_options(options))
    return write_engine(
        capture,
        output,
        options,
        stage,
        notes={
            **notes,
            "source": locate_model(source).name,
            "architecture": type(model).__name__,
            "tokenizer": tokenizer_note,
        },
        extras=lambda folder: save_tokenizer(tokenizer, folder),
        prepare=lambda: _move(model, draft, options.device),
        eos_token_ids=_eos_token_ids(model, tokenizer),
    )


def load_draft(
    model: PreTrainedModel, options: BuildOptions, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[PreTrainedModel, str]:
    """Load what drafts tokens for a model.

    Args:
        model: the model.
        options: what to build for.
        tokenizer: the model's, which is the draft's too.

    Returns:
        The draft, and what the manifest calls it.

    Raises:
        BuildError: the checkpoint cannot be loaded, or the model has no such layers.
    """
    if options.draft_layers is not None:
        draft = first_layers(model, options.draft_layers)
        return draft, f"the model's first {options.draft_layers} layers"
    assert options.draft is not None
    source = Path(options.draft)
    config = check_checkpoint(source, options.capacity)
    draft, _ = load_model(source, options.dtype, config, options.weight_options)
    if options.cache == "fp8":
        quantize_cache(draft, source, tokenizer, options.capacity)
    return draft, locate_model(source).name


def _move(model: PreTrainedModel, draft: PreTrainedModel | None, device: Device) -> None:
    """Move the references to the engine's device."""
    move_to_engine_device(model, device)
    if draft is not None:
        move_to_engine_device(draft, device)


def decoder_options(options: BuildOptions) -> DecoderOptions:
    """The options to capture a decoder with."""
    chunk = min(options.chunk, options.min_capacity or options.capacity)
    max_tokens = min(options.max_tokens, options.max_rows * chunk)
    return DecoderOptions(
        options.capacity,
        options.max_rows,
        chunk,
        max_tokens,
        options.min_capacity,
        options.prompt_logprobs,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write the tokenizer, if there is one.

    Raises:
        OSError: it cannot be written.
    """
    if tokenizer is None:
        return
    try:
        tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
    except OSError:
        raise
    except Exception as error:  # the tokenizers library has no type for a failed write
        raise OSError(f"{TOKENIZER_FOLDER}: {error}") from error


def _eos_token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[int, ...]:
    """The end tokens of the model's generation configuration, or else of its tokenizer."""
    config = model.generation_config
    eos = config.eos_token_id if config is not None else None
    if eos is None and tokenizer is not None:
        eos = tokenizer.eos_token_id
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (eos,)
