"""The front-end for Hugging Face decoders, by transformers' own extension points.

The model's code runs unchanged. Its keys and values pass through `SlotCache`, its attention through
`slot_attention`, which calls ``inplace::attention`` on the layer's states; a mixture of experts
through `inplace_builder.capture.experts.slot_experts`. Everything else in a decoder works token by
token, so the tokens of all rows are packed on one axis.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from inplace.operators import sample
from inplace.schema.dtypes import Dtype
from torch import Tensor
from torch.export import ExportedProgram
from transformers import PreTrainedModel

from inplace_builder.capture.capture import Capture, Reference, complete_program
from inplace_builder.capture.checkpoint import check_positions, quiet
from inplace_builder.capture.decoder import (
    TOKEN_IDS,
    DecoderOptions,
    LayerCache,
    StepExamples,
    cache_states,
    decoder_program,
)
from inplace_builder.capture.experts import grouped_experts
from inplace_builder.capture.slot_cache import (
    IMPLEMENTATION,
    CacheLengthError,
    LayerStates,
    SlotCache,
    Windows,
    current_cache,
)
from inplace_builder.compare import float32_copy
from inplace_builder.errors import BuildError, brief
from inplace_builder.graph.reexport import correct_lstm, size_oblivious

REFERENCE_CHUNK = 1024
"""Tokens of the model's own forward; more are fed in several, through transformers' own cache."""


THRESHOLD_NAMES = ("window", "chunk", "floor_scale", "original_max_position", "local_attention")
"""Parts of the names of a configuration's fields that are positions where something changes."""


def capture_decoder(model: PreTrainedModel, options: DecoderOptions) -> Capture:
    """Export one step of a decoder over packed rows.

    Args:
        model: a causal language model of transformers.
        options: what to build for.

    Raises:
        BuildError: the model does something that the operators do not have.
    """
    config = model.config.get_text_config(decoder=True)
    check_positions(config, options.capacity)
    _check_layer_kinds(config)
    with _inplace_attention(model), grouped_experts(model):
        # 1. Run the model once to read each layer's window off its attention mask.
        try:
            with_mask, windows = False, _layer_windows(model, options.capacity, with_mask=False)
        except CacheLengthError:  # OPT makes a mask of that length where none is given
            with_mask, windows = True, _layer_windows(model, options.capacity, with_mask=True)
        caches = _layer_caches(config, Dtype.of(model.dtype), windows)
        states = cache_states(caches, options)
        # 2. Export one step, with attention, caches and experts replaced by ours.
        exported = _export_step(model, caches, StepExamples(options, states), with_mask=with_mask)
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
        thresholds=frozenset(_thresholds(config.to_dict())),
    )


@contextmanager
def _inplace_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let the model attend through `slot_attention`, and embed positions one by one.

    A rotary embedding that looks at the longest sequence of a step uses its short form, which is
    right up to the length that `check_positions` allows.

    Raises:
        BuildError: transformers has not replaced the model's attention. It leaves a model that
            computes attention in code of its own as it is, with a log message only.
    """
    original = model.config._attn_implementation
    rotary = [module for module in model.modules() if _is_length_dependent(module)]
    with quiet():
        model.set_attn_implementation(IMPLEMENTATION)
    try:
        if model.config.get_text_config(decoder=True)._attn_implementation != IMPLEMENTATION:
            raise BuildError(
                f"{type(model).__name__} does not attend through transformers' attention "
                f"interface, so its keys and values are unknown; choose one that does, such as "
                f"Llama, Mistral, Qwen, Gemma or GPT-2"
            )
        for module in rotary:
            module.forward = _length_independent(module)
        yield
    finally:
        for module in rotary:
            module.__dict__.pop("forward", None)
        with quiet():
            model.set_attn_implementation(original)


def _is_length_dependent(module: torch.nn.Module) -> bool:
    """Whether it is a rotary embedding that transformers' ``dynamic_rope_update`` may change."""
    kinds = getattr(module, "rope_type", None)
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
    changes = any(kind == "longrope" or "dynamic" in str(kind) for kind in kinds)
    return changes and hasattr(type(module).forward, "__wrapped__")


def _length_independent(module: torch.nn.Module) -> Callable[..., Any]:
    """The forward of a rotary embedding without ``dynamic_rope_update``."""
    forward: Any = type(module).forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__

    def embed(*args: Any, **kwargs: Any) -> Any:
        return forward(module, *args, **kwargs)

    return embed


def _layer_windows(model: PreTrainedModel, capacity: int, *, with_mask: bool) -> list[int]:
    """How many positions up to its own a token of each layer sees; 0 for all.

    Raises:
        BuildError: a layer's mask is no window, or the model cannot run with our cache.
    """
    ids = torch.zeros((1, 2), dtype=torch.int64, device=model.device)
    positions = torch.arange(2, device=model.device)
    num_layers: int = model.config.get_text_config(decoder=True).num_hidden_layers
    windows = Windows(capacity)
    try:
        with quiet(), torch.no_grad(), torch.random.fork_rng(devices=()):
            cache = SlotCache(positions, num_layers, windows)
            _run(model, ids[0], positions, cache, with_mask=with_mask)
    except BuildError:
        raise
    except Exception as error:
        raise BuildError(f"{type(model).__name__} cannot run: {brief(error)}") from error
    return [windows.by_layer.get(layer, 0) for layer in range(num_layers)]


