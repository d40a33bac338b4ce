"""For each operator where its result has the tokens of a step, if it treats them alone.

Which axis of each tensor counts the tokens of a step: what is known, and what the rules of operators (`passes.tokenwise`) ask.

The proof that no operator of a graph mixes the tokens of a step.

A graph of which every operator treats tokens alone says the same of tokens of several sequences behind one another as of each sequence by
itself. Every operator has a rule; one without a rule, or one that mixes tokens, ends the proof with the operator's name.
"""

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from inplace_builder.graph.nodes import AnyNode, is_call, shape, value


class MixesTokensError(Exception):
    """An operator does not treat tokens alone, or is not known to.

    Attributes:
        node: the operator's call.
    """

    def __init__(self, node: Node, because: str) -> None:
        super().__init__(f"{node.target} {because}")
        self.node = node


class TokenAxes:
    """The token axes of a graph in which a step has ``tokens`` tokens.

    Args:
        tokens: 1 for a graph of one token, or the dynamic extent that counts them.
        seeds: where tokens come from: each node with its token axis.
        opaque: operators that mix tokens as they should (attention): the operands that are followed, and the token axis that these and
            the result have.

    Attributes:
        axis_of: the token axis of each tensor that has one.
        transposed: for a graph of one token, operands whose token axis must be exchanged with another axis (of extent 1) before this use.
    """

    def __init__(
        self,
        tokens: Any,
        seeds: Mapping[Node, int],
        opaque: Mapping[Node, tuple[Sequence[Node], int]] | None = None,
    ) -> None:
        self.tokens = tokens
        self.axis_of: dict[Node, int] = dict(seeds)
        self.transposed: dict[tuple[Node, Node], tuple[int, int]] = {}
        self._seeds = frozenset(seeds)
        self._opaque = dict(opaque or {})

    @property
    def seeds(self) -> frozenset[Node]:
        """Where tokens come from."""
        return self._seeds

    def opaque(self, node: Node) -> tuple[Sequence[Node], int] | None:
        """The operands of an operator that mixes tokens as it should, and their token axis; None for any other."""
        return self._opaque.get(node)

    def is_token_count(self, extent: Any) -> bool:
        """Whether an extent is the number of tokens."""
        return str(extent) == str(self.tokens)

    def axis_in(self, node: Node, operand: AnyNode, rank: int) -> int | None:
        """The token axis of an operand, in a result of this rank to which it is broadcast."""
        axis = self.axis_of.get(operand)
        return None if axis is None else axis + rank - len(shape(operand))

    def align(self, node: Node, operand: Node, axis: int) -> None:
        """Let an operand have its token axis here; MixesTokensError where it cannot."""
        own = self.axis_of.get(operand)
        if own == axis:
            return
        if own is None or axis < 0 or self.tokens != 1 or not is_one(shape(operand)[axis]):
            raise MixesTokensError(node, "takes tokens along different axes")
        self.transposed[node, operand] = (own, axis)

    def check_untouched(self, node: Node, axis: int, *touched: int) -> None:
        """MixesTokensError where an operator works along the token axis."""
        rank = len(shape(node.args[0])) if isinstance(node.args[0], Node) else 0
        if axis in [place % rank for place in touched]:
            raise MixesTokensError(node, "works along the tokens")

    def axis_after_view(self, node: Node, source: Node, axis: int) -> int:
        """Where a view puts the token axis: an axis as long, with as many elements before it and behind."""
        before, after = shape(source), shape(node)
        found = [
            place
            for place, extent in enumerate(after)
            if self.is_token_count(extent)
            and _product(after[:place]) == _product(before[:axis])
            and _product(after[place + 1 :]) == _product(before[axis + 1 :])
        ]
        if not found:
            raise MixesTokensError(node, "puts tokens and other axes together")
        # a graph of one token has several axes of one entry: the second is where models have their tokens
        return next((place for place in (1, axis) if place in found), found[-1])


def is_one(extent: Any) -> bool:
    """Whether an extent is certainly 1."""
    return isinstance(extent, int) and extent == 1


def _product(extents: Sequence[Any]) -> str:
    product: Any = 1
    for size in extents:
        product = product * size
    return str(product)


