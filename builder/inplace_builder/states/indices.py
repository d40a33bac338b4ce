"""Where a step writes: indices as a graph computes them, followed as far as they can be proved.

Positions that a graph repeats over the other axes of a tensor: proved by evaluating the repetition on small distinct numbers.
"""

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from inplace_builder.graph.nodes import AnyNode, Emitter, as_node, dtype, is_call, shape, value

aten = torch.ops.aten


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
"""What an index may go through and still be its source plus constants, where the source is an operand once and never subtracted."""


MAX_INDEX_NODES = 200


def source_placeholders(node: Node) -> set[Node] | None:
    """The placeholders whose values a node is computed from; None where it is random or larger than anyone would prove.

    Dynamic extents are no values: a node may depend on them beside its leaves.
    """
    pending, seen, found = [node], {node}, set[Node]()
    while pending:
        current = pending.pop()
        if is_call(current, aten.sym_size.int):
            continue
        if current.op == "placeholder":
            found.add(current)
        elif current.op == "call_function":
            tags = getattr(current.target, "tags", ())
            if torch.Tag.nondeterministic_seeded in tags or len(seen) > MAX_INDEX_NODES:
                return None
        for source in current.all_input_nodes:
            if source not in seen:
                seen.add(source)
                pending.append(source)
    return found


class UnknownExtentError(Exception):
    """A node depends on a dynamic extent for which it was given no value."""


def evaluate(
    module: GraphModule,
    node: Node,
    given: Mapping[Node, Any],
    sizes: Mapping[str, int] | None = None,
) -> Any:
    """What a node is for these values of its sources; constants are the module's own.

    Args:
        module: holds the constants.
        node: what to evaluate.
        given: values of sources.
        sizes: values of dynamic extents, by the symbol as it is written.

    Raises:
        UnknownExtentError: the node depends on another dynamic extent.
    """
    known: dict[Node, Any] = dict(given)

    def resolve(source: Node) -> Any:
        if source not in known:
            if is_call(source, aten.sym_size.int):
                known[source] = extent(value(source), sizes or {})
            elif source.op == "get_attr":
                known[source] = torch.fx.graph_module._get_attr(module, str(source.target))
            else:
                assert source.op == "call_function" and callable(source.target)
                arguments, named = torch.fx.node.map_arg((source.args, source.kwargs), resolve)
                known[source] = source.target(*arguments, **named)
        return known[source]

    with torch.no_grad():
        return resolve(node)


def extent(size: Any, sizes: Mapping[str, int]) -> int:
    """The number that an extent is; UnknownExtentError where it is dynamic and not among ``sizes``."""
    if isinstance(size, int):
        return size
    if str(size) not in sizes:
        raise UnknownExtentError(f"it depends on the dynamic extent {size}")
    return sizes[str(size)]


def constant_tensor(module: GraphModule, node: AnyNode) -> Tensor | None:
    """The tensor a node always is, or None."""
    if (
        not isinstance(node, Node)
        or not isinstance(value(node), Tensor)
        or source_placeholders(node) != set()
    ):
        return None
    if any(not isinstance(size, int) for size in shape(node)):
        return None
    try:
        found = evaluate(module, node, {})
    except UnknownExtentError:
        return None
    return found if isinstance(found, Tensor) else None


def shifted_source(node: AnyNode) -> Node | None:
    """The placeholder that an index is, but for added constants and views; None where that is not certain."""
    found = source_placeholders(node) if isinstance(node, Node) else None
    if found is None or len(found) != 1:
        return None
    (source,) = found
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
    once = len(dependent) == 1 and sum(argument is dependent[0] for argument in node.args) == 1
    return once and not subtracted and _is_shift(dependent[0], source)


def is_consecutive(module: GraphModule, index: Node, assume_consecutive: frozenset[str]) -> bool:
    """Whether an index of n entries is always ``s, s + 1, …, s + n - 1`` for some s."""
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
        or _is_one(value(source).numel())
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
"""Numbers of tokens for which an index that counts them is looked at; that it counts is clear from the operators it is made of."""


def _counts_up(module: GraphModule, index: Node) -> bool:
    """Whether an index of a dynamic number of entries is a start plus 0, 1, 2, …: additions and counting alone, and right in examples."""
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
    """Whether only the first entry of a source matters: the others may be anything."""
    held = value(source)
    if not isinstance(held, Tensor) or _is_one(held.numel()):
        return True
    plain = example_positions(source, 5, sizes)
    other = plain.clone()
    other.view(-1)[1:] = 1000 - plain.view(-1)[1:]
    try:
        found = [
            torch.as_tensor(evaluate(module, node, {source: given}, sizes))
            for given in (plain, other)
        ]
    except UnknownExtentError:
        return False
    return torch.equal(*found)


def _is_one(extent: Any) -> bool:
    return isinstance(extent, int) and extent == 1


def _is_assumed_consecutive(node: Node, assume_consecutive: frozenset[str]) -> bool:
    return (
        shifted_source(node) is node and node.name in assume_consecutive and len(shape(node)) == 1
    )


def _index_at(
    module: GraphModule, index: Node, source: Node, start: int, sizes: Mapping[str, int]
) -> Tensor:
    found = evaluate(module, index, {source: example_positions(source, start, sizes)}, sizes)
    assert isinstance(found, Tensor)
    return found


