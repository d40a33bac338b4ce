"""Which axis of each tensor counts the tokens of a step, and the proof that nothing mixes them.

A graph in which every operator treats each token by itself computes the same from packed tokens of
several sequences as from the tokens of each sequence alone. Every operator has a rule that says
where its result has the token axis. An operator without a rule, or one that mixes tokens, ends the
proof with its name. Attention mixes tokens by design; it is proved elsewhere
(`inplace_builder.states.attention`) and passed in.
"""

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import inplace.operators  # noqa: F401  registers the operators
import torch
from torch import Tensor
from torch.fx import Graph, Node

from inplace_builder.graph.nodes import AnyNode, argument, is_call, is_exactly, shape, value

aten = torch.ops.aten


class MixesTokensError(Exception):
    """An operator mixes tokens, or is not known to treat each by itself.

    Attributes:
        node: the operator's call.
    """

    def __init__(self, node: Node, reason: str) -> None:
        super().__init__(f"{node.target} {reason}")
        self.node = node


@dataclass(frozen=True)
class TokenOperands:
    """What an attention takes from the tokens of a step.

    Attributes:
        operands: queries, keys and values of this step.
        axis: the token axis of each of them, and of the attention's result.
    """

    operands: Sequence[Node]
    axis: int


class TokenAxes:
    """The token axes of a graph.

    Args:
        num_tokens: tokens of a step: 1, or the dynamic extent that counts them.
        seeds: the tensors that bring tokens into the graph, each with its token axis.
        attentions: the attentions of the graph, which may mix tokens.

    Attributes:
        axis_of: the token axis of each tensor that has one.
        transposed: in a graph of one token, for a use (user, operand) the token axis of the operand
            and the axis of extent 1 that it must be exchanged with before this use.
    """

    def __init__(
        self,
        num_tokens: Any,
        seeds: Mapping[Node, int],
        attentions: Mapping[Node, TokenOperands] | None = None,
    ) -> None:
        self.num_tokens = num_tokens
        self.seeds = frozenset(seeds)
        self.attentions = dict(attentions or {})
        self.axis_of: dict[Node, int] = dict(seeds)
        self.transposed: dict[tuple[Node, Node], tuple[int, int]] = {}

    def is_token_count(self, extent: Any) -> bool:
        """Whether an extent is the number of tokens."""
        return str(extent) == str(self.num_tokens)

    def axis_in(self, operand: AnyNode, rank: int) -> int | None:
        """The token axis of an operand as an axis of the result of this rank it is broadcast to."""
        axis = self.axis_of.get(operand)
        return None if axis is None else axis + rank - len(shape(operand))

    def align(self, node: Node, operand: Node, axis: int) -> None:
        """Let an operand have its token axis at ``axis`` in this use.

        Raises:
            MixesTokensError: it cannot.
        """
        own = self.axis_of.get(operand)
        if own == axis:
            return
        if (
            own is None
            or axis < 0
            or self.num_tokens != 1
            or not is_exactly(shape(operand)[axis], 1)
        ):
            raise MixesTokensError(node, "takes tokens along different axes")
        self.transposed[node, operand] = (own, axis)

    def check_untouched(self, node: Node, axis: int, *touched: int) -> None:
        """MixesTokensError if the axes that an operator works along include the token axis."""
        rank = len(shape(node.args[0])) if isinstance(node.args[0], Node) else 0
        if axis in [place % rank for place in touched]:
            raise MixesTokensError(node, "works along the token axis")

    def axis_after_view(self, node: Node, source: Node, axis: int) -> int:
        """Where a view puts the token axis.

        It is an axis of the same extent with as many elements before and after it.

        Raises:
            MixesTokensError: there is none.
        """
        before, after = shape(source), shape(node)
        candidates = [
            place
            for place, extent in enumerate(after)
            if self.is_token_count(extent)
            and _product(after[:place]) == _product(before[:axis])
            and _product(after[place + 1 :]) == _product(before[axis + 1 :])
        ]
        if not candidates:
            raise MixesTokensError(node, "merges the token axis with others")
        # a graph of one token has several axes of extent 1; models have their tokens on the second
        return next((place for place in (1, axis) if place in candidates), candidates[-1])


def _product(extents: Sequence[Any]) -> str:
    product: Any = 1
    for size in extents:
        product = product * size
    return str(product)


Rule = Callable[[TokenAxes, AnyNode], int | None]
"""Gives the token axis of an operator's result, or None where it has no tokens."""


