"""The ``inplace`` operator library, and what a graph's calls into it write."""

import torch

NAMESPACE = "inplace"


# Kept for the life of the process: dropping it unregisters the operators.
LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define(name: str, schema: str) -> None:
    """Define the operator ``inplace::name``; its implementations are registered beside it."""
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))


VIEWS = frozenset(
    {torch.ops.aten.select.int, torch.ops.aten.narrow.default, torch.ops.aten.slice.Tensor}
)
"""Operators whose result is a view of their first argument.

Through them a graph passes a state to a user's operator.
"""


def written_arguments(node: torch.fx.Node) -> list[torch.fx.Node]:
    """The nodes that a call mutates, by its operator's alias annotations."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return []
    arguments = node.target._schema.arguments
    passed = (
        dict(zip((argument.name for argument in arguments), node.args, strict=False)) | node.kwargs
    )
    mutated = [
        passed.get(argument.name)
        for argument in arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [argument for argument in mutated if isinstance(argument, torch.fx.Node)]


def written_states(graph: torch.fx.Graph, *, include_inplace: bool = True) -> tuple[str, ...]:
    """Names of the placeholders that some operator of the graph mutates, in placeholder order.

    They are read from the graph: the operators' alias annotations and their arguments.

    Args:
        graph: of the training IR.
        include_inplace: False leaves out what only ``inplace::`` operators mutate.
    """
    written: set[str] = set()
    for node in graph.nodes:
        is_inplace = (
            isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == NAMESPACE
        )
        if is_inplace and not include_inplace:
            continue
        for argument in written_arguments(node):
            while argument.target in VIEWS and isinstance(argument.args[0], torch.fx.Node):
                argument = argument.args[0]
            written.add(argument.name)
    return tuple(
        node.name for node in graph.nodes if node.op == "placeholder" and node.name in written
    )
