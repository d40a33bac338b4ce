"""The front-end for Hugging Face decoders, by transformers' own extension points.

The model's code runs unchanged. Its keys and values pass through `SlotCache`, its attention through
`slot_attention`, which calls ``inplace::attention`` on the layer's states; convolutions and
recurrences go through `slot_recurrences`, a mixture of experts through
`inplace_builder.capture.experts.slot_experts`. Everything else in a decoder works token by token,
so the tokens of all rows are packed on one axis.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import transformers
from inplace.schema.specs import Dtype, StateSpec, Update
from torch.export import ExportedProgram
from torch.utils._sympy.value_ranges import ValueRanges
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from inplace_builder.capture.cache_length import CacheLengthError
from inplace_builder.capture.cache_scales import CacheScales, cache_scales
from inplace_builder.capture.capture import Capture, complete_program
from inplace_builder.capture.checkpoint import check_positions, quiet
from inplace_builder.capture.decoder import (
    TOKEN_IDS,
    DecoderOptions,
    LayerCache,
    StepExamples,
    cache_states,
    decoder_program,
    prompt_program,
)
from inplace_builder.capture.decoder_step import (
    DecoderStep,
    PromptStep,
    StepCall,
    num_layers,
    run_packed,
)
from inplace_builder.capture.experts import grouped_experts
from inplace_builder.capture.indexers import slot_indexers
from inplace_builder.capture.latent import absorbed_latents, describe_latents
from inplace_builder.capture.masks import ChangedMaskError
from inplace_builder.capture.recurrent import CONV, RECURRENT, slot_recurrences
from inplace_builder.capture.reference import references
from inplace_builder.capture.slot_attention import IMPLEMENTATION
from inplace_builder.capture.slot_cache import (
    SeenLayers,
    SlotCache,
)
from inplace_builder.capture.sparse import SPARSE_KINDS
from inplace_builder.capture.token_steps import capture_token_steps
from inplace_builder.capture.uncached import cached_attention
from inplace_builder.compare import TOLERANCE, relative_error
from inplace_builder.errors import BuildError, brief
from inplace_builder.graph.export import (
    ExtentError,
    LengthIndependent,
    correct_lstm,
    named_extents,
    size_oblivious,
)
from inplace_builder.graph.nodes import placeholders_by_name, value
from inplace_builder.graph.passes import drop_dead_assertions

SDPA = "sdpa"
"""transformers' name of PyTorch's ``scaled_dot_product_attention``."""

TIES = (
    " (it attends to the positions with the best scores; of equal scores torch chooses others "
    "where it is fed otherwise)"
)
"""A caveat of a model that selects positions."""


STATELESS_KINDS = frozenset({"mlp", "moe"})
"""Kinds of layers, in transformers' names, that keep no state."""


LAYER_KINDS = STATELESS_KINDS | {
    *SPARSE_KINDS,
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "conv",
    "linear_attention",
    "hybrid",
    "hybrid_sliding",
}
"""Kinds of layers that can be captured, in transformers' names."""


def capture_decoder(model: PreTrainedModel, options: DecoderOptions) -> Capture:
    """Export one step of a decoder over packed rows.

    A model that does something that the operators do not have takes one token of each row a step,
    if it keeps tensors of fixed size from one token to the next.

    Args:
        model: a causal language model of transformers.
        options: what to build for.

    Raises:
        BuildError: neither is possible.
    """
    check_positions(model.config.get_text_config(decoder=True), options.capacity)
    try:
        return _capture_packed(model, options)
    except BuildError as reason:
        if cache_scales(model) is not None:  # what it keeps is then not known to be keys and values
            raise
        try:
            fields = references(model, as_fed=False)
            return capture_token_steps(model, options, fields, str(reason))
        except BuildError as error:
            raise BuildError(
                f"{reason}; nor can its own code take one token of each row a step: {error}"
            ) from reason


