"""Latent attention: one vector a position is cached, in place of every head's key and value.

Such an attention (DeepSeek V2, arXiv:2405.04434, section 2.1) computes keys and values of all heads
from a latent and a rotated part that all heads share, in a method ``expand_kv``. Where that method
is proved to be linear, nothing is expanded: the projection of keys is multiplied with the query,
that of values with the result of attention, and the state holds the latent and the rotated part.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from inplace.schema.specs import Dtype
from torch import Tensor
from transformers import PreTrainedModel

from inplace_builder.capture.slot_cache import SeenLayers, current_step_cache
from inplace_builder.compare import TOLERANCE, relative_error

EXPANSION = "expand_kv"
"""The method that computes keys and values, in transformers' words."""

KEY_PROJECTION, VALUE_PROJECTION = "absorbed_key_projection", "absorbed_value_projection"
"""Names of the projections among the parameters of an attention."""

Expand = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From latents and rotated parts, ``[1, 1, tokens, elements]``, to keys and values."""


@contextmanager
def absorbed_latents(model: PreTrainedModel) -> Iterator[list["LatentExpansion"]]:
    """Let each latent attention of a model be seen by `SlotCache`, and absorbed if proved."""
    modules = [each for each in model.modules() if callable(getattr(each, EXPANSION, None))]
    expansions = [LatentExpansion(module, getattr(module, EXPANSION)) for module in modules]
    for expansion in expansions:
        expansion.module.__dict__[EXPANSION] = expansion
    try:
        yield expansions
    finally:
        for module in modules:
            del module.__dict__[EXPANSION]
            for name in (KEY_PROJECTION, VALUE_PROJECTION):
                module._parameters.pop(name, None)


def describe_latents(expansions: Sequence["LatentExpansion"]) -> str:
    """What layers cache, for the report of a build; empty for models without latent attention."""
    counts = Counter(
        f"latents of {each.latent_dim} elements and rotated parts of {each.rotary_dim}"
        if each.absorbed
        else f"expanded keys and values: {each.reason}"
        for each in expansions
        if each.latent_dim  # it ran
    )
    return "; ".join(f"{what} ({count} layer{'s' * (count > 1)})" for what, count in counts.items())


class LatentExpansion:
    """What stands for the ``expand_kv`` of an attention; `SlotCache` keeps the last that ran.

    Attributes:
        key, value: what it returned last: keys and values of all heads, or, once proved, the key
            and the value of the one head that the latent has.
        latent_dim: elements of a latent.
        absorbed: it is proved, and its projections are parameters of the attention.
        reason: why it is not.
    """

    def __init__(self, module: torch.nn.Module, expand: Expand) -> None:
        self.module, self.expand = module, expand
        self.key = self.value = torch.empty(0)
        self.latent_dim, self.rotary_dim, self.absorbed, self.reason = 0, 0, False, ""

    def __call__(self, latent: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, ``[1, heads, tokens, dim]``, of latents and rotated parts."""
        cache = current_step_cache()
        if cache is None:
            return self.expand(latent, rotated)
        cache.expansion = self
        if isinstance(cache.step, SeenLayers):
            self.key, self.value = self.expand(latent, rotated)
            self._prove(latent, rotated)
        elif self.absorbed:
            self.key = torch.cat([latent, rotated.to(latent.dtype)], -1)
            self.value = latent
        else:
            self.key, self.value = self.expand(latent, rotated)
        return self.key, self.value

    @property
    def key_dim(self) -> int:
        """Elements that are cached of a position."""
        return self.latent_dim + self.rotary_dim

    def _prove(self, latent: Tensor, rotated: Tensor) -> None:
        """Read the projections off the images of unit vectors; keep them if that is all there is.

        The rotated part must be the end of every head's key, as it is, and keys and values of this
        run must be what the projections give.
        """
        self.latent_dim, self.rotary_dim = latent.shape[-1], rotated.shape[-1]
        self.absorbed, self.reason = False, self._refusal(latent, rotated)
        if self.reason:
            return
        units = torch.eye(self.key_dim + 1, self.key_dim, dtype=latent.dtype)[None, None]
        parts = units.to(latent.device).split([self.latent_dim, self.rotary_dim], -1)
        keys, values = (each[0] for each in self.expand(*parts))
        rest = keys.shape[-1] - self.rotary_dim
        key_projection = torch.zeros_like(keys)  # of all that is cached, to whole keys
        key_projection[:, : self.latent_dim, :rest] = keys[:, : self.latent_dim, :rest]
        key_projection[:, self.latent_dim : -1, rest:] = torch.eye(self.rotary_dim)
        value_projection = torch.zeros_like(values)
        value_projection[:, : self.latent_dim] = values[:, : self.latent_dim]
        cached = torch.cat([latent, rotated.to(latent.dtype)], -1)[0].float()
        tolerance = TOLERANCE[Dtype.of(latent.dtype)]
        for image, projection, ran in (
            (keys, key_projection, self.key),
            (values, value_projection, self.value),
        ):
            product = cached @ projection[:, :-1].float()
            close = relative_error(ran[0].float(), product) <= tolerance  # False for NaN
            if not (torch.equal(image, projection) and close):
                self.reason = f"{EXPANSION} is not proved to be linear"
                return
        own = {
            KEY_PROJECTION: keys[:, : self.latent_dim, :rest].transpose(1, 2).contiguous(),
            VALUE_PROJECTION: values[:, : self.latent_dim].contiguous(),
        }
        for name, weight in own.items():
            self.module.register_parameter(name, torch.nn.Parameter(weight, requires_grad=False))
        self.absorbed = True

    def _refusal(self, latent: Tensor, rotated: Tensor) -> str:
        """Why there is nothing to absorb; empty if there may be."""
        heads = self.key.shape[1]
        expanded = heads * (self.key.shape[3] + self.value.shape[3])
        if latent.shape[1] != 1 or rotated.shape[1] != 1 or not self.rotary_dim:
            return "there is no latent with a rotated part that all heads share"
        if self.key_dim >= expanded:
            return f"{self.key_dim} elements are not fewer than the {expanded} of all heads"
        return ""

    def query(self, query: Tensor) -> Tensor:
        """A query ``[tokens, heads, dim]`` as one of latents, ``[tokens, heads, key_dim]``."""
        weight: Any = getattr(self.module, KEY_PROJECTION)
        own, rotated = query.split([weight.shape[1], self.rotary_dim], -1)
        projected = torch.bmm(own.transpose(0, 1), weight).transpose(0, 1)
        return torch.cat([projected, rotated], -1)

    def result(self, attended: Tensor) -> Tensor:
        """Attention over latents, ``[tokens, heads, latent_dim]``, as one over values."""
        weight: Any = getattr(self.module, VALUE_PROJECTION)
        return torch.bmm(attended.transpose(0, 1), weight).transpose(0, 1)
