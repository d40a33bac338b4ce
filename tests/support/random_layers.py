"""Random stacks of layers with states of their own, to be stepped with a row for each sequence.

Every layer takes and returns ``[1, CHANNELS, TOKENS]``.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.row_cases import Of, Recurrent, RowCase, Streaming

CHANNELS, TOKENS, STEPS = 8, 4, 20
SHAPE = (1, CHANNELS, TOKENS)


class Turned(nn.Module):
    """A layer over ``[1, tokens, channels]``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x.mT)
        return result.mT


class Last(nn.Module):
    """The last tokens of what a layer computes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result[..., -TOKENS:]


class Kept(nn.Module):
    """A state of any shape, and how a step changes and uses it.

    Args:
        state: its first value.
        step: called with the state and the input; returns the new state and the output.
    """

    state: Tensor

    def __init__(
        self, state: Tensor, step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    ) -> None:
        super().__init__()
        self.register_buffer("state", state.clone())
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        new, out = self.step(self.state, x)
        self.state.copy_(new)
        return out


class Ring(nn.Module):
    """The last inputs in a ring that is written at a counted place."""

    entries: Tensor
    count: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("entries", torch.zeros(1, CHANNELS, size))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        place = (self.count + torch.arange(TOKENS)) % self.size
        self.entries.index_copy_(2, place, x)
        self.count.add_(TOKENS)
        return x + self.entries.mean(2, keepdim=True)


class Int8(nn.Module):
    """A window of quantized inputs with a scale each."""

    entries: Tensor
    scales: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("entries", torch.zeros(1, CHANNELS, 6, dtype=torch.int8))
        self.register_buffer("scales", torch.ones(1, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(1, keepdim=True).clamp(min=1e-6) / 127
        entry = (x / scale).round().to(torch.int8)
        self.entries.copy_(torch.cat([self.entries[..., TOKENS:], entry], 2))
        self.scales.copy_(torch.cat([self.scales[..., TOKENS:], scale], 2))
        return (self.entries * self.scales)[..., -TOKENS:]


class Attends(nn.Module):
    """The new tokens attend to the last ones."""

    context: Tensor

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(CHANNELS, heads, batch_first=True)
        self.register_buffer("context", torch.zeros(1, size, CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        whole = torch.cat([self.context, x.mT], 1)
        self.context.copy_(whole[:, TOKENS:])
        out: Tensor = self.attention(x.mT, whole, whole, need_weights=False)[0]
        return out.mT


class Cache(nn.Module):
    """Keys and values that are appended, with rotary positions of complex numbers."""

    keys: Tensor
    values: Tensor
    count: Tensor

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads, self.project = heads, nn.Linear(CHANNELS, 3 * CHANNELS)
        size = (1, heads, STEPS * TOKENS, CHANNELS // heads)
        self.register_buffer("keys", torch.zeros(size))
        self.register_buffer("values", torch.zeros(size))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        places = self.count + torch.arange(TOKENS)
        heads = self.project(x.mT).view(1, TOKENS, 3, self.heads, -1).transpose(1, 3)
        query, key, value = heads.unbind(2)
        angles = places[:, None] / 10.0 ** torch.arange(query.shape[-1] // 2)
        turns = torch.polar(torch.ones_like(angles), angles)

        def turned(x: Tensor) -> Tensor:
            pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * turns).flatten(-2)

        self.keys.index_copy_(2, places, turned(key))
        self.values.index_copy_(2, places, value)
        self.count.add_(TOKENS)
        seen = torch.arange(self.keys.shape[2]) <= places[:, None]
        out = F.scaled_dot_product_attention(turned(query), self.keys, self.values, seen)
        return out.transpose(1, 2).reshape(1, TOKENS, -1).mT


class Images(nn.Module):
    """Layers over the channels and tokens as an image."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(3, 1, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x[:, None])
        return result.mean(1)


def _norm() -> nn.Module:
    norm = nn.BatchNorm1d(CHANNELS)
    norm.running_mean = torch.linspace(-1, 1, CHANNELS)
    norm.running_var = torch.linspace(0.5, 2, CHANNELS)
    return norm


def _conv(kernel: int, dilation: int, groups: int) -> nn.Module:
    layer = nn.Conv1d(CHANNELS, CHANNELS, kernel, dilation=dilation, groups=groups)
    return Streaming(layer, (1, CHANNELS, (kernel - 1) * dilation)) if kernel > 1 else layer


