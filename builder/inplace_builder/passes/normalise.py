"""What functionalisation leaves of an assignment, said with the value that is assigned."""

from typing import Any

import torch
from torch.fx import Graph, Node

from inplace_builder.passes.emit import Emitter, dtype, shape
from inplace_builder.passes.match import call

aten = torch.ops.aten


def normalise_assignments(graph: Graph, outputs: int) -> None:
    """Rewrite ``copy(old, new)`` to ``new`` in the type and extents of ``old``, and ``fill(old, x)`` to a full tensor.

    ``state[...] = x`` is exported as a copy over a slice of the old state; only its type and extents matter, so the slice goes away and
    with it a read of the old state. Assertions about types go too: a pattern wants the parts it is made of for itself alone.
    """
    last = graph.output_node().args[0]
    assert isinstance(last, tuple)
    returned = set(last[:outputs])
    for node in list(graph.nodes):
        if call(node, aten._assert_tensor_metadata.default):
            graph.erase_node(node)
        elif call(node, aten.copy.default, aten.fill.Tensor, aten.fill.Scalar, aten.zero.default):
            old, new = node.args[0], node.args[1] if len(node.args) > 1 else 0
            with Emitter(graph, node).before(node) as emit:
                assigned = _assigned(emit, old, new)
                if node in returned or (not _fresh(assigned) and any(not _writes_it(user, node) for user in node.users)):
                    assigned = emit.call(aten.clone.default, assigned, memory_format=torch.contiguous_format)
            node.replace_all_uses_with(assigned)
            graph.erase_node(node)
    graph.eliminate_dead_code()


_INTO = (aten.slice_scatter.default, aten.select_scatter.default)


def _fresh(node: Node) -> bool:
    """Whether it is memory of its own, laid out as a new tensor is: else views would not be those of the old one."""
    made = node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
    alone = made and all(result.alias_info is None for result in node.target._schema.returns)  # type: ignore[union-attr]
    return alone and bool(node.meta["val"].is_contiguous())


def _writes_it(user: Node, node: Node) -> bool:
    """Whether a user only writes a value into something else."""
    into = call(user, *_INTO) and user.args[1] is node and user.args[0] is not node
    return into or user.op == "output"  # what is returned was asked for above, and a state takes a copy


def _assigned(emit: Emitter, old: Any, new: Any) -> Node:
    extents = [_extent(emit, old, axis) for axis in range(len(shape(old)))]
    if not isinstance(new, Node) or not isinstance(new.meta["val"], torch.Tensor):
        return emit.call(aten.full.default, extents, new, dtype=dtype(old), device=old.meta["val"].device)
    assigned = new if dtype(new) == dtype(old) else emit.call(aten.to.dtype, new, dtype(old))
    return assigned if shape(assigned) == shape(old) else emit.call(aten.expand.default, assigned, extents)


def _extent(emit: Emitter, node: Node, axis: int) -> Any:
    extent = shape(node)[axis]
    return int(extent) if isinstance(extent, int) else emit.call(aten.sym_size.int, node, axis)


def drop_dead_assertions(graph: Graph) -> None:
    """Drop run-time assertions about numbers that nothing else uses any more.

    An index that a pattern moved into ``inplace::update`` is checked there; the assertion alone would make the host wait for the device.
    """
    live: set[Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or (not _assertion(node) and not _number(node)) or any(user in live for user in node.users):
            live.add(node)
    for node in reversed(graph.nodes):
        if node not in live and (_assertion(node) or not node.users):
            if _assertion(node) and not _only_dead_numbers(node, live):
                continue
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _assertion(node: Node) -> bool:
    return call(
        node,
        aten._assert_scalar.default,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
        aten._assert_async.msg,
    )


def _number(node: Node) -> bool:
    return node.op == "call_function" and not isinstance(node.meta.get("val"), torch.Tensor) and not _writes(node)


def _writes(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and bool(node.target._schema.is_mutable)


def _only_dead_numbers(node: Node, live: set[Node]) -> bool:
    pending, seen = list(node.all_input_nodes), set[Node]()
    while pending:
        source = pending.pop()
        if source in seen:
            continue
        seen.add(source)
        if source in live and _number(source):
            return False
        if _number(source):
            pending.extend(source.all_input_nodes)
    return True
