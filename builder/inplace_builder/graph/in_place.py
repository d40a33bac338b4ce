"""Remove in-place operators: a network has values, not memory.

``x.mul_(2)`` becomes ``mul(x, 2)``, and every later use of ``x`` uses the new value. Where ``x`` is
a view, the new value is put back into the tensor that it is a view of (``slice_scatter``,
``select_scatter``, an inverse permutation), and later uses of other views take them again from
there. Operators that write states are left as they are: their memory is the engine's.
"""

import operator
from typing import Any

import torch
from inplace.operators import NAMESPACE
from torch.export.graph_signature import InputKind
from torch.fx import Node

from inplace_builder.errors import BuildError, LoweringError
from inplace_builder.graph.nodes import (
    Emitter,
    argument,
    dtype,
    fake_result,
    source_line,
    value,
)
from inplace_builder.graph.program import GraphProgram

aten = torch.ops.aten


SAME_ORDER = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.squeeze.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.view_as.default,
        aten.reshape_as.default,
    }
)
"""Views that keep the order of the elements."""


SELF_INVERSE = frozenset(
    {
        aten.transpose.int,
        aten.t.default,
        aten.swapaxes.default,
        aten.numpy_T.default,
        aten.mT.default,
    }
)
"""Views that undo themselves."""


_INVERSES = {
    aten.view_as_real.default: aten.view_as_complex.default,
    aten.view_as_complex.default: aten.view_as_real.default,
}
"""What undoes a view."""


_IDENTITIES = frozenset(
    {
        aten.alias.default,
        aten.detach.default,
        aten.contiguous.default,
        aten.positive.default,
        aten.lift_fresh.default,
        aten.to.dtype,
        aten.to.device,
        aten.to.dtype_layout,
        aten.to.other,
        aten.type_as.default,
        aten.dropout.default,
        aten.feature_dropout.default,
    }
)
"""Operators that may return their input itself."""


_SCATTERS = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
    aten.diagonal.default: aten.diagonal_scatter.default,
}
"""What replaces the elements of a view, by the operator that takes it."""


def writes_in_place(node: Node) -> bool:
    """Whether a call is an ATen operator that writes one of its arguments."""
    target = node.target
    return (
        node.op == "call_function"
        and isinstance(target, torch._ops.OpOverload)
        and target.namespace == "aten"
        and target._schema.is_mutable
        and target is not aten.detach_.default
    )


def remove_in_place(program: GraphProgram) -> None:
    """Replace ATen's in-place operators by functional ones, in place.

    Raises:
        BuildError: one writes a parameter or a buffer; names the operator and the model's line.
        LoweringError: one has no functional form, or writes a view that cannot be put back.
    """
    if any(writes_in_place(node) for node in program.graph.nodes):
        _Removal(program).run()
    program.graph.eliminate_dead_code(
        lambda node: node.op in ("placeholder", "output") or node.is_impure()
    )


class _Removal:
    """One walk over the graph.

    The nodes of the graph name tensors and views; `_current` has what each of them holds at the
    place where the walk is.

    Attributes:
        source_of: for each view the tensor, view or list of views that it was taken from.
    """

    def __init__(self, program: GraphProgram) -> None:
        self.graph = program.graph
        self.source_of: dict[Node, Node] = {}
        self._current: dict[Node, Node] = {}
        self._written: set[Node] = set()
        kinds = {
            spec.arg.name: spec.kind.name.lower().replace("_", " ")
            for spec in program.graph_signature.input_specs
            if spec.kind is not InputKind.USER_INPUT
        }
        self._weights = {
            node: kinds[node.name]
            for node in program.graph.find_nodes(op="placeholder")
            if node.name in kinds
        }

    def run(self) -> None:
        """Walk over every node once."""
        for node in list(self.graph.nodes):
            if node.op not in ("call_function", "output"):
                continue
            if writes_in_place(node):
                self._write(node)
                continue
            source = _viewed(node) if node.op == "call_function" else None
            self._use_current(node)
            if source is not None:
                self.source_of[node] = source

    def _root(self, node: Node) -> Node:
        while node in self.source_of:
            node = self.source_of[node]
        return node

    def _use_current(self, node: Node) -> None:
        """Let a node use what its arguments hold at this place."""
        for source in node.all_input_nodes:
            if self._root(source) in self._written:
                node.replace_input_with(source, self._value(source, node))

    def _value(self, node: Node, before: Node) -> Node:
        """The node with the current value of a tensor or view; a view is taken again if needed."""
        if self._root(node) not in self._written:
            return node
        if node not in self._current:
            source = self._value(self.source_of[node], before)
            with Emitter(self.graph, node).before(before) as emit:
                self._current[node] = emit.call(node.target, source, *node.args[1:], **node.kwargs)
        return self._current[node]

    def _write(self, node: Node) -> None:
        """Replace one in-place operator by a functional one."""
        target, index = node.target, _written_place(node)
        functional = _functional_overload(target)
        if index is None or functional is None:
            raise LoweringError(
                f"operator {target} writes in place and has no functional form{source_line(node)}"
            )
        name = target._schema.arguments[index].name  # type: ignore[union-attr]
        old = node.args[index] if index < len(node.args) else node.kwargs[name]
        assert isinstance(old, Node)
        self._refuse_weight(node, self._root(old))
        self._use_current(node)
        with Emitter(self.graph, node).before(node) as emit:
            args = node.args[:index] if _is_out(target, index) else node.args
            kwargs = {key: each for key, each in node.kwargs.items() if key != name}
            new = emit.call(functional, *args, **kwargs)
            if dtype(new) != dtype(old):
                new = emit.call(aten.to.dtype, new, dtype(old))
            self._store(emit, old, new, node)
        node.replace_all_uses_with(old)
        self.graph.erase_node(node)

    def _refuse_weight(self, node: Node, root: Node) -> None:
        if root in self._weights:
            raise BuildError(
                f"operator {node.target} writes {root.name}, a {self._weights[root]} of the model, "
                f"in place{source_line(node)}; only states may be written"
            )

    def _store(self, emit: Emitter, old: Node, new: Node, before: Node) -> None:
        """Make ``new`` the value of ``old``, and put it into what ``old`` is a view of."""
        values, view = {old: new}, old
        while view in self.source_of:
            source = self.source_of[view]
            base = self.source_of[source] if view.target is operator.getitem else source
            values[base] = _put_back(emit, view, self._value(base, before), values[view])
            view = base
        self._current = {
            node: now for node, now in self._current.items() if self._root(node) is not view
        }
        self._current |= values
        self._written.add(view)


