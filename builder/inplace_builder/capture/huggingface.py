"""The front-end for Hugging Face decoders, by transformers' own extension points.

The model's code runs unchanged. Its keys and values pass through a cache class (`SlotCache`), its
attention through an attention function (`slot_attention`) that calls ``inplace::attention`` on the
layer's states. Everything else in a decoder works token by token, so the tokens of all rows are
packed on one axis.

Of the front-ends, this is the only one that imports transformers.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
import transformers
from inplace.operators import attention, sample
from inplace.schema.dtypes import Dtype
from torch import Tensor
from torch.export import ExportedProgram
from transformers import AttentionInterface, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache as TransformersCache

from inplace_builder.capture.capture import Capture, Reference, complete_program
from inplace_builder.capture.decoder import (
    TOKEN_IDS,
    DecoderOptions,
    LayerCache,
    StepExamples,
    cache_states,
    decoder_program,
)
from inplace_builder.compare import float32_copy
from inplace_builder.errors import BuildError, brief
from inplace_builder.graph.reexport import size_oblivious


def capture_decoder(model: PreTrainedModel, options: DecoderOptions) -> Capture:
    """Export one step of a decoder over packed rows.

    Args:
        model: a causal language model of transformers.
        options: what to build for.

    Raises:
        BuildError: the model does something that the operators do not have.
    """
    config = model.config.get_text_config(decoder=True)
    # 1. Read the caches of the layers off the configuration.
    _check_positions(config, options)
    caches = _layer_caches(config, Dtype.of(model.dtype))
    states = cache_states(caches, options)
    # 2. Export one step, with attention and caches replaced by ours.
    rings = [cache.is_ring(options) for cache in caches]
    exported = _export_step(model, rings, StepExamples(options, states))
    _check_layers(exported.graph, len(caches), type(model).__name__)
    # 3. Clean the graph, check it against the description, read off what it writes.
    program = decoder_program(config.vocab_size, config.vocab_size, options)
    program, lowering = complete_program(exported, program, states)
    # 4. The model itself is the reference, in its own type and, if that rounds, in float32.
    rounds = model.dtype in (torch.float16, torch.bfloat16)
    return Capture(
        exported=exported,
        program=program,
        states=states,
        capacity=options.capacity,
        dtype=Dtype.of(model.dtype),
        lowering=lowering,
        reference=_reference(model),
        min_capacity=options.dynamic_min_capacity,
        float32_reference=(lambda: _reference(float32_copy(model))) if rounds else None,
    )


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
        BuildError: there is no model, it is no decoder, or transformers cannot read it.
    """
    source = Path(source)
    folder, where = _locate_model(source)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **where)
    except Exception as error:  # transformers raises many types for an unreadable folder
        raise BuildError(
            f"{source} has no configuration that transformers can read: {brief(error)}"
        ) from error
    if config.is_encoder_decoder or type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise BuildError(
            f"{source} holds a {config.model_type!r} model, which is no decoder (transformers has "
            f"no causal language model for it)"
        )
    # SDPA has no soft-cap: it would make a wrong reference of a model that has one
    capped = getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    eager = {"attn_implementation": "eager"} if capped else {}
    try:
        with quiet():
            model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype.as_torch, output_loading_info=True, **where, **eager
            )
    except Exception as error:
        raise BuildError(f"the weights in {source} cannot be loaded: {brief(error)}") from error
    if missing := sorted(loaded["missing_keys"]):
        raise BuildError(
            f"the weights in {source} lack {missing[:3]} ({len(missing)} in all); transformers "
            f"would fill them with random numbers"
        )
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **where)
    except Exception:  # a model without a tokenizer can be served: its clients send token ids
        tokenizer = None
    return model.eval(), tokenizer


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


IMPLEMENTATION = "inplace"
"""The name under which transformers knows `slot_attention`."""


class SlotCache(TransformersCache):
    """A cache that keeps nothing: the attention function appends the keys and values it gets.

    Args:
        key_states, value_states: one state for each layer, ``[slots, kv_heads, capacity, dim]``.
        slots, row_offsets, write_indices: as ``inplace::attention`` takes them.
        rings: for each layer whether its states are rings.
    """

    def __init__(
        self,
        key_states: Sequence[Tensor],
        value_states: Sequence[Tensor],
        slots: Tensor,
        row_offsets: Tensor,
        write_indices: Tensor,
        rings: Sequence[bool],
    ) -> None:
        super().__init__(layers=[])
        self.key_states, self.value_states, self.rings = key_states, value_states, rings
        self.slots, self.row_offsets, self.write_indices = slots, row_offsets, write_indices
        self.updated: int | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Note which layer attends next.

        Args:
            key_states, value_states: ``[1, kv_heads, tokens, dim]`` each; returned as they are.
            layer_idx: the layer.
            args, kwargs: not used.
        """
        self.updated = layer_idx
        return key_states, value_states


_current_cache: ContextVar[SlotCache] = ContextVar("inplace_cache")
"""The cache of the step that is traced: transformers does not pass it to attention functions."""


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in each layer.

    Args:
        module: the layer's attention.
        query: ``[1, heads, tokens, dim]``.
        key, value: ``[1, kv_heads, tokens, dim]``.
        attention_mask: must be None.
        scaling: factor of the scores; ``dim ** -0.5`` if None.
        dropout: not used: the model is in evaluation mode.
        sliding_window: how many positions up to its own a token sees; None for all.
        softcap: soft-cap of the scores.
        others: what else a model passes to its attention.

    Returns:
        The result ``[1, tokens, heads, dim]``; no attention weights.

    Raises:
        BuildError: the layer attends in a way that ``inplace::attention`` does not have.
    """
    cache = _current_cache.get()
    layer, cache.updated = cache.updated, None
    kind = type(module).__name__
    if layer is None or layer != getattr(module, "layer_idx", layer):
        raise BuildError(
            f"{kind} attends without caching its own keys and values (shared or cross-attention "
            f"layers are not supported)"
        )
    if attention_mask is not None:
        raise BuildError(
            f"{kind} has an attention mask of its own; only causal and sliding-window attention is "
            f"supported"
        )
    if unknown := sorted(
        name for name in ("s_aux", "position_bias", "head_mask") if others.get(name) is not None
    ):
        raise BuildError(f"{kind} attends with {unknown}, which inplace::attention does not have")
    if not getattr(module, "is_causal", True):
        raise BuildError(f"{kind} is not causal; a decoder step needs causal attention")
    out = attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        cache.key_states[layer],
        cache.value_states[layer],
        cache.slots,
        cache.row_offsets,
        cache.write_indices,
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
        window=sliding_window or 0,
        ring=cache.rings[layer],
        softcap=softcap or 0.0,
    )
    return out.unsqueeze(0), None


