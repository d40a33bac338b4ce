"""For each operator where its result has the tokens of a step, if it treats them alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from inplace_builder.passes.emit import shape, value
from inplace_builder.passes.match import AnyNode, call
from inplace_builder.passes.token_axes import MixesTokensError, TokenAxes, is_one

aten = torch.ops.aten

Rule = Callable[[TokenAxes, AnyNode], int | None]
"""Where an operator's result has its tokens, if at all."""


def of_the_step(work: TokenAxes, node: Node) -> int | None:
    """A tensor that is made of no token: the same in every step, or one that is spread over the tokens."""
    if not any(isinstance(value(operand), torch.SymInt) for operand in node.all_input_nodes):
        return None
    counted = [axis for axis, extent in enumerate(shape(node)) if work.counts(extent)]
    source = node.args[0]
    if call(node, aten.expand.default) and isinstance(source, Node) and len(counted) == 1:
        before = counted[0] - (len(shape(node)) - len(shape(source)))
        if before < 0 or is_one(shape(source)[before]):
            return counted[0]
    raise MixesTokensError(node, "depends on how many tokens a step has")


def pointwise(work: TokenAxes, node: AnyNode) -> int | None:
    """Operands are broadcast and combined entry by entry."""
    rank = len(shape(node))
    operands = [operand for operand in node.all_input_nodes if isinstance(value(operand), Tensor)]
    if any(isinstance(value(operand), torch.SymInt) for operand in node.all_input_nodes):
        raise MixesTokensError(node, "depends on how many tokens a step has")
    places = [place for operand in operands if (place := work.place(node, operand, rank)) is not None]
    wanted = 1 if 1 in places else places[0]
    for operand in operands:
        inside = wanted - rank + len(shape(operand))
        if operand in work.axes:
            work.move(node, operand, inside)
        elif inside >= 0 and not is_one(shape(operand)[inside]):
            raise MixesTokensError(node, "takes a tensor that differs between the tokens of a step")
    return wanted


def _same(work: TokenAxes, node: AnyNode) -> int | None:
    """One operand, changed entry by entry; others give a type only."""
    return work.axes.get(first(node))


def first(node: AnyNode) -> Node:
    """The first operand."""
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def _onlyfirst(work: TokenAxes, node: AnyNode) -> int:
    """The token axis of the first operand; it must be the only one that has tokens."""
    source = first(node)
    if source not in work.axes or any(operand in work.axes for operand in node.all_input_nodes if operand is not source):
        raise MixesTokensError(node, "takes tokens where it has weights")
    return work.axes[source]


def _linear(work: TokenAxes, node: AnyNode) -> int:
    axis = _onlyfirst(work, node)
    work.keeps(node, axis, -1)
    return axis


def _normalized(work: TokenAxes, node: AnyNode) -> int:
    axis = _onlyfirst(work, node)
    work.keeps(node, axis, *range(-len(node.args[1]), 0))
    return axis


def _addmm(work: TokenAxes, node: AnyNode) -> int:
    bias, x, weight = node.args[:3]
    if work.axes.get(x) != 0 or bias in work.axes or weight in work.axes:
        raise MixesTokensError(node, "takes tokens where it has weights")
    return 0


def _matmul(work: TokenAxes, node: AnyNode) -> int:
    x, y = node.args[:2]
    assert isinstance(x, Node) and isinstance(y, Node)
    rank, (given, other) = len(shape(node)), ((x, y) if x in work.axes else (y, x))
    if other in work.axes or min(len(shape(x)), len(shape(y))) < 2:
        raise MixesTokensError(node, "multiplies tokens with tokens")
    axis, summed = work.axes[given] - len(shape(given)), -1 if given is x else -2
    if axis == summed:
        raise MixesTokensError(node, "sums over the tokens")
    if axis < -2 and len(shape(other)) >= -axis and not is_one(shape(other)[axis]):
        raise MixesTokensError(node, "takes a tensor that differs between the tokens of a step")
    return axis + rank