def _strided(kernel: int) -> nn.Module:
    down = nn.Conv1d(CHANNELS, CHANNELS, kernel, stride=2, padding=kernel // 2)
    up = nn.ConvTranspose1d(CHANNELS, CHANNELS, 4, stride=2, padding=1)
    return nn.Sequential(down, nn.SiLU(), up)


def _recurrent(kind: str, layers: int, projected: bool) -> nn.Module:
    sizes: dict[str, Any] = {"num_layers": layers, "batch_first": True}
    if projected and kind == "LSTM":
        return Turned(Recurrent(nn.LSTM(CHANNELS, 2 * CHANNELS, proj_size=CHANNELS, **sizes)))
    return Turned(Recurrent(getattr(nn, kind)(CHANNELS, CHANNELS, **sizes)))


def _encoder(norm_first: bool, size: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        CHANNELS, 2, 16, batch_first=True, norm_first=norm_first, activation="gelu"
    )
    return Last(Streaming(Turned(layer), (1, CHANNELS, size)))


STATES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "average": lambda s, x: (s.lerp(x.mean(2, keepdim=True), 0.1), x - s),
    "peak": lambda s, x: (torch.maximum(s * 0.9, x.abs().amax(2, keepdim=True)), x / (s + 1)),
    "total": lambda s, x: (s + x.sum(2, keepdim=True), x.cumsum(2) * 0.1 + s * 0.01),
    "gate": lambda s, x: (torch.where(x.mean() > 0, x[..., -1:], s), torch.sigmoid(s) * x),
    "order": lambda s, x: (torch.cat([s, x], 2).sort(2)[0][..., -1:], x + s),
}
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(1) - x.log_softmax(2),
    "glu": lambda x: F.glu(x.repeat(1, 2, 1), 1),
    "pool": lambda x: F.max_pool1d(x, 3, 1, 1) + F.avg_pool1d(x, 3, 1, 1),
    "adaptive pool": lambda x: F.adaptive_avg_pool1d(x, 2).repeat_interleave(2, 2),
    "pads": lambda x: F.pad(F.pad(x, (1, 2), "reflect"), (1, 0), "replicate")[..., 2:6],
    "circular": lambda x: F.pad(x, (2, 1), "circular")[..., :TOKENS],
    "resize": lambda x: F.interpolate(F.interpolate(x, scale_factor=2, mode="linear"), TOKENS),
    "unfold": lambda x: F.pad(x, (3, 0)).unfold(2, 4, 1).var(-1),
    "moves": lambda x: x.flip(2).roll(1, 1).transpose(1, 2).contiguous().view(1, 8, 4),
    "pieces": lambda x: torch.cat([*x.chunk(2, 1)][::-1], 1) + torch.stack(x.unbind(2), 2),
    "top": lambda x: x.topk(TOKENS, 1)[0].mT.repeat(1, 2, 1),
    "sort": lambda x: x.sort(2, descending=True)[0] + x.argsort(1) * 0.1,
    "sums": lambda x: x.cumsum(2) * 0.3 + x.logsumexp(1, keepdim=True),
    "einsum": lambda x: torch.einsum("bct,bdt->bcd", x, x).softmax(-1) @ x,
    "mask": lambda x: torch.where(x > 0, x, x.mean()).masked_fill(x > 1, 0.0).tril(2),
    "constant mask": lambda x: x[:, torch.tensor([True, False] * 4)].repeat(1, 2, 1),
    "distance": lambda x: torch.cdist(x.mT, x.mT).repeat(1, 2, 1),
    "normalize": lambda x: F.normalize(x, dim=1) * x.norm(dim=2, keepdim=True),
    "cosine": lambda x: F.cosine_similarity(x, x.roll(1, 2), 1)[:, None] * x,
    "statistics": lambda x: (x - x.mean(2, keepdim=True)) / (x.std(2, keepdim=True) + 1),
    "gather": lambda x: x.gather(2, x.argsort(2)) + x[:, [3, 2, 1, 0, 7, 6, 5, 4]],
    "one hot": lambda x: F.one_hot(x.argmax(1), CHANNELS).float().mT + x,
    "scatter": lambda x: torch.zeros_like(x).scatter_add(2, x.argsort(2) // 2, x),
    "spectrum": lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=2) * 0.5, n=TOKENS, dim=2),
    "phases": lambda x: torch.polar(x.abs(), x).real + torch.complex(x, x).angle(),
    "bits": lambda x: ((x * 4).round().to(torch.int32) % 3).float() + x.clamp(-1, 1),
    "steps": lambda x: torch.bucketize(x, torch.tensor([-1.0, 0.0, 1.0])).float() * x,
    "functions": lambda x: torch.erf(x) + F.mish(x) * F.hardswish(x) - torch.atan2(x, x + 5),
    "logarithms": lambda x: torch.log1p(x.abs()) + torch.expm1(-x.abs()) + torch.xlogy(x.abs(), 2),
    "in place": lambda x: x.clone().mul_(2).index_fill_(2, torch.tensor([1]), 0.5).clamp_(-3, 3),
    "running": lambda x: x.cummax(2)[0] - x.cummin(1)[0] + x.logcumsumexp(2) + x.cumprod(2) * 0.1,
    "medians": lambda x: x.median(2, keepdim=True)[0] + x.kthvalue(3, 1, keepdim=True)[0] * x,
    "patches": lambda x: F.fold(F.unfold(x[:, None], 3, padding=1), (8, 4), 3, padding=1)[:, 0],
    "pixels": lambda x: F.pixel_unshuffle(F.pixel_shuffle(x.view(1, 4, 2, 4), 2), 2).view(SHAPE),
    "attention": lambda x: F.scaled_dot_product_attention(x.mT, x.mT, x.mT, is_causal=True).mT,
    "envelope": lambda x: torch.fft.ifft(
        torch.fft.fft(x) * torch.tensor([1.0, 2.0, 1.0, 0.0])
    ).abs(),
    "plane": lambda x: torch.fft.ifft2(torch.fft.fftshift(torch.fft.fft2(x), 1)).real,
    "blocks": lambda x: torch.block_diag(x[0, :4, :2], x[0, 4:, 2:])[None],
    "largest of a bin": lambda x: torch.zeros(SHAPE).scatter_reduce(
        2, x.argsort(2) // 2, x, "amax", include_self=False
    ),
    "splits": lambda x: torch.hstack(torch.tensor_split(x, 3, 1)).rot90(2, (1, 2)),
    "sums of products": lambda x: torch.addcmul(x, x, x, value=0.5).baddbmm(x[..., :2], x[:, :2]),
    "distances": lambda x: F.pairwise_distance(x.mT, x.mT.roll(1, 1))[:, None] * x,
    "slices": lambda x: x.slice_scatter(x[:, 2:4] * 2, 1, 0, 2).index_add(
        1, torch.tensor([0, 0]), x[:, :2]
    ),
}
MODULES: dict[str, Callable[[], nn.Module]] = {
    "batch norm": _norm,
    "group norm": lambda: nn.GroupNorm(2, CHANNELS),
    "instance norm": lambda: nn.InstanceNorm1d(CHANNELS, affine=True),
    "layer norm": lambda: Turned(nn.LayerNorm(CHANNELS)),
    "rms norm": lambda: Turned(nn.RMSNorm(CHANNELS)),
    "local response norm": lambda: nn.LocalResponseNorm(2),
    "linear": lambda: Turned(nn.Sequential(nn.Linear(CHANNELS, 12), nn.GELU(), nn.Linear(12, 8))),
    "bilinear": lambda: Turned(Of(_bilinear(nn.Bilinear(CHANNELS, CHANNELS, CHANNELS)))),
    "parametric": lambda: nn.Sequential(nn.PReLU(CHANNELS), nn.Softplus(), nn.Dropout(0.5)),
    "images": Images,
    "ring": lambda: Ring(6),
    "int8": Int8,
    "identity first": lambda: Kept(
        torch.eye(CHANNELS)[None], lambda s, x: (s * 0.9 + 0.1 * (x @ x.mT).tanh(), s @ x)
    ),
    "number": lambda: Kept(torch.tensor(1.0), lambda s, x: (s * 0.9 + 0.1 * x.mean(), x * s)),
}


