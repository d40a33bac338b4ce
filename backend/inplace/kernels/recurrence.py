"""Convolutions and recurrences on a GPU, over each row's own tokens and the state of its slot.

A program of a recurrence holds a part of one row's state in registers, and goes through the row's
tokens. So a decode step reads and writes each state once. In a step with a prompt, where a head has
one decay and inputs are float16 or bfloat16, it goes from chunk to chunk with matrix products, and
keeps the state before each chunk; the outputs of all chunks are then computed side by side. The
factors of these products have the inputs' type; sums are in float32.
"""

from dataclasses import dataclass
from math import prod
from typing import Self

import torch
import triton

from inplace.kernels.linear import MULTIPROCESSORS, shared_memory
from inplace.kernels.memory import Memory
from inplace.kernels.recurrence_kernels import (
    conv_kernel,
    conv_state_kernel,
    delta_kernel,
    delta_outputs_kernel,
    delta_solve_kernel,
    delta_states_kernel,
    linear_recurrence_kernel,
    scan_kernel,
    scan_outputs_kernel,
    scan_states_kernel,
)

BLOCK = 64
"""Channels that a program computes."""


SCAN_CHUNK, DELTA_CHUNK = 64, 32
"""Tokens of a prompt that matrix products compute at once. The time to solve the delta rule's
triangles grows with the square of them."""


CONV_TOKENS = 16
"""Tokens of a prompt that a program of the convolution computes."""


@dataclass(frozen=True)
class Chunks:
    """How the rows of a step are cut for matrix products.

    Attributes:
        size: tokens of a chunk.
        count: chunks of all rows, at most; a row's last one may not be full.
        inner: the padded extent of a state that queries and keys have.
        outer: how much of the other one a program of the outputs has.
        narrow: the same of the states, which go through a row's chunks one after another.
        block_r: rows, padded.
    """

    size: int
    count: int
    inner: int
    outer: int
    narrow: int
    block_r: int

    @classmethod
    def of(
        cls,
        size: int,
        tokens: int,
        rows: int,
        heads: int,
        inner: int,
        outer: int,
        dtype: torch.dtype,
    ) -> Self | None:
        """None if a step goes from token to token.

        Args:
            size: tokens of a chunk, if shared memory suffices.
            tokens: of all rows.
            rows: of the step.
            heads: of each.
            inner: extent of a state that queries and keys have.
            outer: extent of a state that values have.
            dtype: of the keys.
        """
        if tokens <= rows or dtype.itemsize != 2:
            return None
        inner, outer = (max(16, triton.next_power_of_2(extent)) for extent in (inner, outer))
        parts = triton.cdiv(outer, BLOCK)
        outer = min(outer, BLOCK)
        few = rows * heads * parts < MULTIPROCESSORS
        narrow = outer // 2 if few and outer == BLOCK else outer
        while size >= 16:
            # Two stages of keys, reads and values; scaled keys, weights and the state.
            entries = 2 * size * (2 * inner + outer) + size * (inner + size) + inner * outer
            if 2 * entries <= shared_memory():
                count, block_r = tokens // size + rows, triton.next_power_of_2(rows)
                return cls(size, count, inner, outer, narrow, block_r)
            size //= 2
        return None

    def launch(self) -> dict[str, int]:
        """Arguments of all launches."""
        return {"CHUNK": self.size, "BLOCK_R": self.block_r, "num_warps": 4}


def causal_conv1d(
    *,
    x: Memory,
    weight: Memory,
    bias: Memory | None,
    state: Memory,
    slots: Memory,
    row_offsets: Memory,
    out: Memory,
    tokens: int,
    rows: int,
    channels: int,
    width: int,
    silu: bool,
) -> None:
    """Launch `inplace.operators.causal_conv1d` on the current stream; all memory is contiguous."""
    if tokens == 0 or rows == 0:
        return
    blocks = triton.cdiv(channels, 2 * BLOCK)
    together = CONV_TOKENS if tokens > rows else 1
    conv_kernel[(triton.cdiv(tokens, together), blocks)](
        x, weight, x if bias is None else bias, state, slots, row_offsets, out, tokens, rows,
        channels, WIDTH=width, BIAS=bias is not None, SILU=silu, BLOCK_T=together,
        BLOCK_C=2 * BLOCK, BLOCK_R=triton.next_power_of_2(rows),
    )  # fmt: skip
    conv_state_kernel[(rows, blocks)](
        x, state, slots, row_offsets, channels, WIDTH=width, BLOCK_C=2 * BLOCK
    )


