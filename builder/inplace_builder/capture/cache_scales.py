"""Caches in fp8: where the scales of keys and values come from, and what they make of a model.

A model whose keys and values are cached as 8-bit floats has a module `CacheScales`. A captured step
hands its scales to ``inplace::attention``; the reference, which is the model in PyTorch, attends to
keys and values that were rounded with them.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from inplace.operators.float8 import LARGEST, MIN_SCALE, power_of_two, quantize_heads
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from inplace_builder.capture.checkpoint import quiet
from inplace_builder.capture.model_memory import memory_argument
from inplace_builder.capture.quantized import read_weights
from inplace_builder.capture.sources import locate_model
from inplace_builder.errors import BuildError, brief

CALIBRATION_TOKENS = 256
"""Most tokens of each calibration text."""

MIN_TOKENS = 8
"""Different tokens that a tokenizer makes of each of them at least."""

HEADROOM = 2
"""How much larger than the largest measured number the largest cached one is at least.

Scales are powers of two, so it is up to twice as much. A number keeps its 3 bits from 1/28672 of
the largest cached one on, so this costs no precision.
"""

MAX_CLIPPING = 8
"""How much larger than the largest cached number a number may be, by a checkpoint's scales."""

SMALLEST_NORMAL = 2.0**-6
"""The smallest 8-bit float with 3 bits."""

TEXTS = (
    "The harbour was quiet that morning. Two fishing boats had come in before sunrise, and their "
    "crews were already mending nets on the quay while gulls argued over what was left in the "
    "crates. Nobody spoke about the storm, although everybody had seen the sky.",
    "def merge(left, right):\n    result, i, j = [], 0, 0\n    while i < len(left) and j < "
    "len(right):\n        if left[i] <= right[j]:\n            result.append(left[i])\n            "
    "i += 1\n        else:\n            result.append(right[j])\n            j += 1\n    return "
    "result + left[i:] + right[j:]\n",
    "User: How do I convert a temperature from Fahrenheit to Celsius?\nAssistant: Subtract 32 and "
    "multiply the result by 5/9. For example, 212 °F is (212 - 32) x 5/9 = 100 °C.\nUser: And what "
    "is -40 °F?\nAssistant: -40 °C. It is where both scales meet.\n",
    '{"id": 48213, "name": "Café Müller", "open": true, "rating": 4.75, "tags": ["coffee", "cake"],'
    ' "address": {"street": "Lange Straße 7", "zip": "10243"}, "visits": [1, 1, 2, 3, 5, 8, 13]}',
    "In 1905 Albert Einstein published four papers. The first explained the photoelectric effect, "
    "the second Brownian motion, the third special relativity, and the fourth that E = mc². He was "
    "26 years old and worked at the patent office in Bern, 8 hours a day, 6 days a week.",
    "El tren sale a las ocho y cuarto. Le chat dort sur la chaise. Morgen wird es regnen, sagt der "
    "Wetterbericht. 今天天气很好，我们去公园散步吧。 Сегодня вечером мы пойдём в театр.",
    "!!! WARNING !!!  >>> 0x7ffe5367e044 <<<  ||  ---- ==== ####  \n\n\n\t\t\tTODO: fix me :-( "
    "aaaaaaaaaaaaaaaa 0000000000000000 https://example.org/a/b?c=d&e=%20#f  ¯\\_(ツ)_/¯",
)
"""What is fed to measure how large keys and values get, where a checkpoint does not say it."""

_NAMES = {
    "key": (".k_scale", ".k_proj.output_scale", ".kv_scale"),
    "value": (".v_scale", ".v_proj.output_scale", ".kv_scale"),
}
"""Ends of the names of a checkpoint's scales, as vLLM and compressed-tensors write them."""