def _capture_packed(model: PreTrainedModel, options: DecoderOptions) -> Capture:
    """Capture a decoder whose tokens are packed, by the operators.

    Raises:
        BuildError: the model does something that the operators do not have.
    """
    config = model.config.get_text_config(decoder=True)
    _check_layer_kinds(config)
    implementation = config._attn_implementation
    with (
        cached_attention(model) as without_cache,
        _inplace_attention(model, without_cache=without_cache) as own_attention,
        grouped_experts(model),
        slot_recurrences(model),
        absorbed_latents(model) as expansions,
        slot_indexers(model, options.capacity, skips_masks=implementation == SDPA),
    ):
        # 1. Run the model once to see what each layer attends to and keeps.
        layers, call = _see_layers(
            model, options.capacity, StepCall(with_mask=False, own_attention=own_attention)
        )
        scales = cache_scales(model)
        if scales is not None:
            _check_scaled(model, layers, scales, own_attention=call.own_attention is not None)
        dtype = Dtype.of(model.dtype) if scales is None else Dtype.FLOAT8_E4M3FN
        caches = _layer_caches(layers, dtype)
        states = (
            *cache_states(caches, options),
            *_index_states(layers, Dtype.of(model.dtype), options),
            *_recurrent_states(layers),
        )
        # 2. Export one step, with attention, caches and experts replaced by ours.
        rings = {layer: cache.is_ring(options) for layer, cache in caches.items()}
        step = DecoderStep(model, layers.by_layer, rings, call, layers.num_logits == 1)
        size = config.vocab_size
        steps = [(step, StepExamples(options, states, size))]
        if options.prompt_logprobs:
            scoring = PromptStep(model, layers.by_layer, rings, call, step.selects_logits)
            steps.append((scoring, StepExamples(options, states, size, scores_prompt=True)))
        all_exported = [_export_step(*each) for each in steps]
    for (exported, drops_branch), (_, examples) in zip(all_exported, steps, strict=True):
        if call.own_attention:
            drop_dead_assertions(exported.graph)  # with the scores that attention took the place of
        _check_layers(exported.graph, config, layers, type(model).__name__)
        if drops_branch:
            _check_one_token(model, exported, examples)
    # 3. Clean the graph, check it against the description, read off what it writes.
    lookahead = any(layer.mask.lookahead for layer in layers.by_layer.values())
    if lookahead and getattr(config, "is_decoder", None) is False:
        raise BuildError(
            f"{type(model).__name__} is an encoder: is_decoder in its configuration is False, its "
            f"attention is not causal, and it caches nothing; set it if the weights are a decoder's"
        )
    if lookahead and options.prompt_logprobs:
        raise BuildError(
            f"{type(model).__name__} lets tokens see later ones that are fed with them, so there "
            f"are no log-probabilities given only those before: leave prompt_logprobs out"
        )
    program = decoder_program(size, size, options, lookahead=lookahead)
    notes = _lookahead_note(options) if lookahead else {}
    if latents := describe_latents(expansions):
        notes["latents"] = latents
    described = [program, prompt_program(program, size)]
    completed = [
        (exported, *complete_program(exported, each, states))
        for (exported, _), each in zip(all_exported, described, strict=False)
    ]
    # 4. The model itself is the reference.
    fields = references(model, as_fed=lookahead)
    captures = [
        Capture(
            exported=exported,
            program=program,
            states=states,
            capacity=options.capacity,
            dtype=Dtype.of(model.dtype),
            lowering=lowering,
            min_capacity=options.dynamic_min_capacity,
            **fields,
            caveat=TIES if layers.index else "",
            notes=notes,
        )
        for exported, program, lowering in completed
    ]
    return replace(captures[0], prompt_logprobs=next(iter(captures[1:]), None))


def _lookahead_note(options: DecoderOptions) -> dict[str, str]:
    return {
        "capture": f"tokens see later ones that are fed with them: the tokens of a request are fed "
        f"in one step, at most {options.chunk} (chunk)"
    }


@contextmanager
def _inplace_attention(model: PreTrainedModel, *, without_cache: bool) -> Iterator[str | None]:
    """Let the model attend through `slot_attention`, and embed positions one by one.

    Some models compute attention in code of their own; what they compute is tracked from their
    cache on. Yields the name of such a model, else None.

    A rotary embedding that looks at the longest sequence of a step uses its short form, which is
    right up to the length that `check_positions` allows.

    Args:
        model: the model.
        without_cache: it keeps no keys and values, and `cached_attention` has replaced its
            attention.
    """
    original = model.config._attn_implementation
    rotary = [module for module in model.modules() if _is_length_dependent(module)]
    ALL_MASK_ATTENTION_FUNCTIONS[SDPA] = ALL_MASK_ATTENTION_FUNCTIONS[IMPLEMENTATION]
    with quiet():
        model.set_attn_implementation(IMPLEMENTATION)
    try:
        own = model.config.get_text_config(decoder=True)._attn_implementation != IMPLEMENTATION
        own = own and not without_cache
        if own:  # transformers only logs that it has not replaced the model's attention
            # by this name it may choose PyTorch's function, and prepare masks for that
            model.config._attn_implementation = original if original == SDPA else IMPLEMENTATION
        for module in rotary:
            module.forward = _length_independent(module)
        yield type(model).__name__ if own else None
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS[SDPA]
        for module in rotary:
            module.__dict__.pop("forward", None)
        model.config._attn_implementation = original
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


