"""The files of a Hugging Face model: checks before and after they are loaded.

Weights that transformers would drop, ignore or fill with random numbers are refused.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from inplace.schema.specs import Dtype
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from inplace_builder.capture.gguf_files import parsed_once
from inplace_builder.capture.lora import merge_lora, read_lora_config
from inplace_builder.capture.quantized import (
    CACHE_SCALES,
    check_quantization,
    dequantizing_config,
    is_cache_only,
    quantization,
    read_quantized,
    with_own_file,
    without_quantization,
)
from inplace_builder.capture.scaled_linear import (
    has_scaled,
    round_all,
    round_experts,
    use_stored,
)
from inplace_builder.capture.sources import ModelFiles, locate_model
from inplace_builder.choices import WeightOptions
from inplace_builder.errors import BuildError, brief

_RECOMPUTED_KEYS = ("rotary_emb.inv_freq", "masked_bias")
"""Ends of the names of tensors that old checkpoints hold and models compute themselves."""

DEQUANTIZED = WeightOptions()


def load_decoder(
    source: Path | str, dtype: Dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a decoder from files of this machine. Nothing is downloaded.

    A LoRA adapter is merged, and quantized weights (fp8, GPTQ, AWQ, mxfp4) are dequantized.

    Args:
        source: a folder with weights (safetensors, ``.bin``, one GGUF file) or with a LoRA adapter,
            a GGUF file, a model's folder in the cache of ``hf download``, or its id there.
        dtype: the type of the weights.

    Returns:
        The model, and its tokenizer if it has one.

    Raises:
        BuildError: there is no model, it is not a decoder, transformers cannot read it, or it would
            not use all weights.
    """
    with parsed_once():
        model, _ = load_model(source, dtype)
        return model, load_tokenizer(source)[0]


def load_model(
    source: Path | str,
    dtype: Dtype,
    config: PretrainedConfig | None = None,
    weights: WeightOptions = DEQUANTIZED,
) -> tuple[PreTrainedModel, dict[str, str]]:
    """Load the model alone, as `load_decoder`.

    Args:
        source: as `load_decoder` takes it.
        dtype: the type of the weights.
        config: what `check_checkpoint` returned; None checks here. Reading it from GGUF is slow.
        weights: which weights are 8-bit floats. An adapter is merged into weights that are none.

    Returns:
        The model, and what was done to the weights: ``adapter``, ``quantization`` and ``weights``,
        in words.
    """
    source = Path(source)
    config = config or check_checkpoint(source)
    files = locate_model(source)
    stored = weights if files.adapter is None else DEQUANTIZED
    model, notes = load_weights(source, files, dtype, config, _decoder_class(config), stored)
    if files.adapter is not None:
        with torch.no_grad():
            notes["adapter"] = merge_lora(model, files.adapter)
    if weights.kind == "fp8" and not has_scaled(model):
        notes["weights"] = round_all(model, weights)
    if weights.kind == "fp8":
        with torch.no_grad():
            notes["weights"] += round_experts(model, dtype.as_torch)
    return model.eval(), notes