def _axis_without_token_operands(axes: TokenAxes, node: Node) -> int | None:
    """The axis of a tensor made without tokens: None, or where it is expanded to their number."""
    if not any(isinstance(value(operand), torch.SymInt) for operand in node.all_input_nodes):
        return None
    counted = [axis for axis, extent in enumerate(shape(node)) if axes.is_token_count(extent)]
    source = node.args[0]
    if is_call(node, aten.expand.default) and isinstance(source, Node) and len(counted) == 1:
        before = counted[0] - (len(shape(node)) - len(shape(source)))
        if before < 0 or is_exactly(shape(source)[before], 1):
            return counted[0]
    raise MixesTokensError(node, "depends on the number of tokens of a step")


def _pointwise(axes: TokenAxes, node: AnyNode) -> int | None:
    """Operands are broadcast and combined element by element."""
    rank = len(shape(node))
    operands = [operand for operand in node.all_input_nodes if isinstance(value(operand), Tensor)]
    if any(isinstance(value(operand), torch.SymInt) for operand in node.all_input_nodes):
        raise MixesTokensError(node, "depends on the number of tokens of a step")
    places = [place for operand in operands if (place := axes.axis_in(operand, rank)) is not None]
    axis = 1 if 1 in places else places[0]
    for operand in operands:
        inside = axis - rank + len(shape(operand))
        if operand in axes.axis_of:
            axes.align(node, operand, inside)
        elif inside >= 0 and not is_exactly(shape(operand)[inside], 1):
            raise MixesTokensError(node, "combines tokens with a tensor that differs between them")
    return axis


def _same(axes: TokenAxes, node: AnyNode) -> int | None:
    """One operand, changed element by element; others only give a type."""
    return axes.axis_of.get(_first_operand(node))


def _first_operand(node: AnyNode) -> Node:
    """The first operand, which must be a node."""
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def _only_token_operand_axis(axes: TokenAxes, node: AnyNode) -> int:
    """The token axis of the first operand, which must be the only one with tokens."""
    source = _first_operand(node)
    if source not in axes.axis_of or any(
        operand in axes.axis_of for operand in node.all_input_nodes if operand is not source
    ):
        raise MixesTokensError(node, "takes tokens where weights belong")
    return axes.axis_of[source]


def _linear(axes: TokenAxes, node: AnyNode) -> int:
    axis = _only_token_operand_axis(axes, node)
    axes.check_untouched(node, axis, -1)
    return axis


def _normalized(axes: TokenAxes, node: AnyNode) -> int:
    axis = _only_token_operand_axis(axes, node)
    axes.check_untouched(node, axis, *range(-len(node.args[1]), 0))
    return axis


def _addmm(axes: TokenAxes, node: AnyNode) -> int:
    bias, x, weight = node.args[:3]
    if axes.axis_of.get(x) != 0 or bias in axes.axis_of or weight in axes.axis_of:
        raise MixesTokensError(node, "takes tokens where weights belong")
    return 0


def _matmul(axes: TokenAxes, node: AnyNode) -> int:
    x, y = node.args[:2]
    assert isinstance(x, Node) and isinstance(y, Node)
    rank, (given, other) = len(shape(node)), ((x, y) if x in axes.axis_of else (y, x))
    if other in axes.axis_of or min(len(shape(x)), len(shape(y))) < 2:
        raise MixesTokensError(node, "multiplies tokens with tokens")
    axis, summed = axes.axis_of[given] - len(shape(given)), -1 if given is x else -2
    if axis == summed:
        raise MixesTokensError(node, "sums over the tokens")
    if axis < -2 and len(shape(other)) >= -axis and not is_exactly(shape(other)[axis], 1):
        raise MixesTokensError(node, "combines tokens with a tensor that differs between them")
    return axis + rank


def _along(axes: TokenAxes, node: AnyNode) -> int:
    """An operator along one axis that keeps all axes."""
    axis = _only_token_operand_axis(axes, node)
    axes.check_untouched(node, axis, argument(node, 1, "dim", -1))
    return axis


def _counted(axes: TokenAxes, node: AnyNode) -> int:
    """An operator that takes a count, and changes one axis only."""
    axis = _only_token_operand_axis(axes, node)
    along = argument(node, 2, "dim", -1 if is_call(node, aten.topk.default) else None)
    if along is None:
        raise MixesTokensError(node, "merges the token axis with others")
    axes.check_untouched(node, axis, along)
    return axis


def _split(axes: TokenAxes, node: AnyNode) -> int:
    axis = _only_token_operand_axis(axes, node)
    axes.check_untouched(node, axis, argument(node, 2, "dim", 0))
    return axis


