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
    delta_inverse_kernel,
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


CHUNK = 64
"""Tokens of a prompt that matrix products compute at once."""


SCAN_STAGES = 2
"""Stages of the launch that goes through the chunks of a scan."""


CONV_TOKENS = 16
"""Tokens of a prompt that a program of the convolution computes."""


@dataclass(frozen=True)
class StateBlocks:
    """Sizes of a launch that goes from token to token.

    Attributes:
        entries: of a state that a program has.
        warps: of a program.
        evict: the eviction policy of states.
    """

    entries: int = 4096
    warps: int = 4
    evict: str = ""


@dataclass(frozen=True)
class PromptBlocks:
    """Sizes of the launches that go from chunk to chunk.

    The fastest of `benchmarks/results/gpu_recurrence_blocks.txt`.

    Attributes:
        narrow: components of values that a program of a few rows' states has.
        stages: of a program of the delta rule's states.
        states_warps: of that program.
        outer: components of values that a program of the delta rule's outputs has.
        outputs_warps: of that program.
        solve_warps: of a program that solves a chunk.
        inverse_warps: of a program that inverts a triangle.
    """

    narrow: int = 32
    stages: int = 3
    states_warps: int = 4
    outer: int = 128
    outputs_warps: int = 4
    solve_warps: int = 2
    inverse_warps: int = 1


PROMPT_BLOCKS = PromptBlocks()
"""What is launched."""


FEW_PROGRAMS = 16 * MULTIPROCESSORS
"""Where a decode step has fewer programs of 4096 entries of states, smaller ones are faster."""


def choose_scan_blocks(tokens: int, rows: int, *, has_one_rate: bool) -> StateBlocks:
    """The fastest of `benchmarks/results/gpu_recurrence_blocks.txt` for a scan's decode step.

    Args:
        tokens: of all rows.
        rows: of the step.
        has_one_rate: whether a head has one rate.
    """
    if tokens <= rows and has_one_rate:
        return StateBlocks(512, 1, "evict_first")
    return StateBlocks()


