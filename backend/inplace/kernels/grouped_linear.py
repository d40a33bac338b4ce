"""Linear layers of a mixture of experts: each row is multiplied with the weight of its own expert.

A decode step has few pairs of a token and one of its experts, and its time is that to read the
experts that are used. `few_pairs_kernel` reads each of them once for all its rows, in one launch.
A step with a prompt has many pairs: `group_pairs_kernel` sorts them by expert, and
`many_pairs_kernel` is a product for every tile of an expert's rows. None waits for the host.
"""

from dataclasses import dataclass, replace
from math import ceil, sqrt
from typing import Any

import triton

from inplace.kernels.grouped_linear_kernels import (
    few_pairs_kernel,
    group_pairs_kernel,
    many_pairs_kernel,
    sum_pairs_kernel,
)
from inplace.kernels.linear import MULTIPROCESSORS, shared_memory
from inplace.kernels.memory import Memory

MAX_FEW_PAIRS = 512
"""Up to so many pairs of a token and an expert are one launch: 64 tokens with 8 experts each."""


MAX_FEW_ROWS = 64
"""Rows of an expert that `few_pairs_kernel` multiplies at once; for more it reads the weight again,
from the L2 cache."""


MIN_ROWS = 16
"""The smallest tile that tensor cores multiply."""


SORTED_BLOCK = 8192
"""Pairs that a program of `group_pairs_kernel` looks at at once."""


SUM_BLOCK = 1024
"""Columns that a program of `weighted_sum` adds."""


@dataclass(frozen=True)
class GroupedLinearSpec:
    """The static properties of one layer of experts.

    Attributes:
        inputs, outputs: extents of an expert's weight.
        experts: how many there are.
        bias: whether there is one.
        transposed: weights are ``[experts, inputs, outputs]``, not ``[experts, outputs, inputs]``.
        activation: one of ``inplace.operators.ACTIVATIONS``.
        gated: ``activation(first half of the outputs) * second half``.
        scaled: weights are 8-bit floats (e4m3) with a scale for each output.
    """

    inputs: int
    outputs: int
    experts: int
    bias: bool = False
    transposed: bool = False
    activation: str = "none"
    gated: bool = False
    scaled: bool = False

    @property
    def width(self) -> int:
        """Columns of the result."""
        return self.outputs // 2 if self.gated else self.outputs