class CacheScales(nn.Module):
    """The scales of a model's keys and values, ``[kv_heads]`` float32 for each layer, as buffers.

    Args:
        scales: those of keys and of values by layer.
    """

    def __init__(self, scales: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.layers = tuple(sorted(scales))
        for layer, pair in scales.items():
            for name, scale in zip(_NAMES, pair, strict=True):
                self.register_buffer(f"{name}_{layer}", scale.float().contiguous())

    def by_layer(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Those of keys and of values by layer."""
        return {
            layer: (self.get_buffer(f"key_{layer}"), self.get_buffer(f"value_{layer}"))
            for layer in self.layers
        }


def cache_scales(model: nn.Module) -> CacheScales | None:
    """The scales of a model whose keys and values are cached in fp8; None for any other."""
    found = getattr(model, "cache_scales", None)
    return found if isinstance(found, CacheScales) else None


class _Watched(DynamicCache):  # type: ignore[misc]  # transformers has no types
    """A cache of transformers that changes keys and values before it keeps them.

    Args:
        model: the model.
        change: takes layer, keys and values ``[1, heads, tokens, dim]``; what is cached.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        change: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__(config=model.config)
        self._change = change

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kw: object
    ) -> tuple[Tensor, Tensor]:
        """As transformers' caches, with what `change` makes of keys and values."""
        changed = self._change(layer_idx, key_states, value_states)
        keys, values = super().update(*changed, layer_idx, *args, **kw)
        return keys, values


def rounding_cache(model: PreTrainedModel) -> DynamicCache | None:
    """A cache of transformers that rounds as the engine does; None where that rounds nothing."""
    scales = cache_scales(model)
    if scales is None:
        return None
    by_layer = scales.by_layer()

    def rounded(x: Tensor, of_heads: Tensor) -> Tensor:
        stored = quantize_heads(x[0].transpose(0, 1), of_heads).float()
        return (stored * of_heads[:, None]).transpose(0, 1)[None].to(x.dtype)

    def change(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        key_scale, value_scale = by_layer[layer]
        return rounded(keys, key_scale), rounded(values, value_scale)

    return _Watched(model, change)


def quantize_cache(
    model: PreTrainedModel,
    source: Path | str,
    tokenizer: PreTrainedTokenizerBase | None,
    capacity: int,
) -> str:
    """Let a model cache keys and values in fp8.

    The scales are those of the checkpoint if it has them for every layer, else measured: the model
    is fed `TEXTS`, or random tokens if there is no tokenizer that knows their words.

    Args:
        model: gets a `CacheScales`.
        source: its files.
        tokenizer: its tokenizer, if it has one.
        capacity: positions that a sequence may hold.

    Returns:
        What was done, in words.

    Raises:
        BuildError: the model keeps no keys and values, or scales of the checkpoint do not fit.
    """
    stored = read_scales(source)
    prompts, kind = _prompts(model, tokenizer, 2 if stored else min(CALIBRATION_TOKENS, capacity))
    largest = _measure(model, prompts[:1] if stored else prompts)
    missing = [layer for layer in largest if len(stored.get(layer, {})) < len(_NAMES)]
    if stored and missing:
        raise BuildError(
            f"cache is fp8, and {source} holds scales of cached keys and values, but not of both "
            f"in the layers {missing[:5]} ({len(missing)} of {len(largest)}): remove them from the "
            f"checkpoint, so that they are measured, or leave cache out"
        )
    scales = {
        layer: (_scale("key", layer, keys, stored), _scale("value", layer, values, stored))
        for layer, (keys, values) in largest.items()
    }
    model.cache_scales = CacheScales(scales)
    how = "those of the checkpoint"
    if not stored:
        how = f"measured with {sum(map(len, prompts))} {kind}"
    parts = []
    for index, name in enumerate(("keys", "values")):
        every = torch.cat([pair[index] for pair in scales.values()])
        parts.append(f"{name} {float(every.min()):.3g} to {float(every.max()):.3g}")
    return (
        f"keys and values are cached in fp8 (e4m3) in {len(scales)} layers, with a scale for each "
        f"layer and head, {how}: {', '.join(parts)}"
    )


def read_scales(source: Path | str) -> dict[int, dict[str, Tensor]]:
    """The scales of cached keys and values that a checkpoint has, by layer and kind.

    Raises:
        BuildError: there are two for one layer, or one that is not a positive number.
    """
    files = locate_model(Path(source))
    found: dict[int, dict[str, Tensor]] = {}
    if files.gguf is not None:
        return found
    for name, tensor in read_weights(files.folder, lambda name: bool(_kinds(name))):
        scale, layer = tensor.float().flatten(), re.search(r"\.(\d+)\.", name)
        if layer is None or not (torch.isfinite(scale) & (scale >= MIN_SCALE)).all():
            raise BuildError(
                f"{source} holds {name} = {scale.tolist()[:4]}; expected positive numbers, the "
                f"scales of a numbered layer"
            )
        of_layer = found.setdefault(int(layer[1]), {})
        for kind in _kinds(name):
            if kind in of_layer:
                raise BuildError(
                    f"{source} holds {name}, and another scale of the {kind}s of layer {layer[1]}"
                )
            of_layer[kind] = scale
    return found


def _kinds(name: str) -> list[str]:
    """Whether a tensor of a checkpoint has scales of keys, of values, of both, or none."""
    return [kind for kind, ends in _NAMES.items() if name.endswith(ends)]


def _prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, limit: int
) -> tuple[list[Tensor], str]:
    """Token ids to measure with, each ``[tokens]``, and what they are in words."""
    size = model.config.get_text_config(decoder=True).vocab_size
    if tokenizer is not None:
        encoded = [torch.tensor(tokenizer(text)["input_ids"])[:limit] for text in TEXTS]
        # transformers makes a tokenizer without words where a checkpoint has no files of one
        enough = all(len(ids.unique()) >= min(limit, MIN_TOKENS) for ids in encoded)
        if enough and all(int(ids.max()) < size for ids in encoded):
            return encoded, "tokens of texts"
    generator = torch.Generator().manual_seed(0)
    random = [torch.randint(0, size, (limit,), generator=generator) for _ in range(2)]
    return random, "random tokens"


def _measure(model: PreTrainedModel, prompts: Sequence[Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
    """The largest absolute key and value of each head, ``[heads]``, by layer.

    Raises:
        BuildError: the model caches nothing, or not through transformers' cache.
    """
    largest: dict[int, tuple[Tensor, Tensor]] = {}

    def watch(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        new = [x.detach().float().abs().amax((0, 2, 3)) for x in (keys, values)]
        old = largest.get(layer, new)
        largest[layer] = (torch.maximum(old[0], new[0]), torch.maximum(old[1], new[1]))
        return keys, values

    name, kind = memory_argument(model) or "past_key_values", type(model).__name__
    try:
        with quiet(), torch.no_grad():
            for ids in prompts:
                cache = _Watched(model, watch)
                model(input_ids=ids[None].to(model.device), use_cache=True, **{name: cache})
    except Exception as error:
        raise BuildError(
            f"cache is fp8, and {kind} cannot be run to see how large its keys and values are: "
            f"{brief(error)}"
        ) from error
    if not largest:
        raise BuildError(
            f"cache is fp8, and {kind} keeps no keys and values in transformers' cache: leave it "
            f"out"
        )
    if not all(torch.isfinite(x).all() for pair in largest.values() for x in pair):
        raise BuildError(f"cache is fp8, and {kind} has keys or values that are not finite")
    return dict(sorted(largest.items()))


def _scale(
    kind: str, layer: int, largest: Tensor, stored: Mapping[int, Mapping[str, Tensor]]
) -> Tensor:
    """The scales of keys or values of a layer: the checkpoint's, or for what was measured."""
    if not stored:
        return _with_headroom(largest)
    return _fitting(stored[layer][kind], largest, f"{kind}s in layer {layer}")


def _with_headroom(largest: Tensor) -> Tensor:
    """Scales with which numbers `HEADROOM` times as large as these are no larger than `LARGEST`."""
    return power_of_two(largest.double() * HEADROOM)


def _fitting(scale: Tensor, largest: Tensor, what: str) -> Tensor:
    """A scale of a checkpoint for each head.

    Args:
        scale: of the checkpoint.
        largest: the largest number of each head, measured with a few tokens.
        what: what is scaled, in words.

    Raises:
        BuildError: it is neither one for all nor one for each, or much too small or too large.
    """
    heads = len(largest)
    if len(scale) not in (1, heads):
        raise BuildError(
            f"the checkpoint has {len(scale)} scales of cached {what}, which has {heads} heads; "
            f"expected one, or one for each head"
        )
    of_heads = scale.expand(heads).clone()
    # a head that has its scale in common with larger ones may be small
    compared = largest.max().expand(heads) if len(scale) == 1 else largest
    small = (compared < of_heads * SMALLEST_NORMAL) & (largest > 0)
    wrong = small | (largest > of_heads * LARGEST * MAX_CLIPPING)
    if wrong.any():
        head = int(wrong.int().argmax())
        raise BuildError(
            f"the checkpoint has the scale {float(of_heads[head]):.3g} of cached {what}, head "
            f"{head}, with numbers up to {float(largest[head]):.3g} after a few tokens: it caches "
            f"numbers up to {float(of_heads[head]) * LARGEST:.3g}, and rounds those below "
            f"{float(of_heads[head]) * SMALLEST_NORMAL:.3g} to few bits; remove the scales from "
            f"the checkpoint, so that they are measured"
        )
    return of_heads
