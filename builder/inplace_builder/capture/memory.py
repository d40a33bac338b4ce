"""The memory that a user's module is given: which of it is written, by which line, and what of that no engine can take."""

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import torch
from inplace.dtypes import Dtype
from inplace.operators.library import written_arguments
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from inplace_builder.errors import BuildError
from inplace_builder.passes.emit import Emitter
from inplace_builder.passes.state_uses import source_line
from inplace_builder.passes.states import Found

if TYPE_CHECKING:
    from inplace_builder.capture.functional import Functional

aten = torch.ops.aten
FOLLOWED = frozenset(
    {
        aten.select.int,
        aten.slice.Tensor,
        aten.narrow.default,
        aten.view.default,
        aten.reshape.default,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.alias.default,
        aten.detach.default,
        aten.expand.default,
        aten.index.Tensor,
    }
)
"""Views that the passes follow, or of which they say themselves where they do not."""


@dataclass(frozen=True)
class Writer:
    """The first operator that writes an input.

    Attributes:
        line: the module's line, as `source_line` has it.
        through: a part of the input was written through a view that no pattern follows: in words, with the line; else empty.
    """

    line: str
    through: str


def first_writers(exported: ExportedProgram) -> dict[str, Writer]:
    """For each input and buffer that is written the operator that does it, in the graph before functionalisation."""
    found: dict[str, Writer] = {}
    for node in exported.graph.nodes:
        if node.op == "placeholder" and (first := first_writer(node)) is not None:
            found[node.name] = Writer(source_line(first), _through(node, first))
    return found


def _through(node: Node, first: Node) -> str:
    """Whether only a part was written, and through what."""
    for written in written_arguments(first):
        steps = []
        current = written
        while current is not node and current.op == "call_function" and isinstance(current.args[0], Node):
            steps.append(current)
            current = current.args[0]
        whole, part = node.meta["val"], written.meta["val"]
        hidden = [step for step in steps if step.target not in FOLLOWED]
        if current is node and hidden and whole.numel() * whole.itemsize != part.numel() * part.itemsize:
            return f"a part of it is written through the view {hidden[-1].target}, which no pattern follows{source_line(first)}"
    return ""


def check_extents(state: Found, result: Node, writer: Writer | None) -> None:
    """BuildError where a state would become another shape; extents that only a call knows are left to it."""
    old, new = tuple(state.initial.shape), tuple(result.meta["val"].shape)
    if all(isinstance(extent, int) for extent in new) and old != new:  # to compare with one that varies would fix it
        line = writer.line if writer is not None else ""
        raise BuildError(f"state {state.source} of {old} becomes {new}{line}: a state is updated in its own memory, so it keeps its shape")


def check_state(state: Found, written: Writer | None) -> None:
    """BuildError if a state is not contiguous, or of a type that no engine takes."""
    line = "" if written is None else written.line
    if not state.initial.is_contiguous():
        raise BuildError(
            f"state {state.source} of {tuple(state.initial.shape)} has strides {state.initial.stride()}, and the module writes it{line}: a "
            f"state is updated in its own memory, which must be contiguous; pass .contiguous() and keep that tensor"
        )
    try:
        Dtype.of(state.initial.dtype)
    except ValueError:
        raise BuildError(
            f"state {state.source} is {state.initial.dtype}, which no engine takes, and the module writes it{line}; the types are "
            f"{[str(dtype) for dtype in Dtype]}"
        ) from None


def written_elsewhere(exported: ExportedProgram, made: "Functional") -> str:
    """What a module without state may have meant: it writes a copy, or returns what it should have written."""
    for node in exported.graph.nodes:
        for written in written_arguments(node):
            if written.op == "call_function" and node.target is not aten.detach_.default:
                return f"; what it writes{source_line(node)} is a copy that {written.target} made, not the tensor itself"
    last = made.graph_module.graph.output_node()
    for place, node in enumerate(last.args[0]):  # type: ignore[arg-type]
        if isinstance(node, Node) and node.target in NEW_VERSIONS and isinstance(node.args[0], Node) and node.args[0].op == "placeholder":
            return (
                f"; output {place} is {node.args[0].name} with something written into it, as a new tensor{source_line(node)}: for a state "
                f"write it in place ({node.args[0].name}.copy_(…)), and need not return it"
            )
    return ""


NEW_VERSIONS = frozenset(
    {
        aten.index_copy.default,
        aten.index_put.default,
        aten.scatter.src,
        aten.scatter.value,
        aten.slice_scatter.default,
        aten.select_scatter.default,
    }
)
"""Operators that return their first argument with something written into it."""