def example_positions(source: Node, start: int, sizes: Mapping[str, int] | None = None) -> Any:
    """A value of an index's source: consecutive positions from ``start``; a dynamic extent that is not among ``sizes`` is 4."""
    held = value(source)
    if not isinstance(held, Tensor):
        return start
    extents = [
        size if isinstance(size, int) else (sizes or {}).get(str(size), 4) for size in held.shape
    ]
    return torch.arange(start, start + math.prod(extents), dtype=held.dtype).reshape(extents)


def _steps_by_one(index: Tensor) -> bool:
    return bool((index.diff() == 1).all())


def number_as_tensor(emit: Emitter, number: AnyNode) -> Node | None:
    """A Python or symbolic number of the graph as an integer tensor ``[1]``; None where it cannot be one without the host."""
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
            first, second = (number_as_tensor(emit, argument) for argument in number.args)
            return None if first is None or second is None else emit.call(target, first, second)
    if isinstance(number, Node) and isinstance(value(number), torch.SymInt):
        return emit.call(
            aten.reshape.default,
            emit.call(aten.scalar_tensor.default, number, dtype=torch.int64),
            [1],
        )
    return None


_BROADCASTS = (
    aten.unsqueeze.default,
    aten.view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.alias.default,
    aten.logical_not.default,
    aten.bitwise_not.default,
)


def evaluated(node: Node, known: dict[Node, Any]) -> Any:
    """What a node is, given what those are that it is made from; what was computed on the way is added to ``known``."""
    if node not in known:
        assert callable(node.target)
        arguments, named = torch.fx.node.map_arg(
            (node.args, node.kwargs), lambda source: evaluated(source, known)
        )
        known[node] = node.target(*arguments, **named)
    return known[node]


def repeated_positions(index: Node) -> tuple[Node | None, bool]:
    """The tensor that an index repeats: one entry, or one for each entry of the first axis only."""
    current = index
    while is_call(
        current,
        aten.expand.default,
        aten.unsqueeze.default,
        aten.view.default,
        aten.reshape.default,
        aten.alias.default,
    ):
        extents = shape(current)
        if any(not isinstance(extent, int) for extent in extents):
            return None, False
        if value(current).numel() == 1:
            return current, False
        before = as_node(current.args[0])
        varying = [extent for extent in shape(before) if extent != 1]
        if is_call(current, aten.view.default, aten.reshape.default) and varying != [
            extent for extent in extents if extent != 1
        ]:
            return None, False
        current = before
        if value(current).numel() == 1:
            return current, False
        if len(shape(current)) == 1:
            break
    stays = (
        len(shape(current)) == 1
        and shape(current)[0] == shape(index)[0]
        and _repeats_along_first_axis(index, current)
    )
    return (current, True) if stays else (None, False)


def _repeats_along_first_axis(index: Node, source: Node) -> bool:
    """Evaluate the repetition on distinct numbers: entry [r, …] must be the r-th."""
    rows = shape(source)[0]
    found = evaluated(index, {source: torch.arange(rows)})
    return bool((found == torch.arange(rows).reshape(-1, *[1] * (found.dim() - 1))).all())


def match_one_hot(
    mask: Node, base: AnyNode, module: GraphModule, *, positive: bool
) -> tuple[int, Node, bool] | None:
    """The axis and the position of a mask that is ``arange(extent) == position``, spread over the other axes."""
    if not isinstance(base, Node) or any(
        not isinstance(extent, int) for extent in (*shape(base), *shape(mask))
    ):
        return None
    compared = mask
    while is_call(compared, *_BROADCASTS):
        compared = as_node(compared.args[0])
    if not is_call(compared, aten.eq.Tensor, aten.ne.Tensor):
        return None
    for entries, position in (
        (compared.args[0], compared.args[1]),
        (compared.args[1], compared.args[0]),
    ):
        order, where = constant_tensor(module, entries), as_node(position)
        if (
            order is None
            or value(where).is_floating_point()
            or value(where).numel() not in (1, shape(base)[0])
        ):
            continue
        rows = value(where).numel()
        for axis, extent in enumerate(shape(base)):
            if order.reshape(-1).tolist() == list(range(extent)) and _is_one_hot(
                mask, compared, base, entries, where, axis, positive=positive
            ):
                return axis, where, rows > 1
    return None


def _is_one_hot(
    mask: Node,
    compared: Node,
    base: Node,
    entries: AnyNode,
    position: Node,
    axis: int,
    *,
    positive: bool,
) -> bool:
    """Evaluate the mask for some positions: along ``axis`` exactly the row's own position must differ from the rest."""
    extent, rows = shape(base)[axis], value(position).numel()
    for first in range(extent):
        places = (torch.arange(rows) * (1 if rows > 1 else 0) + first) % extent
        known: dict[Node, Any] = {position: places.reshape(shape(position))}
        known[as_node(entries)] = torch.arange(extent).reshape(shape(as_node(entries)))
        selected = evaluated(mask, known)
        selected = selected if positive else ~selected
        try:
            selected = torch.broadcast_to(selected, tuple(shape(base)))
        except RuntimeError:
            return False
        view = [1] * len(shape(base))
        view[axis] = extent
        at = places.reshape(-1, *[1] * (len(shape(base)) - 1)) if rows > 1 else places
        wanted = torch.broadcast_to(torch.arange(extent).reshape(view) == at, tuple(shape(base)))
        if not torch.equal(selected, wanted):
            return False
    return True
