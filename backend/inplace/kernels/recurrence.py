"""Convolutions and recurrences on a GPU, over each row's own tokens and the state of its slot.

A program of a recurrence holds a part of one row's state in registers, and goes through the row's
tokens. So a step reads and writes each state once. Steps with a prompt go from chunk to chunk with
matrix products where a head has one decay and inputs are float16 or bfloat16; their factors have
that type. All others go from token to token. Sums are in float32.
"""

from dataclasses import dataclass

import torch
import triton

from inplace.kernels.linear import shared_memory
from inplace.kernels.memory import Memory
from inplace.kernels.recurrence_kernels import (
    conv_kernel,
    conv_state_kernel,
    delta_chunks_kernel,
    delta_inverse_kernel,
    delta_kernel,
    linear_recurrence_kernel,
    scan_chunks_kernel,
    scan_kernel,
)

BLOCK = 64
"""Channels that a program computes."""


SCAN_CHUNK, DELTA_CHUNK = 64, 32
"""Tokens of a prompt that matrix products compute at once."""


CONV_TOKENS = 16
"""Tokens of a prompt that a program of the convolution computes."""


@dataclass(frozen=True)
class ChunkBlocks:
    """Blocks of a program that goes from chunk to chunk.

    Attributes:
        chunk: tokens.
        inner: the padded extent of the state that products sum over.
        outer: how much of the other one it has.
    """

    chunk: int
    inner: int
    outer: int

    @classmethod
    def of(cls, inner: int, outer: int, chunk: int) -> "ChunkBlocks | None":
        """The largest that fit into shared memory; None if none do.

        Args:
            inner: extent of a state that queries and keys have.
            outer: extent of a state that values have.
            chunk: most tokens.
        """
        inner, outer = (max(16, triton.next_power_of_2(extent)) for extent in (inner, outer))
        outer = min(outer, BLOCK)
        while chunk >= 16:
            # Two stages of queries, keys and values; scaled keys, values, two weights; the state.
            staged = 2 * chunk * (2 * inner + outer)
            entries = staged + chunk * (inner + outer + 2 * chunk) + inner * outer
            if 2 * entries <= shared_memory():
                return cls(chunk, inner, outer)
            chunk //= 2
        return None

    def launch(self) -> dict[str, int]:
        """Arguments of a launch."""
        return {"CHUNK": self.chunk, "num_warps": 4, "num_stages": 2}


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
        tokens: of all rows.
        rows: rows of the step.
        shape: of a slot: heads, dim, size.
        groups: of key and query.
        rate_shape: extents of a head's rates.
    """
    if rows == 0:
        return
    heads, dim, size = shape
    memories = (x, dt, rates, key, query, x if skip is None else skip)
    step = (state, slots, row_offsets, out, tokens)
    sizes = {"HEADS": heads, "DIM": dim, "GROUPS": groups, "SIZE": size, "SKIP": skip is not None}
    by_chunks = tokens > rows and rate_shape == (1, 1) and key.dtype.itemsize == 2
    blocks = ChunkBlocks.of(size, dim, SCAN_CHUNK) if by_chunks else None
    if blocks is not None:
        scan_chunks_kernel[(rows, heads, triton.cdiv(dim, blocks.outer))](
            *memories, *step, **sizes, BLOCK_P=blocks.outer, BLOCK_N=blocks.inner,
            **blocks.launch(),
        )  # fmt: skip
        return
    block_n = triton.next_power_of_2(size)
    block_c = min(BLOCK, max(1, 4096 // block_n), triton.next_power_of_2(heads // groups * dim))
    scan_kernel[(rows, groups, triton.cdiv(heads // groups * dim, block_c))](
        *memories, *step, **sizes, RATE_DIM=rate_shape[0], RATE_SIZE=rate_shape[1],
        BLOCK_C=block_c, BLOCK_N=block_n,
    )  # fmt: skip


def delta_rule_workspace(
    tokens: int, rows: int, shape: tuple[int, int, int], dtype: torch.dtype, *, diagonal: bool
) -> int:
    """Entries of scratch memory that `delta_rule` needs, with its arguments and the keys' type."""
    blocks = _delta_blocks(tokens, rows, shape, dtype, diagonal)
    return 0 if blocks is None else tokens * shape[0] * blocks.chunk


def _delta_blocks(
    tokens: int, rows: int, shape: tuple[int, int, int], dtype: torch.dtype, diagonal: bool
) -> ChunkBlocks | None:
    """The blocks of a step that goes from chunk to chunk; None: from token to token."""
    by_chunks = tokens > rows and not diagonal and dtype.itemsize == 2
    return ChunkBlocks.of(shape[1], shape[2], DELTA_CHUNK) if by_chunks else None


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
    workspace: Memory,
    tokens: int,
    rows: int,
    shape: tuple[int, int, int],
    diagonal: bool,
) -> None:
    """Launch `inplace.operators.delta_rule` on the current stream; all memory is contiguous.

    Args:
        query, key, value, decay, beta, state, slots, row_offsets: of the operator.
        out: ``[tokens, heads, value_dim]``.
        workspace: `delta_rule_workspace` entries of the keys' type.
        tokens: of all rows.
        rows: rows of the step.
        shape: of a slot: heads, key_dim, value_dim.
        diagonal: whether each key component has a decay of its own.
    """
    if rows == 0:
        return
    heads, key_dim, value_dim = shape
    blocks = _delta_blocks(tokens, rows, shape, key.dtype, diagonal)
    if blocks is not None:
        # Each row may have a chunk that is not full.
        delta_inverse_kernel[(tokens // blocks.chunk + rows, heads)](
            key, decay, beta, slots, row_offsets, workspace, rows,
            HEADS=heads, KEY_DIM=key_dim, BLOCK_K=blocks.inner,
            BLOCK_R=triton.next_power_of_2(rows), **blocks.launch(),
        )  # fmt: skip
        delta_chunks_kernel[(rows, heads, triton.cdiv(value_dim, blocks.outer))](
            query, key, value, decay, beta, state, slots, row_offsets, workspace, out, tokens,
            HEADS=heads, KEY_DIM=key_dim, VALUE_DIM=value_dim, BLOCK_K=blocks.inner,
            BLOCK_V=blocks.outer, **blocks.launch(),
        )  # fmt: skip
        return
    block_k = triton.next_power_of_2(key_dim)
    block_v = min(triton.next_power_of_2(value_dim), max(1, 4096 // block_k))
    delta_kernel[(rows, heads, triton.cdiv(value_dim, block_v))](
        query, key, value, decay, beta, state, slots, row_offsets, out, tokens,
        HEADS=heads, KEY_DIM=key_dim, VALUE_DIM=value_dim, DIAGONAL=diagonal,
        BLOCK_K=block_k, BLOCK_V=block_v,
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