def check_sharing(exported: ExportedProgram) -> None:
    """Make one of buffers that are one tensor or parts of one; refuse memory shared in any other way once it is written.

    Functionalisation takes every input for memory of its own, so what is written through one name would be missing under the other.
    """
    tensors = _memory_of_inputs(exported)
    merged: set[Node] = set()
    for (first, a), (second, b) in combinations(tensors.items(), 2):
        if first in merged or second in merged or not _overlap(a, b):
            continue
        written = first_writer(first) or first_writer(second)
        held = bool(first.meta.get("buffer") and second.meta.get("buffer"))
        whole, part = (first, second) if a.numel() >= b.numel() else (second, first)
        path = _path(tensors[whole], tensors[part])
        if held and path is not None and (written is not None or not path):
            _merge(exported, whole, part, path)
            merged.add(part)
        elif written is not None:
            raise BuildError(
                f"{_title(first)} and {_title(second)} share memory, and the module writes it{source_line(written)}: keep one tensor and "
                f"take views of it in forward, or give each memory of its own"
            )


def _title(node: Node) -> str:
    return f"buffer {node.meta['buffer']}" if node.meta.get("buffer") else f"input {node.name}"


def _memory_of_inputs(exported: ExportedProgram) -> dict[Node, Tensor]:
    nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    arguments, named = exported.example_inputs or ((), {})
    leaves = iter(torch.utils._pytree.tree_leaves((arguments, named)))
    found: dict[Node, Tensor] = {}
    for spec in exported.graph_signature.input_specs:
        name = spec.arg.name
        if spec.kind is InputKind.USER_INPUT:
            leaf = next(leaves, None)
            if isinstance(leaf, Tensor):
                found[nodes[name]] = leaf
        elif spec.kind in (InputKind.BUFFER, InputKind.PARAMETER, InputKind.CONSTANT_TENSOR) and spec.target is not None:
            held = exported.state_dict.get(spec.target, exported.constants.get(spec.target))
            if isinstance(held, Tensor):
                if spec.kind is InputKind.BUFFER:
                    nodes[name].meta["buffer"] = spec.target
                found[nodes[name]] = held
    return found


def _span(tensor: Tensor) -> tuple[int, int]:
    first = tensor.data_ptr()
    last = sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (last + 1) * tensor.element_size()


def _overlap(a: Tensor, b: Tensor) -> bool:
    if not a.numel() or not b.numel() or a.device != b.device or a.device.type == "meta":
        return False
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    (a_start, a_end), (b_start, b_end) = _span(a), _span(b)
    return a_start < b_end and b_start < a_end


def _path(whole: Tensor, part: Tensor) -> list[int] | None:
    """The indices on the first axes that make one tensor of another, ``whole[2, 0]``; None where it is no such part."""
    axes = whole.dim() - part.dim()
    apart = part.data_ptr() - whole.data_ptr()
    alike = (whole.dtype, whole.shape[axes:], whole.stride()[axes:]) == (part.dtype, part.shape, part.stride())
    if axes < 0 or not alike or apart < 0 or apart % part.element_size():
        return None
    left, path = apart // part.element_size(), []
    for extent, stride in zip(whole.shape[:axes], whole.stride()[:axes], strict=True):
        index, left = divmod(left, stride) if stride else (0, left)
        if index >= extent:
            return None
        path.append(index)
    return path if left == 0 else None


def _merge(exported: ExportedProgram, kept: Node, alias: Node, path: list[int]) -> None:
    """Let every user of the second buffer use the first, or the part of it."""
    first = next(node for node in exported.graph.nodes if node.op != "placeholder")
    with Emitter(exported.graph, kept).before(first) as emit:
        for index in path:
            kept = emit.call(aten.select.int, kept, 0, index)
    alias.replace_all_uses_with(kept)
    exported.graph.erase_node(alias)
    specs = exported.graph_signature.input_specs
    specs[:] = [spec for spec in specs if spec.arg.name != alias.name]
    exported.state_dict.pop(alias.meta["buffer"], None)
    exported.constants.pop(alias.meta["buffer"], None)
    exported.graph_module.recompile()


def first_writer(node: Node) -> Node | None:
    """The first operator that writes a tensor or a view of it, in the graph before functionalisation."""
    pending, seen = [node], {node}
    while pending:
        tensor = pending.pop(0)
        for user in tensor.users:
            if not isinstance(user.target, torch._ops.OpOverload) or user in seen:
                continue
            if tensor in written_arguments(user):
                return user
            for argument, passed in zip(user.target._schema.arguments, user.args, strict=False):
                if passed is tensor and argument.alias_info is not None:
                    seen.add(user)
                    pending.append(user)
    return None
