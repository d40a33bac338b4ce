"""Frontend for Hugging Face decoders, through transformers' own extension points: a cache class and an attention function.

The model's code runs unchanged. Its keys and values pass through `SlotCache.update`, its attention through `slot_attention`, which
calls ``inplace::attention`` on the layer's states. Everything else in a decoder works token by token, so the tokens of all rows
are packed behind one another on one axis.

From a model folder to a transformers model.
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
from inplace.schema.specs import StateSpec
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache as TransformersCache

from inplace_builder.capture.capture import Capture, Reference, complete_program
from inplace_builder.capture.decoder import (
    DecoderOptions,
    LayerCache,
    StepExamples,
    cache_states,
    decoder_program,
)
from inplace_builder.compare import float32_copy
from inplace_builder.errors import BuildError, brief
from inplace_builder.graph.reexport import size_oblivious


def load_decoder(
    source: Path, dtype: Dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a decoder from a local folder (safetensors or one GGUF file) or from a GGUF file. Nothing is downloaded.

    Raises:
        BuildError: there is no model, it is no decoder, or transformers cannot read it.
    """
    if not source.exists():
        raise BuildError(
            f"{source} does not exist; give the folder of a Hugging Face model, or a GGUF file"
        )
    folder = source if source.is_dir() else source.parent
    files = sorted(folder.glob("*.gguf")) if source.is_dir() else [source]
    where: dict[str, Any] = {"local_files_only": True}
    if not (folder / "config.json").is_file() or source.is_file():
        if len(files) != 1 or files[0].suffix != ".gguf":
            held = (
                f"{len(files)} GGUF files; name one"
                if len(files) > 1
                else "neither config.json nor a GGUF file"
            )
            raise BuildError(f"{source} is no model: it holds {held}")
        where["gguf_file"] = files[0].name
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **where)
    except (
        Exception
    ) as error:  # transformers raises many types for a folder it cannot make sense of
        raise BuildError(
            f"{source} has no configuration that transformers can read: {brief(error)}"
        ) from error
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
            with contextlib.redirect_stderr(
                io.StringIO()
            ):  # transformers' GGUF reader draws its bar whatever it is told
                yield
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
        if bars:
            transformers.utils.logging.enable_progress_bar()


IMPLEMENTATION = "inplace"
"""The name under which transformers knows `slot_attention`."""


class SlotCache(TransformersCache):
    """A cache that keeps nothing: the keys and values it is given go on to the attention function, which appends them.

    Args:
        key_states, value_states: one state a layer, ``[slots, kv_heads, capacity, dim]``.
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
        """Note which layer's keys and values come next; ``[1, kv_heads, tokens, dim]`` each, returned as they are."""
        self.updated = layer_idx
        return key_states, value_states


