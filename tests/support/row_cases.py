"""Modules of one sequence as people write them, to be stepped with a row for each of several."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.corpus.case import noise


@dataclass(frozen=True)
class RowCase:
    """A module of one sequence, and the shape of what it takes at each step.

    Attributes:
        name: unique among the cases.
        module: makes the module, already in evaluation mode where that matters.
        shape: of the input ``x``.
        states: makes the states that are passed as the arguments after ``x``.
        capture: more options of the capture.
        options: more of `RowOptions`.
    """

    name: str
    module: Callable[[], nn.Module]
    shape: tuple[int, ...]
    states: Callable[[], list[Tensor]] = list
    capture: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def input(self, step: int, row: int) -> Tensor:
        """What a row is given at one of its steps."""
        return noise(100 * row + step, *self.shape)


class Streaming(nn.Module):
    """A layer over what came before and the new part, along one axis.

    Args:
        layer: called with the context and the input joined.
        context: the shape of the context.
        axis: the axis of time.
    """

    context: Tensor

    def __init__(self, layer: nn.Module, context: tuple[int, ...], axis: int = -1) -> None:
        super().__init__()
        self.layer, self.axis = layer, axis
        self.register_buffer("context", torch.zeros(context))

    def forward(self, x: Tensor) -> Tensor:
        whole = torch.cat([self.context, x], self.axis)
        size = self.context.shape[self.axis]
        self.context.copy_(whole.narrow(self.axis, whole.shape[self.axis] - size, size))
        result: Tensor = self.layer(whole)
        return result


class Recurrent(nn.Module):
    """LSTM, GRU or RNN with its state in buffers."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer
        hidden = layer.proj_size or layer.hidden_size
        self.register_buffer("hidden", torch.zeros(layer.num_layers, 1, hidden))
        if isinstance(layer, nn.LSTM):
            self.register_buffer("cell", torch.zeros(layer.num_layers, 1, layer.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        hidden, cell = self.get_buffer("hidden"), dict(self.named_buffers()).get("cell")
        if cell is None:
            out, new = self.layer(x, hidden)
            hidden.copy_(new)
        else:
            out, (new, new_cell) = self.layer(x, (hidden, cell))
            hidden.copy_(new)
            cell.copy_(new_cell)
        result: Tensor = out
        return result


class Of(nn.Module):
    """A module of one function."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class Attends(nn.Module):
    """The new positions attend to the last ones; with an output projection."""

    context: Tensor

    def __init__(self, *, batch_first: bool, need_weights: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.axis, self.need_weights = int(batch_first), need_weights
        self.register_buffer("context", torch.zeros((1, 4, 8) if batch_first else (4, 1, 8)))

    def forward(self, x: Tensor) -> Any:
        whole = torch.cat([self.context, x], self.axis)
        self.context.copy_(whole.narrow(self.axis, whole.shape[self.axis] - 4, 4))
        out, weights = self.attention(x, whole, whole, need_weights=self.need_weights)
        return (out, weights) if self.need_weights else out


class Layers(nn.Module):
    """Layers one after the other, each with a state of its own."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(8),
                    "conv": Streaming(nn.Conv1d(8, 8, 3, groups=8), (1, 8, 2)),
                    "gru": Recurrent(nn.GRU(8, 8, batch_first=True)),
                    "out": nn.Linear(8, 8),
                }
            )
            for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            hidden = layer["norm"](x)
            hidden = layer["conv"](hidden.mT).mT
            x = x + layer["out"](F.silu(layer["gru"](hidden)))
        return x


class Quantized(nn.Module):
    """A window of int8 entries with a scale each."""

    entries: Tensor
    scales: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("entries", torch.zeros(1, 2, 6, 8, dtype=torch.int8))
        self.register_buffer("scales", torch.ones(1, 2, 6, 1))

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-6) / 127
        entry = (x / scale).round().to(torch.int8)
        self.entries.copy_(torch.cat([self.entries[:, :, 1:], entry], 2))
        self.scales.copy_(torch.cat([self.scales[:, :, 1:], scale], 2))
        return (self.entries * self.scales).sum(2)


class Scaled(nn.Module):
    """Two states that broadcast."""

    total: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(1, 4))
        self.register_buffer("scale", torch.ones(1, 1))

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(x)
        self.scale.mul_(0.9)
        return self.total * self.scale


class Rolled(nn.Module):
    """A ring that is rolled and written at its end; a bank of filters over it."""

    keys: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(1, 8, 4))

    def forward(self, x: Tensor) -> Tensor:
        keys = torch.roll(self.keys, -1, 2)
        keys[:, :, -1] = x[:, :, -1]
        self.keys.copy_(keys)
        return keys.sum(2)


