"""Passes that every capture route runs over its graph: normalise, resolve masks, clean up, refuse.

Each changes the graph in place, or only looks at it, and knows nothing of the route.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from inplace.operators import NAMESPACE
from inplace.operators.state import VIEWS, written_arguments
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, Node

from inplace_builder.errors import BuildError
from inplace_builder.graph.nodes import (
    ConstantValues,
    Emitter,
    argument,
    dtype,
    fake_result,
    insert_constant,
    is_call,
    placeholders_by_name,
    returned_values,
    shape,
    source_line,
    value,
)

aten = torch.ops.aten


def normalise_assignments(graph: Graph, num_outputs: int) -> None:
    """Replace ``copy(old, new)`` by ``new``, and ``fill(old, x)`` by a full tensor.

    torch.export turns ``state[...] = x`` into a copy over a slice of the old state. Only the type
    and the extents of that slice matter, so the slice goes away and with it a read of the state.
    Assertions about types go too: patterns match only what nothing else uses.

    Args:
        graph: rewritten; it returns the module's outputs and then the new values of its states.
        num_outputs: how many of the returned values are outputs.
    """
    returned = set(returned_values(graph)[:num_outputs])
    for node in list(graph.nodes):
        if is_call(node, aten._assert_tensor_metadata.default):
            graph.erase_node(node)
        elif is_call(
            node, aten.copy.default, aten.fill.Tensor, aten.fill.Scalar, aten.zero.default
        ):
            old, new = node.args[0], node.args[1] if len(node.args) > 1 else 0
            with Emitter(graph, node).before(node) as emit:
                assigned = _assigned_value(emit, old, new)
                if node in returned or (
                    not _is_new_memory(assigned)
                    and any(not _only_stores(user, node) for user in node.users)
                ):
                    assigned = emit.call(
                        aten.clone.default, assigned, memory_format=torch.contiguous_format
                    )
            node.replace_all_uses_with(assigned)
            graph.erase_node(node)
    graph.eliminate_dead_code()


def cast_copies(exported: ExportedProgram) -> None:
    """Cast what a module copies into a tensor of another type, in place.

    PyTorch 2.11 forgets the cast of ``state.copy_(x)`` when it makes a program functional.
    """
    graph = exported.graph_module.graph
    for node in graph.find_nodes(op="call_function", target=aten.copy_.default):
        old, new = node.args[0], node.args[1]
        if isinstance(new, Node) and dtype(new) != dtype(old):
            with Emitter(graph, node).before(node) as emit:
                node.update_arg(1, emit.call(aten.to.dtype, new, dtype(old)))
    exported.graph_module.recompile()


def keep_old_values(exported: ExportedProgram) -> None:
    """Let a module that assigns a buffer anew return the old tensor as it was, in place.

    torch.export copies the new value into the buffer at the end of the graph, although the old
    tensor, or a view of it, may be what the module returns.
    """
    graph = exported.graph_module.graph
    output = graph.output_node()
    for node in graph.find_nodes(op="call_function", target=aten.copy_.default):
        buffer, new = node.args[:2]
        # torch.export gives its own copy the metadata of what it copies
        if buffer.op != "placeholder" or node.meta.get("torch_fn") != new.meta.get("torch_fn"):
            continue
        for returned in [each for each in output.all_input_nodes if _viewed(each) is buffer]:
            with Emitter(graph, returned).before(node) as emit:
                old = emit.call(aten.clone.default, returned)
            output.replace_input_with(returned, old)
            for spec in exported.graph_signature.output_specs:
                if spec.arg.name == returned.name:
                    spec.arg.name = old.name
    exported.graph_module.recompile()


_INDEXED_ALONG_AN_AXIS = (
    aten.index_select.default,
    aten.index_copy.default,
    aten.index_add.default,
    aten.index_reduce.default,
    aten.index_fill.int_Scalar,
    aten.index_fill.int_Tensor,
)
"""Operators ``(x, axis, index, …)`` whose index has one axis, or none for one entry."""


def give_indices_an_axis(graph: Graph) -> None:
    """Give an index of no axes one, in place: it means the same, and rules expect one."""
    for node in list(graph.nodes):
        if is_call(node, *_INDEXED_ALONG_AN_AXIS) and not value(node.args[2]).dim():
            with Emitter(graph, node).before(node) as emit:
                index = emit.call(aten.reshape.default, node.args[2], [1])
            node.args = (*node.args[:2], index, *node.args[3:])


def _assigned_value(emit: Emitter, old: Any, new: Any) -> Node:
    """What is assigned, in the type and the extents of what it is assigned to."""
    extents = [_extent(emit, old, axis) for axis in range(len(shape(old)))]
    if not isinstance(new, Node) or not isinstance(value(new), Tensor):
        return emit.call(
            aten.full.default, extents, new, dtype=dtype(old), device=value(old).device
        )
    assigned = new if dtype(new) == dtype(old) else emit.call(aten.to.dtype, new, dtype(old))
    if shape(assigned) == shape(old):
        return assigned
    return emit.call(aten.expand.default, assigned, extents)


def _extent(emit: Emitter, node: Node, axis: int) -> Any:
    extent = shape(node)[axis]
    return int(extent) if isinstance(extent, int) else emit.call(aten.sym_size.int, node, axis)


def _is_new_memory(node: Node) -> bool:
    """Whether a node's result is new, contiguous memory: views of it are those of the old value."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    aliases_nothing = all(result.alias_info is None for result in node.target._schema.returns)
    return aliases_nothing and bool(value(node).is_contiguous())