def selective_scan_workspace(
    tokens: int,
    rows: int,
    shape: tuple[int, int, int],
    rate_shape: tuple[int, int],
    dtype: torch.dtype,
) -> int:
    """Entries of scratch memory that `selective_scan` needs, with its arguments and keys' type."""
    chunks = _scan_chunks(tokens, rows, shape, rate_shape, dtype)
    return 0 if chunks is None else chunks.count * prod(shape)


def _scan_chunks(
    tokens: int,
    rows: int,
    shape: tuple[int, int, int],
    rate_shape: tuple[int, int],
    dtype: torch.dtype,
) -> Chunks | None:
    has_one_rate = rate_shape == (1, 1)
    if not has_one_rate:
        return None
    return Chunks.of(SCAN_CHUNK, tokens, rows, shape[0], shape[2], shape[1], dtype)


def selective_scan(
    *,
    x: Memory,
    dt: Memory,
    rates: Memory,
    key: Memory,
    query: Memory,
    skip: Memory | None,
    state: Memory,
    slots: Memory,
    row_offsets: Memory,
    out: Memory,
    workspace: Memory,
    tokens: int,
    rows: int,
    shape: tuple[int, int, int],
    groups: int,
    rate_shape: tuple[int, int],
) -> None:
    """Launch `inplace.operators.selective_scan` on the current stream; all memory is contiguous.

    Args:
        x, dt, key, query, skip, state, slots, row_offsets: of the operator; ``rates`` is its A.
        out: ``[tokens, heads, dim]``.
        workspace: `selective_scan_workspace` entries of the keys' type.
        tokens: of all rows.
        rows: rows of the step.
        shape: of a slot: heads, dim, size.
        groups: of key and query.
        rate_shape: extents of a head's rates.
    """
    if rows == 0:
        return
    heads, dim, size = shape
    skip, has_skip = (x, False) if skip is None else (skip, True)
    sizes = {"HEADS": heads, "DIM": dim, "GROUPS": groups, "SIZE": size}
    chunks = _scan_chunks(tokens, rows, shape, rate_shape, key.dtype)
    if chunks is not None:
        blocks = {"BLOCK_N": chunks.inner} | chunks.launch()
        scan_states_kernel[(rows, heads, triton.cdiv(dim, chunks.narrow))](
            x, dt, rates, key, state, slots, row_offsets, workspace, out, tokens,
            **sizes, **blocks, BLOCK_P=chunks.narrow, num_stages=2,
        )  # fmt: skip
        scan_outputs_kernel[(chunks.count, heads, triton.cdiv(dim, chunks.outer))](
            x, dt, rates, key, query, skip, slots, row_offsets, workspace, out, rows,
            **sizes, **blocks, BLOCK_P=chunks.outer, SKIP=has_skip,
        )  # fmt: skip
        return
    block_n = triton.next_power_of_2(size)
    block_c = min(BLOCK, max(1, 4096 // block_n), triton.next_power_of_2(heads // groups * dim))
    scan_kernel[(rows, groups, triton.cdiv(heads // groups * dim, block_c))](
        x, dt, rates, key, query, skip, state, slots, row_offsets, out, tokens,
        **sizes, RATE_DIM=rate_shape[0], RATE_SIZE=rate_shape[1], SKIP=has_skip,
        BLOCK_C=block_c, BLOCK_N=block_n,
    )  # fmt: skip


def delta_rule_workspaces(
    tokens: int, rows: int, shape: tuple[int, int, int], dtype: torch.dtype, *, diagonal: bool
) -> tuple[int, int, int]:
    """Entries of scratch memories that `delta_rule` needs, with its arguments and keys' type."""
    chunks = _delta_chunks(tokens, rows, shape, dtype, diagonal)
    heads, key_dim, value_dim = shape
    if chunks is None:
        return 0, 0, 0
    return tokens * heads * key_dim, tokens * heads * value_dim, chunks.count * prod(shape)


def _delta_chunks(
    tokens: int, rows: int, shape: tuple[int, int, int], dtype: torch.dtype, diagonal: bool
) -> Chunks | None:
    return None if diagonal else Chunks.of(DELTA_CHUNK, tokens, rows, *shape, dtype)


def delta_rule(
    *,
    query: Memory,
    key: Memory,
    value: Memory,
    decay: Memory,
    beta: Memory,
    state: Memory,
    slots: Memory,
    row_offsets: Memory,
    out: Memory,
    workspaces: tuple[Memory, Memory, Memory],
    tokens: int,
    rows: int,
    shape: tuple[int, int, int],
    diagonal: bool,
) -> None:
    """Launch `inplace.operators.delta_rule` on the current stream; all memory is contiguous.

    Args:
        query, key, value, decay, beta, state, slots, row_offsets: of the operator.
        out: ``[tokens, heads, value_dim]``.
        workspaces: `delta_rule_workspaces` entries of the keys' type.
        tokens: of all rows.
        rows: rows of the step.
        shape: of a slot: heads, key_dim, value_dim.
        diagonal: whether each key component has a decay of its own.
    """
    if rows == 0:
        return
    heads, key_dim, value_dim = shape
    chunks = _delta_chunks(tokens, rows, shape, key.dtype, diagonal)
    sizes = {"HEADS": heads, "KEY_DIM": key_dim, "VALUE_DIM": value_dim}
    if chunks is not None:
        reads, writes, states = workspaces
        blocks = {"BLOCK_K": chunks.inner} | chunks.launch()
        delta_solve_kernel[(chunks.count, heads)](
            key, value, decay, beta, slots, row_offsets, reads, writes, rows,
            **sizes, **blocks, BLOCK_V=max(16, triton.next_power_of_2(value_dim)),
        )  # fmt: skip
        delta_states_kernel[(rows, heads, triton.cdiv(value_dim, chunks.narrow))](
            key, decay, state, slots, row_offsets, reads, writes, states, out, tokens,
            **sizes, **blocks, BLOCK_V=chunks.narrow, num_stages=2,
        )  # fmt: skip
        delta_outputs_kernel[(chunks.count, heads, triton.cdiv(value_dim, chunks.outer))](
            query, key, decay, slots, row_offsets, writes, states, out, rows,
            **sizes, **blocks, BLOCK_V=chunks.outer,
        )  # fmt: skip
        return
    block_k = triton.next_power_of_2(key_dim)
    block_v = min(triton.next_power_of_2(value_dim), max(1, 4096 // block_k))
    delta_kernel[(rows, heads, triton.cdiv(value_dim, block_v))](
        query, key, value, decay, beta, state, slots, row_offsets, out, tokens,
        **sizes, DIAGONAL=diagonal, BLOCK_K=block_k, BLOCK_V=block_v,
    )  # fmt: skip


def linear_recurrence(
    *,
    decay: Memory,
    x: Memory,
    state: Memory,
    slots: Memory,
    row_offsets: Memory,
    out: Memory,
    tokens: int,
    rows: int,
    channels: int,
) -> None:
    """Launch `inplace.operators.linear_recurrence` on the current stream; memory is contiguous."""
    if rows == 0:
        return
    linear_recurrence_kernel[(rows, triton.cdiv(channels, 2 * BLOCK))](
        decay, x, state, slots, row_offsets, out, tokens, channels, BLOCK_C=2 * BLOCK
    )
