"""A decoder of transformers as the reference of its engine: what it computes of one sequence."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from inplace_builder.capture.cache_scales import cache_scales, rounding_cache
from inplace_builder.capture.capture import Reference
from inplace_builder.capture.checkpoint import quiet
from inplace_builder.capture.decoder import TOKEN_IDS
from inplace_builder.capture.model_memory import memory_argument, positions_argument
from inplace_builder.capture.sparse import sparse_limits
from inplace_builder.compare import float32_copy

REFERENCE_CHUNK = 1024
"""Tokens of the model's own forward; more are fed in several, through transformers' own cache."""


CHANGE_FLOAT32 = 2.0**-14
"""The part of itself that embeddings of a float32 model are changed by, half of its tolerance."""

OPTIONS = ("softcap", "s_aux")
"""What layers pass to an attention function that may ignore it: soft-caps and sinks."""

THRESHOLD_NAMES = ("window", "chunk", "floor_scale", "original_max_position", "local_attention")
"""Parts of the names of a configuration's fields that are positions where something changes."""


def references(model: PreTrainedModel, *, as_fed: bool) -> dict[str, Any]:
    """The fields of a capture that say what it is verified against, and how far.

    The model is the reference in its own type and, if that or its cache rounds, in float32, with
    the same cache. It attends by its own code where the attention function that it is set to
    ignores something that it is given.
    """
    eager = ignores_options(model)
    config = model.config.get_text_config(decoder=True)
    rounds = model.dtype in (torch.float16, torch.bfloat16) or cache_scales(model) is not None

    def float32_reference() -> Reference:
        return reference(float32_copy(model), as_fed=as_fed, eager=eager)

    def perturbed_reference(seed: int) -> Reference:
        run = reference(model, as_fed=as_fed, eager=eager)

        def perturbed(requests: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
            with embeddings_rounded_otherwise(model, seed):
                return run(requests)

        return perturbed

    return {
        "reference": reference(model, as_fed=as_fed, eager=eager),
        "float32_reference": float32_reference if rounds else None,
        "perturbed_reference": perturbed_reference if rounds else None,
        "thresholds": frozenset([*_thresholds(config.to_dict()), *sparse_limits(config)]),
    }


def reference(model: PreTrainedModel, *, as_fed: bool, eager: bool = False) -> Reference:
    """The model on one sequence, with keys and values rounded as the engine does.

    Args:
        model: the model.
        as_fed: feed the tokens of each request together, because tokens that are fed together see
            each other; else as few times as possible.
        eager: let it attend by its own code.
    """

    def run(requests: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        parts = [request[TOKEN_IDS].to(model.device) for request in requests]
        if not as_fed:
            parts = list(torch.cat(parts).split(REFERENCE_CHUNK))
        with torch.no_grad(), eager_attention(model) if eager else nullcontext():
            logits = _last_logits(model, parts, rounding_cache(model)).float().cpu()
        return {"next_token": logits.argmax(-1, keepdim=True), "logits": logits}

    return run


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let the model compute attention in its own code."""
    original = model.config._attn_implementation
    with quiet():
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        with quiet():
            model.set_attn_implementation(original)


def ignores_options(model: PreTrainedModel) -> bool:
    """Whether the attention function that the model is set to ignores what its layers pass to it.

    PyTorch's own (``sdpa``) has no soft-cap and no sinks, and transformers passes it both.
    """
    implementation = model.config.get_text_config(decoder=True)._attn_implementation
    if implementation not in ALL_ATTENTION_FUNCTIONS:
        return False  # the model's own code
    attend = ALL_ATTENTION_FUNCTIONS[implementation]
    known = inspect.signature(attend).parameters
    ignored: set[str] = set()

    def noting(*args: Any, **kwargs: Any) -> Any:
        given = {name for name in OPTIONS if kwargs.get(name) is not None}
        ignored.update(given - known.keys())
        return attend(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[implementation] = noting
    try:
        with quiet(), torch.no_grad():
            token = torch.zeros(1, dtype=torch.int64, device=model.device)
            _last_logits(model, [token], None)
    except Exception:  # of any type: the capture that follows says what is wrong with the model
        return False
    finally:
        ALL_ATTENTION_FUNCTIONS[implementation] = attend
    return bool(ignored)


@contextmanager
def embeddings_rounded_otherwise(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Change each element of token embeddings by one rounding, up or down or not, by chance.

    Args:
        model: a model in a type of 16 bits, or with a cache of 8 bits. Another number is rounded
            there where two computations differ in a last bit, which in float32 is rare, so there
            the change is `CHANGE_FLOAT32`.
        seed: of the changes.
    """
    generator = torch.Generator().manual_seed(seed)

    def change(_: object, __: object, embedded: Tensor) -> Tensor:
        direction = torch.randint(-1, 2, embedded.shape, generator=generator)
        step = direction.to(embedded.device) * max(
            torch.finfo(embedded.dtype).eps / 2, CHANGE_FLOAT32
        )
        return (embedded.float() * (1 + step)).to(embedded.dtype)

    handle = model.get_input_embeddings().register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()


def _last_logits(model: PreTrainedModel, parts: Sequence[Tensor], cache: Any) -> Tensor:
    """The scores ``[vocab_size]`` of the last token, as ``generate`` has them.

    Positions are passed where the model takes them. Without, a RoBERTa counts from the index of its
    padding on.

    Args:
        model: the model.
        parts: token ids ``[tokens]`` that are fed together, of one sequence.
        cache: what to keep keys and values in; None for the model's own choice.
    """
    use_cache = len(parts) > 1 or cache is not None
    name = cache_argument(model)
    parameters = inspect.signature(model.forward).parameters
    positions = torch.arange(sum(map(len, parts)), device=model.device)
    for part, places in zip(parts, positions.split([*map(len, parts)]), strict=True):
        out = model(
            input_ids=part[None],
            use_cache=use_cache,
            logits_to_keep=1,
            **{name: cache},
            **positions_argument(parameters, places),
        )
        cache = getattr(out, name) if use_cache else None
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


def cache_argument(model: PreTrainedModel) -> str:
    """The name of the argument that a model takes its cache as."""
    return memory_argument(model) or "past_key_values"