current_cache: ContextVar[SlotCache] = ContextVar("inplace_cache")
"""The cache of the step that is being traced: transformers does not hand it to attention functions."""


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
    """The attention function that transformers calls in each layer; query ``[1, heads, tokens, dim]``.

    Raises:
        BuildError: the layer attends in a way that ``inplace::attention`` does not have.
    """
    cache = current_cache.get()
    layer, cache.updated = cache.updated, None
    kind = type(module).__name__
    if layer is None or layer != getattr(module, "layer_idx", layer):
        raise BuildError(
            f"{kind} attends without caching its own keys and values (shared or cross-attention layers are not supported)"
        )
    if attention_mask is not None:
        raise BuildError(
            f"{kind} brings an attention mask of its own; only causal and sliding-window attention is supported"
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
    """One step of a decoder over packed rows. The names of its arguments become those of the graph's inputs."""

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
        """Token ids ``[tokens]`` to each row's next token ``[rows, 1]``, chosen by `sample`, and float32 logits ``[rows, vocabulary]``."""
        cache = SlotCache(key_states, value_states, slots, row_offsets, write_indices, self.rings)
        token = current_cache.set(cache)
        try:
            out = self.model(
                input_ids=input_ids.unsqueeze(0),
                position_ids=positions.unsqueeze(0),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=last_tokens,
            )
        finally:
            current_cache.reset(token)
        logits = out.logits[0].float()
        return sample(logits, temperature, top_k, top_p, seed, next_positions), logits


def capture_decoder(model: PreTrainedModel, options: DecoderOptions) -> Capture:
    """Export one step of a decoder over packed rows.

    Raises:
        BuildError: the model does something that the operators do not have.
    """
    config = model.config.get_text_config(decoder=True)
    _check_positions(config, options)
    states, rings = _states(config, model.dtype, options)
    original = model.config._attn_implementation
    layers = len(rings)
    examples = StepExamples(options, states)
    memory, shapes = examples.memory(), examples.memory_shapes()
    with quiet():
        model.set_attn_implementation(IMPLEMENTATION)
    try:
        _check_interface(model)
        with quiet(), torch.no_grad(), size_oblivious():
            exported = torch.export.export(
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
    _check_layers(exported.graph, layers, type(model).__name__)
    description = decoder_program(config.vocab_size, config.vocab_size, options)
    program, lowering = complete_program(exported, description, states)
    rounded = model.dtype in (torch.float16, torch.bfloat16)
    return Capture(
        exported=exported,
        program=program,
        states=states,
        capacity=options.capacity,
        dtype=Dtype.of(model.dtype),
        lowering=lowering,
        reference=_reference(model),
        min_capacity=options.dynamic_min_capacity,
        float32_reference=(lambda: _reference(float32_copy(model))) if rounded else None,
    )


def _reference(model: PreTrainedModel) -> Reference:
    def reference(requests: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        ids = torch.cat([request["input_ids"] for request in requests]).to(model.device)
        with torch.no_grad():
            logits = (
                model(input_ids=ids[None], use_cache=False, logits_to_keep=1)
                .logits[0, -1]
                .float()
                .cpu()
            )
        return {"next_token": logits.argmax(-1, keepdim=True), "logits": logits}

    return reference


def _states(
    config: transformers.PretrainedConfig, dtype: torch.dtype, options: DecoderOptions
) -> tuple[tuple[StateSpec, ...], list[bool]]:
    """The key and value states of each layer, and which are rings."""
    if (
        getattr(config, "num_attention_heads", None) is None
        or getattr(config, "num_hidden_layers", None) is None
    ):
        raise BuildError(
            f"a {config.model_type!r} model has no attention heads; only decoders with a key-value cache are supported"
        )
    layers: int = config.num_hidden_layers
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if types is None:
        types = ["sliding_attention" if window else "full_attention"] * layers
    if odd := sorted(set(types) - {"full_attention", "sliding_attention"}):
        raise BuildError(
            f"the model has layers of the kind {odd}; only full_attention and sliding_attention are supported"
        )
    caches = [
        LayerCache(
            heads,
            dim,
            dim,
            Dtype.of(dtype),
            window=window if kind == "sliding_attention" and window else 0,
        )
        for kind in types
    ]
    return cache_states(caches, options), [cache.ring(options) for cache in caches]


def _check_positions(config: transformers.PretrainedConfig, options: DecoderOptions) -> None:
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and options.capacity > longest:
        raise BuildError(
            f"a capacity of {options.capacity} is more than the {longest} positions this model was made for; choose at most {longest}"
        )


def _check_interface(model: PreTrainedModel) -> None:
    """Transformers leaves a model whose attention is code of its own as it was, and says so in a log message only."""
    if model.config.get_text_config(decoder=True)._attn_implementation != IMPLEMENTATION:
        raise BuildError(
            f"{type(model).__name__} does not attend through transformers' attention interface, so its keys and values cannot be found; "
            f"choose one that does, such as Llama, Mistral, Qwen, Gemma or GPT-2"
        )


def _check_layers(graph: torch.fx.Graph, layers: int, kind: str) -> None:
    count = sum(node.target is torch.ops.inplace.attention.default for node in graph.nodes)
    if count != layers:
        raise BuildError(
            f"{kind} has {layers} layers, but {count} of them attend through transformers' attention interface"
        )