def _see_layers(
    model: PreTrainedModel, capacity: int, call: StepCall
) -> tuple[SeenLayers, StepCall]:
    """What each layer attends to and keeps, and how the model must be called for that.

    Raises:
        BuildError: a layer's mask is not a window, or the model cannot run with our cache.
    """
    try:
        return _run_once(model, capacity, call), call
    except CacheLengthError:  # OPT makes a mask of that length where none is given
        call = replace(call, with_mask=True)
    except ChangedMaskError:  # GIT lets its attention be chosen, but computes it in its own code
        call = replace(call, own_attention=type(model).__name__)
    return _run_once(model, capacity, call), call


def _run_once(model: PreTrainedModel, capacity: int, call: StepCall) -> SeenLayers:
    """What each layer hands to its attention and how it attends, and its other states.

    Sizes are not read from the configuration: layers may differ, and so may keys and values.

    Raises:
        BuildError: a layer's mask is not a window, or the model cannot run with our cache.
    """
    # a mask of the model's own is read off its scores, so there must be as many positions
    tokens = 2 if call.own_attention is None else capacity
    config = model.config.get_text_config(decoder=True)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (tokens,), generator=generator).to(model.device)
    positions = torch.arange(tokens, device=model.device)
    seen = SeenLayers(capacity)
    try:
        with quiet(), torch.no_grad(), torch.random.fork_rng(devices=()):
            cache = SlotCache(positions, num_layers(config), seen, call.own_attention)
            out = run_packed(model, ids, positions, cache, with_mask=call.with_mask)
            cache.check_states_stored()
            seen.num_logits = out.logits.shape[1]
    except BuildError:
        raise
    except Exception as error:
        name, reason = type(model).__name__, brief(error)
        if SlotCache.__name__ in reason:  # it asks the cache for something that none has
            raise BuildError(
                f"{name} keeps its states in an object of its own, not in transformers' cache"
            ) from error
        raise BuildError(f"{name} cannot run: {reason}") from error
    return seen


def _index_states(
    layers: SeenLayers, dtype: Dtype, options: DecoderOptions
) -> tuple[StateSpec, ...]:
    """The keys of indexers.

    Raises:
        BuildError: the capacity is to be chosen at load.
    """
    if layers.index and options.dynamic_min_capacity is not None:
        raise BuildError(
            f"layers {sorted(layers.index)} select the positions that they attend to, which needs "
            f"one capacity; leave min_capacity out"
        )
    return tuple(
        StateSpec(
            name=f"index_states_{layer}",
            shape=(1, options.capacity, elements),
            dtype=dtype,
            update=Update.APPEND,
            axis=1,
            reset=False,  # a token sees only what lies within the cached length
        )
        for layer, elements in layers.index.items()
    )


def _recurrent_states(layers: SeenLayers) -> tuple[StateSpec, ...]:
    """The states that are not keys and values: zeros in a new sequence, rewritten by every step.

    Those of all convolutions come first.
    """
    return tuple(
        StateSpec(
            name=name, shape=tuple(slot.shape), dtype=Dtype.of(slot.dtype), update=Update.REPLACE
        )
        for part in (CONV, RECURRENT)
        for name, slot in layers.recurrent.items()
        if name.startswith(part)
    )


def _export_step(step: DecoderStep, examples: StepExamples) -> tuple[ExportedProgram, bool]:
    """Export a step.

    Returns:
        The step; and whether the model has code of its own for one token, which is left out.

    Raises:
        BuildError: torch.export cannot capture the model.
    """
    try:
        return _exported(step, examples, min_tokens=1), False
    except BuildError:
        raise
    except ExtentError as error:
        if any(each.condition != f"{TOKEN_IDS}.shape[0] != 1" for each in error.assumptions):
            raise _not_captured(step, error) from error
        reason = error
    except Exception as error:
        raise _not_captured(step, error) from error
    # GIT has a branch for one token; packed tokens may belong to several rows
    try:
        exported = _exported(step, examples, min_tokens=2)
    except Exception as error:
        raise _not_captured(step, reason) from error
    tokens = value(placeholders_by_name(exported.graph)[TOKEN_IDS]).shape[0].node.expr
    limits = exported.range_constraints[tokens]
    exported.range_constraints[tokens] = ValueRanges(1, limits.upper)
    return exported, True


def _exported(step: DecoderStep, examples: StepExamples, *, min_tokens: int) -> ExportedProgram:
    memory = _by_layer(examples.states, examples.memory())
    shapes = _by_layer(examples.states, examples.memory_shapes())
    with (
        quiet(),
        torch.no_grad(),
        correct_lstm(),
        size_oblivious(),
        named_extents(),
        LengthIndependent(),
    ):
        return torch.export.export(
            step,
            (*examples.inputs(), *memory),
            dynamic_shapes=(*examples.input_shapes(min_tokens=min_tokens), *shapes),
        )


