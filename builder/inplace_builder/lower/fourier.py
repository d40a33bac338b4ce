"""Fourier transforms as products with constant matrices, on pairs of real tensors."""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from inplace_builder.graph.nodes import dtype, shape
from inplace_builder.lower.complex_numbers import (
    NotRealError,
    Pair,
    PairEmitter,
    Part,
    pair_rule,
    product,
)

aten = torch.ops.aten


MAX_LENGTH = 4096
"""Elements of a transformed axis: the matrices have the square of it."""


Matrix: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""The parts of a constant matrix."""


def _scale(normalization: int, length: int) -> float:
    """PyTorch's ``fft_norm_mode``: none, by the root of the length, by the length."""
    return (1.0, 1.0 / math.sqrt(length), 1.0 / length)[normalization]


def _length(x: Part, axis: int) -> int:
    assert isinstance(x, Node)
    return _checked(shape(x)[axis])


def _checked(length: Any) -> int:
    if not isinstance(length, int):
        raise NotRealError("the transformed axis has an extent that varies; fix it")
    if length > MAX_LENGTH:
        raise NotRealError(f"it transforms {length} elements; at most {MAX_LENGTH} are lowered")
    return length


def _matrix(rows: int, columns: int, length: int, sign: int) -> Matrix:
    """``exp(sign 2πi r c / length)``, in double precision while it is computed."""
    angles = torch.outer(torch.arange(rows), torch.arange(columns)).remainder(length).double()
    angles = angles * (sign * 2 * math.pi / length)
    return angles.cos(), angles.sin()


def _constant(emit: PairEmitter, matrix: torch.Tensor, like: Node) -> Node:
    return emit.constant(matrix.to(dtype(like)), "transform")


def _transformed(emit: PairEmitter, x: Pair, axis: int, matrix: Matrix) -> Pair:
    """The product of one axis with a matrix ``[length, results]``."""
    like = x.real if isinstance(x.real, Node) else x.imag
    assert isinstance(like, Node)
    last = len(shape(like)) - 1
    moved = Pair(*(_swap(emit, part, axis, last) for part in x))
    constants = Pair(*(_constant(emit, part, like) for part in matrix))

    def multiply(emit: PairEmitter, a: Part, b: Part) -> Part:
        return emit.call(aten.matmul.default, a, b)

    return Pair(
        *(_swap(emit, part, axis, last) for part in product(emit, moved, constants, multiply))
    )


def _swap(emit: PairEmitter, part: Part, axis: int, last: int) -> Part:
    if not isinstance(part, Node) or axis % (last + 1) == last:
        return part
    return emit.call(aten.transpose.int, part, axis, last)


@pair_rule(aten._fft_r2c.default)
def _fft_of_real(
    emit: PairEmitter, node: Node, x: Node, axes: Sequence[int], normalization: int, onesided: bool
) -> Pair:
    result = Pair(x, None)
    for place, axis in enumerate(reversed(axes)):
        length = _length(x, axis)
        results = length // 2 + 1 if onesided and place == 0 else length
        real, imag = _matrix(length, results, length, -1)
        scale = _scale(normalization, length)
        result = _transformed(emit, result, axis, (real * scale, imag * scale))
    return result


@pair_rule(aten._fft_c2c.default)
def _fft(
    emit: PairEmitter, node: Node, x: Pair, axes: Sequence[int], normalization: int, forward: bool
) -> Pair:
    for axis in axes:
        length = _length(x.real, axis)
        real, imag = _matrix(length, length, length, -1 if forward else 1)
        scale = _scale(normalization, length)
        x = _transformed(emit, x, axis, (real * scale, imag * scale))
    return x


@pair_rule(aten._fft_c2r.default)
def _inverse_fft_to_real(
    emit: PairEmitter, node: Node, x: Pair, axes: Sequence[int], normalization: int, length: int
) -> Part:
    """Coefficients but the first, and the middle one, count twice: for their conjugates."""
    *others, last = axes
    x = _fft(emit, node, x, others, normalization, False) if others else x
    _checked(length)
    real, imag = _matrix(length // 2 + 1, length, length, 1)
    counts = torch.full((length // 2 + 1, 1), 2.0, dtype=torch.float64)
    counts[0] = 1.0
    if length % 2 == 0:
        counts[-1] = 1.0
    scale = counts * _scale(normalization, length)
    kept = Pair(*(emit.call(aten.slice.Tensor, part, last, 0, length // 2 + 1) for part in x))
    return _transformed(emit, kept, last, (real * scale, imag * scale)).real
