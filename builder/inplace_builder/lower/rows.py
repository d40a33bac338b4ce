"""The rows of a step where row r is slot r (*identity placement*), and every row has as many tokens as the others.

The mechanisms ``copy`` and ``kv_cache_update`` work like this: TensorRT updates a whole batch of caches, not chosen slots of an arena.
The runtime binds the slots it steps, one a row; a decode step has one token a row, a prefill step one row with a chunk. A slot of -1 is
still a null row: it writes nothing and gives zeros.
"""

from dataclasses import dataclass

import torch

from inplace_builder.lower.extents import Size, expression
from inplace_builder.lower.layers import ITensor
from inplace_builder.lower.network import Network, State

INT = torch.int32


def argument(node: torch.fx.Node, name: str) -> object:
    """An argument of an operator's call by the name its schema gives it."""
    assert isinstance(node.target, torch._ops.OpOverload)
    position = [each.name for each in node.target._schema.arguments].index(name)
    return node.args[position] if position < len(node.args) else node.kwargs[name]


@dataclass(frozen=True)
class Rows:
    """What a step does to each row.

    Attributes:
        count: number of rows, which is the number of slots.
        null: ``[rows]`` bool: the row is none.
        starts: ``[rows]`` int32: cached length before the step.
    """

    count: Size
    null: ITensor
    starts: ITensor

    def null_as(self, ctx: Network, rank: int) -> ITensor:
        """``null`` with axes of 1 behind it."""
        return ctx.reshape(self.null, (-1, *(1,) * (rank - 1)))

    def column(self, ctx: Network, x: ITensor) -> ITensor:
        """``[rows]`` as ``[rows, 1]``."""
        return ctx.reshape(x, (-1, 1))


def rows_of(ctx: Network, states: tuple[State, ...], slots: ITensor, write_indices: ITensor | None) -> Rows:
    """The rows that the arguments of an operator describe; TensorRT is told that these states have a slot a row."""
    count = ctx.meta(argument(ctx.node, "slots")).shape[0]
    if not isinstance(count, int):
        for state in states:
            state.input.set_dimension_name(0, str(expression(count)))

    def make() -> Rows:
        null = ctx.less(slots, ctx.scalar(0, ctx.dtype_of(slots), 1))
        starts = ctx.scalar(0, INT, 1) if write_indices is None else ctx.cast(write_indices, INT)
        return Rows(count, null, starts)

    return ctx.once((Rows, slots, write_indices), make)
