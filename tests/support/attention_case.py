"""Steps of `inplace::attention` and a reference for them in plain PyTorch."""

from dataclasses import dataclass, field

import torch
from inplace.operators import attention
from torch import Tensor

NAN = float("nan")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""Largest relative error of a row's output: a few roundings of the dtype."""


def bits(tensor: Tensor) -> Tensor:
    """A copy as bytes: NaN equals NaN only with the same payload."""
    return tensor.detach().clone().contiguous().view(torch.uint8)


def indices(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


@dataclass(frozen=True)
class Row:
    """One row of a step: its slot, its cached length, and its number of tokens."""

    slot: int
    start: int
    tokens: int


@dataclass(frozen=True)
class Options:
    append: bool = True
    causal: bool = True
    window: int = 0
    ring: bool = False
    softcap: float = 0.0
    sinks: bool = False
    attention_chunk: int = 0
    bias_heads: int = 0
    latent: bool = False  # values are a part of keys; the value state is not used


def hiding(bias: Tensor) -> Tensor:
    """A bias ``[tokens, heads, capacity]`` of random numbers, a third of them replaced by -inf."""
    hidden = bias.roll(1, -1) > 0.45
    hidden[..., ::7] = False
    return (2 * bias).masked_fill(hidden, float("-inf"))


@dataclass
class Case:
    """A step of `attention`: random cached entries, NaN in the rest of the states, new tokens."""

    rows: list[Row]
    options: Options = field(default_factory=Options)
    heads: int = 4
    kv_heads: int = 2
    dim: int = 8
    value_dim: int = 6
    capacity: int = 16
    slots: int = 6
    dtype: torch.dtype = torch.float32
    index_dtype: torch.dtype = torch.int32
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        tokens = sum(row.tokens for row in self.rows)
        self.scale = self.dim**-0.5
        self.query = draw(tokens, self.heads, self.dim)
        self.key = draw(tokens, self.kv_heads, self.dim) if self.options.append else None
        self.value = draw(tokens, self.kv_heads, self.value_dim) if self.options.append else None
        self.sinks = draw(self.heads) * 2
        self.bias = hiding(draw(tokens, max(self.options.bias_heads, 1), self.capacity))
        self.key_state = torch.full(
            (self.slots, self.kv_heads, self.capacity, self.dim), NAN, dtype=self.dtype
        )
        self.value_state = torch.full(
            (self.slots, self.kv_heads, self.capacity, self.value_dim), NAN, dtype=self.dtype
        )
        self.history = [
            (
                draw(max(row.start, 0), self.kv_heads, self.dim),
                draw(max(row.start, 0), self.kv_heads, self.value_dim),
            )
            for row in self.rows
        ]
        if self.options.latent:
            self.value = None if self.key is None else self.key[..., : self.value_dim]
            self.history = [(keys, keys[..., : self.value_dim]) for keys, _ in self.history]
        for row, (keys, values) in zip(self.rows, self.history, strict=True):
            if row.slot >= 0:
                place(self.key_state, row.slot, keys, 0)
                if not self.options.latent:
                    place(self.value_state, row.slot, values, 0)
        self.offsets = [0]
        for row in self.rows:
            self.offsets.append(self.offsets[-1] + row.tokens)

    def run(self) -> Tensor:
        latent = self.options.latent
        return attention(
            self.query,
            self.key,
            None if latent else self.value,
            self.key_state,
            None if latent else self.value_state,
            indices(*[row.slot for row in self.rows], dtype=self.index_dtype),
            indices(*self.offsets, dtype=self.index_dtype),
            indices(*[row.start for row in self.rows], dtype=self.index_dtype),
            scale=self.scale,
            append=self.options.append,
            causal=self.options.causal,
            window=self.options.window,
            ring=self.options.ring,
            softcap=self.options.softcap,
            latent_dim=self.value_dim if latent else 0,
            sinks=self.sinks if self.options.sinks else None,
            attention_chunk=self.options.attention_chunk,
            bias=self.bias if self.options.bias_heads else None,
        )

    def reference(self) -> Tensor:
        """Each token and head separately, over the row's whole history of keys, in float64."""
        out = torch.zeros(len(self.query), self.heads, self.value_dim, dtype=torch.float64)
        chunk = self.options.attention_chunk
        for row, (keys, values), first in zip(
            self.rows, self.history, self.offsets[:-1], strict=True
        ):
            if row.slot < 0:
                continue
            if self.key is not None and self.value is not None:
                keys = torch.cat([keys, self.key[first : first + row.tokens]])
                values = torch.cat([values, self.value[first : first + row.tokens]])
            for token in range(row.tokens):
                own = row.start + token
                visible = [
                    position
                    for position in range(len(keys))
                    if (not self.options.causal or position <= own)
                    and (not self.options.window or position > own - self.options.window)
                    and (not chunk or position >= own // chunk * chunk)
                ]
                for head in range(self.heads):
                    shared = head // (self.heads // self.kv_heads)
                    query = self.query[first + token, head].double()
                    scores = (
                        torch.stack(
                            [
                                (query * keys[position, shared].double()).sum()
                                for position in visible
                            ]
                        )
                        * self.scale
                    )
                    if self.options.softcap:
                        scores = self.options.softcap * torch.tanh(scores / self.options.softcap)
                    if self.options.bias_heads:
                        added = self.bias[first + token, head % self.options.bias_heads, visible]
                        scores = scores + added.double()
                    if self.options.sinks:
                        scores = torch.cat([scores, self.sinks[head, None].double()])
                    if scores.max() == float("-inf"):  # all is hidden
                        out[first + token, head] = 0
                        continue
                    weights = torch.exp(scores - scores.max())
                    weights = weights[: len(visible)] / weights.sum()
                    out[first + token, head] = sum(
                        weight * values[position, shared].double()
                        for weight, position in zip(weights, visible, strict=True)
                    )
        return out

    def check(self) -> Tensor:
        """Compare a step with the reference, bytes that must not change included; the outputs."""
        addresses = (self.key_state.data_ptr(), self.value_state.data_ptr())
        allowed = (self.key_state.clone(), self.value_state.clone())
        if self.key is not None and self.value is not None:
            for row, first in zip(self.rows, self.offsets[:-1], strict=True):
                if row.slot >= 0:
                    place(allowed[0], row.slot, self.key[first : first + row.tokens], row.start)
                    if not self.options.latent:
                        value = self.value[first : first + row.tokens]
                        place(allowed[1], row.slot, value, row.start)
        out, expected = self.run(), self.reference()
        assert (self.key_state.data_ptr(), self.value_state.data_ptr()) == addresses
        assert torch.equal(bits(self.key_state), bits(allowed[0]))
        assert torch.equal(bits(self.value_state), bits(allowed[1]))
        assert out.dtype == self.dtype
        assert torch.isfinite(out).all()
        for first, end in zip(self.offsets[:-1], self.offsets[1:], strict=True):
            error = (out[first:end].double() - expected[first:end]).norm()
            assert error <= TOLERANCE[self.dtype] * expected[first:end].norm().clamp(min=1e-9)
        return out


def place(state: Tensor, slot: int, entries: Tensor, start: int) -> None:
    """Write entries ``[count, kv_heads, dim]`` of a slot from ``start``, modulo the capacity."""
    for index, entry in enumerate(entries):
        state[slot, :, (start + index) % state.shape[2]] = entry


RAGGED = [Row(4, 7, 1), Row(0, 0, 5), Row(2, 9, 3), Row(5, 0, 1)]
"""In one step: decode, prefill from the start, prefill a later chunk, start with one token."""