aten = torch.ops.aten


Rule = Callable[[TokenAxes, AnyNode], int | None]
"""Where an operator's result has its tokens, if at all."""


def _axis_without_token_operands(work: TokenAxes, node: Node) -> int | None:
    """A tensor that is made of no token: the same in every step, or one that is spread over the tokens."""
    if not any(isinstance(value(operand), torch.SymInt) for operand in node.all_input_nodes):
        return None
    counted = [axis for axis, extent in enumerate(shape(node)) if work.is_token_count(extent)]
    source = node.args[0]
    if is_call(node, aten.expand.default) and isinstance(source, Node) and len(counted) == 1:
        before = counted[0] - (len(shape(node)) - len(shape(source)))
        if before < 0 or is_one(shape(source)[before]):
            return counted[0]
    raise MixesTokensError(node, "depends on how many tokens a step has")


def _pointwise(work: TokenAxes, node: AnyNode) -> int | None:
    """Operands are broadcast and combined entry by entry."""
    rank = len(shape(node))
    operands = [operand for operand in node.all_input_nodes if isinstance(value(operand), Tensor)]
    if any(isinstance(value(operand), torch.SymInt) for operand in node.all_input_nodes):
        raise MixesTokensError(node, "depends on how many tokens a step has")
    places = [
        place for operand in operands if (place := work.axis_in(node, operand, rank)) is not None
    ]
    wanted = 1 if 1 in places else places[0]
    for operand in operands:
        inside = wanted - rank + len(shape(operand))
        if operand in work.axis_of:
            work.align(node, operand, inside)
        elif inside >= 0 and not is_one(shape(operand)[inside]):
            raise MixesTokensError(node, "takes a tensor that differs between the tokens of a step")
    return wanted


def _same(work: TokenAxes, node: AnyNode) -> int | None:
    """One operand, changed entry by entry; others give a type only."""
    return work.axis_of.get(first_operand(node))


def first_operand(node: AnyNode) -> Node:
    """The first operand."""
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def _axis_of_only_first(work: TokenAxes, node: AnyNode) -> int:
    """The token axis of the first operand; it must be the only one that has tokens."""
    source = first_operand(node)
    if source not in work.axis_of or any(
        operand in work.axis_of for operand in node.all_input_nodes if operand is not source
    ):
        raise MixesTokensError(node, "takes tokens where it has weights")
    return work.axis_of[source]


def _linear(work: TokenAxes, node: AnyNode) -> int:
    axis = _axis_of_only_first(work, node)
    work.check_untouched(node, axis, -1)
    return axis


def _normalized(work: TokenAxes, node: AnyNode) -> int:
    axis = _axis_of_only_first(work, node)
    work.check_untouched(node, axis, *range(-len(node.args[1]), 0))
    return axis


def _addmm(work: TokenAxes, node: AnyNode) -> int:
    bias, x, weight = node.args[:3]
    if work.axis_of.get(x) != 0 or bias in work.axis_of or weight in work.axis_of:
        raise MixesTokensError(node, "takes tokens where it has weights")
    return 0


def _matmul(work: TokenAxes, node: AnyNode) -> int:
    x, y = node.args[:2]
    assert isinstance(x, Node) and isinstance(y, Node)
    rank, (given, other) = len(shape(node)), ((x, y) if x in work.axis_of else (y, x))
    if other in work.axis_of or min(len(shape(x)), len(shape(y))) < 2:
        raise MixesTokensError(node, "multiplies tokens with tokens")
    axis, summed = work.axis_of[given] - len(shape(given)), -1 if given is x else -2
    if axis == summed:
        raise MixesTokensError(node, "sums over the tokens")
    if axis < -2 and len(shape(other)) >= -axis and not is_one(shape(other)[axis]):
        raise MixesTokensError(node, "takes a tensor that differs between the tokens of a step")
    return axis + rank