def _bilinear(layer: nn.Bilinear) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        result: Tensor = layer(x, x.flip(1))
        return result

    return call


def _each(
    name: str, make: Callable[..., nn.Module], *choices: tuple[Any, ...]
) -> dict[str, Callable[[], nn.Module]]:
    """A layer with every combination of its arguments."""
    return {f"{name}{args}": partial(make, *args) for args in itertools.product(*choices)}


LAYERS: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "conv": _each("conv", _conv, (1, 2, 3, 5), (1, 2), (1, 2, CHANNELS)),
    "strided": _each("strided", _strided, (1, 3)),
    "recurrent": _each("recurrent", _recurrent, ("GRU", "LSTM", "RNN"), (1, 2), (False, True)),
    "attends": _each("attends", Attends, (1, 2, 4), (4, 6)),
    "encoder": _each("encoder", _encoder, (False, True), (2, 4)),
    "cache": _each("cache", Cache, (1, 2, 4)),
    "state": {
        f"state {name}": partial(Kept, torch.zeros(1, CHANNELS, 1), step)
        for name, step in STATES.items()
    },
    "module": MODULES,
    "plain": {name: partial(Of, function) for name, function in PLAIN.items()},
}
"""What makes each layer, by its name, in groups that are drawn equally often."""


class Stack(nn.Module):
    """Layers one after the other, some beside a residual."""

    def __init__(self, layers: list[nn.Module], residual: list[bool]) -> None:
        super().__init__()
        self.layers, self.residual = nn.ModuleList(layers), residual
        self.gain = 1 / math.sqrt(2)
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("steps").add_(1)  # a stack without other states has this one
        for layer, residual in zip(self.layers, self.residual, strict=True):
            new = layer(x).tanh()
            x = (x + new) * self.gain if residual else new
        return x * 1.0


@st.composite
def stacks(draw: st.DrawFn) -> RowCase:
    """One to four layers."""
    kinds = draw(st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=4))
    made = [draw(st.sampled_from(sorted(LAYERS[kind].items()))) for kind in kinds]
    residual = [draw(st.booleans()) for _ in made]
    return RowCase(
        " | ".join(name for name, _ in made),
        lambda: Stack([make() for _, make in made], residual).eval(),
        SHAPE,
        options={"max_requests": STEPS} if "cache" in kinds else {},
    )
