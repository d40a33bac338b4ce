"""What no engine can keep, refused before a module is made a function."""

from typing import Any

import torch
from inplace.operators.state import written_arguments
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, Node

from inplace_builder.errors import BuildError
from inplace_builder.graph.nodes import argument, is_call, placeholders_by_name, source_line, value

aten = torch.ops.aten


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
    return len({each.dtype for each in values if isinstance(each, torch.Tensor)}) < 2


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


def _is_random(node: Node) -> bool:
    target = node.target
    if is_call(node, *_RECURRENT):
        dropout, train = node.args[5], node.args[6]
        return bool(train and dropout and node.args[4] != 1)
    if is_call(node, aten.scaled_dot_product_attention.default):
        return bool(argument(node, 4, "dropout_p", 0.0))
    if is_call(node, aten.dropout.default, aten.feature_dropout.default):
        return bool(node.args[2] and node.args[1])
    return (
        isinstance(target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in target.tags
        and not is_call(node, aten.rrelu.default)
    )