def _check_one_token(
    model: PreTrainedModel, exported: ExportedProgram, examples: StepExamples
) -> None:
    """BuildError if what a model does for several tokens is not right for one."""
    module, memory = exported.module(), [torch.zeros_like(each) for each in examples.memory()]
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    tokens = min(8, examples.options.capacity)
    ids = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(0))
    results = []
    with quiet(), torch.no_grad():
        expected = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0]
        for at, token in enumerate(ids):
            inputs = (*examples.one_token(int(token), at), *_by_layer(examples.states, memory))
            results.append(module(*inputs)[1])
    error = relative_error(torch.cat(results), expected.float().cpu())
    if not error <= TOLERANCE[Dtype.of(model.dtype)]:
        raise BuildError(
            f"{type(model).__name__} has other code for one token than for several, and the latter "
            f"gives other scores for one: they differ by {error:.1e}"
        )


def _not_captured(step: DecoderStep, error: Exception) -> BuildError:
    return BuildError(f"torch.export cannot capture {type(step.model).__name__}: {brief(error)}")


def _by_layer(states: Sequence[StateSpec], values: Sequence[Any]) -> list[dict[Any, Any]]:
    """Values of the states as `DecoderStep` takes them: in groups, by what follows their names."""
    groups: dict[str, dict[Any, Any]] = {
        part: {} for part in ("key_states", "value_states", "index_states", CONV, RECURRENT)
    }
    for state, given in zip(states, values, strict=True):
        part, _, rest = state.name.partition("_states_")
        part = f"{part}_states"
        groups[part][rest if part in (CONV, RECURRENT) else int(rest)] = given
    return list(groups.values())


def _check_layer_kinds(config: transformers.PretrainedConfig) -> None:
    """BuildError if a layer is of a kind whose states are unknown."""
    if not num_layers(config):
        raise BuildError(
            f"a {config.model_type!r} model has no number of layers; only decoders with a "
            f"key-value cache, or with recurrent states in its place, are supported"
        )
    kinds = getattr(config, "layer_types", None) or []
    if unsupported := sorted(set(kinds) - LAYER_KINDS):
        raise BuildError(
            f"the model has layers of the kind {unsupported}; only {sorted(LAYER_KINDS)} are "
            f"supported"
        )


def _layer_caches(layers: SeenLayers, dtype: Dtype) -> dict[int, LayerCache]:
    """The cache of each layer that attends, of the sizes that it was seen with."""
    return {
        index: LayerCache(*layer.key, layer.value[1], dtype, layer.mask.reach)
        for index, layer in sorted(layers.by_layer.items())
    }


def _check_scaled(
    model: PreTrainedModel, layers: SeenLayers, scales: CacheScales, *, own_attention: bool
) -> None:
    """BuildError if some layer cannot keep its keys and values as 8-bit floats."""
    known, count = scales.by_layer(), num_layers(model.config.get_text_config(decoder=True))
    reasons = []
    if own_attention:
        reasons.append("attends in code of its own, which may change keys that it has cached")
    for index, layer in layers.by_layer.items():
        if not layer.value[1]:
            reasons.append(f"caches latents (layer {index}), of which it makes keys and values")
        elif index not in known:
            reasons.append(f"caches keys or values of layer {index % count} twice")
        elif {len(each) for each in known[index]} != {layer.key[0], layer.value[0]}:
            reasons.append(f"caches other keys in layer {index} than transformers' cache gets")
    if reasons:
        raise BuildError(
            f"cache is fp8, and {type(model).__name__} {reasons[0]}: only keys and values that a "
            f"layer caches as it attends to them can be 8-bit floats; leave cache out"
        )


def _check_layers(
    graph: torch.fx.Graph, config: transformers.PretrainedConfig, layers: SeenLayers, kind: str
) -> None:
    """BuildError if a layer keeps nothing, and is of no kind that does: it attends unseen."""
    expected = num_layers(config)
    kinds = getattr(config, "layer_types", None) or []
    stateless = sum(each in STATELESS_KINDS for each in kinds)
    stateless += len(getattr(config, "cross_attention_layers", None) or [])  # of Mllama, to images
    attending = {index % expected for index in layers.by_layer}
    keeping = attending | {int(name.split("_")[2]) for name in layers.recurrent}
    count = sum(node.target is torch.ops.inplace.attention.default for node in graph.nodes)
    if len(keeping) + layers.sharing + stateless < expected or count < len(layers.by_layer):
        raise BuildError(
            f"{kind} has {expected} layers, but {count} of them attend through transformers' "
            f"attention interface, and {len(keeping - attending)} others keep states "
            f"through its cache"
        )
