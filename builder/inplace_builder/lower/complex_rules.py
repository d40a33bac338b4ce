"""What operators on complex numbers compute on pairs of real tensors."""

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node

from inplace_builder.graph.nodes import dtype, value
from inplace_builder.lower.complex_numbers import (
    NotRealError,
    Pair,
    PairEmitter,
    Part,
    add,
    as_pair,
    as_tensors,
    is_complex,
    multiply,
    negative,
    pair_rule,
    product,
    subtract,
)

aten = torch.ops.aten


def _result(emit: PairEmitter, node: Node, pair: Pair) -> Pair:
    return as_tensors(emit, pair, dtype(node))


# Making complex tensors, and taking their parts


@pair_rule(aten.view_as_complex.default)
def _view_as_complex(emit: PairEmitter, node: Node, x: Node) -> Pair:
    return Pair(*(emit.call(aten.select.int, x, -1, part) for part in (0, 1)))


@pair_rule(aten.view_as_real.default)
def _view_as_real(emit: PairEmitter, node: Node, x: Pair) -> Node:
    return emit.call(aten.stack.default, list(x), -1)


@pair_rule(aten.complex.default)
def _complex(emit: PairEmitter, node: Node, real: Node, imag: Node) -> Pair:
    return _result(emit, node, Pair(real, imag))


@pair_rule(aten.polar.default)
def _polar(emit: PairEmitter, node: Node, length: Part, angle: Part) -> Pair:
    turned = (emit.call(each.default, angle) for each in (aten.cos, aten.sin))
    return Pair(*(emit.call(aten.mul.Tensor, length, each) for each in turned))


@pair_rule(aten.real.default)
def _real(emit: PairEmitter, node: Node, x: Pair) -> Part:
    return x.real


@pair_rule(aten.imag.default)
def _imag(emit: PairEmitter, node: Node, x: Pair) -> Part:
    return x.imag


@pair_rule(
    aten._conj.default, aten.conj.default, aten._conj_physical.default, aten.conj_physical.default
)
def _conjugate(emit: PairEmitter, node: Node, x: Pair) -> Pair:
    return Pair(x.real, negative(emit, x.imag))


@pair_rule(
    aten.full.default,
    aten.full_like.default,
    aten.new_full.default,
    aten.scalar_tensor.default,
)
def _full(emit: PairEmitter, node: Node, *args: Any, **kwargs: Any) -> Pair:
    *sizes, number = args
    return Pair(
        *(
            _made(emit, node, (*sizes, part), kwargs)
            for part in (complex(number).real, complex(number).imag)
        )
    )


@pair_rule(
    aten.zeros.default,
    aten.zeros_like.default,
    aten.new_zeros.default,
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.new_empty.default,
)
def _zeros(emit: PairEmitter, node: Node, *args: Any, **kwargs: Any) -> Pair:
    made = _made(emit, node, args, kwargs)
    return Pair(made, made)


@pair_rule(aten.ones.default, aten.ones_like.default, aten.new_ones.default)
def _ones(emit: PairEmitter, node: Node, *args: Any, **kwargs: Any) -> Pair:
    made = _made(emit, node, args, kwargs)
    return Pair(made, emit.call(aten.zeros_like.default, made))