def _run(
    model: PreTrainedModel,
    input_ids: Tensor,
    positions: Tensor,
    cache: SlotCache,
    logits_to_keep: Tensor | int = 1,
    *,
    with_mask: bool,
) -> Any:
    """Call the model on packed tokens, with a mask that says that none is padding, or without."""
    given = {"attention_mask": torch.ones_like(input_ids).unsqueeze(0)} if with_mask else {}
    with current_cache(cache):
        return model(
            input_ids=input_ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
            **given,
        )


class DecoderStep(torch.nn.Module):
    """One step of a decoder over packed rows.

    The names of its arguments become those of the graph's inputs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Sequence[int],
        rings: Sequence[bool],
        *,
        with_mask: bool,
    ) -> None:
        super().__init__()
        self.model, self.windows, self.rings = model, windows, rings
        self.with_mask = with_mask

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
        states = LayerStates(
            key_states, value_states, slots, row_offsets, write_indices, self.windows, self.rings
        )
        cache = SlotCache(positions, len(self.windows), states)
        out = _run(self.model, input_ids, positions, cache, last_tokens, with_mask=self.with_mask)
        logits = out.logits[0].float()
        return sample(logits, temperature, top_k, top_p, seed, next_positions), logits


def _export_step(
    model: PreTrainedModel,
    caches: Sequence[LayerCache],
    examples: StepExamples,
    *,
    with_mask: bool,
) -> ExportedProgram:
    layers = len(caches)
    step = DecoderStep(
        model,
        [cache.window for cache in caches],
        [cache.is_ring(examples.options) for cache in caches],
        with_mask=with_mask,
    )
    memory, shapes = examples.memory(), examples.memory_shapes()
    try:
        with quiet(), torch.no_grad(), correct_lstm(), size_oblivious():
            return torch.export.export(
                step,
                (*examples.inputs(), memory[:layers], memory[layers:]),
                dynamic_shapes=(*examples.input_shapes(), shapes[:layers], shapes[layers:]),
            )
    except BuildError:
        raise
    except Exception as error:
        raise BuildError(
            f"torch.export cannot capture {type(model).__name__}: {brief(error)}"
        ) from error


def _reference(model: PreTrainedModel) -> Reference:
    def reference(requests: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        ids = torch.cat([request[TOKEN_IDS] for request in requests]).to(model.device)
        with torch.no_grad():
            logits = _last_logits(model, ids).float().cpu()
        return {"next_token": logits.argmax(-1, keepdim=True), "logits": logits}

    return reference


def _last_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The scores ``[vocab_size]`` of the last of token ids ``[tokens]``."""
    cache: Any = None
    use_cache = len(ids) > REFERENCE_CHUNK
    for part in ids.split(REFERENCE_CHUNK):
        out = model(
            input_ids=part[None], past_key_values=cache, use_cache=use_cache, logits_to_keep=1
        )
        cache = out.past_key_values if use_cache else None
    logits: Tensor = out.logits[0, -1]
    return logits


def _thresholds(fields: Mapping[str, Any]) -> Iterator[int]:
    """The positions that a configuration names: windows, chunks, steps of a temperature.

    Args:
        fields: its fields; some are mappings themselves.
    """
    for name, given in fields.items():
        if isinstance(given, Mapping):
            yield from _thresholds(given)
        elif type(given) is int and any(part in name for part in THRESHOLD_NAMES):
            yield given


def _check_layer_kinds(config: transformers.PretrainedConfig) -> None:
    """BuildError if a layer keeps another state than keys and values."""
    if (
        getattr(config, "num_attention_heads", None) is None
        or getattr(config, "num_hidden_layers", None) is None
    ):
        raise BuildError(
            f"a {config.model_type!r} model has no attention heads; only decoders with a key-value "
            f"cache are supported"
        )
    kinds = getattr(config, "layer_types", None) or []
    if unsupported := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise BuildError(
            f"the model has layers of the kind {unsupported}; only full_attention and "
            f"sliding_attention are supported"
        )


def _layer_caches(
    config: transformers.PretrainedConfig, dtype: Dtype, windows: Sequence[int]
) -> list[LayerCache]:
    """The cache of each layer, of the sizes that the configuration states.

    If they are not those of the model, ``inplace::attention`` refuses its keys and values.
    """
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    try:
        stated = getattr(config, "head_dim", None)
    except Exception as error:  # transformers raises where layers differ
        raise BuildError(
            f"the layers of a {config.model_type!r} model have heads of different sizes, which is "
            f"not supported ({brief(error)})"
        ) from error
    dim: int = stated or config.hidden_size // config.num_attention_heads
    return [LayerCache(heads, dim, dim, dtype, window) for window in windows]


def _check_layers(graph: torch.fx.Graph, layers: int, kind: str) -> None:
    count = sum(node.target is torch.ops.inplace.attention.default for node in graph.nodes)
    if count != layers:
        raise BuildError(
            f"{kind} has {layers} layers, but {count} of them attend through transformers' "
            f"attention interface"
        )