def _option(node: AnyNode, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _along(work: TokenAxes, node: AnyNode) -> int:
    """An operator along one axis that keeps all axes."""
    axis = _axis_of_only_first(work, node)
    work.check_untouched(node, axis, _option(node, 1, "dim", -1))
    return axis


def _split(work: TokenAxes, node: AnyNode) -> int:
    axis = _axis_of_only_first(work, node)
    work.check_untouched(node, axis, _option(node, 2, "dim", 0))
    return axis


def _reduced(work: TokenAxes, node: AnyNode) -> int:
    axis, rank = _axis_of_only_first(work, node), len(shape(first_operand(node)))
    over = _option(node, 1, "dim", None)
    if over is None or over == []:
        raise MixesTokensError(node, "works along the tokens")
    places = sorted(place % rank for place in (over if isinstance(over, list | tuple) else [over]))
    work.check_untouched(node, axis, *places)
    return (
        axis if _option(node, 2, "keepdim", False) else axis - sum(place < axis for place in places)
    )


def _transposed(work: TokenAxes, node: AnyNode) -> int:
    axis, rank = work.axis_of[first_operand(node)], len(shape(node))
    one, other = (node.args[1] % rank, node.args[2] % rank) if len(node.args) > 2 else (0, rank - 1)
    return int({one: other, other: one}.get(axis, axis))


def _permuted(work: TokenAxes, node: AnyNode) -> int:
    order = [place % len(shape(node)) for place in node.args[1]]
    return order.index(work.axis_of[first_operand(node)])


def _unsqueezed(work: TokenAxes, node: AnyNode) -> int:
    axis = work.axis_of[first_operand(node)]
    return axis + int(node.args[1] % len(shape(node)) <= axis)


def _squeezed(work: TokenAxes, node: AnyNode) -> int:
    axis, rank = work.axis_of[first_operand(node)], len(shape(first_operand(node)))
    given = node.args[1]
    places = [place % rank for place in (given if isinstance(given, list | tuple) else [given])]
    work.check_untouched(node, axis, *places)
    gone = [place for place in places if place < axis and is_one(shape(first_operand(node))[place])]
    return axis - len(gone)


def _sliced(work: TokenAxes, node: AnyNode) -> int:
    axis, source = work.axis_of[first_operand(node)], first_operand(node)
    along = _option(node, 1, "dim", 0) % len(shape(source))
    whole = (
        str(shape(node)[along]) == str(shape(source)[along]) and _option(node, 4, "step", 1) == 1
    )
    if along == axis and not whole:
        raise MixesTokensError(node, "takes some tokens of a step")
    if any(operand is not source for operand in node.all_input_nodes) and along != axis:
        raise MixesTokensError(node, "depends on how many tokens a step has")
    return axis


def _selected(work: TokenAxes, node: AnyNode) -> int:
    axis, along = _axis_of_only_first(work, node), node.args[1] % len(shape(first_operand(node)))
    work.check_untouched(node, axis, along)
    return axis - int(along < axis)


def _joined(work: TokenAxes, node: AnyNode) -> int:
    parts = node.args[0]
    assert isinstance(parts, list | tuple)
    axis = next(work.axis_of[part] for part in parts if part in work.axis_of)
    for part in parts:
        assert isinstance(part, Node)
        work.align(node, part, axis)
    along = _option(node, 1, "dim", 0) % len(shape(node))
    if is_call(node, aten.stack.default):
        return axis + int(along <= axis)
    if along == axis:
        raise MixesTokensError(node, "joins along the tokens")
    return axis


def _expanded(work: TokenAxes, node: AnyNode) -> int:
    axis: int = (
        work.axis_of[first_operand(node)] + len(shape(node)) - len(shape(first_operand(node)))
    )
    if not work.is_token_count(shape(node)[axis]):
        raise MixesTokensError(node, "repeats tokens")
    return axis


def _repeated(work: TokenAxes, node: AnyNode) -> int:
    axis: int = (
        work.axis_of[first_operand(node)] + len(shape(node)) - len(shape(first_operand(node)))
    )
    if node.args[1][axis] != 1:
        raise MixesTokensError(node, "repeats tokens")
    return axis


def _viewed(work: TokenAxes, node: AnyNode) -> int:
    return work.axis_after_view(node, first_operand(node), work.axis_of[first_operand(node)])


def _embedded(work: TokenAxes, node: AnyNode) -> int:
    weight, index = node.args[:2]
    if weight in work.axis_of or index not in work.axis_of:
        raise MixesTokensError(node, "takes tokens where it has weights")
    return work.axis_of[index]


def _indexed(work: TokenAxes, node: AnyNode) -> int:
    """A fixed table at one index of tokens."""
    table, indices = node.args[0], node.args[1]
    given = [(place, index) for place, index in enumerate(indices) if index is not None]
    if table in work.axis_of or len(given) != 1 or given[0][1] not in work.axis_of:
        raise MixesTokensError(node, "picks entries in a way that has no rule")
    place, index = given[0]
    return place + work.axis_of[index]


def _made(work: TokenAxes, node: AnyNode) -> int | None:
    """A constant in the type of a tensor."""
    return _axis_without_token_operands(work, node) if len(node.all_input_nodes) > 1 else None


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


_POINTWISE = (
    aten.__and__.Tensor,
    aten.__or__.Tensor,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.where.Scalar,
)
"""Operators that lack the tag."""


VIEWS = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)
"""Operators that only say the extents anew."""


