"""Where a step writes: what is provable about indices that a graph computes.

An index may be a placeholder plus constants, a count from a start, one position for each row spread
over a tensor, or a mask that is true at one position. Additions and views are followed node by
node; everything else is proved by evaluating the nodes on numbers that tell the cases apart.
"""

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from inplace_builder.graph.nodes import (
    AnyNode,
    Emitter,
    as_node,
    dtype,
    is_call,
    is_exactly,
    shape,
    value,
)

aten = torch.ops.aten


MAX_INDEX_NODES = 200
"""Nodes that an index may be computed from; a larger computation is not analysed."""


def source_placeholders(node: Node) -> set[Node] | None:
    """The placeholders whose values a node is computed from.

    Dynamic extents are not values: the node may depend on them as well.

    Returns:
        None if the node is random, or computed from more than `MAX_INDEX_NODES` nodes.
    """
    pending, seen, placeholders = [node], {node}, set[Node]()
    while pending:
        current = pending.pop()
        if is_call(current, aten.sym_size.int):
            continue
        if current.op == "placeholder":
            placeholders.add(current)
        elif current.op == "call_function":
            tags = getattr(current.target, "tags", ())
            if torch.Tag.nondeterministic_seeded in tags or len(seen) > MAX_INDEX_NODES:
                return None
        for source in current.all_input_nodes:
            if source not in seen:
                seen.add(source)
                pending.append(source)
    return placeholders


class UnknownExtentError(Exception):
    """A node depends on a dynamic extent for which no value was given."""


def evaluate(
    module: GraphModule,
    node: Node,
    given: Mapping[Node, Any],
    sizes: Mapping[str, int] | None = None,
) -> Any:
    """The value of a node for these values of its sources; constants are the module's own.

    Args:
        module: holds the constants.
        node: what to evaluate.
        given: values of sources.
        sizes: values of dynamic extents, by their symbol as text.

    Raises:
        UnknownExtentError: the node depends on another dynamic extent.
    """
    known: dict[Node, Any] = dict(given)

    def resolve(source: Node) -> Any:
        if source not in known:
            if is_call(source, aten.sym_size.int):
                known[source] = known_extent(value(source), sizes or {})
            elif source.op == "get_attr":
                known[source] = torch.fx.graph_module._get_attr(module, str(source.target))
            else:
                assert source.op == "call_function" and callable(source.target)
                arguments, named = torch.fx.node.map_arg((source.args, source.kwargs), resolve)
                known[source] = source.target(*arguments, **named)
        return known[source]

    with torch.no_grad():
        return resolve(node)


def known_extent(size: Any, sizes: Mapping[str, int]) -> int:
    """The number that an extent is.

    Raises:
        UnknownExtentError: it is dynamic and not among ``sizes``.
    """
    if isinstance(size, int):
        return size
    if str(size) not in sizes:
        raise UnknownExtentError(f"it depends on the dynamic extent {size}")
    return sizes[str(size)]


def constant_tensor(module: GraphModule, node: AnyNode) -> Tensor | None:
    """The tensor that a node is in every step, or None if it depends on an input."""
    if not isinstance(node, Node) or not isinstance(value(node), Tensor):
        return None
    if source_placeholders(node) != set():
        return None
    if any(not isinstance(size, int) for size in shape(node)):
        return None
    try:
        result = evaluate(module, node, {})
    except UnknownExtentError:
        return None
    return result if isinstance(result, Tensor) else None


_SHIFTS = (
    aten.to.dtype,
    aten._to_copy.default,
    aten.view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.expand.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.arange.start,
    aten.item.default,
    aten._local_scalar_dense.default,
    operator.add,
    operator.sub,
)
"""Operators after which an index is still its source plus constants.

The source must be an operand once and must not be subtracted.
"""


def shifted_source(node: AnyNode) -> Node | None:
    """The placeholder that an index is, apart from added constants and views; None if unsure."""
    sources = source_placeholders(node) if isinstance(node, Node) else None
    if sources is None or len(sources) != 1:
        return None
    (source,) = sources
    return source if isinstance(node, Node) and _is_shift(node, source) else None


def _is_shift(node: Node, source: Node) -> bool:
    if node is source:
        return True
    if not is_call(node, *_SHIFTS) or node.kwargs.get("alpha", 1) != 1:
        return False
    if is_call(node, aten.to.dtype, aten._to_copy.default) and dtype(node) not in (
        torch.int32,
        torch.int64,
    ):
        return False
    dependent = [
        operand
        for operand in node.all_input_nodes
        if source in (source_placeholders(operand) or ())
    ]
    if is_call(node, aten.arange.start):  # from a start to that start plus a constant
        return all(_is_shift(operand, source) for operand in dependent)
    subtracted = is_call(node, aten.sub.Tensor, operator.sub) and node.args[0] not in dependent
    once = len(dependent) == 1 and sum(operand is dependent[0] for operand in node.args) == 1
    return once and not subtracted and _is_shift(dependent[0], source)


