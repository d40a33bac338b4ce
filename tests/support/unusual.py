"""Caches, and what modules that are not quite a pattern are made of."""

import torch
import torch.nn.functional as F
from torch import Tensor

CAPACITY = 8
VISIBLE = torch.arange(CAPACITY)
STEPS = 6


def numbers(step: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + step))


def caches() -> list[Tensor]:
    return [torch.zeros(1, 2, CAPACITY, 4), torch.zeros(1, 2, CAPACITY, 4)]


def token(step: int) -> tuple[Tensor, Tensor]:
    return numbers(step, 1, 2, 1, 4), torch.tensor([step])


def attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask[None, None, None])


def written(keys: Tensor, values: Tensor, x: Tensor, position: Tensor) -> None:
    keys.index_copy_(2, position, x)
    values.index_copy_(2, position, x * 2)