AttentionInterface.register(IMPLEMENTATION, slot_attention)


class DecoderStep(torch.nn.Module):
    """One step of a decoder over packed rows.

    The names of its arguments become those of the graph's inputs.
    """

    def __init__(self, model: PreTrainedModel, rings: Sequence[bool]) -> None:
        super().__init__()
        self.model = model
        self.rings = rings

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        row_offsets: Tensor,
        last_tokens: Tensor,
        slots: Tensor,
        write_indices: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        seed: Tensor,
        next_positions: Tensor,
        key_states: list[Tensor],
        value_states: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """From token ids ``[tokens]`` to each row's next token.

        Returns:
            The tokens ``[rows, 1]``, chosen by `sample`, and float32 logits ``[rows, vocab_size]``.
        """
        cache = SlotCache(key_states, value_states, slots, row_offsets, write_indices, self.rings)
        token = _current_cache.set(cache)
        try:
            out = self.model(
                input_ids=input_ids.unsqueeze(0),
                position_ids=positions.unsqueeze(0),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=last_tokens,
            )
        finally:
            _current_cache.reset(token)
        logits = out.logits[0].float()
        return sample(logits, temperature, top_k, top_p, seed, next_positions), logits


def _export_step(
    model: PreTrainedModel, rings: Sequence[bool], examples: StepExamples
) -> ExportedProgram:
    layers, original = len(rings), model.config._attn_implementation
    memory, shapes = examples.memory(), examples.memory_shapes()
    with quiet():
        model.set_attn_implementation(IMPLEMENTATION)
    try:
        _check_interface(model)
        with quiet(), torch.no_grad(), size_oblivious():
            return torch.export.export(
                DecoderStep(model, rings),
                (*examples.inputs(), memory[:layers], memory[layers:]),
                dynamic_shapes=(*examples.input_shapes(), shapes[:layers], shapes[layers:]),
            )
    except BuildError:
        raise
    except Exception as error:
        raise BuildError(
            f"torch.export cannot capture {type(model).__name__}: {brief(error)}"
        ) from error
    finally:
        with quiet():
            model.set_attn_implementation(original)


def _reference(model: PreTrainedModel) -> Reference:
    def reference(requests: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        ids = torch.cat([request[TOKEN_IDS] for request in requests]).to(model.device)
        with torch.no_grad():
            out = model(input_ids=ids[None], use_cache=False, logits_to_keep=1)
        logits = out.logits[0, -1].float().cpu()
        return {"next_token": logits.argmax(-1, keepdim=True), "logits": logits}

    return reference


def _layer_caches(config: transformers.PretrainedConfig, dtype: Dtype) -> list[LayerCache]:
    """The cache of each layer."""
    if (
        getattr(config, "num_attention_heads", None) is None
        or getattr(config, "num_hidden_layers", None) is None
    ):
        raise BuildError(
            f"a {config.model_type!r} model has no attention heads; only decoders with a key-value "
            f"cache are supported"
        )
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    if unsupported := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise BuildError(
            f"the model has layers of the kind {unsupported}; only full_attention and "
            f"sliding_attention are supported"
        )
    windows = [window if kind == "sliding_attention" and window else 0 for kind in kinds]
    return [LayerCache(heads, dim, dim, dtype, window) for window in windows]


def _check_positions(config: transformers.PretrainedConfig, options: DecoderOptions) -> None:
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and options.capacity > limit:
        raise BuildError(
            f"a capacity of {options.capacity} is more than the {limit} positions this model was "
            f"made for; choose at most {limit}"
        )


def _check_interface(model: PreTrainedModel) -> None:
    """BuildError if transformers has not replaced the model's attention.

    It leaves a model that computes attention in code of its own as it is, with a log message only.
    """
    if model.config.get_text_config(decoder=True)._attn_implementation != IMPLEMENTATION:
        raise BuildError(
            f"{type(model).__name__} does not attend through transformers' attention interface, so "
            f"its keys and values are unknown; choose one that does, such as Llama, Mistral, Qwen, "
            f"Gemma or GPT-2"
        )


def _check_layers(graph: torch.fx.Graph, layers: int, kind: str) -> None:
    count = sum(node.target is torch.ops.inplace.attention.default for node in graph.nodes)
    if count != layers:
        raise BuildError(
            f"{kind} has {layers} layers, but {count} of them attend through transformers' "
            f"attention interface"
        )