def is_consecutive(module: GraphModule, index: Node, assume_consecutive: frozenset[str]) -> bool:
    """Whether an index of n entries is always ``s, s + 1, …, s + n - 1`` for some s.

    Args:
        module: the graph's module.
        index: the index.
        assume_consecutive: inputs that the caller states to be consecutive positions.
    """
    extents = shape(index)
    if len(extents) > 1:
        return False
    if extents and not isinstance(extents[0], int):
        return _is_assumed_consecutive(index, assume_consecutive) or _counts_up(module, index)
    if value(index).numel() == 1:
        return True
    fixed, source = constant_tensor(module, index), shifted_source(index)
    if fixed is not None or source is None:
        return fixed is not None and _steps_by_one(fixed)
    if (
        not isinstance(value(source), Tensor)
        or is_exactly(value(source).numel(), 1)
        or depends_on_first_entry(module, index, source, {})
    ):
        return all(_steps_by_one(_index_at(module, index, source, start, {})) for start in (0, 5))
    return (
        _is_assumed_consecutive(source, assume_consecutive)
        and shape(source) == extents
        and _steps_by_one(_index_at(module, index, source, 0, {}))
    )


_COUNTING = (*_SHIFTS, aten.arange.default, aten.arange.start_step, aten.sym_size.int)


EXAMPLE_SIZES = (1, 2, 3, 4, 7, 16)
"""Numbers of tokens for which a counting index is evaluated.

That it counts at all follows from the operators that it is made of.
"""


def _counts_up(module: GraphModule, index: Node) -> bool:
    """Whether an index of a dynamic number of entries is a start plus 0, 1, 2, ….

    It must consist of additions and counting alone, and be right for the example sizes.
    """
    source = shifted_source(index)
    if source is None or not all(
        is_call(node, *_COUNTING) for node in _nodes_between(index, source)
    ):
        return False
    symbol = str(shape(index)[0])
    return depends_on_first_entry(module, index, source, {symbol: 3}) and all(
        torch.equal(
            _index_at(module, index, source, start, {symbol: n}).diff(),
            torch.ones(n - 1, dtype=torch.int64),
        )
        for start in (0, 5)
        for n in EXAMPLE_SIZES
    )


def _nodes_between(node: Node, source: Node) -> set[Node]:
    pending, seen = [node], {node}
    while pending:
        for operand in pending.pop().all_input_nodes:
            if operand is not source and operand not in seen and operand.op == "call_function":
                seen.add(operand)
                if not is_call(operand, aten.sym_size.int):
                    pending.append(operand)
    return seen


def depends_on_first_entry(
    module: GraphModule, node: Node, source: Node, sizes: Mapping[str, int]
) -> bool:
    """Whether a node depends on no entry of a source but the first."""
    example = value(source)
    if not isinstance(example, Tensor) or is_exactly(example.numel(), 1):
        return True
    plain = example_positions(source, 5, sizes)
    other = plain.clone()
    other.view(-1)[1:] = 1000 - plain.view(-1)[1:]
    try:
        results = [
            torch.as_tensor(evaluate(module, node, {source: given}, sizes))
            for given in (plain, other)
        ]
    except UnknownExtentError:
        return False
    return torch.equal(*results)


def _is_assumed_consecutive(node: Node, assume_consecutive: frozenset[str]) -> bool:
    return (
        shifted_source(node) is node and node.name in assume_consecutive and len(shape(node)) == 1
    )


def _index_at(
    module: GraphModule, index: Node, source: Node, start: int, sizes: Mapping[str, int]
) -> Tensor:
    result = evaluate(module, index, {source: example_positions(source, start, sizes)}, sizes)
    assert isinstance(result, Tensor)
    return result


def example_positions(source: Node, start: int, sizes: Mapping[str, int] | None = None) -> Any:
    """A value for the source of an index: consecutive positions from ``start``.

    A dynamic extent that is not among ``sizes`` is 4.
    """
    example = value(source)
    if not isinstance(example, Tensor):
        return start
    extents = [
        size if isinstance(size, int) else (sizes or {}).get(str(size), 4) for size in example.shape
    ]
    return torch.arange(start, start + math.prod(extents), dtype=example.dtype).reshape(extents)


def _steps_by_one(index: Tensor) -> bool:
    return bool((index.diff() == 1).all())


