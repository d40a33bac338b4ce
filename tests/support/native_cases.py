"""Networks of TensorRT's cache layer without a matrix product, and the steps that run them.

TensorRT 10.15 can be had without the kernels of matrix products for a GPU, and runs a network that
has none. So every product is a multiplication and a sum here; all other layers are those of a
build.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from inplace_builder.lower.layers import ITensor
from inplace_builder.lower.network import Network

from support.state_cases import STATE_CASES, StateCase

COUNTS = (4, *[1] * 9, 3, *[1] * 9)
"""Tokens of a row in each step."""
CAPACITY = 7 + sum(COUNTS)
"""The last step fills the last row's cache to its end."""
LENGTHS = (5, 3, CAPACITY)
"""Of the caches that nothing is appended to."""
REFUSED = {
    "ring": "keys is a ring",
    "ring-sinks": "keys is a ring",
    "ring-chunk": "keys is a ring",
    "packed-first-axis": "memory has rank 3 with its slots",
    "packed-ring": "memory grows along axis 3",
    "replace": "memory has rank 3",
    "replace-int32": "memory has rank 2",
}
"""State cases that the cache layer refuses, and why."""


def _long(case: StateCase) -> StateCase:
    """The case with steps for every member of `COUNTS`."""
    starts = [tuple(at + sum(COUNTS[:step]) for at in (0, 3, 7)) for step in range(len(COUNTS))]
    if case.name == "cross":
        starts = [LENGTHS] * len(COUNTS)
    states = []
    for state in case.states:
        assert state.axis is not None
        shape = list(state.shape)
        shape[state.axis] = CAPACITY
        states.append(state.model_copy(update={"shape": tuple(shape)}))
    steps = tuple(zip(COUNTS, starts, strict=True))
    shapes = dict(case.shapes)
    if "bias" in shapes:
        shapes["bias"] = (*shapes["bias"][:2], CAPACITY)
    return replace(case, states=tuple(states), steps=steps, shapes=shapes)


NATIVE_CASES = [_long(case) for case in STATE_CASES if case.name not in REFUSED]
"""The state cases that the cache layer updates, with 20 steps each."""


def _multiply_and_sum(
    network: Network, a: ITensor, b: ITensor, *, transpose_b: bool = False
) -> ITensor:
    """`Network.matmul` without a matrix product; sums are in float32."""
    rank, dtype = max(len(a.shape), len(b.shape)), network.dtype_of(a)
    a, b = (network.cast(network.expand_rank(x, rank), torch.float32) for x in (a, b))
    if not transpose_b:
        b = network.permute(b, [*range(rank - 2), rank - 1, rank - 2])
    pairs = network.multiply(network.unsqueeze(a, [rank - 1]), network.unsqueeze(b, [rank - 2]))
    return network.cast(network.reduce("SUM", pairs, [rank], keep=False), dtype)


@contextmanager
def no_matrix_products() -> Iterator[None]:
    """Within the block networks are made without matrix products."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Network, "matmul", _multiply_and_sum)
        yield
