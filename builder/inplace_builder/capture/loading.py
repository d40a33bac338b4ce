"""From a model folder to a transformers model."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from inplace.dtypes import Dtype
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from inplace_builder.errors import BuildError, brief


def load_decoder(source: Path, dtype: Dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a decoder from a local folder (safetensors or one GGUF file) or from a GGUF file. Nothing is downloaded.

    Raises:
        BuildError: there is no model, it is no decoder, or transformers cannot read it.
    """
    if not source.exists():
        raise BuildError(f"{source} does not exist; give the folder of a Hugging Face model, or a GGUF file")
    folder = source if source.is_dir() else source.parent
    files = sorted(folder.glob("*.gguf")) if source.is_dir() else [source]
    where: dict[str, Any] = {"local_files_only": True}
    if not (folder / "config.json").is_file() or source.is_file():
        if len(files) != 1 or files[0].suffix != ".gguf":
            held = f"{len(files)} GGUF files; name one" if len(files) > 1 else "neither config.json nor a GGUF file"
            raise BuildError(f"{source} is no model: it holds {held}")
        where["gguf_file"] = files[0].name
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **where)
    except Exception as error:  # transformers raises many types for a folder it cannot make sense of
        raise BuildError(f"{source} has no configuration that transformers can read: {brief(error)}") from error
    if config.is_encoder_decoder or type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise BuildError(
            f"{source} holds a {config.model_type!r} model, which is no decoder (transformers has no causal language model for it)"
        )
    # SDPA has no soft-cap: as the reference of such a model it would be wrong
    capped = getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    reference = {"attn_implementation": "eager"} if capped else {}
    try:
        with quiet():
            model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype.as_torch, output_loading_info=True, **where, **reference
            )
    except Exception as error:
        raise BuildError(f"the weights in {source} cannot be loaded: {brief(error)}") from error
    if missing := sorted(loaded["missing_keys"]):
        raise BuildError(
            f"the weights in {source} lack {missing[:3]} ({len(missing)} in all); transformers would fill them with random numbers"
        )
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **where)
    except Exception:  # a model without a tokenizer is served all the same: its clients send ids
        tokenizer = None
    return model.eval(), tokenizer


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' and torch's progress bars and advice: what matters is said by our own errors."""
    bars = transformers.utils.logging.is_progress_bar_enabled()
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):  # transformers' GGUF reader draws its bar whatever it is told
                yield
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
        if bars:
            transformers.utils.logging.enable_progress_bar()
