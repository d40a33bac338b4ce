"""Small modules, each with one way of writing a part of a tensor."""

from typing import Any

import torch
from torch import Tensor, nn

CAPACITY = 16


class SliceStatic(nn.Module):
    def forward(self, cache: Tensor, x: Tensor) -> Tensor:
        cache[:, :, 3:5] = x
        return cache.sum(2)


class SliceItem(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        start = pos.item()
        torch._check(start >= 0)
        torch._check(start + 2 <= CAPACITY)
        cache[:, :, start : start + 2] = x
        return cache.sum(2)


class IndexCopy(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache.index_copy_(2, pos, x)
        return cache.sum(2)


class IndexCopySeveral(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache.index_copy_(2, pos + torch.arange(2), x)
        return cache.sum(2)


class Assign(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache[:, :, pos] = x
        return cache.sum(2)


class SelectItem(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        place: Any = pos.item()
        torch._check(place >= 0)
        torch._check(place < CAPACITY)
        cache.select(2, place).copy_(x[:, :, 0])
        return cache.sum(2)


class PutScalar(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        torch.ops.aten.index_put_.default(cache, [None, None, pos.reshape(())], x.squeeze(2))
        return cache.sum(2)


class Scatter(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache.scatter_(2, pos[None, None, :, None].expand(1, 2, 1, 4), x)
        return cache.sum(2)


class Where(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        mask = (torch.arange(CAPACITY) == pos)[None, None, :, None]
        cache.copy_(torch.where(mask, x, cache))
        return cache.sum(2)


class WhereNot(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        mask = (torch.arange(CAPACITY) != pos)[None, None, :, None]
        cache.copy_(torch.where(mask, cache, x))
        return cache.sum(2)


class Wraps(nn.Module):
    """Negative positions count from the end, as in eager PyTorch."""

    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache[:, :, pos - 3] = x
        return cache.sum(2)


class RingOfSlots(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache[:, :, pos % 4] = x
        return cache.sum(2)


class Masked(nn.Module):
    """A position outside the cache writes nothing."""

    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        mask = (torch.arange(CAPACITY) == pos * 2 - 2)[:, None]
        cache.copy_(torch.where(mask, x, cache))
        return cache.sum(2)


class TwoWrites(nn.Module):
    """The old version, the one between and the new one are all looked at."""

    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        old = cache.sum()
        cache.index_copy_(2, pos, x)
        between = cache.amax(2)
        cache[:, :, 5] = cache[:, :, 0] + 1
        return old, between, cache.clone()


class PerRow(nn.Module):
    def forward(self, cache: Tensor, other: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache[torch.arange(3), :, pos] = x
        other.scatter_(1, pos[:, None, None].expand(3, 1, 4), x[:, :1])
        return cache.sum(2)


class PerRowMask(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        mask = (torch.arange(CAPACITY)[None] == pos[:, None])[:, None, :, None]
        cache.copy_(torch.where(mask, x, cache))
        return cache.sum(2)


class Strided(nn.Module):
    def forward(self, cache: Tensor, x: Tensor) -> Tensor:
        cache[:, :, ::2] = x
        return cache.sum(2)


class Shuffled(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache[:, :, torch.cat([pos, 2 * pos + 1])] = x
        return cache.sum(2)


class Accumulated(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache.index_put_((torch.tensor([0]), torch.tensor([1]), pos), x[0, 0], accumulate=True)
        return cache.sum(2)


class Unaliased(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache.copy_((cache + 0).index_copy(2, pos, x))
        return cache.sum(2)


class Block(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache[:, 1:2, 3:4] = x[:, :1]
        return cache.sum(2)


class OtherRow(nn.Module):
    """The first axis is the batch of one: a slot has no such axis to append along."""

    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache[torch.tensor([1, 0])] = x
        return cache.sum(1)


class Promised(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache.index_copy_(2, pos, x)
        return cache.sum(2)


class Numbered(nn.Module):
    def forward(self, cache: Tensor, x: Tensor, start: int) -> Tensor:
        cache[:, :, start : start + 1] = x
        return cache.sum(2)