def choose_delta_blocks(tokens: int, rows: int, shape: tuple[int, int, int]) -> StateBlocks:
    """The same for the delta rule; ``shape`` is that of a slot."""
    if tokens > rows:
        return StateBlocks()
    if rows * prod(shape) < FEW_PROGRAMS * 4096:
        return StateBlocks(2048, 1, "evict_first")
    return StateBlocks(4096, 2, "evict_first")


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
        tokens: int,
        rows: int,
        heads: int,
        inner: int,
        outer: int,
        dtype: torch.dtype,
        stages: int,
    ) -> Self | None:
        """None if a step goes from token to token.

        Args:
            tokens: of all rows.
            rows: of the step.
            heads: of each.
            inner: extent of a state that queries and keys have.
            outer: extent of a state that values have.
            dtype: of the keys.
            stages: of the launch that goes through a row's chunks.
        """
        if tokens <= rows or dtype.itemsize != 2:
            return None
        inner, outer = (max(16, triton.next_power_of_2(extent)) for extent in (inner, outer))
        parts = triton.cdiv(outer, BLOCK)
        outer = min(outer, BLOCK)
        few = rows * heads * parts < MULTIPROCESSORS
        narrow = min(outer, PROMPT_BLOCKS.narrow) if few and outer == BLOCK else outer
        size = CHUNK
        while size >= 16:
            # Stages of keys, reads and values; scaled keys, weights and the state.
            staged = stages * size * (2 * inner + outer)
            entries = staged + size * (inner + size) + inner * outer
            if 2 * entries <= shared_memory():
                count, block_r = tokens // size + rows, triton.next_power_of_2(rows)
                return cls(size, count, inner, outer, narrow, block_r)
            size //= 2
        return None

    @property
    def part(self) -> int:
        """Tokens of a triangle that is inverted at once."""
        return max(16, self.size // 2)

    def launch(self) -> dict[str, int]:
        """Arguments of all launches."""
        return {"CHUNK": self.size, "BLOCK_R": self.block_r}


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
    return Chunks.of(tokens, rows, shape[0], shape[2], shape[1], dtype, SCAN_STAGES)


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
            **sizes, **blocks, BLOCK_P=chunks.narrow, num_stages=SCAN_STAGES, num_warps=4,
        )  # fmt: skip
        scan_outputs_kernel[(chunks.count, heads, triton.cdiv(dim, chunks.outer))](
            x, dt, rates, key, query, skip, slots, row_offsets, workspace, out, rows,
            **sizes, **blocks, BLOCK_P=chunks.outer, SKIP=has_skip, num_warps=4,
        )  # fmt: skip
        return
    block_n = triton.next_power_of_2(size)
    channels = heads // groups * dim
    state_blocks = choose_scan_blocks(tokens, rows, has_one_rate=rate_shape == (1, 1))
    entries = max(1, state_blocks.entries // block_n)
    block_c = min(BLOCK, entries, triton.next_power_of_2(channels))
    scan_kernel[(triton.cdiv(channels, block_c), groups, rows)](
        x, dt, rates, key, query, skip, state, slots, row_offsets, out, tokens,
        **sizes, RATE_DIM=rate_shape[0], RATE_SIZE=rate_shape[1], SKIP=has_skip,
        BLOCK_C=block_c, BLOCK_N=block_n, EVICT=state_blocks.evict, num_warps=state_blocks.warps,
    )  # fmt: skip


def delta_rule_workspaces(
    tokens: int, rows: int, shape: tuple[int, int, int], dtype: torch.dtype, *, diagonal: bool
) -> tuple[int, int, int, int]:
    """Entries of scratch memories that `delta_rule` needs, with its arguments and keys' type."""
    chunks = _delta_chunks(tokens, rows, shape, dtype, diagonal)
    heads, key_dim, value_dim = shape
    if chunks is None:
        return 0, 0, 0, 0
    pairs = tokens * heads
    return pairs * chunks.part, pairs * key_dim, pairs * value_dim, chunks.count * prod(shape)


def _delta_chunks(
    tokens: int, rows: int, shape: tuple[int, int, int], dtype: torch.dtype, diagonal: bool
) -> Chunks | None:
    if diagonal:
        return None
    return Chunks.of(tokens, rows, *shape, dtype, PROMPT_BLOCKS.stages)


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
    workspaces: tuple[Memory, Memory, Memory, Memory],
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
        inverses, reads, writes, states = workspaces
        blocks = {"BLOCK_K": chunks.inner} | chunks.launch()
        part, block_v = chunks.part, max(16, triton.next_power_of_2(value_dim))
        delta_inverse_kernel[(chunks.count * (chunks.size // part), heads)](
            key, decay, beta, slots, row_offsets, inverses, rows,
            HEADS=heads, KEY_DIM=key_dim, PART=part, **blocks,
            num_warps=PROMPT_BLOCKS.inverse_warps,
        )  # fmt: skip
        delta_solve_kernel[(chunks.count, heads)](
            key, value, decay, beta, slots, row_offsets, inverses, reads, writes, rows,
            **sizes, **blocks, PART=part, BLOCK_V=block_v, num_warps=PROMPT_BLOCKS.solve_warps,
        )  # fmt: skip
        delta_states_kernel[(rows, heads, triton.cdiv(value_dim, chunks.narrow))](
            key, decay, state, slots, row_offsets, reads, writes, states, out, tokens,
            **sizes, **blocks, BLOCK_V=chunks.narrow,
            num_stages=PROMPT_BLOCKS.stages, num_warps=PROMPT_BLOCKS.states_warps,
        )  # fmt: skip
        outer = min(block_v, PROMPT_BLOCKS.outer)
        delta_outputs_kernel[(chunks.count, heads, triton.cdiv(value_dim, outer))](
            query, key, decay, slots, row_offsets, writes, states, out, rows,
            **sizes, **blocks, BLOCK_V=outer, num_warps=PROMPT_BLOCKS.outputs_warps,
        )  # fmt: skip
        return
    block_k = triton.next_power_of_2(key_dim)
    state_blocks = choose_delta_blocks(tokens, rows, shape)
    block_v = min(triton.next_power_of_2(value_dim), max(1, state_blocks.entries // block_k))
    delta_kernel[(triton.cdiv(value_dim, block_v), heads, rows)](
        query, key, value, decay, beta, state, slots, row_offsets, out, tokens,
        **sizes, DIAGONAL=diagonal, BLOCK_K=block_k, BLOCK_V=block_v,
        EVICT=state_blocks.evict, num_warps=state_blocks.warps,
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