class Kalman(nn.Module):
    """A filter whose covariance begins with the identity."""

    covariance: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("covariance", torch.eye(3)[None])
        self.register_buffer("mean", torch.zeros(1, 3))

    def forward(self, x: Tensor) -> Tensor:
        covariance = self.covariance + 0.1 * torch.eye(3)
        gain = covariance @ torch.linalg.inv(covariance + torch.eye(3))
        self.mean.copy_(self.mean + ((x - self.mean)[:, None] @ gain.mT)[:, 0])
        self.covariance.copy_((torch.eye(3) - gain) @ covariance)
        return self.mean * 1.0


class Counts(nn.Module):
    """A histogram by `index_add_`, and the largest entries so far by a sort."""

    counts: Tensor
    largest: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(5))
        self.register_buffer("largest", torch.full((1, 3), -10.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        place = x[0].argmax()
        self.counts.index_add_(0, place[None], torch.ones(1))
        both = torch.cat([self.largest, x], 1)
        self.largest.copy_(both.sort(1, descending=True)[0][:, :3])
        bucket = torch.searchsorted(torch.tensor([-1.0, 0.0, 1.0]), x)
        return self.counts.cumsum(0), self.largest * 1, F.one_hot(bucket, 4).float()


class Spectrum(nn.Module):
    """Short-time Fourier transforms over a window of the signal, and back."""

    context: Tensor
    window: Tensor

    def __init__(self, *, inverse: bool = False) -> None:
        super().__init__()
        self.inverse = inverse
        self.register_buffer("context", torch.zeros(1, 8))
        self.register_buffer("window", torch.hann_window(16))

    def forward(self, x: Tensor) -> Tensor:
        whole = torch.cat([self.context, x], 1)
        self.context.copy_(whole[:, -8:])
        spectrum = torch.stft(
            whole, 16, 4, window=self.window, center=self.inverse, return_complex=True
        )
        if self.inverse:
            return torch.istft(spectrum * 0.5, 16, 4, window=self.window)
        return spectrum.abs()


class Ring(nn.Module):
    """Writes at a remainder of its own counter: more steps than the ring has entries."""

    ring: Tensor
    line: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ring", torch.zeros(1, 6, 4))
        self.register_buffer("line", torch.zeros(1, 8, 4))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        place = self.count % 6
        self.ring.scatter_(1, place.view(1, 1, 1).expand(1, 1, 4), x[:, None])
        self.line.index_copy_(1, self.count % 8, x[:, None] + 1)
        self.count += 1
        return self.ring.cumsum(1) + self.line[:, 2:]


def _encoders() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True)
    mask = torch.triu(torch.full((6, 6), float("-inf")), 1)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    return Of(lambda x: encoder(x, mask=mask))


def _norms() -> nn.Module:
    norm = nn.BatchNorm1d(8)
    norm.running_mean = torch.linspace(-1, 1, 8)
    norm.running_var = torch.linspace(0.5, 2, 8)
    return nn.Sequential(norm, nn.GroupNorm(2, 8), nn.Conv1d(8, 4, 3), nn.GLU(1), nn.Softplus())


def _images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.PReLU(4),
        nn.MaxPool2d(2),
        nn.ConvTranspose2d(4, 2, 2, stride=2),
        nn.AdaptiveAvgPool2d(2),
        nn.InstanceNorm2d(2, affine=True),
    ).eval()


def _encoder(norm_first: bool) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)


class Bags(nn.Module):
    """Bags of embeddings by constant offsets and by each row's own, and of a table in a state."""

    table: Tensor

    def __init__(self, mode: str, *, last: bool = False, padding: int | None = None) -> None:
        super().__init__()
        self.layer = nn.EmbeddingBag(
            10, 4, mode=mode, include_last_offset=last, padding_idx=padding
        )
        self.register_buffer("table", noise(7, 10, 4))

    def forward(self, x: Tensor) -> Any:
        """``x``: ``[2, 3]``, also the weights of a sum."""
        ids = (x.abs() * 37).long() % 10
        flat = ids.flatten()
        ends = [6] if self.layer.include_last_offset else []
        at = ids[0, 0] % 7  # the first bag or the last may be empty
        own = torch.stack([at * 0, at, *(at * 0 + end for end in ends)])
        self.table.mul_(0.9)
        of_state = F.embedding_bag(ids, self.table, mode=self.layer.mode)
        bags = [self.layer(flat, torch.tensor([0, 2, 2, *ends])), self.layer(flat, own), of_state]
        if not ends:
            bags.append(self.layer(ids))
        if self.layer.mode == "sum":
            bags.append(self.layer(flat, own, per_sample_weights=x.flatten()))
            bags.append(self.layer(flat, torch.tensor([0, 3, *ends]), x.flatten()))
        return bags