def load_weights(
    source: Path,
    files: ModelFiles,
    dtype: Dtype,
    config: PretrainedConfig,
    kind: Any,
    weights: WeightOptions = DEQUANTIZED,
) -> tuple[PreTrainedModel, dict[str, str]]:
    """Load a model without its adapter; refuse what is missing and what would not be used.

    Args:
        source: for errors.
        files: of the model.
        dtype: the type of the weights.
        config: the configuration.
        kind: the class of transformers whose ``from_pretrained`` loads it.
        weights: whether 8-bit floats of the checkpoint are kept.

    Returns:
        The model, and what was done to the weights, in words.

    Raises:
        BuildError: the weights cannot be loaded, or are not those of the configuration.
    """
    fields = None if files.gguf else quantization(config)
    notes: dict[str, str] = {}
    arguments = _arguments(files)
    if fields is not None and is_cache_only(fields):
        arguments["config"], fields = without_quantization(config), None
    stored = None
    if fields is not None:
        keep = weights.kind == "fp8"
        stored = read_quantized(files.folder, config, dtype.as_torch, keep=keep)
        done = stored.note if stored else f"mxfp4 weights, dequantized to {dtype}"
        notes["quantization"] = f"{done}; activations are not quantized"
        arguments["config"] = dequantizing_config(config)
        if stored is not None:
            arguments |= {"config": without_quantization(config), "state_dict": stored.tensors}
    try:
        with quiet(), files.without_adapter() as folder:
            dequantized = "state_dict" in arguments
            if dequantized:
                kind = _class_without_folder(kind, arguments)
            model, loaded = kind.from_pretrained(
                None if dequantized else folder,  # it takes a folder or tensors
                dtype=dtype.as_torch,
                output_loading_info=True,
                **arguments,
            )
            for parameter in model.parameters() if fields is not None else ():
                if parameter.dtype is torch.bfloat16:  # mxfp4 is dequantized to it
                    parameter.data = parameter.data.to(dtype.as_torch)
            if dequantized and (folder / "generation_config.json").is_file():
                model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    except Exception as error:
        raise BuildError(f"the weights in {source} cannot be loaded: {brief(error)}") from error
    if missing := sorted(loaded["missing_keys"]):
        raise BuildError(
            f"the weights in {source} lack {missing[:3]} ({len(missing)} in all); transformers "
            f"would fill them with random numbers"
        )
    unexpected = sorted(loaded["unexpected_keys"])
    if scales := [key for key in unexpected if key.endswith(CACHE_SCALES)]:
        notes["cache"] = (
            f"keys and values are cached in {dtype}, not in 8 bits: {scales[:2]} ({len(scales)} "
            f"scales in all) are not used; cache fp8 uses them"
        )
    zeros = stored.zero_biases if stored is not None else frozenset()
    ignored = (*_RECOMPUTED_KEYS, *CACHE_SCALES)
    if unused := [key for key in unexpected if not key.endswith(ignored) and key not in zeros]:
        raise BuildError(
            f"the weights in {source} hold {unused[:3]} ({len(unused)} in all), which "
            f"{type(model).__name__} does not use: its output would not be that of the model the "
            f"weights belong to; correct config.json, or remove these tensors"
        )
    if stored is not None and stored.scaled:
        notes["weights"] = use_stored(model, stored.scaled, weights)
        del notes["quantization"]
    return model, notes


def load_tokenizer(source: Path | str) -> tuple[PreTrainedTokenizerBase | None, str]:
    """Load the tokenizer of a model.

    Returns:
        The tokenizer, None if it has none that can be loaded; and which it is or why it cannot be
        served, in words.
    """
    files = locate_model(Path(source))
    own = files.adapter is not None and (files.adapter / "tokenizer_config.json").is_file()
    folder, arguments = files.folder, _arguments(files)
    if own and files.adapter is not None:  # it may have been trained with further tokens
        folder, arguments = files.adapter, _arguments(ModelFiles("", files.adapter))
    without = "clients send token ids, not text"
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **arguments)
    except Exception as error:  # a model without a tokenizer can be served
        return None, f"none, {without} ({brief(error)[:160]})"
    name = type(tokenizer).__name__
    if not tokenizer.is_fast:
        return tokenizer, f"{name} has no fast version (tokenizer.json): {without}"
    if not len(tokenizer):
        return None, f"none, {without} ({name} has no vocabulary)"
    return tokenizer, name


def check_checkpoint(source: Path | str, capacity: int = 1) -> PretrainedConfig:
    """Read the configuration of a decoder, and check what can be checked without the weights.

    Args:
        source: as `load_decoder` takes it.
        capacity: maximum number of positions of a sequence.

    Returns:
        The configuration.

    Raises:
        BuildError: there is no model, it is not a decoder, its adapter cannot be merged, its
            quantization is not supported, or it was made for fewer positions.
    """
    source = Path(source)
    files = locate_model(source)
    config = read_config(source, files)
    if config.is_encoder_decoder or _decoder_class(config) is None:
        raise BuildError(
            f"{source} holds a {config.model_type!r} model, which is not a decoder (transformers "
            f"has no causal language model for it)"
        )
    if files.adapter is not None:
        read_lora_config(files.adapter)
    if files.gguf is None:
        check_quantization(config, source)
    check_positions(config.get_text_config(decoder=True), capacity)
    return config


