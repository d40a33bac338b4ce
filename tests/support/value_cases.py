"""Modules of one sequence that index, branch and order by values, and keep states in objects."""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.row_cases import RowCase

Step = Callable[[Any, Tensor], Any]

REQUESTS: dict[str, Any] = {"max_requests": 24}


class Stateful(nn.Module):
    """A step over buffers: ``state`` of one sequence, and ``n``, which counts the steps."""

    state: Tensor
    n: Tensor

    def __init__(self, state: Tensor, step: Step) -> None:
        super().__init__()
        self.step = step
        self.register_buffer("state", state.clone())
        self.register_buffer("n", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Any:
        returned = self.step(self, x)
        self.n += 1
        return returned


def at_a_counter(self: Any, x: Tensor) -> Any:
    """Reads and writes at a tensor of no axes, as parts, ranges and views that are written."""
    state, n = self.state, self.n
    state[:, :, n] = x
    last = state[0, :, n]
    last[0].add_(1)
    state.narrow(2, n, 2).mul_(2)
    state.select(2, n).sub_(x)
    state[:, 0, n, 1:] += x[:, 0, 1:]
    start = n % 5
    state[:, :, start + 2 : start + 4] = x.unsqueeze(2)
    state[:, n % 2, n] = x[:, 1].double().float()
    state.add_(0.5)
    return state.cumsum(2), last, state[..., n, :], state[:, [1, 0], n], state[:, :, -1 - n]


def at_a_number(self: Any, x: Tensor) -> Any:
    """Indexes and calculates with what ``item`` returned; indices of no axes along an axis."""
    state, n = self.state, self.n.item()
    state[:, :, (n + 3) % 4] = x
    state[:, :, n : n + 2] *= 2
    state.index_copy_(2, self.n, x[:, :, None])
    state.index_add_(2, self.n, x[:, :, None] / (n + 1))
    state.index_fill_(2, self.n + 1, 3.0)
    return torch.roll(state, -n, 2), state[:, :, n] * n, x.clamp(max=n - 2)


def branches(self: Any, x: Tensor) -> Any:
    """Every sequence takes the branch of its own values."""
    state: Tensor = torch.cond(
        x.sum() > 0, lambda old, x: old + x, lambda old, x: old * 0.5 - x, (self.state, x)
    )
    self.state.copy_(state)
    early, late = torch.cond(
        self.n > 3,
        lambda old, x, n: (old.clone(), x.index_select(1, (n % 4).view(1))),
        lambda old, x, n: (x.sin(), old[:, :1] * 2),
        (self.state, x, self.n),
    )
    return early, late


def order(self: Any, x: Tensor) -> Any:
    """Quantiles and medians of a window."""
    self.state.copy_(torch.cat([self.state[:, 1:], x[:, None]], 1))
    window, some = self.state, torch.tensor([0.2, 0.9])
    missing = torch.where(window > 1, torch.nan, window)
    return (
        window.quantile(0.3, dim=1),
        torch.quantile(window, some, 1, keepdim=True, interpolation="nearest"),
        missing.nanquantile(0.7, dim=2),
        torch.nanquantile(missing, 0.5, interpolation="midpoint")[None],
        window.median(1).values + missing.nanmedian(1).values.nan_to_num(),
        window.kthvalue(2, 1).values,
    )


def memory(self: Any, x: Tensor) -> Any:
    """Reads and writes memory at distances, also of tensors whose rows lie in another order."""
    state = self.state
    state.as_strided((4,), (7,)).add_(x[0])
    state.transpose(1, 2)[:, 2].copy_(x)
    turned = torch.empty_strided((4, 4), (1, 4))
    turned.copy_(torch.outer(x[0], x[0] + 1))
    pairs = torch.as_strided(F.pad(x, (1, 1)), (4, 3), (1, 1))
    bits = state.view(torch.int32) % 7
    return turned.as_strided((16,), (1,)), pairs, state.mT.as_strided((3, 4), (2, 1)) * 2, bits


def places(self: Any, x: Tensor) -> Any:
    """Counts, sorts in and repeats by the values of each row; the lengths are the same for all."""
    window = self.state
    window.copy_(torch.cat([window[:, 1:], x[:, None]], 1))
    sorted_x = x[0].sort().values
    repeats = (window[0, :4, 0] > 0).long() + 1
    repeats = torch.cat([repeats, 10 - repeats.sum(0, keepdim=True)])
    return (
        torch.searchsorted(sorted_x, 0.3),
        torch.searchsorted((sorted_x * 9).int(), 3, right=True) + torch.bucketize(0.3, sorted_x),
        F.pdist(window[0]) + F.pdist(window[0], 1.0),
        torch.nonzero_static(window > 0.3, size=6, fill_value=-7),
        torch.nonzero_static(x[0] > 0, size=9),
        torch.histc(x, 4, -2, 2) + torch.histc(window.mul(10).round().div(10), 4),
        torch.repeat_interleave(window, repeats, 1, output_size=10),
        torch.vander(x[0]) + torch.vander((x[0] * 9).long(), 4, increasing=True),
    )


def fresh(self: Any, x: Tensor) -> Any:
    """Writes into parts of tensors that the step makes; takes parts of complex numbers."""
    made, diagonal = torch.empty(4, 3), torch.zeros(4, 4)
    made.fill_(1)
    made[:, 1:].copy_(x[0].unsqueeze(1))
    made[0] = self.state[0, :3]
    diagonal.diagonal().add_(x[0])
    self.state.add_(x)
    one = torch.complex(x, x).matmul(torch.complex(x, -x).mT).real  # one element, of stride 2
    return made, diagonal, torch.fft.rfft(x).conj().imag, one


def rounded(self: Any, x: Tensor) -> Any:
    """Rounds as integers would be, as modules that are trained for quantization do."""
    scale, zero = torch.tensor(0.05), torch.tensor(3, dtype=torch.int32)
    each, zeros = torch.tensor([0.1, 0.2, 0.3, 0.7]), torch.tensor([0, 1, -2, 5])
    new = torch.fake_quantize_per_tensor_affine(self.state * 0.5 + x, 0.1, 1, -8, 7)
    self.state.copy_(torch.fake_quantize_per_channel_affine(new, each, zeros.int(), 1, -8, 7))
    return torch.fake_quantize_per_tensor_affine(x, scale, zero, -128, 127), self.state.clone()


class Cache:
    """A cache as people write them: an object that replaces its tensors."""

    def __init__(self) -> None:
        self.keys, self._values = torch.zeros(1, 3, 4), [torch.zeros(1, 4)]

    def put(self, x: Tensor) -> Tensor:
        self.keys = torch.cat([self.keys[:, 1:], x[:, None]], 1)
        self._values = [self._values[0] * 0.5 + x]
        return self.keys.sum(1) + self._values[0]


class Objects(nn.Module):
    """States in objects, in a queue and in a private attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.caches = [Cache(), Cache()]
        self.queue = deque([torch.zeros(1, 4)] * 2, maxlen=2)
        self._total = torch.zeros(1, 4)

    def forward(self, x: Tensor) -> Any:
        self._total = self._total + x
        for cache in self.caches:
            x = x + cache.put(x)
        self.queue.append(x)
        return torch.stack(list(self.queue)).sum(0), None, self._total * 1


class Buffers(nn.Module):
    """A hook that refers to the module, copies between types, and an old value that is returned."""

    counts: Tensor
    hidden: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(1, 4, dtype=torch.int16))
        self.register_buffer("hidden", torch.zeros(1, 4))
        self.layer = nn.Linear(4, 4)
        self.layer.register_forward_hook(lambda layer, given, out: out + self.hidden)

    def forward(self, x: Tensor) -> Any:
        self.counts.data.copy_(x * 100)
        self.counts[:, x[0] > 1] = 7
        old = self.hidden
        self.hidden = torch.tanh(self.layer(x))
        return old, self.counts + 0


class Held(nn.Module):
    """Puts new tensors in the place of a buffer and of an attribute."""

    hidden: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("hidden", torch.zeros(1, 4))
        self.total = torch.ones(1, 4)

    def forward(self, x: Tensor) -> Tensor:
        old = self.total
        self.hidden = torch.tanh(self.hidden + x)
        self.total = old * 0.5 + self.hidden
        return old


class Parts(nn.Module):
    """Buffers of parts that are assigned, also by a hook; old values and views of one another."""

    last: Tensor
    whole: Tensor
    before: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("nothing", None)
        self.register_buffer("whole", torch.zeros(1, 8))
        self.register_buffer("last", torch.zeros(1, 4))
        self.register_buffer("before", torch.zeros(1, 4))
        self.parts = nn.ModuleList([Held(), Held()])
        self.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, given: Any, out: Tensor) -> Tensor:
        old = self.last
        self.last = out * 0.5
        self.before = old
        return out + self.before

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            for part in self.parts:
                x = part(x)
        self.whole = torch.cat([self.whole[:, 4:], x], 1)
        return self.whole[:, :4] + x


class Hooks(nn.Module):
    """Hooks that refer to the module and to its queue, and change both."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.zeros(1, 4)
        self.queue = queue = deque([torch.zeros(1, 4), torch.ones(1, 4)], maxlen=2)
        self.register_buffer("total", torch.zeros(1, 4))
        self.layer = nn.Linear(4, 4)

        def after(layer: nn.Module, given: Any, out: Tensor) -> Tensor:
            self.total.add_(out)
            self.hidden = torch.tanh(out) + queue[0]
            queue.append(out)
            return out + self.hidden

        self.layer.register_forward_hook(after)

    def forward(self, x: Tensor) -> Any:
        old = self.hidden
        return self.layer(x + old), self.hidden * 2, self.queue[0] - self.total


def masks(self: Any, x: Tensor) -> Any:
    """Masks of Python's numbers choose what an export must know the extent of."""
    chosen, state = torch.tensor([True, False, True, True]), self.state
    patches = F.unfold(x[:, chosen][:, None, :, None], (2, 1))
    state[..., [False, True, False, True]] = patches.sum(1)
    corners = torch.tensor([[True, False, False, True]] * 2)
    return state.reshape(1, 2, 4)[:, corners].unfold(1, 2, 1).sum(-1)


def _with(step: Step, *shape: int) -> Callable[[], nn.Module]:
    return lambda: Stateful(torch.zeros(shape), step)


VALUE_CASES = [
    RowCase("at a counter", _with(at_a_counter, 1, 2, 24, 3), (1, 2, 3), options=REQUESTS),
    RowCase("at a number", _with(at_a_number, 1, 2, 24, 3), (1, 2, 3), options=REQUESTS),
    RowCase("branches", _with(branches, 1, 4), (1, 4)),
    RowCase("order", _with(order, 1, 5, 4), (1, 4)),
    RowCase("masks", _with(masks, 1, 2, 4), (1, 4)),
    RowCase("places", _with(places, 1, 5, 4), (1, 4)),
    RowCase("fresh", _with(fresh, 1, 4), (1, 4)),
    RowCase("rounded", _with(rounded, 1, 4), (1, 4)),
    RowCase("memory", _with(memory, 1, 4, 6), (1, 4)),
    RowCase("objects", Objects, (1, 4)),
    RowCase("buffers", Buffers, (1, 4)),
    RowCase("hooks", Hooks, (1, 4)),
    RowCase("parts", Parts, (1, 4)),
]
"""Each is compared with eager PyTorch."""