ROW_CASES = [
    RowCase("batch norm", lambda: Streaming(_norms(), (1, 8, 2)).eval(), (1, 8, 4)),
    RowCase("images", lambda: Streaming(_images(), (1, 2, 6, 2)), (1, 2, 6, 4)),
    RowCase("no batch axis", lambda: Streaming(nn.Conv1d(3, 2, 3), (3, 2)), (3, 5)),
    RowCase(
        "transposed",
        lambda: Streaming(nn.ConvTranspose1d(3, 2, 4, stride=2, padding=1), (1, 3, 2)),
        (1, 3, 4),
    ),
    RowCase("gru", lambda: Recurrent(nn.GRU(4, 8, batch_first=True)), (1, 3, 4)),
    RowCase("gru of two layers", lambda: Recurrent(nn.GRU(4, 6, 2)), (3, 1, 4)),
    RowCase("lstm", lambda: Recurrent(nn.LSTM(4, 8, 2, batch_first=True)), (1, 3, 4)),
    RowCase("projected lstm", lambda: Recurrent(nn.LSTM(4, 8, 3, proj_size=5)), (2, 1, 4)),
    RowCase("rnn", lambda: Recurrent(nn.RNN(4, 8, 2, nonlinearity="relu", bias=False)), (1, 1, 4)),
    RowCase("attention", lambda: Attends(batch_first=True).eval(), (1, 2, 8)),
    RowCase(
        "attention and weights", lambda: Attends(batch_first=False, need_weights=True), (2, 1, 8)
    ),
    RowCase("encoder", lambda: Streaming(_encoder(False), (1, 4, 8), 1).eval(), (1, 2, 8)),
    RowCase(
        "encoder, norm first", lambda: Streaming(_encoder(True), (1, 4, 8), 1).eval(), (1, 2, 8)
    ),
    RowCase("layers", lambda: Layers(2), (1, 2, 8)),
    RowCase("int8", Quantized, (1, 2, 1, 8)),
    RowCase("broadcast", Scaled, (1, 4)),
    RowCase("rolled", Rolled, (1, 8, 1)),
    RowCase("kalman", Kalman, (1, 3)),
    RowCase("counts", Counts, (1, 5)),
    RowCase("bags", lambda: Bags("sum", padding=3), (2, 3)),
    RowCase("means of bags", lambda: Bags("mean", last=True), (2, 3)),
    RowCase("largest of bags", lambda: Bags("max", padding=-1), (2, 3)),
    RowCase("bags to the last offset", lambda: Bags("sum", last=True, padding=3), (2, 3)),
    RowCase("spectrum", Spectrum, (1, 24)),
    RowCase("spectrum and back", lambda: Spectrum(inverse=True), (1, 24)),
    RowCase(
        "interpolated",
        lambda: Streaming(Of(lambda x: F.interpolate(x, scale_factor=2, mode="linear")), (1, 3, 2)),
        (1, 3, 4),
    ),
    RowCase(
        "padded",
        lambda: Streaming(Of(lambda x: F.pad(F.pad(x, (1, 2), "reflect"), (1, 0))), (1, 3, 2)),
        (1, 3, 4),
    ),
    RowCase(
        "unfolded",
        lambda: Streaming(Of(lambda x: x.unfold(2, 4, 2).var(-1) + x.flip(2)[:, :, :2]), (1, 3, 2)),
        (1, 3, 4),
    ),
    RowCase(
        "einsum",
        lambda: Streaming(
            Of(lambda x: torch.einsum("bct,bdt->bcd", x, x).softmax(-1).cumsum(1)), (1, 3, 2)
        ),
        (1, 3, 4),
    ),
    RowCase("stack of encoders", lambda: Streaming(_encoders(), (1, 4, 8), 1).eval(), (1, 2, 8)),
    RowCase("ring", Ring, (1, 4)),
    RowCase(
        "random in training only",
        lambda: Streaming(
            nn.Sequential(
                nn.RReLU(), nn.AlphaDropout(), nn.Dropout(inplace=True), nn.RReLU(inplace=True)
            ),
            (1, 3, 2),
        ).eval(),
        (1, 3, 4),
    ),
    RowCase(
        "masked scatter",
        lambda: Streaming(Of(lambda x: x.masked_scatter(x > 0, x * 2 + 1)), (1, 3, 2)),
        (1, 3, 4),
    ),
    RowCase(
        "masked",
        lambda: Streaming(
            Of(lambda x: torch.where(x > 0, x, x.mean()).masked_fill(x > 1, 0.0).tril()), (1, 3, 2)
        ),
        (1, 3, 4),
    ),
]
"""Each is compared with eager PyTorch."""