def _option(node: AnyNode, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _along(work: TokenAxes, node: AnyNode) -> int:
    """An operator along one axis that keeps all axes."""
    axis = _onlyfirst(work, node)
    work.keeps(node, axis, _option(node, 1, "dim", -1))
    return axis


def _split(work: TokenAxes, node: AnyNode) -> int:
    axis = _onlyfirst(work, node)
    work.keeps(node, axis, _option(node, 2, "dim", 0))
    return axis


def _reduced(work: TokenAxes, node: AnyNode) -> int:
    axis, rank = _onlyfirst(work, node), len(shape(first(node)))
    over = _option(node, 1, "dim", None)
    if over is None or over == []:
        raise MixesTokensError(node, "works along the tokens")
    places = sorted(place % rank for place in (over if isinstance(over, list | tuple) else [over]))
    work.keeps(node, axis, *places)
    return axis if _option(node, 2, "keepdim", False) else axis - sum(place < axis for place in places)


def _transposed(work: TokenAxes, node: AnyNode) -> int:
    axis, rank = work.axes[first(node)], len(shape(node))
    one, other = (node.args[1] % rank, node.args[2] % rank) if len(node.args) > 2 else (0, rank - 1)
    return int({one: other, other: one}.get(axis, axis))


def _permuted(work: TokenAxes, node: AnyNode) -> int:
    order = [place % len(shape(node)) for place in node.args[1]]
    return order.index(work.axes[first(node)])


def _unsqueezed(work: TokenAxes, node: AnyNode) -> int:
    axis = work.axes[first(node)]
    return axis + int(node.args[1] % len(shape(node)) <= axis)


def _squeezed(work: TokenAxes, node: AnyNode) -> int:
    axis, rank = work.axes[first(node)], len(shape(first(node)))
    given = node.args[1]
    places = [place % rank for place in (given if isinstance(given, list | tuple) else [given])]
    work.keeps(node, axis, *places)
    gone = [place for place in places if place < axis and is_one(shape(first(node))[place])]
    return axis - len(gone)


def _sliced(work: TokenAxes, node: AnyNode) -> int:
    axis, source = work.axes[first(node)], first(node)
    along = _option(node, 1, "dim", 0) % len(shape(source))
    whole = str(shape(node)[along]) == str(shape(source)[along]) and _option(node, 4, "step", 1) == 1
    if along == axis and not whole:
        raise MixesTokensError(node, "takes some tokens of a step")
    if any(operand is not source for operand in node.all_input_nodes) and along != axis:
        raise MixesTokensError(node, "depends on how many tokens a step has")
    return axis


def _selected(work: TokenAxes, node: AnyNode) -> int:
    axis, along = _onlyfirst(work, node), node.args[1] % len(shape(first(node)))
    work.keeps(node, axis, along)
    return axis - int(along < axis)


def _joined(work: TokenAxes, node: AnyNode) -> int:
    parts = node.args[0]
    assert isinstance(parts, list | tuple)
    axis = next(work.axes[part] for part in parts if part in work.axes)
    for part in parts:
        assert isinstance(part, Node)
        work.move(node, part, axis)
    along = _option(node, 1, "dim", 0) % len(shape(node))
    if call(node, aten.stack.default):
        return axis + int(along <= axis)
    if along == axis:
        raise MixesTokensError(node, "joins along the tokens")
    return axis


def _expanded(work: TokenAxes, node: AnyNode) -> int:
    axis: int = work.axes[first(node)] + len(shape(node)) - len(shape(first(node)))
    if not work.counts(shape(node)[axis]):
        raise MixesTokensError(node, "repeats tokens")
    return axis


def _repeated(work: TokenAxes, node: AnyNode) -> int:
    axis: int = work.axes[first(node)] + len(shape(node)) - len(shape(first(node)))
    if node.args[1][axis] != 1:
        raise MixesTokensError(node, "repeats tokens")
    return axis


def _viewed(work: TokenAxes, node: AnyNode) -> int:
    return work.reshaped(node, first(node), work.axes[first(node)])


def _embedded(work: TokenAxes, node: AnyNode) -> int:
    weight, index = node.args[:2]
    if weight in work.axes or index not in work.axes:
        raise MixesTokensError(node, "takes tokens where it has weights")
    return work.axes[index]


def _indexed(work: TokenAxes, node: AnyNode) -> int:
    """A fixed table at one index of tokens."""
    table, indices = node.args[0], node.args[1]
    given = [(place, index) for place, index in enumerate(indices) if index is not None]
    if table in work.axes or len(given) != 1 or given[0][1] not in work.axes:
        raise MixesTokensError(node, "picks entries in a way that has no rule")
    place, index = given[0]
    return place + work.axes[index]


def _made(work: TokenAxes, node: AnyNode) -> int | None:
    """A constant in the type of a tensor."""
    return of_the_step(work, node) if len(node.all_input_nodes) > 1 else None


_SAME = (
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten.type_as.default,
    aten.alias.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.dropout.default,
    aten.clone.default,
    aten.lift_fresh_copy.default,
    aten.ones_like.default,
    aten.zeros_like.default,
    aten.full_like.default,
)
_POINTWISE = (aten.__and__.Tensor, aten.__or__.Tensor, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
"""Operators that lack the tag."""
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int)
"""Operators that only say the extents anew."""

RULES: dict[Any, Rule] = {
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(_POINTWISE, pointwise),
    **dict.fromkeys((aten.new_ones.default, aten.new_zeros.default, aten.new_full.default), _made),
    aten.linear.default: _linear,
    **dict.fromkeys((aten.layer_norm.default, aten.rms_norm.default), _normalized),
    aten.addmm.default: _addmm,
    **dict.fromkeys((aten.matmul.default, aten.mm.default, aten.bmm.default), _matmul),
    **dict.fromkeys((aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten.cumsum.default, aten.glu.default), _along),
    **dict.fromkeys((aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default), _split),
    **dict.fromkeys((aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.argmax.default), _reduced),
    **dict.fromkeys((aten.transpose.int, aten.t.default, aten.numpy_T.default), _transposed),
    aten.permute.default: _permuted,
    aten.unsqueeze.default: _unsqueezed,
    **dict.fromkeys((aten.squeeze.dim, aten.squeeze.dims), _squeezed),
    aten.slice.Tensor: _sliced,
    aten.select.int: _selected,
    **dict.fromkeys((aten.cat.default, aten.stack.default), _joined),
    aten.expand.default: _expanded,
    aten.repeat.default: _repeated,
    **dict.fromkeys(VIEWS, _viewed),
    aten.embedding.default: _embedded,
    aten.index.Tensor: _indexed,
}
"""An operator without a rule that has torch's tag ``pointwise`` has the rule `pointwise`."""