def _only_stores(user: Node, node: Node) -> bool:
    """Whether a user only writes a value into another tensor, or returns it.

    An output of the module is looked at before; a state that is returned receives a copy.
    """
    into = is_call(user, aten.slice_scatter.default, aten.select_scatter.default)
    return (into and user.args[1] is node and user.args[0] is not node) or user.op == "output"


_INDEXED = frozenset(
    {aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default}
)


def resolve_constant_masks(graph: Graph, constants: Mapping[Node, Tensor]) -> None:
    """Replace constant masks by indices, in place: then no extent depends on a value.

    torch.export gives ``x[mask]`` an unknown extent, also where the mask is a buffer that nothing
    writes. Its entries are known, so the mask becomes the indices of what it selects.

    Args:
        graph: without operators that write a constant; its module gets the indices as buffers.
        constants: the tensors behind the nodes that never change.
    """
    walk = _MaskWalk(graph, constants)
    for node in list(graph.nodes):
        if node.op == "call_function":
            walk.visit(node)
    if walk.changed:
        graph.eliminate_dead_code(
            lambda node: node.op in ("placeholder", "output") or node.is_impure()
        )


class _MaskWalk:
    """One walk over a graph that resolves masks.

    Attributes:
        changed: the nodes whose value has other extents than before.
    """

    def __init__(self, graph: Graph, constants: Mapping[Node, Tensor]) -> None:
        self.changed: set[Node] = set()
        self._values = ConstantValues(constants)
        self._fake: Any = detect_fake_mode([node.meta.get("val") for node in graph.nodes])

    def visit(self, node: Node) -> None:
        """Resolve what a node selects by, and give it its extents."""
        if node.target in _INDEXED:
            self._resolve_indices(node)
        elif node.target is aten.masked_select.default:
            self._resolve_selection(node)
        elif (
            node.target is aten.nonzero.default
            and (places := self._values.tensor(node)) is not None
        ):
            self._replace(node, self._constant(places, node))
        if not self.changed.isdisjoint(node.all_input_nodes):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), value)
            node.meta["val"] = fake_result(node.target, args, kwargs)
            self.changed.add(node)

    def _resolve_indices(self, node: Node) -> None:
        indices: Any = node.args[1]
        resolved: list[Any] = []
        for index in indices:
            mask = self._values.tensor(index) if _is_mask(index) else None
            if mask is None:
                resolved.append(index)
                continue
            resolved += self._indices(mask, node)
            if not mask.any() and node.target is aten.index_put.default:
                self._replace(node, node.args[0])
                return
        if resolved != list(indices):
            node.update_arg(1, resolved)
            self.changed |= {each for each in resolved if isinstance(each, Node)}

    def _resolve_selection(self, node: Node) -> None:
        source, selector = node.args
        assert isinstance(source, Node) and isinstance(selector, Node)
        mask, extents = self._values.tensor(selector), value(source).shape
        if mask is None or not all(isinstance(extent, int) for extent in extents):
            return
        whole = torch.broadcast_shapes(mask.shape, extents)
        places = self._indices(mask.expand(whole), node)
        with Emitter(node.graph, node).before(node) as emit:
            wide = emit.call(aten.expand.default, source, list(whole))
            self._replace(node, emit.call(aten.index.Tensor, wide, places))

    def _replace(self, node: Node, new: Any) -> None:
        node.replace_all_uses_with(new)
        self.changed.add(new)

    def _indices(self, mask: Tensor, node: Node) -> list[Node]:
        """The indices of what a mask selects, one constant for each of its axes."""
        return [self._constant(places, node) for places in mask.nonzero().unbind(1)]

    def _constant(self, tensor: Tensor, node: Node) -> Node:
        constant = self._values.insert(node, tensor, "selected")
        constant.meta["val"] = self._fake.from_tensor(tensor, static_shapes=True)
        return constant


