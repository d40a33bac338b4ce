"""Steps for the attention and update kernels, compared with the operators on the CPU.

States are NaN outside the cached entries, so a kernel that reads more gives NaN. Used in Triton's
interpreter and on a GPU.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from inplace.kernels.attention import AttentionSpec, attention, attention_locks, attention_workspace
from inplace.kernels.update import UpdateSpec, update
from inplace.operators import attention as reference_attention
from torch import Tensor

from support.attention_case import Row, bits, hiding

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Largest relative error of a token's output against the reference in float32."""


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """RuntimeError where the host waits for the GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Transformers' ``apply_rotary_pos_emb`` on ``[tokens, heads, dim]``.

    If cos has fewer than dim components, only so many are rotated.
    """
    width = cos.shape[1]
    head, rest = x[..., :width], x[..., width:]
    first, second = head.chunk(2, -1)
    rotated = head * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
    return torch.cat([rotated, rest], -1)


@dataclass
class AttentionCase:
    """A step of attention: random cached entries, NaN elsewhere, and a merged projection.

    Query, key and value are slices of the projection.
    """

    spec: AttentionSpec
    rows: list[Row]
    capacity: int = 48
    slots: int = 9
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0
    pdl: bool = False
    settled: bool = False
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None
    offsets: list[int] = field(init=False)

    def __post_init__(self) -> None:
        spec, generator = self.spec, torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.offsets = [0]
        for row in self.rows:
            self.offsets.append(self.offsets[-1] + row.tokens)
        tokens = self.offsets[-1]
        sizes = [spec.heads * spec.dim, spec.kv_heads * spec.dim, spec.kv_heads * spec.value_dim]
        self.merged = draw(tokens, sum(sizes)).to(self.dtype)
        angles = draw(tokens, spec.rotary // 2) * 3
        self.cos, self.sin = (
            torch.cat([angles, angles], 1).cos(),
            torch.cat([angles, angles], 1).sin(),
        )
        self.key_state = torch.full(
            (self.slots, spec.kv_heads, self.capacity, spec.dim), float("nan"), dtype=self.dtype
        )
        self.value_state = torch.full(
            (self.slots, spec.kv_heads, self.capacity, spec.value_dim),
            float("nan"),
            dtype=self.dtype,
        )
        for row in self.rows:
            if row.slot >= 0:
                cached = torch.arange(max(0, row.start - self.capacity), row.start) % self.capacity
                self.key_state[row.slot, :, cached] = draw(spec.kv_heads, len(cached), spec.dim).to(
                    self.dtype
                )
                self.value_state[row.slot, :, cached] = draw(
                    spec.kv_heads, len(cached), spec.value_dim
                ).to(self.dtype)
        self.sinks = draw(spec.heads) * 2
        self.bias = hiding(draw(tokens, max(spec.bias_heads, 1), self.capacity))
        for name in ("merged", "cos", "sin", "key_state", "value_state", "sinks", "bias"):
            setattr(self, name, getattr(self, name).to(self.device))
        query, key, value = self.merged.split(sizes, 1)
        self.query = query.unflatten(1, (spec.heads, spec.dim))
        self.key = key.unflatten(1, (spec.kv_heads, spec.dim))
        self.value = value.unflatten(1, (spec.kv_heads, spec.value_dim))
        self.control = [
            self.indices([row.slot for row in self.rows]),
            self.indices(self.offsets),
            self.indices([row.start for row in self.rows]),
        ]
        count = attention_workspace(spec, tokens, len(self.rows), self.capacity) // 4
        self.workspace = torch.full((count,), float("nan"), device=self.device) if count else None
        self.locks = torch.zeros(
            attention_locks(spec, len(self.rows)), dtype=torch.int32, device=self.device
        )
        self.out = torch.full(
            (tokens, spec.heads, spec.value_dim), float("nan"), dtype=self.dtype, device=self.device
        )

    def indices(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def launch(self) -> Tensor:
        spec = self.spec
        attention(
            spec,
            query=self.query,
            key=self.key if spec.append else None,
            value=self.value if spec.append and not spec.latent else None,
            query_stride=self.merged.stride(0),
            key_stride=self.merged.stride(0),
            value_stride=self.merged.stride(0),
            cos=self.cos if spec.rotary else None,
            sin=self.sin if spec.rotary else None,
            key_state=self.key_state,
            value_state=None if spec.latent else self.value_state,
            capacity=self.capacity,
            slots=self.control[0],
            row_offsets=self.control[1],
            write_indices=self.control[2],
            sinks=self.sinks if spec.sinks else None,
            bias=self.bias if spec.bias_heads else None,
            out=self.out,
            workspace=self.workspace,
            locks=self.locks if self.workspace is not None else None,
            tokens=self.offsets[-1],
            rows=len(self.rows),
            key_scale=self.key_scale,
            value_scale=self.value_scale,
            pdl=self.pdl,
            settled=self.settled,
        )
        return self.out

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """The operator's output and the key and value states after it; float32, on the CPU."""
        spec = self.spec
        query, key, value = (x.float().cpu() for x in (self.query, self.key, self.value))
        if spec.rotary:
            cos, sin = self.cos.cpu(), self.sin.cpu()
            query, key = (rotate(x, cos, sin).to(self.dtype).float() for x in (query, key))
        keys, values = self.key_state.float().cpu(), self.value_state.float().cpu()
        slots, offsets, starts = (x.cpu() for x in self.control)
        out = reference_attention(
            query,
            key if spec.append else None,
            value if spec.append and not spec.latent else None,
            keys,
            None if spec.latent else values,
            slots,
            offsets,
            starts,
            scale=spec.scale,
            append=spec.append,
            causal=spec.causal,
            window=spec.window,
            ring=spec.ring,
            softcap=spec.softcap,
            latent_dim=spec.value_dim if spec.latent else 0,
            sinks=self.sinks.cpu() if spec.sinks else None,
            attention_chunk=spec.attention_chunk,
            bias=self.bias.cpu() if spec.bias_heads else None,
        )
        return out, keys, values

    def compare(
        self, out: Tensor, expected: tuple[Tensor, Tensor, Tensor], before: tuple[Tensor, Tensor]
    ) -> None:
        """Check that outputs and appended entries are as expected and no other byte changed."""
        tolerance = TOLERANCE[self.dtype]
        result = out.float().cpu()
        assert torch.isfinite(result).all(), (
            f"{int((~torch.isfinite(result)).sum())} outputs are not finite"
        )
        error = (result - expected[0]).flatten(1).norm(dim=1) / expected[0].flatten(1).norm(
            dim=1
        ).clamp(min=1e-6)
        assert error.max() <= tolerance, f"relative error {error.tolist()} of tokens"
        for state, old, new in zip(
            (self.key_state, self.value_state), before, expected[1:], strict=True
        ):
            written = torch.zeros(state.shape[0], state.shape[2], dtype=torch.bool)
            appended = self.spec.append and not (state is self.value_state and self.spec.latent)
            for row in self.rows if appended else []:
                if row.slot >= 0:
                    written[
                        row.slot, torch.arange(row.start, row.start + row.tokens) % self.capacity
                    ] = True
            actual = state.cpu()
            entries = written[:, None, :].expand(actual.shape[:3])
            assert torch.equal(bits(actual[~entries]), bits(old.cpu()[~entries]))
            torch.testing.assert_close(
                actual[entries].float(), new[entries], rtol=tolerance, atol=tolerance
            )
        assert not self.locks.any()

    def check(self) -> Tensor:
        """Compare one launch with the operator; returns its output."""
        expected, before = self.expected(), (self.key_state.clone(), self.value_state.clone())
        out = self.launch()
        self.compare(out, expected, before)
        return out


def check_update(
    shape: tuple[int, ...],
    axis: int,
    rows: list[Row],
    dtype: torch.dtype,
    *,
    packed: bool,
    ring: bool = False,
    device: str = "cpu",
) -> None:
    """Compare an append along ``axis`` of a state ``[6, *shape]`` with the operator, bit for bit.

    Axis 0 replaces whole slots.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*extents: int) -> Tensor:
        return torch.randint(-100, 100, extents, generator=generator).to(dtype)

    state = draw(6, *shape)
    slots, starts = (
        torch.tensor(x, dtype=torch.int32)
        for x in ([r.slot for r in rows], [r.start for r in rows])
    )
    counts = [row.tokens for row in rows]
    offsets = torch.tensor(
        [sum(counts[:index]) for index in range(len(rows) + 1)], dtype=torch.int32
    )
    if axis == 0:
        value = draw(len(rows), *shape)
    elif packed:
        value = draw(sum(counts), *shape[: axis - 1], *shape[axis:])
    else:
        value = draw(len(rows), *shape[: axis - 1], counts[0], *shape[axis:])
    expected = state.clone()
    torch.ops.inplace.update(
        expected, slots, value, offsets if packed else None, starts if axis else None, axis, ring
    )
    state = state.to(device)
    update(
        UpdateSpec.of(tuple(state.shape), axis, append=axis > 0, ring=ring),
        state=state,
        slots=slots.to(device),
        value=value.to(device),
        row_offsets=offsets.to(device) if packed else None,
        write_indices=starts.to(device) if axis else None,
        rows=len(rows),
        units=sum(counts) if axis else len(rows),
    )
    assert torch.equal(bits(state.cpu()), bits(expected))