_RULES: dict[Any, Rule] = {
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(_POINTWISE, _pointwise),
    **dict.fromkeys((aten.new_ones.default, aten.new_zeros.default, aten.new_full.default), _made),
    aten.linear.default: _linear,
    **dict.fromkeys((aten.layer_norm.default, aten.rms_norm.default), _normalized),
    aten.addmm.default: _addmm,
    **dict.fromkeys((aten.matmul.default, aten.mm.default, aten.bmm.default), _matmul),
    **dict.fromkeys(
        (
            aten.softmax.int,
            aten._softmax.default,
            aten.log_softmax.int,
            aten.cumsum.default,
            aten.glu.default,
        ),
        _along,
    ),
    **dict.fromkeys(
        (aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default),
        _split,
    ),
    **dict.fromkeys(
        (
            aten.mean.dim,
            aten.sum.dim_IntList,
            aten.amax.default,
            aten.amin.default,
            aten.argmax.default,
        ),
        _reduced,
    ),
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
"""An operator without a rule that has torch's tag ``_pointwise`` has the rule `_pointwise`."""


def propagate_token_axes(
    graph: Graph,
    results: Collection[Node],
    tokens: Any,
    seeds: Mapping[Node, int],
    opaque: Mapping[Node, tuple[Sequence[Node], int]] | None = None,
) -> TokenAxes:
    """Find the token axes of everything that some nodes are computed from.

    Args:
        graph: their graph.
        results: the nodes.
        tokens, seeds, opaque: as for `TokenAxes`.

    Raises:
        MixesTokensError: an operator on the way mixes tokens.
    """
    work = TokenAxes(tokens, seeds, opaque)
    needed = set(results)
    pending = list(results)
    while pending:
        node = pending.pop()
        kept_apart = work.opaque(node)
        operands = (
            ()
            if node in work.seeds
            else kept_apart[0]
            if kept_apart is not None
            else node.all_input_nodes
        )
        for operand in operands:
            if operand not in needed:
                needed.add(operand)
                pending.append(operand)
    for node in graph.nodes:
        if node in needed and node not in work.axis_of and node.op == "call_function":
            axis = _result_axis(work, node)
            if axis is not None:
                work.axis_of[node] = axis
    return work


def _result_axis(work: TokenAxes, node: Node) -> int | None:
    if (kept_apart := work.opaque(node)) is not None:
        operands, axis = kept_apart
        for operand in operands:
            work.align(node, operand, axis)
        return axis
    if is_call(node, operator.getitem):
        return work.axis_of.get(first_operand(node))
    if is_call(node, aten.sym_size.int) or not isinstance(value(node), Tensor | tuple | list):
        return None
    if not any(operand in work.axis_of for operand in node.all_input_nodes):
        return _axis_without_token_operands(work, node)
    rule = _RULES.get(node.target)
    if (
        rule is None
        and isinstance(node.target, torch._ops.OpOverload)
        and torch.Tag.pointwise in node.target.tags
    ):
        rule = _pointwise
    if rule is None:
        raise MixesTokensError(node, "is not known to treat tokens alone")
    return rule(work, node)
