"""Which outputs of a linear layer a query, key or value is made of: found by running the views between them on numbers."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from inplace_builder.passes.match import VIEWS, AnyNode, call

aten, inplace = torch.ops.aten, torch.ops.inplace

PICKS = (
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.slice.Tensor,
    aten.narrow.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    operator.getitem,
)
"""Operators beside `VIEWS` that only choose and order what is there."""
TOKENS = 3
"""Tokens of the example that is run; any number other than 1."""


def linear_rows(node: AnyNode, after: Sequence[Node] = ()) -> tuple[Node, Tensor] | None:
    """The linear layer that a tensor is a view of, and which of its outputs each element is.

    Args:
        node: where to start.
        after: views of ``node``, in order, to follow first.

    Returns:
        The layer and int64 ``[heads, dim]``: rows of its weight; None if something else than views stands between, or if what they give is
        not ``[tokens, heads, dim]``.
    """
    before: list[Node] = []
    while not call(node, inplace.linear.default):
        if not call(node, *VIEWS, *PICKS):
            return None
        before.insert(0, node)
        node = node.args[0]
    numbers = _numbers(node)
    found = None if numbers is None else _run([*before, *after], numbers, _tokens(node))
    width = node.meta["val"].shape[-1]
    if found is None or found.dim() != 3 or len(found) != TOKENS:
        return None
    rows = found[0]
    every_token_alike = torch.equal(found, rows + torch.arange(TOKENS)[:, None, None] * width)
    return (node, rows) if every_token_alike else None


def keeps_heads(node: AnyNode, views: Sequence[Node]) -> bool:
    """Whether these views of ``[..., tokens, dim]`` give ``[tokens, heads, dim]`` with every head whole."""
    numbers = _numbers(node)
    found = None if numbers is None else _run(views, numbers, _tokens(node))
    dim = node.meta["val"].shape[-1]
    if found is None or found.dim() != 3 or len(found) != TOKENS or found.shape[-1] != dim:
        return False
    return torch.equal(found % dim, torch.arange(dim).expand_as(found))


def _tokens(node: AnyNode) -> str | None:
    """The one unknown extent of a tensor, as it is written."""
    unknown = {str(size) for size in node.meta["val"].shape if not isinstance(size, int)}
    return unknown.pop() if len(unknown) == 1 else None


def _numbers(node: AnyNode) -> Tensor | None:
    """0, 1, 2, … in the shape of the tensor, with `TOKENS` tokens."""
    if _tokens(node) is None:
        return None
    shape = [size if isinstance(size, int) else TOKENS for size in node.meta["val"].shape]
    return torch.arange(torch.Size(shape).numel()).view(shape)


def _run(views: Sequence[Node], value: Any, tokens: str | None) -> Tensor | None:
    """Apply views to a value; None where one has an argument that depends on more than the number of tokens."""

    def known(argument: Any) -> Any:
        size = argument.meta["val"] if isinstance(argument, Node) else argument
        if isinstance(size, torch.SymInt):
            if str(size) != tokens:
                raise _UnknownError
            return TOKENS
        if isinstance(argument, Node):
            raise _UnknownError
        return argument

    for view in views:
        assert callable(view.target)
        try:
            args, kwargs = torch.fx.node.map_aggregate((view.args[1:], view.kwargs), known)
        except _UnknownError:
            return None
        value = view.target(value, *args, **kwargs)
    return value if isinstance(value, Tensor) else None


class _UnknownError(Exception):
    """An argument is not known."""