def _reduced(axes: TokenAxes, node: AnyNode) -> int:
    axis, rank = _only_token_operand_axis(axes, node), len(shape(_first_operand(node)))
    over = argument(node, 1, "dim", None)
    if over is None or over == []:
        raise MixesTokensError(node, "works along the token axis")
    places = sorted(place % rank for place in (over if isinstance(over, list | tuple) else [over]))
    axes.check_untouched(node, axis, *places)
    return (
        axis
        if argument(node, 2, "keepdim", False)
        else axis - sum(place < axis for place in places)
    )


def _transposed(axes: TokenAxes, node: AnyNode) -> int:
    axis, rank = axes.axis_of[_first_operand(node)], len(shape(node))
    one, other = (node.args[1] % rank, node.args[2] % rank) if len(node.args) > 2 else (0, rank - 1)
    return int({one: other, other: one}.get(axis, axis))


def _permuted(axes: TokenAxes, node: AnyNode) -> int:
    order = [place % len(shape(node)) for place in node.args[1]]
    return order.index(axes.axis_of[_first_operand(node)])


def _unsqueezed(axes: TokenAxes, node: AnyNode) -> int:
    axis = axes.axis_of[_first_operand(node)]
    return axis + int(node.args[1] % len(shape(node)) <= axis)


def _squeezed(axes: TokenAxes, node: AnyNode) -> int:
    axis, rank = axes.axis_of[_first_operand(node)], len(shape(_first_operand(node)))
    given = node.args[1]
    places = [place % rank for place in (given if isinstance(given, list | tuple) else [given])]
    axes.check_untouched(node, axis, *places)
    gone = [
        place
        for place in places
        if place < axis and is_exactly(shape(_first_operand(node))[place], 1)
    ]
    return axis - len(gone)


def _sliced(axes: TokenAxes, node: AnyNode) -> int:
    axis, source = axes.axis_of[_first_operand(node)], _first_operand(node)
    along = argument(node, 1, "dim", 0) % len(shape(source))
    whole = (
        str(shape(node)[along]) == str(shape(source)[along]) and argument(node, 4, "step", 1) == 1
    )
    if along == axis and not whole:
        raise MixesTokensError(node, "takes only some tokens of a step")
    if any(operand is not source for operand in node.all_input_nodes) and along != axis:
        raise MixesTokensError(node, "depends on the number of tokens of a step")
    return axis


def _selected(axes: TokenAxes, node: AnyNode) -> int:
    axis, along = (
        _only_token_operand_axis(axes, node),
        node.args[1] % len(shape(_first_operand(node))),
    )
    axes.check_untouched(node, axis, along)
    return axis - int(along < axis)


def _joined(axes: TokenAxes, node: AnyNode) -> int:
    parts = node.args[0]
    assert isinstance(parts, list | tuple)
    axis = next(axes.axis_of[part] for part in parts if part in axes.axis_of)
    for part in parts:
        assert isinstance(part, Node)
        axes.align(node, part, axis)
    along = argument(node, 1, "dim", 0) % len(shape(node))
    if is_call(node, aten.stack.default):
        return axis + int(along <= axis)
    if along == axis:
        raise MixesTokensError(node, "concatenates along the token axis")
    return axis


def _expanded(axes: TokenAxes, node: AnyNode) -> int:
    axis: int = (
        axes.axis_of[_first_operand(node)] + len(shape(node)) - len(shape(_first_operand(node)))
    )
    if not axes.is_token_count(shape(node)[axis]):
        raise MixesTokensError(node, "repeats tokens")
    return axis


def _repeated(axes: TokenAxes, node: AnyNode) -> int:
    axis: int = (
        axes.axis_of[_first_operand(node)] + len(shape(node)) - len(shape(_first_operand(node)))
    )
    if node.args[1][axis] != 1:
        raise MixesTokensError(node, "repeats tokens")
    return axis


def _viewed(axes: TokenAxes, node: AnyNode) -> int:
    return axes.axis_after_view(node, _first_operand(node), axes.axis_of[_first_operand(node)])


def _embedded(axes: TokenAxes, node: AnyNode) -> int:
    weight, index = node.args[:2]
    if weight in axes.axis_of or index not in axes.axis_of:
        raise MixesTokensError(node, "takes tokens where weights belong")
    return axes.axis_of[index]


