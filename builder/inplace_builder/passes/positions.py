"""Where a step writes: indices as a graph computes them, followed as far as they can be proved."""

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from inplace_builder.passes.emit import Emitter, dtype, shape, value
from inplace_builder.passes.match import AnyNode, call

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

MOST_NODES = 200


def leaves(node: Node) -> set[Node] | None:
    """The placeholders that a node is computed from; None where it is random or larger than anyone would prove."""
    pending, seen, found = [node], {node}, set[Node]()
    while pending:
        current = pending.pop()
        if current.op == "placeholder":
            found.add(current)
        elif current.op == "call_function":
            tags = getattr(current.target, "tags", ())
            if torch.Tag.nondeterministic_seeded in tags or len(seen) > MOST_NODES:
                return None
        for source in current.all_input_nodes:
            if source not in seen:
                seen.add(source)
                pending.append(source)
    return found


def evaluate(module: GraphModule, node: Node, given: Mapping[Node, Any]) -> Any:
    """What a node is for these values of its sources; constants are the module's own."""
    known: dict[Node, Any] = dict(given)

    def resolve(source: Node) -> Any:
        if source not in known:
            if source.op == "get_attr":
                known[source] = torch.fx.graph_module._get_attr(module, str(source.target))
            else:
                assert source.op == "call_function" and callable(source.target)
                arguments, named = torch.fx.node.map_arg((source.args, source.kwargs), resolve)
                known[source] = source.target(*arguments, **named)
        return known[source]

    with torch.no_grad():
        return resolve(node)


def constant(module: GraphModule, node: AnyNode) -> Tensor | None:
    """The tensor a node always is, or None."""
    if not isinstance(node, Node) or not isinstance(value(node), Tensor) or leaves(node) != set():
        return None
    if any(not isinstance(extent, int) for extent in shape(node)):
        return None
    found = evaluate(module, node, {})
    return found if isinstance(found, Tensor) else None


def shifted(node: AnyNode) -> Node | None:
    """The placeholder that an index is, but for added constants and views; None where that is not certain."""
    found = leaves(node) if isinstance(node, Node) else None
    if found is None or len(found) != 1:
        return None
    (source,) = found
    return source if isinstance(node, Node) and _shifts(node, source) else None


def _shifts(node: Node, source: Node) -> bool:
    if node is source:
        return True
    if not call(node, *_SHIFTS) or node.kwargs.get("alpha", 1) != 1:
        return False
    if call(node, aten.to.dtype, aten._to_copy.default) and dtype(node) not in (torch.int32, torch.int64):
        return False
    dependent = [operand for operand in node.all_input_nodes if source in (leaves(operand) or ())]
    if call(node, aten.arange.start):  # from a start to that start plus a constant
        return all(_shifts(operand, source) for operand in dependent)
    subtracted = call(node, aten.sub.Tensor, operator.sub) and node.args[0] not in dependent
    once = len(dependent) == 1 and sum(argument is dependent[0] for argument in node.args) == 1
    return once and not subtracted and _shifts(dependent[0], source)


def consecutive(module: GraphModule, index: Node, promised: frozenset[str]) -> bool:
    """Whether an index of n entries is always ``s, s + 1, …, s + n - 1`` for some s."""
    extents = shape(index)
    if len(extents) > 1 or any(not isinstance(extent, int) for extent in extents):
        return _promised(index, promised)
    if value(index).numel() == 1:
        return True
    if (fixed := constant(module, index)) is not None:
        return _steps_by_one(fixed)
    source = shifted(index)
    if source is None:
        return False
    if isinstance(value(source), Tensor) and value(source).numel() != 1:
        return _promised(source, promised) and shape(source) == extents and _steps_by_one(_at(module, index, source, 0))
    return _steps_by_one(_at(module, index, source, 0)) and _steps_by_one(_at(module, index, source, 5))


def _promised(node: Node, promised: frozenset[str]) -> bool:
    return shifted(node) is node and node.name in promised and len(shape(node)) == 1


def _at(module: GraphModule, index: Node, source: Node, start: int) -> Tensor:
    found = evaluate(module, index, {source: example(source, start)})
    assert isinstance(found, Tensor)
    return found


def example(source: Node, start: int) -> Any:
    """A value of an index's source: consecutive positions from ``start``."""
    held = value(source)
    if not isinstance(held, Tensor):
        return start
    return torch.arange(start, start + held.numel(), dtype=held.dtype).reshape(held.shape)


def _steps_by_one(index: Tensor) -> bool:
    return bool((index.diff() == 1).all())


def as_tensor(emit: Emitter, number: AnyNode) -> Node | None:
    """A Python or symbolic number of the graph as an integer tensor ``[1]``; None where it cannot be one without the host."""
    if isinstance(number, int):
        return emit.call(aten.full.default, [1], number, dtype=torch.int32)
    if call(number, aten.item.default, aten._local_scalar_dense.default) and dtype(number.args[0]) in (torch.int32, torch.int64):
        return emit.call(aten.reshape.default, number.args[0], [1])
    for function, target in ((operator.add, aten.add.Tensor), (operator.sub, aten.sub.Tensor), (operator.mul, aten.mul.Tensor)):
        if call(number, function):
            first, second = (as_tensor(emit, argument) for argument in number.args)
            return None if first is None or second is None else emit.call(target, first, second)
    if isinstance(number, Node) and isinstance(value(number), torch.SymInt):
        return emit.call(aten.reshape.default, emit.call(aten.scalar_tensor.default, number, dtype=torch.int64), [1])
    return None
