"""Steps of convolutions and recurrences: sizes of models, ragged rows, null rows, no rows."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from inplace import operators
from torch import Tensor

from support.attention_case import NAN, bits, indices

NUM_SLOTS = 8
STEPS: dict[str, tuple[tuple[int, ...], list[int]]] = {
    "decode": ((4, 0, 7, 2), [1, 1, 1, 1]),
    "decode with null rows": ((4, -1, 7, -1), [1, 1, 1, 1]),
    "ragged": ((4, 0, -1, 2, 5, 6), [70, 1, 5, 0, 300, 2]),
    "one row": ((3,), [130]),
    "only null rows": ((-1, -1), [3, 1]),
    "rows without tokens": ((4, 0), [0, 0]),
    "no rows": ((), []),
}
"""The slots of the rows, and the tokens of each."""


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Shape:
    """An operator at one size.

    Attributes:
        name: of the operator.
        slot: the shape of a slot.
        tokens: makes the inputs with a token axis from the number of tokens and a seed.
        weights: the other inputs, which stand before the state.
        first: how many of the inputs with a token axis stand before the weights.
        options: keyword arguments.
    """

    name: str
    slot: tuple[int, ...]
    tokens: Callable[[int, int], list[Tensor]]
    weights: list[Tensor | None] = field(default_factory=list)
    first: int = 1
    options: dict[str, Any] = field(default_factory=dict)


def conv(channels: int, width: int, *, bias: bool, silu: bool) -> Shape:
    return Shape(
        "causal_conv1d",
        (width - 1, channels),
        lambda count, seed: [random(count, channels, seed=seed)],
        [random(channels, width, seed=50), random(channels, seed=51) if bias else None],
        options={"silu": silu},
    )


def scan(heads: int, dim: int, groups: int, size: int, *rates: int, skip: bool) -> Shape:
    """A scan; ``A`` and ``D`` are placed by `Step.arguments`."""

    def tokens(count: int, seed: int) -> list[Tensor]:
        return [
            random(count, heads, dim, seed=seed),
            random(count, heads, seed=seed + 1).sigmoid(),
            random(count, groups, size, seed=seed + 2),
            random(count, groups, size, seed=seed + 3) * size**-0.5,
        ]

    decay = -random(heads, *rates, seed=52).abs() - 0.1
    return Shape(
        "selective_scan",
        (heads, dim, size),
        tokens,
        [decay, random(heads, seed=53) if skip else None],
        first=2,
    )


def delta(heads: int, key_dim: int, value_dim: int, *decays: int) -> Shape:
    def tokens(count: int, seed: int) -> list[Tensor]:
        return [
            F.normalize(random(count, heads, key_dim, seed=seed), dim=-1),
            F.normalize(random(count, heads, key_dim, seed=seed + 1), dim=-1),
            random(count, heads, value_dim, seed=seed + 2),
            F.logsigmoid(random(count, heads, *decays, seed=seed + 3)),
            random(count, heads, seed=seed + 4).sigmoid(),
        ]

    return Shape("delta_rule", (heads, key_dim, value_dim), tokens, first=5)


def linear(channels: int) -> Shape:
    def tokens(count: int, seed: int) -> list[Tensor]:
        return [
            random(count, channels, seed=seed).sigmoid(),
            random(count, channels, seed=seed + 1),
        ]

    return Shape("linear_recurrence", (channels,), tokens, first=2)


SHAPES = {
    "convolution": conv(1000, 4, bias=True, silu=True),
    "convolution of width 3": conv(256, 3, bias=False, silu=False),
    "mamba 2": scan(16, 64, 2, 128, 1, 1, skip=True),
    "mamba": scan(300, 1, 1, 16, 1, 16, skip=True),
    "scan with a rate each": scan(6, 20, 3, 24, 20, 24, skip=False),
    "delta rule": delta(4, 128, 128),
    "delta rule of odd sizes": delta(3, 96, 80),
    "kimi delta attention": delta(4, 128, 128, 128),
    "linear recurrence": linear(700),
}


class Step:
    """A step: its inputs, and states that are NaN where no row has a slot."""

    def __init__(self, shape: Shape, step: str, dtype: torch.dtype, seed: int = 0) -> None:
        self.shape = shape
        self.rows, counts = STEPS[step]
        self.written = [
            slot for slot, count in zip(self.rows, counts, strict=True) if slot >= 0 and count
        ]
        self.inputs = [x.to(dtype) for x in shape.tokens(sum(counts), seed)]
        # rates and skips are float32 in models; the weights of a convolution have its type
        is_conv = shape.name == "causal_conv1d"
        self.weights = [x if x is None or not is_conv else x.to(dtype) for x in self.shape.weights]
        self.state = torch.full(
            (NUM_SLOTS, *shape.slot), NAN, dtype=dtype if is_conv else torch.float32
        )
        for slot in self.rows:
            if slot >= 0:
                self.state[slot] = random(*shape.slot, seed=seed + 10 + slot)
        offsets = [sum(counts[:row]) for row in range(len(counts) + 1)]
        self.control = [indices(*self.rows), indices(*offsets)]

    def to(self, device: str) -> "Step":
        self.inputs = [x.to(device) for x in self.inputs]
        self.weights = [x if x is None else x.to(device) for x in self.weights]
        self.state, self.control = self.state.to(device), [x.to(device) for x in self.control]
        return self

    def arguments(self) -> list[Tensor | None]:
        """Those of the operator; ``A`` stands before B and C, ``D`` after them."""
        own: list[Tensor | None] = [*self.inputs[: self.shape.first], *self.weights]
        if self.shape.name == "selective_scan":
            own = [*self.inputs[:2], self.weights[0], *self.inputs[2:], self.weights[1]]
        return [*own, self.state, *self.control]

    def run(self) -> Tensor:
        """Call the operator."""
        out = getattr(operators, self.shape.name)(*self.arguments(), **self.shape.options)
        assert isinstance(out, Tensor)
        return out

    def copy_from(self, other: "Step") -> None:
        pairs = zip(
            (*self.inputs, self.state, *self.control),
            (*other.inputs, other.state, *other.control),
            strict=True,
        )
        for own, new in pairs:
            own.copy_(new)

    def compare(
        self, out: Tensor, expected: Tensor, states: Tensor, before: Tensor, tolerance: float
    ) -> None:
        """Check outputs, the states that the step writes, and that no other byte changed."""
        assert out.dtype == expected.dtype
        torch.testing.assert_close(
            out.cpu().float(), expected.float(), rtol=tolerance, atol=tolerance
        )
        actual = self.state.cpu()
        torch.testing.assert_close(
            actual[self.written].float(),
            states[self.written].float(),
            rtol=tolerance,
            atol=tolerance,
        )
        others = sorted(set(range(NUM_SLOTS)) - set(self.written))
        assert torch.equal(bits(actual[others]), bits(before[others]))