def _is_mask(index: Any) -> bool:
    return isinstance(index, Node) and value(index).dtype in (torch.bool, torch.uint8)


def index_strided(graph: Graph) -> None:
    """Replace ``as_strided``, which reads memory, by an index, which reads elements, in place.

    Passes and rows may lay out a tensor in another way than PyTorch does. Where the elements are is
    known from the export. A call stays where an extent is not known or memory has gaps.

    Args:
        graph: functional, as it was exported; its module gets the indices as buffers.
    """
    for node in list(graph.nodes):
        if not is_call(node, aten.as_strided.default):
            continue
        root = _memory_of(node)
        index = None if root is None else _elements(value(root), value(node))
        if root is None or index is None:
            continue
        with graph.inserting_before(node):
            constant = insert_constant(graph, index.reshape(-1), "elements")
        fake_mode = value(root).fake_mode
        constant.meta["val"] = fake_mode.from_tensor(index.reshape(-1), static_shapes=True)
        with Emitter(graph, node).before(node) as emit:
            flat = emit.call(aten.reshape.default, root, [-1])
            chosen = emit.call(aten.index_select.default, flat, 0, constant)
            node.replace_all_uses_with(emit.call(aten.reshape.default, chosen, list(index.shape)))
        graph.erase_node(node)


def _memory_of(node: Node) -> Node | None:
    """The first node whose memory a view has; None if it is not known."""
    while True:
        memory = _storage(node)
        if memory is None:
            return None
        source = next((each for each in node.all_input_nodes if _storage(each) == memory), None)
        if source is None:
            return node
        node = source


def _storage(node: Node) -> Any:
    """What tells apart the memory of tensors; for several results, that of the first."""
    given = node.meta.get("val")
    if isinstance(given, list | tuple) and given:
        given = given[0]
    return given.untyped_storage()._cdata if isinstance(given, Tensor) else None


def _elements(root: Tensor, view: Tensor) -> Tensor | None:
    """Which elements of a tensor a view of its memory has, in the view's shape.

    Returns:
        None if the tensor does not fill its memory, or if an extent is not known.
    """
    extents = (*root.shape, *root.stride(), *view.shape, *view.stride())
    if not all(isinstance(each, int) for each in extents) or root.dtype != view.dtype:
        return None
    count = root.numel()
    places = torch.arange(count)
    try:
        own = places.as_strided(root.shape, root.stride(), root.storage_offset()).reshape(-1)
        if own.unique().numel() != count:
            return None
        order = torch.empty_like(places)
        order[own] = places
        return order.as_strided(view.shape, view.stride(), view.storage_offset())
    except RuntimeError:  # it reaches beyond the tensor
        return None