def _written_place(node: Node) -> int | None:
    """The position in the schema of the only argument that an operator writes."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    places = [
        place
        for place, each in enumerate(arguments)
        if each.alias_info is not None and each.alias_info.is_write
    ]
    return places[0] if len(places) == 1 else None


def _is_out(overload: Any, index: int) -> bool:
    return bool(overload._schema.arguments[index].is_out)


def _functional_overload(overload: Any) -> torch._ops.OpOverload | None:
    """The operator that returns what this one writes; None if there is none."""
    base = overload._schema.name.partition("::")[2]
    packet = getattr(aten, base.removesuffix("_"), None)
    takes = [(each.name, str(each.type)) for each in overload._schema.arguments if not each.is_out]
    for name in packet.overloads() if packet is not None else ():
        candidate: torch._ops.OpOverload = getattr(packet, name)
        arguments = [(each.name, str(each.type)) for each in candidate._schema.arguments]
        if not candidate._schema.is_mutable and arguments == takes:
            return candidate
    return None


def _viewed(node: Node) -> Node | None:
    """The argument that a call's result shares its memory with, or None."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node):
        return None
    if node.target is operator.getitem:
        return source if _viewed(source) is not None else None
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace == NAMESPACE:
        return None
    if not isinstance(value(source), torch.Tensor) or not _may_alias(target):
        return None
    args: Any
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), value)
    result = fake_result(target, args, kwargs)
    first = result[0] if isinstance(result, list | tuple) and result else result
    shares = isinstance(first, torch.Tensor) and _memory(first) == _memory(args[0])
    return source if shares else None


def _memory(x: torch.Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def _may_alias(target: torch._ops.OpOverload) -> bool:
    if target._schema.is_mutable:
        return False
    returns_view = any(each.alias_info is not None for each in target._schema.returns)
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    return returns_view or target.has_kernel_for_dispatch_key(composite)


def _put_back(emit: Emitter, view: Node, base: Node, new: Node) -> Node:
    """The tensor that a view was taken from, with another value in the view's place.

    Args:
        emit: where to insert.
        view: the call that made the view.
        base: the tensor.
        new: the value, of the view's shape.

    Raises:
        LoweringError: elements of this view cannot be put back.
    """
    target, arguments = view.target, view.args[1:]
    whole: Node | None = None
    if target in SAME_ORDER:
        whole = emit.call(aten.reshape_as.default, new, base)
    elif target in SELF_INVERSE:
        whole = emit.call(target, new, *arguments, **view.kwargs)
    elif target in _IDENTITIES:
        whole = new
    elif target in _INVERSES:
        whole = emit.call(_INVERSES[target], new)
    elif target is aten.real.default:
        whole = emit.call(aten.complex.default, new, emit.call(aten.imag.default, base))
    elif target is aten.imag.default:
        whole = emit.call(aten.complex.default, emit.call(aten.real.default, base), new)
    elif target in _SCATTERS:
        whole = emit.call(_SCATTERS[target], base, new, *arguments, **view.kwargs)
    elif target is aten.permute.default:
        order: Any = arguments[0]
        inverse = [0] * len(order)
        for place, axis in enumerate(order):
            inverse[axis % len(order)] = place
        whole = emit.call(aten.permute.default, new, inverse)
    elif target is aten.narrow.default and all(isinstance(each, int) for each in arguments):
        dim, start, length = (int(each) for each in arguments)  # type: ignore[arg-type]
        whole = emit.call(aten.slice_scatter.default, base, new, dim, start, start + length)
    elif target is operator.getitem:
        whole = _put_back_piece(emit, view, base, new)
    if whole is not None:
        return whole
    made = view.args[0] if target is operator.getitem else view
    raise LoweringError(
        f"a view made by {made.target}{source_line(view)} is written in place, "  # type: ignore[union-attr]
        f"which is not lowered; write to the tensor itself, or to a slice of it"
    )


def _put_back_piece(emit: Emitter, view: Node, base: Node, new: Node) -> Node | None:
    """One piece of a split, a chunk or an unbind; None where its place is not known."""
    made, place = view.args
    assert isinstance(made, Node) and isinstance(place, int)
    if made.target is aten.unbind.int:
        dim = argument(made, 1, "dim", 0)
        return emit.call(aten.select_scatter.default, base, new, dim, place)
    dim = argument(made, 2, "dim", 0)
    extents = [piece.shape[dim] for piece in value(made)]
    if not all(isinstance(extent, int) for extent in extents[: place + 1]):
        return None
    start = sum(extents[:place])
    end = start + extents[place]
    return emit.call(aten.slice_scatter.default, base, new, dim, start, end)
