"""The files of a Hugging Face decoder: what can be said of them before and after they are loaded.

Weights that transformers would drop, ignore or fill with random numbers are refused.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from inplace.schema.dtypes import Dtype
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from inplace_builder.errors import BuildError, brief

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = (ADAPTER_CONFIG, "adapter_model.safetensors", "adapter_model.bin")
"""The files of a LoRA or another adapter, as peft writes them."""


_RECOMPUTED_KEYS = ("rotary_emb.inv_freq", "masked_bias")
"""Ends of the names of tensors that old checkpoints hold and models compute themselves."""


def load_decoder(
    source: Path | str, dtype: Dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a decoder from a local folder or a GGUF file. Nothing is downloaded.

    Args:
        source: a folder with safetensors or one GGUF file, or a GGUF file.
        dtype: the type of the weights.

    Returns:
        The model, and its tokenizer if it has one.

    Raises:
        BuildError: there is no model, it is no decoder, transformers cannot read it, or it would
            not use all weights.
    """
    model = load_model(source, dtype)
    return model, load_tokenizer(source)[0]


def load_model(
    source: Path | str, dtype: Dtype, config: PretrainedConfig | None = None
) -> PreTrainedModel:
    """Load the model alone, as `load_decoder`.

    Args:
        source: as `load_decoder` takes it.
        dtype: the type of the weights.
        config: what `check_checkpoint` returned; None checks here. Reading it from GGUF is slow.
    """
    source = Path(source)
    config = config or check_checkpoint(source)
    folder, where = _locate_model(source)
    # SDPA has no soft-cap: it would make a wrong reference of a model that has one
    capped = getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    eager = {"attn_implementation": "eager"} if capped else {}
    try:
        with quiet():
            model, loaded = _decoder_class(config).from_pretrained(
                folder, dtype=dtype.as_torch, output_loading_info=True, **where, **eager
            )
    except Exception as error:
        raise BuildError(f"the weights in {source} cannot be loaded: {brief(error)}") from error
    if missing := sorted(loaded["missing_keys"]):
        raise BuildError(
            f"the weights in {source} lack {missing[:3]} ({len(missing)} in all); transformers "
            f"would fill them with random numbers"
        )
    if unused := sorted(
        key for key in loaded["unexpected_keys"] if not key.endswith(_RECOMPUTED_KEYS)
    ):
        raise BuildError(
            f"the weights in {source} hold {unused[:3]} ({len(unused)} in all), which "
            f"{type(model).__name__} does not use: its output would not be that of the model the "
            f"weights belong to; correct config.json, or remove these tensors"
        )
    result: PreTrainedModel = model.eval()
    return result


def load_tokenizer(source: Path | str) -> tuple[PreTrainedTokenizerBase | None, str]:
    """Load the tokenizer of a decoder.

    Returns:
        The tokenizer, None if it has none that can be loaded; and which it is or why it cannot be
        served, in words.
    """
    folder, where = _locate_model(Path(source))
    without = "clients send token ids, not text"
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **where)
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
        BuildError: there is no model, it is no decoder, it has an adapter or an unknown
            quantization, or it was made for fewer positions.
    """
    source = Path(source)
    folder, where = _locate_model(source)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **where)
    except Exception as error:  # transformers raises many types for an unreadable folder
        raise BuildError(
            f"{source} has no configuration that transformers can read: {brief(error)}"
        ) from error
    if config.is_encoder_decoder or _decoder_class(config) is None:
        raise BuildError(
            f"{source} holds a {config.model_type!r} model, which is no decoder (transformers has "
            f"no causal language model for it)"
        )
    adapters = [name for name in ADAPTER_FILES if (folder / name).exists()]
    if source.is_dir() and adapters:
        raise BuildError(
            f"{source} holds an adapter beside the weights ({', '.join(adapters)}), which the "
            f"build would leave out; merge it (peft: merge_and_unload, then save_pretrained), or "
            f"remove these files"
        )
    _check_quantization(config, source)
    check_positions(config.get_text_config(decoder=True), capacity)
    return config


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


def _check_quantization(config: PretrainedConfig, source: Path) -> None:
    for part in (config, config.get_text_config(decoder=True)):
        quantization = getattr(part, "quantization_config", None)
        if quantization is None:
            continue
        fields = quantization if isinstance(quantization, dict) else quantization.to_dict()
        if fields.get("load_in_8bit") or fields.get("load_in_4bit"):
            continue
        method = fields.get("quant_method")
        method = getattr(method, "value", method)
        if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
            raise BuildError(
                f"{source} is quantized with {method!r}, which transformers does not know and "
                f"would ignore; it knows {sorted(AUTO_QUANTIZATION_CONFIG_MAPPING)}"
            )


def check_positions(config: PretrainedConfig, capacity: int) -> None:
    """BuildError if a sequence could be longer than the model was made for."""
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:  # XLNet's -1: no limit
        return
    ropes = _rope_parameters(config)
    limits = [_scaled_limit(rope, limit) for rope in ropes]
    allowed = min(limits, default=limit)
    if capacity <= allowed:
        return
    changing = [rope["rope_type"] for rope in ropes if _is_length_dependent(rope)]
    reason = (
        f"beyond these its rotary embedding ({changing[0]}) changes with the length of the "
        f"sequence, which is not supported"
        if changing
        else "this model was made for"
    )
    joint = ": " if changing else " "
    raise BuildError(
        f"a capacity of {capacity} is more than the {allowed} positions{joint}{reason}; choose at "
        f"most {allowed}"
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


def _locate_model(source: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of a model, and the keyword arguments of ``from_pretrained``."""
    if not source.exists():
        raise BuildError(
            f"{source} does not exist; give the folder of a Hugging Face model, or a GGUF file"
        )
    folder = source if source.is_dir() else source.parent
    where: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if source.is_dir() and (folder / "config.json").is_file():
        return folder, where
    files = sorted(folder.glob("*.gguf")) if source.is_dir() else [source]
    if len(files) != 1 or files[0].suffix != ".gguf":
        content = (
            f"{len(files)} GGUF files; name one"
            if len(files) > 1
            else "neither config.json nor a GGUF file"
        )
        if (folder / ADAPTER_CONFIG).is_file():
            content += "; the adapter there needs the model it was trained on: merge the two"
        raise BuildError(f"{source} is no model: it holds {content}")
    where["gguf_file"] = files[0].name
    return folder, where


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
