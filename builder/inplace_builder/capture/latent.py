"""Latent attention: one vector a position is cached, in place of every head's key and value.

Such an attention (DeepSeek V2, arXiv:2405.04434, section 2.1) computes keys and values of all heads
from a latent and a rotated part that all heads share, in a method ``expand_kv``. Where that method
is proved to be linear, nothing is expanded: the projection of keys is multiplied with the query,
that of values with the result of attention, and the state holds the latent and the rotated part.
"""

from collections.abc import Callable, Iterator
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
def absorbed_latents(model: PreTrainedModel) -> Iterator[None]:
    """Let each latent attention of a model be seen by `SlotCache`, and absorbed if proved."""
    modules = [each for each in model.modules() if callable(getattr(each, EXPANSION, None))]
    for module in modules:
        module.__dict__[EXPANSION] = LatentExpansion(module, getattr(module, EXPANSION))
    try:
        yield
    finally:
        for module in modules:
            del module.__dict__[EXPANSION]
            for name in (KEY_PROJECTION, VALUE_PROJECTION):
                module._parameters.pop(name, None)


class LatentExpansion:
    """What stands for the ``expand_kv`` of an attention; `SlotCache` keeps the last that ran.

    Attributes:
        key, value: what it returned last: keys and values of all heads, or, once proved, the key
            and the value of the one head that the latent has.
        latent_dim: elements of a latent.
        absorbed: it is proved, and its projections are parameters of the attention.
    """

    def __init__(self, module: torch.nn.Module, expand: Expand) -> None:
        self.module, self.expand = module, expand
        self.key = self.value = torch.empty(0)
        self.latent_dim, self.rotary_dim, self.absorbed = 0, 0, False

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
        """Read the projections off the images of unit vectors, and compare what they give.

        Nothing is absorbed if the rotated part is not the end of every head's key, if the method
        adds something to what is linear, or if expanded keys and values are as small.
        """
        rank, rotary = latent.shape[-1], rotated.shape[-1]
        heads, key_dim = self.key.shape[1], self.key.shape[3]
        self.latent_dim, self.rotary_dim, self.absorbed = rank, rotary, False
        expanded = heads * (key_dim + self.value.shape[3])
        if latent.shape[1] != 1 or rotated.shape[1] != 1 or rank + rotary >= expanded:
            return
        units = torch.eye(rank + rotary + 1, rank + rotary, dtype=latent.dtype)[None, None]
        keys, values = self.expand(*units.to(latent.device).split([rank, rotary], -1))
        rest = key_dim - rotary
        shares = torch.zeros_like(keys[0])
        shares[:, :rank, :rest] = keys[0, :, :rank, :rest]
        shares[:, rank:-1, rest:] = torch.eye(rotary)
        projected = torch.zeros_like(values[0])
        projected[:, :rank] = values[0, :, :rank]
        if not (torch.equal(shares, keys[0]) and torch.equal(projected, values[0])):
            return
        x = torch.cat([latent, rotated.to(latent.dtype)], -1)[0].float()
        tolerance = TOLERANCE[Dtype.of(latent.dtype)]
        for found, projection in ((self.key, shares), (self.value, projected)):
            if not relative_error(found[0].float(), x @ projection[:, :-1].float()) <= tolerance:
                return
        own = {
            KEY_PROJECTION: shares[:, :rank, :rest].transpose(1, 2).contiguous(),
            VALUE_PROJECTION: projected[:, :rank].contiguous(),
        }
        for name, weight in own.items():
            self.module.register_parameter(name, torch.nn.Parameter(weight, requires_grad=False))
        self.absorbed = True

    def query(self, query: Tensor) -> Tensor:
        """A query ``[tokens, heads, dim]`` as one of latents, ``[tokens, heads, key_dim]``."""
        weight: Any = getattr(self.module, KEY_PROJECTION)
        own, rotated = query.split([weight.shape[1], self.rotary_dim], -1)
        projected = torch.matmul(own.transpose(0, 1), weight).transpose(0, 1)
        return torch.cat([projected, rotated], -1)

    def result(self, attended: Tensor) -> Tensor:
        """Attention over latents, ``[tokens, heads, latent_dim]``, as one over values."""
        weight: Any = getattr(self.module, VALUE_PROJECTION)
        return torch.matmul(attended.transpose(0, 1), weight).transpose(0, 1)