def read_config(source: Path, files: ModelFiles) -> PretrainedConfig:
    """Read the configuration of a model of any kind.

    Args:
        source: for errors.
        files: of the model.

    Raises:
        BuildError: transformers cannot read it.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(files.folder, **_arguments(files))
    except Exception as error:  # transformers raises many types for an unreadable folder
        raise BuildError(
            f"{source} has no configuration that transformers can read: {brief(error)}"
        ) from error
    return config if files.gguf else with_own_file(config, files.folder)


def _decoder_class(config: PretrainedConfig) -> Any:
    """What loads the decoder of a configuration; None if it has none.

    The text part of a larger model (Emu3, Mllama), saved alone, has a type that transformers' table
    of causal language models does not have; ``architectures`` names its class.
    """
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    for name in config.architectures or ():
        kind = getattr(transformers, name, None) if name.endswith("ForCausalLM") else None
        if kind is not None and kind.config_class is type(config):
            return kind
    return None


def _class_without_folder(kind: Any, arguments: dict[str, Any]) -> Any:
    """The class that ``AutoModelForCausalLM`` would choose: it looks into a folder itself.

    Args:
        kind: what `_decoder_class` returned.
        arguments: of ``from_pretrained``; ``config`` becomes the text part's where the class is of
            the text part.
    """
    if kind is not transformers.AutoModelForCausalLM:
        return kind
    config = arguments["config"]
    chosen = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not isinstance(config, chosen.config_class):
        arguments["config"] = config.get_text_config(decoder=True)
    return chosen


def check_positions(config: PretrainedConfig, capacity: int) -> None:
    """BuildError if a sequence could be longer than the model was made for, or is captured for."""
    allowed, reason = min(_position_limits(config), default=(capacity, ""))
    if capacity > allowed:
        raise BuildError(
            f"a capacity of {capacity} is more than the {allowed} positions{reason}; choose at "
            f"most {allowed}"
        )


def _position_limits(config: PretrainedConfig) -> Iterator[tuple[int, str]]:
    """Numbers of positions that a sequence may have at most, and why, in words that follow."""
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:  # XLNet's -1: no limit
        return
    ropes = _rope_parameters(config)
    positions = min((_scaled_limit(rope, limit) for rope in ropes), default=limit)
    changing = [rope["rope_type"] for rope in ropes if _is_length_dependent(rope)]
    yield (
        positions,
        f": beyond these its rotary embedding ({changing[0]}) changes with the length of the "
        f"sequence, which is not supported"
        if changing
        else " this model was made for",
    )


def _rope_parameters(config: PretrainedConfig) -> list[dict[str, Any]]:
    """The parameters of each rotary embedding; some models have one for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [each for each in parameters.values() if isinstance(each, dict)]
    return [rope for rope in nested or [parameters] if rope.get("rope_type")]


def _is_length_dependent(rope: dict[str, Any]) -> bool:
    return rope["rope_type"] in ("dynamic", "longrope")


def _scaled_limit(rope: dict[str, Any], limit: int) -> int:
    """The number of positions that a rotary embedding is right for.

    Args:
        rope: its parameters.
        limit: the configuration's ``max_position_embeddings``: the positions before scaling where
            the embedding is linear; after it in some models with ``yarn``, where the original
            number stands beside it.
    """
    original = rope.get("original_max_position_embeddings")
    if _is_length_dependent(rope):
        return min(limit, original) if rope["rope_type"] == "longrope" and original else limit
    if rope["rope_type"] not in ("linear", "yarn"):
        return limit
    before = original if original and rope["rope_type"] == "yarn" else limit
    return max(limit, int(before * float(rope.get("factor") or 1.0)))


def _arguments(files: ModelFiles) -> dict[str, Any]:
    """The keyword arguments of ``from_pretrained``."""
    arguments: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    return arguments | ({"gguf_file": files.gguf} if files.gguf else {})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide progress bars and advice of transformers and torch: our own errors say what failed."""
    bars = transformers.utils.logging.is_progress_bar_enabled()
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        # transformers' GGUF reader draws a progress bar in spite of these settings
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
        if bars:
            transformers.utils.logging.enable_progress_bar()
