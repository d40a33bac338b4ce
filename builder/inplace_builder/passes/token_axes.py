"""Which axis of each tensor counts the tokens of a step: what is known, and what the rules of operators (`passes.tokenwise`) ask."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.fx import Node

from inplace_builder.passes.emit import shape
from inplace_builder.passes.match import AnyNode


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
        axes: the token axis of each tensor that has one.
        moved: for a graph of one token, operands whose token axis must be exchanged with another axis (of extent 1) before this use.
    """

    def __init__(self, tokens: Any, seeds: Mapping[Node, int], opaque: Mapping[Node, tuple[Sequence[Node], int]] | None = None) -> None:
        self.tokens = tokens
        self.axes: dict[Node, int] = dict(seeds)
        self.moved: dict[tuple[Node, Node], tuple[int, int]] = {}
        self._seeds = frozenset(seeds)
        self._opaque = dict(opaque or {})

    @property
    def seeds(self) -> frozenset[Node]:
        """Where tokens come from."""
        return self._seeds

    def opaque(self, node: Node) -> tuple[Sequence[Node], int] | None:
        """The operands of an operator that mixes tokens as it should, and their token axis; None for any other."""
        return self._opaque.get(node)

    def counts(self, extent: Any) -> bool:
        """Whether an extent is the number of tokens."""
        return str(extent) == str(self.tokens)

    def place(self, node: Node, operand: AnyNode, rank: int) -> int | None:
        """The token axis of an operand, in a result of this rank to which it is broadcast."""
        axis = self.axes.get(operand)
        return None if axis is None else axis + rank - len(shape(operand))

    def move(self, node: Node, operand: Node, axis: int) -> None:
        """Let an operand have its token axis here; MixesTokensError where it cannot."""
        own = self.axes.get(operand)
        if own == axis:
            return
        if own is None or axis < 0 or self.tokens != 1 or not is_one(shape(operand)[axis]):
            raise MixesTokensError(node, "takes tokens along different axes")
        self.moved[node, operand] = (own, axis)

    def keeps(self, node: Node, axis: int, *touched: int) -> None:
        """MixesTokensError where an operator works along the token axis."""
        rank = len(shape(node.args[0])) if isinstance(node.args[0], Node) else 0
        if axis in [place % rank for place in touched]:
            raise MixesTokensError(node, "works along the tokens")

    def reshaped(self, node: Node, source: Node, axis: int) -> int:
        """Where a view puts the token axis: an axis as long, with as many elements before it and behind."""
        before, after = shape(source), shape(node)
        found = [
            place
            for place, extent in enumerate(after)
            if self.counts(extent)
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