def drop_dead_assertions(graph: Graph) -> None:
    """Drop run-time assertions about numbers that nothing else uses any more.

    An index that a pattern moved into ``inplace::update`` is checked there. The assertion alone
    would make the host wait for the device.
    """
    live: set[Node] = set()
    for node in reversed(graph.nodes):
        if (
            node.op == "output"
            or (not _is_assertion(node) and not _is_number(node))
            or any(user in live for user in node.users)
        ):
            live.add(node)
    for node in reversed(graph.nodes):
        if node not in live and (_is_assertion(node) or not node.users):
            if _is_assertion(node) and not _uses_only_dead_numbers(node, live):
                continue
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _is_assertion(node: Node) -> bool:
    return is_call(
        node,
        aten._assert_scalar.default,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
        aten._assert_async.msg,
    )


def _is_number(node: Node) -> bool:
    """Whether a call only computes a number."""
    if node.op != "call_function" or isinstance(node.meta.get("val"), Tensor):
        return False
    overload = isinstance(node.target, torch._ops.OpOverload)
    return not (overload and node.target._schema.is_mutable)  # type: ignore[union-attr]


def _uses_only_dead_numbers(node: Node, live: set[Node]) -> bool:
    pending, seen = list(node.all_input_nodes), set[Node]()
    while pending:
        source = pending.pop()
        if source in seen:
            continue
        seen.add(source)
        if source in live and _is_number(source):
            return False
        if _is_number(source):
            pending.extend(source.all_input_nodes)
    return True