def _made(emit: PairEmitter, node: Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Node:
    """One part of a new tensor, by the node's own operator."""
    args = tuple(each.real if isinstance(each, Pair) else each for each in args)
    kwargs = kwargs | {"dtype": dtype(node).to_real()}
    return emit.call(node.target, *args, **kwargs)


@pair_rule(aten._to_copy.default, aten.to.dtype)
def _cast(emit: PairEmitter, node: Node, x: Any, *args: Any, **kwargs: Any) -> Any:
    """As PyTorch: what becomes a number loses its imaginary part, 0 alone becomes False."""
    real, imag = as_pair(x)
    assert isinstance(real, Node)
    if dtype(node) == torch.bool:
        parts = [emit.call(aten.ne.Scalar, part, 0) for part in (real, imag)]
        return emit.call(aten.logical_or.default, *parts)
    if not is_complex(node):
        return emit.call(aten.to.dtype, real, dtype(node))
    return _result(emit, node, Pair(real, imag))


# Operators that are applied to both parts


@pair_rule(
    aten.broadcast_to.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.cumsum.default,
    aten.diagonal.default,
    aten.expand.default,
    aten.flatten.using_ints,
    aten.flip.default,
    aten.gather.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.mean.default,
    aten.mean.dim,
    aten.neg.default,
    aten.permute.default,
    aten.repeat.default,
    aten.reshape.default,
    aten.roll.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.sum.default,
    aten.sum.dim_IntList,
    aten.t.default,
    aten.transpose.int,
    aten.tril.default,
    aten.triu.default,
    aten.unflatten.int,
    aten.unfold.default,
    aten.unsqueeze.default,
    aten.view.default,
    aten._unsafe_view.default,
)
def _of_both(emit: PairEmitter, node: Node, x: Any, *args: Any, **kwargs: Any) -> Pair:
    if not isinstance(x, Pair) or kwargs.get("dtype") is not None:
        raise NotRealError("it changes to a complex type; convert its input first")
    return Pair(*(emit.call(node.target, part, *args, **kwargs) for part in x))


@pair_rule(aten.constant_pad_nd.default)
def _padded(
    emit: PairEmitter, node: Node, x: Pair, pads: Sequence[Any], number: complex = 0
) -> Pair:
    numbers = (complex(number).real, complex(number).imag)
    parts = zip(x, numbers, strict=True)
    return Pair(*(emit.call(node.target, part, pads, each) for part, each in parts))


@pair_rule(
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
    aten.resolve_conj.default,
    aten.resolve_neg.default,
)
def _itself(emit: PairEmitter, node: Node, x: Pair) -> Pair:
    return x


@pair_rule(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int)
def _pieces(emit: PairEmitter, node: Node, x: Pair, *args: Any) -> list[Pair]:
    real, imag = (emit.call(node.target, part, *args) for part in x)
    return [
        Pair(*(emit.call(operator.getitem, each, place) for each in (real, imag)))
        for place in range(len(value(real)))
    ]


@pair_rule(operator.getitem)
def _piece(emit: PairEmitter, node: Node, pieces: list[Pair], place: int) -> Pair:
    return pieces[place]


@pair_rule(aten.cat.default, aten.stack.default)
def _joined(emit: PairEmitter, node: Node, xs: Sequence[Any], *args: Any) -> Pair:
    real, imag = _operands(emit, node, *xs)
    return Pair(*(emit.call(node.target, list(parts), *args) for parts in (real, imag)))


@pair_rule(
    aten.slice_scatter.default,
    aten.select_scatter.default,
    aten.diagonal_scatter.default,
    aten.copy.default,
    aten.expand_as.default,
    aten.reshape_as.default,
    aten.view_as.default,
)
def _with_another(
    emit: PairEmitter, node: Node, base: Any, other: Any, *args: Any, **kwargs: Any
) -> Any:
    if not is_complex(node):  # a copy of complex numbers to real ones takes their real parts
        real = as_pair(other).real
        return emit.call(node.target, as_pair(base).real, real, *args, **kwargs)
    parts = _operands(emit, node, base, other)
    return Pair(*(emit.call(node.target, *each, *args, **kwargs) for each in parts))


@pair_rule(aten.where.self)
def _where(emit: PairEmitter, node: Node, condition: Node, a: Any, b: Any) -> Pair:
    parts = _operands(emit, node, a, b)
    return Pair(*(emit.call(aten.where.self, condition, *each) for each in parts))


@pair_rule(aten.index_put.default)
def _index_put(
    emit: PairEmitter, node: Node, base: Any, indices: Any, new: Any, *args: Any
) -> Pair:
    parts = _operands(emit, node, base, new)
    return Pair(*(emit.call(aten.index_put.default, a, indices, b, *args) for a, b in parts))


def _operands(emit: PairEmitter, node: Node, *xs: Any) -> Iterator[tuple[Part, ...]]:
    """The real parts of several operands, then their imaginary parts, all as tensors."""
    return zip(*(as_tensors(emit, as_pair(x), dtype(node)) for x in xs), strict=True)


@pair_rule(aten.sym_size.int)
def _size(emit: PairEmitter, node: Node, x: Pair, axis: int) -> Node:
    return emit.call(aten.sym_size.int, x.real, axis)


# Arithmetic


@pair_rule(aten.add.Tensor, aten.add.Scalar)
def _sum(emit: PairEmitter, node: Node, a: Any, b: Any, alpha: Any = 1) -> Pair:
    x, y = as_pair(a), product(emit, as_pair(b), as_pair(alpha))
    return _result(emit, node, Pair(add(emit, x.real, y.real), add(emit, x.imag, y.imag)))


@pair_rule(aten.sub.Tensor, aten.sub.Scalar)
def _difference(emit: PairEmitter, node: Node, a: Any, b: Any, alpha: Any = 1) -> Pair:
    x, y = as_pair(a), product(emit, as_pair(b), as_pair(alpha))
    parts = (subtract(emit, *each) for each in zip(x, y, strict=True))
    return _result(emit, node, Pair(*parts))


@pair_rule(aten.rsub.Tensor, aten.rsub.Scalar)
def _reversed_difference(emit: PairEmitter, node: Node, a: Any, b: Any, alpha: Any = 1) -> Pair:
    y = product(emit, as_pair(a), as_pair(alpha))
    parts = (subtract(emit, *each) for each in zip(as_pair(b), y, strict=True))
    return _result(emit, node, Pair(*parts))


@pair_rule(aten.mul.Tensor, aten.mul.Scalar)
def _times(emit: PairEmitter, node: Node, a: Any, b: Any) -> Pair:
    return _result(emit, node, product(emit, as_pair(a), as_pair(b)))


@pair_rule(aten.mm.default, aten.bmm.default, aten.matmul.default)
def _matrix_product(emit: PairEmitter, node: Node, a: Any, b: Any) -> Pair:
    def multiply(emit: PairEmitter, x: Part, y: Part) -> Part:
        return emit.call(node.target, x, y)

    return _result(emit, node, product(emit, as_pair(a), as_pair(b), multiply))


@pair_rule(aten.div.Tensor, aten.div.Scalar)
def _quotient(emit: PairEmitter, node: Node, a: Any, b: Any) -> Pair:
    """``x / y = x * conj(y) / |y|²``; by a real number both parts are divided.

    Both are first divided by the larger part of ``y``, whose square would overflow or vanish.
    """
    x, y = as_pair(a), as_pair(b)
    if y.imag is None:
        return _result(emit, node, _divided(emit, x, y.real))
    if isinstance(y.real, Node) and isinstance(y.imag, Node):
        larger, _ = _larger_part(emit, y)
        x, y = (_divided(emit, each, larger) for each in (x, y))
    size = add(emit, multiply(emit, y.real, y.real), multiply(emit, y.imag, y.imag))
    conjugate = Pair(y.real, negative(emit, y.imag))
    return _result(emit, node, _divided(emit, product(emit, x, conjugate), size))


def _divided(emit: PairEmitter, x: Pair, by: Part) -> Pair:
    def divide(part: Part) -> Part:
        if part is None:
            return None
        if isinstance(part, Node):
            return emit.call(aten.div.Tensor, part, by)
        assert isinstance(by, Node)
        return multiply(emit, emit.call(aten.reciprocal.default, by), part)

    return Pair(*map(divide, x))


@pair_rule(aten.reciprocal.default)
def _reciprocal(emit: PairEmitter, node: Node, x: Pair) -> Pair:
    return _quotient(emit, node, 1.0, x)


@pair_rule(aten.pow.Tensor_Scalar)
def _power(emit: PairEmitter, node: Node, x: Pair, exponent: float) -> Pair:
    if exponent not in (1, 2, 3, 4):
        raise NotRealError("complex powers are lowered up to 4, of whole numbers")
    result = x
    for _ in range(int(exponent) - 1):
        result = product(emit, result, x)
    return result


@pair_rule(aten.abs.default)
def _absolute(emit: PairEmitter, node: Node, x: Pair) -> Node:
    """The larger part times ``sqrt(1 + r²)``: squares of large numbers would overflow."""
    larger, smaller = _larger_part(emit, x)
    is_zero = emit.call(aten.eq.Scalar, larger, 0)
    safe = emit.call(aten.where.self, is_zero, emit.call(aten.ones_like.default, larger), larger)
    ratio = emit.call(aten.div.Tensor, smaller, safe)
    square = emit.call(aten.add.Tensor, emit.call(aten.mul.Tensor, ratio, ratio), 1.0)
    return emit.call(aten.mul.Tensor, larger, emit.call(aten.sqrt.default, square))


def _larger_part(emit: PairEmitter, x: Pair) -> tuple[Node, Node]:
    """The sizes of the larger and of the smaller part."""
    sizes = [emit.call(aten.abs.default, part) for part in x]
    return emit.call(aten.maximum.default, *sizes), emit.call(aten.minimum.default, *sizes)


@pair_rule(aten.angle.default)
def _angle(emit: PairEmitter, node: Node, x: Pair) -> Node:
    return emit.call(aten.atan2.default, x.imag, x.real)


@pair_rule(aten.exp.default)
def _exponential(emit: PairEmitter, node: Node, x: Pair) -> Pair:
    return _polar(emit, node, emit.call(aten.exp.default, x.real), x.imag)


@pair_rule(aten.log.default)
def _logarithm(emit: PairEmitter, node: Node, x: Pair) -> Pair:
    return Pair(emit.call(aten.log.default, _absolute(emit, node, x)), _angle(emit, node, x))


@pair_rule(aten.eq.Tensor, aten.eq.Scalar)
def _equal(emit: PairEmitter, node: Node, a: Any, b: Any) -> Node:
    pairs = zip(as_pair(a), as_pair(b), strict=True)
    parts = [emit.call(aten.eq.Tensor, *_first_a_tensor(*each)) for each in pairs]
    return emit.call(aten.logical_and.default, *parts)


def _first_a_tensor(a: Part, b: Part) -> tuple[Part, Part]:
    a, b = (0.0 if each is None else each for each in (a, b))
    return (a, b) if isinstance(a, Node) else (b, a)