def number_as_tensor(emit: Emitter, number: AnyNode) -> Node | None:
    """A Python or symbolic number of the graph as an integer tensor ``[1]``.

    Returns:
        None if only the host could make it one.
    """
    if isinstance(number, int):
        return emit.call(aten.full.default, [1], number, dtype=torch.int32)
    if is_call(number, aten.item.default, aten._local_scalar_dense.default) and dtype(
        number.args[0]
    ) in (torch.int32, torch.int64):
        return emit.call(aten.reshape.default, number.args[0], [1])
    for function, target in (
        (operator.add, aten.add.Tensor),
        (operator.sub, aten.sub.Tensor),
        (operator.mul, aten.mul.Tensor),
    ):
        if is_call(number, function):
            first, second = (number_as_tensor(emit, operand) for operand in number.args)
            return None if first is None or second is None else emit.call(target, first, second)
    if isinstance(number, Node) and isinstance(value(number), torch.SymInt):
        return emit.call(
            aten.reshape.default,
            emit.call(aten.scalar_tensor.default, number, dtype=torch.int64),
            [1],
        )
    return None


_REPEATS = (
    aten.expand.default,
    aten.unsqueeze.default,
    aten.view.default,
    aten.reshape.default,
    aten.alias.default,
)


def repeated_positions(module: GraphModule, index: Node) -> tuple[Node | None, bool]:
    """The positions that an index repeats over the other axes of a tensor.

    Returns:
        The tensor that is repeated, or None; and whether it has an entry for each entry of the
        first axis (else it has one entry).
    """
    current = index
    while is_call(current, *_REPEATS):
        extents = shape(current)
        if any(not isinstance(extent, int) for extent in extents):
            return None, False
        if value(current).numel() == 1:
            return current, False
        source = as_node(current.args[0])
        varying = [extent for extent in shape(source) if extent != 1]
        if is_call(current, aten.view.default, aten.reshape.default) and varying != [
            extent for extent in extents if extent != 1
        ]:
            return None, False
        current = source
        if value(current).numel() == 1:
            return current, False
        if len(shape(current)) == 1:
            break
    per_row = (
        len(shape(current)) == 1
        and shape(current)[0] == shape(index)[0]
        and _repeats_along_first_axis(module, index, current)
    )
    return (current, True) if per_row else (None, False)


def _repeats_along_first_axis(module: GraphModule, index: Node, source: Node) -> bool:
    """Evaluate the repetition on distinct numbers: entry ``[r, …]`` must be the r-th."""
    rows = torch.arange(shape(source)[0])
    repeated = evaluate(module, index, {source: rows})
    return bool((repeated == rows.reshape(-1, *[1] * (repeated.dim() - 1))).all())


_BROADCASTS = (
    aten.unsqueeze.default,
    aten.view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.alias.default,
    aten.logical_not.default,
    aten.bitwise_not.default,
)


def match_one_hot(
    module: GraphModule, mask: Node, base: AnyNode, *, positive: bool
) -> tuple[int, Node, bool] | None:
    """Match a mask that is ``arange(extent) == position``, broadcast over the other axes.

    Args:
        module: the graph's module.
        mask: the mask.
        base: the tensor that it is broadcast to.
        positive: the mask is true at the position; else false there alone.

    Returns:
        The axis that the position is on, the position, and whether each row has its own.
    """
    if not isinstance(base, Node) or any(
        not isinstance(extent, int) for extent in (*shape(base), *shape(mask))
    ):
        return None
    comparison = mask
    while is_call(comparison, *_BROADCASTS):
        comparison = as_node(comparison.args[0])
    if not is_call(comparison, aten.eq.Tensor, aten.ne.Tensor):
        return None
    for entries, other in (comparison.args[:2], comparison.args[1::-1]):
        order, position = constant_tensor(module, entries), as_node(other)
        if (
            order is None
            or value(position).is_floating_point()
            or value(position).numel() not in (1, shape(base)[0])
        ):
            continue
        for axis, extent in enumerate(shape(base)):
            if order.reshape(-1).tolist() == list(range(extent)) and _is_one_hot(
                module, mask, base, as_node(entries), position, axis, positive=positive
            ):
                return axis, position, value(position).numel() > 1
    return None


def _is_one_hot(
    module: GraphModule,
    mask: Node,
    base: Node,
    entries: Node,
    position: Node,
    axis: int,
    *,
    positive: bool,
) -> bool:
    """Evaluate the mask: along ``axis``, only the row's own position may differ from the rest."""
    extent, rows = shape(base)[axis], value(position).numel()
    for first in range(extent):
        places = (torch.arange(rows) * (1 if rows > 1 else 0) + first) % extent
        given = {
            position: places.reshape(shape(position)),
            entries: torch.arange(extent).reshape(shape(entries)),
        }
        selected = evaluate(module, mask, given)
        selected = selected if positive else ~selected
        try:
            selected = torch.broadcast_to(selected, tuple(shape(base)))
        except RuntimeError:
            return False
        view = [1] * len(shape(base))
        view[axis] = extent
        at = places.reshape(-1, *[1] * (len(shape(base)) - 1)) if rows > 1 else places
        expected = torch.broadcast_to(torch.arange(extent).reshape(view) == at, tuple(shape(base)))
        if not torch.equal(selected, expected):
            return False
    return True