def remove_no_ops(exported: ExportedProgram) -> int:
    """Drop assertions about metadata, and casts to the type that a tensor already has, in place.

    Each of these nodes would cost a PyTorch engine time in every step.

    Returns:
        The number of nodes dropped.
    """
    graph = exported.graph_module.graph
    dropped = 0
    for node in list(graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
            dropped += 1
        elif node.target in (aten.to.dtype, aten.to.device) and _changes_nothing(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            dropped += 1
    graph.lint()
    exported.graph_module.recompile()
    return dropped


def _changes_nothing(node: Node) -> bool:
    if any(user.op == "output" for user in node.users):
        return False  # the program's signature names its outputs
    source = node.args[0]
    assert isinstance(source, Node)
    before, after = value(source), value(node)
    copies = len(node.args) > 3 and node.args[3]
    return bool(before.dtype == after.dtype and before.device == after.device and not copies)


def check_state_uses(graph: Graph, states: Collection[str]) -> None:
    """Refuse a graph in which anything but an ``inplace::`` operator reads or writes a state.

    This is the contract between the front-ends and the engines: a graph touches its states only
    through these operators.

    Raises:
        BuildError: names the state, the operator and the line of the model that called it.
    """
    for node in graph.nodes:
        if node.op != "placeholder" or node.name not in states:
            continue
        for user in node.users:
            if not _is_own_operator(user) and not _is_view_for_writers(user):
                use = "returned by the model" if user.op == "output" else f"used by {user.target}"
                raise BuildError(
                    f"state {node.name} is {use}{source_line(user)}: a state may only be used by "
                    f"inplace.operators.read, update and attention; read it first, and write it "
                    f"back with update"
                )


def _is_own_operator(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == NAMESPACE


def _is_view_for_writers(node: Node) -> bool:
    """Whether a node is a view of a state that only user operators take, to write it."""
    return (
        node.target in VIEWS
        and bool(node.users)
        and all(node in written_arguments(user) for user in node.users)
    )


def check_writes(exported: ExportedProgram) -> None:
    """Refuse a module that writes a parameter, or a tensor larger than the one it writes.

    Args:
        exported: the module, before it is functional.

    Raises:
        BuildError: with the name and the module's line.
    """
    names: dict[str, tuple[str, str]] = {
        spec.arg.name: (
            "parameter" if spec.kind is InputKind.PARAMETER else "state",
            str(spec.target or spec.arg.name),
        )
        for spec in exported.graph_signature.input_specs
    }
    placeholders = placeholders_by_name(exported.graph)
    owners = {placeholders[name]: described for name, described in names.items()}
    for node in exported.graph.nodes:
        for written in written_arguments(node):
            kind, name = owners.get(_viewed(written), ("", ""))
            if kind == "parameter":
                raise BuildError(
                    f"the module writes its parameter {name}{source_line(node)}: parameters are "
                    f"constants of an engine; make it a buffer (register_buffer) to keep it as a "
                    f"state, or do not train in forward"
                )
            if kind and is_call(node, aten.copy_.default):
                old, new = tuple(value(written).shape), tuple(value(node.args[1]).shape)
                if _grows(old, new):
                    raise BuildError(
                        f"state {name} of {old} becomes {new}{_line_of_value(node)}: a state is "
                        f"updated in its own memory, so it keeps its shape; make it as large as it "
                        f"gets, write the new part at its position, and mask what is not written"
                    )


def _viewed(node: Node) -> Node:
    """The tensor that a chain of views begins with."""
    while _is_view(node):
        source = node.args[0]
        assert isinstance(source, Node)
        node = source
    return node


def _is_view(node: Node) -> bool:
    """Whether a call returns a view of its first argument, or that argument written in place."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.args:
        return False
    source, schema = node.args[0], node.target._schema
    if not isinstance(source, Node) or not schema.returns or not schema.arguments:
        return False
    returned, taken = schema.returns[0].alias_info, schema.arguments[0].alias_info
    if returned is None or taken is None or not returned.before_set & taken.before_set:
        return False
    values = [each.meta.get("val") for each in (node, source)]
    # Casts are declared as views, for they are where the type is the same.
    return len({each.dtype for each in values if isinstance(each, Tensor)}) < 2


def _grows(old: tuple[Any, ...], new: tuple[Any, ...]) -> bool:
    """Whether a tensor cannot be copied into a state because it is larger than it."""
    if len(new) > len(old):
        return True
    pairs = zip(old[::-1], new[::-1], strict=False)
    return any(isinstance(a, int) and isinstance(b, int) and b not in (1, a) for a, b in pairs)


def _line_of_value(node: Node) -> str:
    """The line that computed what a node copies: an assignment itself has none."""
    source = node.args[1]
    return source_line(node) or (source_line(source) if isinstance(source, Node) else "")


def check_deterministic(graph: Graph) -> None:
    """Refuse a module that draws random numbers.

    Raises:
        BuildError: with the operator and the module's line.
    """
    for node in graph.nodes:
        if node.users and _is_random(node):
            raise BuildError(
                f"{node.target}{source_line(node)} is random: an engine computes the same as the "
                f"module, step after step; call eval() on the module if this is dropout, else pass "
                f"the random numbers as an input"
            )


_RECURRENT = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)


_DROPOUTS = tuple(
    getattr(aten, name).default
    for name in (
        "dropout",
        "dropout_",
        "feature_dropout",
        "feature_dropout_",
        "alpha_dropout",
        "alpha_dropout_",
        "feature_alpha_dropout",
        "feature_alpha_dropout_",
    )
)


def _is_random(node: Node) -> bool:
    target = node.target
    if is_call(node, *_RECURRENT):
        dropout, train = node.args[5], node.args[6]
        return bool(train and dropout and node.args[4] != 1)
    if is_call(node, aten.scaled_dot_product_attention.default):
        return bool(argument(node, 4, "dropout_p", 0.0))
    if is_call(node, *_DROPOUTS):
        return bool(node.args[2] and node.args[1])
    if is_call(node, aten.rrelu.default, aten.rrelu_.default):
        return bool(argument(node, 3, "training", False))
    if is_call(node, aten.rrelu_with_noise_functional.default):
        return bool(argument(node, 4, "training", False))
    return (
        isinstance(target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in target.tags
    )