@dataclass(frozen=True)
class GroupedBlocks:
    """Blocks of a launch.

    Attributes:
        m: rows of a program.
        n: outputs of a program.
        k: inputs of a round.
        warps, stages: of a program.
        rest: rows of the smaller tile that multiplies the last ones of an expert with many; 0 for
            none.
        together: tiles of rows that take the same outputs one after another, where rows are many.
        rows_first: multiply ``x @ weight.T`` where rows are many, not ``weight @ x.T``.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    rest: int = 0
    together: int = 4
    rows_first: bool = False


def grouped_linear_workspace(spec: GroupedLinearSpec, pairs: int) -> int:
    """Bytes of scratch memory that `grouped_linear` needs for up to so many pairs."""
    if pairs <= MAX_FEW_PAIRS:
        return 0
    return 4 * (pairs + spec.experts + 2 + _tiles(spec, pairs, MIN_ROWS))


def _tiles(spec: GroupedLinearSpec, pairs: int, rows: int) -> int:
    """Tiles of so many rows that there is room for; those of the experts, and of no expert."""
    return pairs // rows + spec.experts + 1


def grouped_linear(
    spec: GroupedLinearSpec,
    *,
    x: Memory,
    expert_ids: Memory,
    weight: Memory,
    bias: Memory | None,
    out: Memory,
    workspace: Memory,
    tokens: int,
    experts_per_token: int,
    shared: bool,
    scale: Memory | None = None,
    pdl: bool = False,
    blocks: GroupedBlocks | None = None,
) -> None:
    """Launch the layers on the current stream.

    Args:
        spec: the static properties.
        x: ``[tokens, inputs]`` if ``shared``, else ``[tokens, experts_per_token, inputs]``.
        expert_ids: ``[tokens, experts_per_token]``, int32 or int64.
        weight: ``[experts, outputs, inputs]``, or with the last two exchanged.
        bias: ``[experts, outputs]``.
        out: ``[tokens, experts_per_token, width]``.
        workspace: int32, `grouped_linear_workspace` bytes.
        tokens: rows of ``expert_ids``.
        experts_per_token: experts of each.
        shared: the experts of a token take the same vector.
        scale: ``[experts, outputs]`` float32 if ``spec.scaled``, else None.
        pdl: use programmatic dependent launch (compute capability 9.0 or later).
        blocks: in place of what `choose_blocks` chooses; for tests and tuning.
    """
    pairs = tokens * experts_per_token
    blocks = blocks or choose_blocks(spec, tokens, experts_per_token, x.dtype.itemsize)
    launch: dict[str, Any] = {"PDL": pdl, **({"launch_pdl": True} if pdl else {})}
    extents = (pairs, spec.inputs, spec.width, spec.experts, experts_per_token)
    flags = {
        "SHARED": shared,
        "BIAS": spec.bias,
        "SCALED": spec.scaled,
        "TRANSPOSED": spec.transposed,
        "ACTIVATION": spec.activation,
        "GATED": spec.gated,
        "EVEN": spec.inputs % blocks.k == 0,
        "BLOCK_M": blocks.m,
        "BLOCK_N": blocks.n,
        "BLOCK_K": blocks.k,
        "STAGES": blocks.stages,
        "num_warps": blocks.warps,
        **launch,
    }
    if spec.scaled != (scale is not None):
        raise ValueError("a scale must be given exactly when the weights are 8-bit floats")
    bias, scale = (x if each is None else each for each in (bias, scale))  # then not read
    columns = triton.cdiv(spec.width, blocks.n)
    if pairs <= MAX_FEW_PAIRS:
        by_expert = spec.experts < pairs
        few_pairs_kernel[(columns, spec.experts + 1 if by_expert else pairs)](
            x, expert_ids, weight, bias, scale, out, *extents,
            BY_EXPERT=by_expert, PAIRS=triton.next_power_of_2(pairs), **flags,
        )  # fmt: skip
        return
    group_pairs_kernel[(spec.experts + 1,)](
        expert_ids, workspace, pairs, spec.experts, BLOCK_M=blocks.m,
        BLOCK=min(SORTED_BLOCK, triton.next_power_of_2(pairs)), num_warps=8, **launch,
    )  # fmt: skip
    many_pairs_kernel[(columns * _tiles(spec, pairs, blocks.m),)](
        x, workspace, weight, bias, scale, out, *extents, blocks.together, **flags,
        REST=blocks.rest, ROWS_FIRST=blocks.rows_first,
    )  # fmt: skip


def weighted_sum(
    *,
    x: Memory,
    weights: Memory,
    out: Memory,
    tokens: int,
    per_token: int,
    width: int,
    pdl: bool = False,
) -> None:
    """Launch `inplace.operators.weighted_sum` on the current stream; all memory is contiguous.

    ``pdl``: use programmatic dependent launch (compute capability 9.0 or later).
    """
    block = min(SUM_BLOCK, triton.next_power_of_2(width))
    launch: dict[str, Any] = {"PDL": pdl, **({"launch_pdl": True} if pdl else {})}
    sum_pairs_kernel[(tokens, triton.cdiv(width, block))](
        x, weights, out, width, PER_TOKEN=per_token, BLOCK_N=block, num_warps=4, **launch
    )


def choose_blocks(
    spec: GroupedLinearSpec, tokens: int, experts_per_token: int, itemsize: int
) -> GroupedBlocks:
    """The blocks of a step.

    Those of 16-bit weights are the fastest of `benchmarks/results/gpu_grouped_blocks.txt`, but for
    a few percent. As many stages as the GPU has shared memory for.
    """
    blocks = _choose_tile(spec, tokens, experts_per_token, itemsize)
    stage = (blocks.n * (2 if spec.gated else 1) + blocks.m) * blocks.k * itemsize
    stages = min(blocks.stages, (shared_memory() - 2048) // stage)
    return replace(blocks, stages=max(1, stages))


def _choose_tile(
    spec: GroupedLinearSpec, tokens: int, experts_per_token: int, itemsize: int
) -> GroupedBlocks:
    pairs = tokens * experts_per_token
    average = pairs / spec.experts
    if pairs <= MAX_FEW_PAIRS:
        likely = ceil(average + 2 * sqrt(average))  # tokens choose experts almost at random
        rows = min(MAX_FEW_ROWS, tokens, likely)
        rows = max(MIN_ROWS, triton.next_power_of_2(rows))
        if itemsize == 4:
            return GroupedBlocks(rows, 16, 64, 4, 3)
        if spec.gated and rows == 16:
            return GroupedBlocks(rows, 64, 128, 4, 3)
        if not spec.gated and triton.cdiv(spec.width, 64) * pairs < MULTIPROCESSORS:
            return GroupedBlocks(rows, 32, 128, 4, 4)
        return GroupedBlocks(rows, 64, 64, 4, 4)
    rows = max(MIN_ROWS, triton.next_power_of_2(ceil(average)))
    if itemsize == 4:
        return GroupedBlocks(min(64, rows), 32, 32, 4, 3)
    if rows < 128 or spec.transposed:
        return GroupedBlocks(min(128, rows), 128, 64, 8, 3)
    return _choose_wide_tile(spec, average)


def _choose_wide_tile(spec: GroupedLinearSpec, average: float) -> GroupedBlocks:
    """Of weights ``[experts, out, in]``, whose experts have more than 64 rows on average."""
    if spec.gated:
        if average < 256:
            return GroupedBlocks(128, 128, 64, 8, 4, rest=32)
        return GroupedBlocks(256, 64, 64, 8, 4, rest=32)
    if spec.width < 256:
        return GroupedBlocks(128, 128, 64, 8, 3, rest=32)
    stages, rest = (4, 32) if average < 256 else (3, 64)
    return GroupedBlocks(128, 256, 64, 8, stages, rest=rest, rows_first=True)