def _indexed(axes: TokenAxes, node: AnyNode) -> int:
    """A constant table at one index of tokens."""
    table, indices = node.args[0], node.args[1]
    given = [(place, index) for place, index in enumerate(indices) if index is not None]
    if table in axes.axis_of or len(given) != 1 or given[0][1] not in axes.axis_of:
        raise MixesTokensError(node, "indexes in a way that has no rule")
    place, index = given[0]
    return place + axes.axis_of[index]


def _gathered(axes: TokenAxes, node: AnyNode) -> int:
    """Elements of each token at, or into, places of its own."""
    operands = [operand for operand in node.all_input_nodes if isinstance(value(operand), Tensor)]
    axis = next(axes.axis_of[operand] for operand in operands if operand in axes.axis_of)
    for operand in operands:
        axes.align(node, operand, axis)
    axes.check_untouched(node, axis, node.args[1])
    return axis


def _grouped_linear(axes: TokenAxes, node: AnyNode) -> int:
    """Every token takes the weights that its own ids choose."""
    x, expert_ids, *weights = node.args
    if any(weight in axes.axis_of for weight in weights):
        raise MixesTokensError(node, "takes tokens where weights belong")
    for operand in (x, expert_ids):
        axes.align(node, operand, 0)
    return 0


def _weighted_sum(axes: TokenAxes, node: AnyNode) -> int:
    """Over the second axis of every token."""
    for operand in node.args:
        axes.align(node, operand, 0)
    return 0


def _made(axes: TokenAxes, node: AnyNode) -> int | None:
    """A constant of the type of a tensor."""
    return _axis_without_token_operands(axes, node) if len(node.all_input_nodes) > 1 else None


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
"""Pointwise operators without torch's tag ``pointwise``."""


VIEWS = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)
"""Operators that only change the extents."""


_RULES: dict[Any, Rule] = {
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(_POINTWISE, _pointwise),
    **dict.fromkeys((aten.new_ones.default, aten.new_zeros.default, aten.new_full.default), _made),
    **dict.fromkeys((aten.linear.default, torch.ops.inplace.linear.default), _linear),
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
            aten.sort.default,
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
    **dict.fromkeys((aten.topk.default, aten.repeat_interleave.self_int), _counted),
    **dict.fromkeys((aten.gather.default, aten.scatter.value, aten.scatter.src), _gathered),
    torch.ops.inplace.grouped_linear.default: _grouped_linear,
    torch.ops.inplace.weighted_sum.default: _weighted_sum,
}
"""An operator without a rule that has torch's tag ``_pointwise`` has the rule `_pointwise`."""


def propagate_token_axes(
    graph: Graph,
    results: Collection[Node],
    num_tokens: Any,
    seeds: Mapping[Node, int],
    attentions: Mapping[Node, TokenOperands] | None = None,
) -> TokenAxes:
    """Find the token axis of everything that some nodes are computed from.

    Args:
        graph: their graph.
        results: the nodes.
        num_tokens, seeds, attentions: as for `TokenAxes`.

    Raises:
        MixesTokensError: an operator on the way mixes tokens, or has no rule.
    """
    axes = TokenAxes(num_tokens, seeds, attentions)
    needed = set(results)
    pending = list(results)
    while pending:
        for operand in _followed_operands(axes, pending.pop()):
            if operand not in needed:
                needed.add(operand)
                pending.append(operand)
    for node in graph.nodes:
        if node in needed and node not in axes.axis_of and node.op == "call_function":
            axis = _result_axis(axes, node)
            if axis is not None:
                axes.axis_of[node] = axis
    return axes


def _followed_operands(axes: TokenAxes, node: Node) -> Sequence[Node]:
    """The operands through which a node depends on tokens."""
    if node in axes.seeds:
        return ()
    if node in axes.attentions:
        return axes.attentions[node].operands
    return node.all_input_nodes


def _result_axis(axes: TokenAxes, node: Node) -> int | None:
    if (attention := axes.attentions.get(node)) is not None:
        for operand in attention.operands:
            axes.align(node, operand, attention.axis)
        return attention.axis
    if is_call(node, operator.getitem):
        return axes.axis_of.get(_first_operand(node))
    if is_call(node, aten.sym_size.int) or not isinstance(value(node), Tensor | tuple | list):
        return None
    if not any(operand in axes.axis_of for operand in node.all_input_nodes):
        return _axis_without_token_operands(axes, node)
    rule = _RULES.get(node.target)
    if (
        rule is None
        and isinstance(node.target, torch._ops.OpOverload)
        and torch.Tag.pointwise in node.target.tags
    ):
        rule = _pointwise
    if rule is None:
        raise MixesTokensError(node, "has no rule that keeps tokens apart")
    return rule(axes, node)
