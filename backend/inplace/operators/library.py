"""The ``inplace`` operator library, and what a graph's calls into it write."""

import torch

NAMESPACE = "inplace"


LIBRARY = torch.library.Library(
    NAMESPACE, "DEF"
)  # kept for the life of the process: dropping it unregisters the operators


def define(name: str, schema: str) -> None:
    """Register the operator ``inplace::name``; its functions carry the rest."""
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))


VIEWS = frozenset(
    {torch.ops.aten.select.int, torch.ops.aten.narrow.default, torch.ops.aten.slice.Tensor}
)
"""Operators whose result is the memory of their first argument, through which a graph hands a state to an operator of the user's own."""


def written_arguments(node: torch.fx.Node) -> list[torch.fx.Node]:
    """The nodes that a call writes, by its operator's alias annotations."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return []
    arguments = node.target._schema.arguments
    passed = (
        dict(zip((argument.name for argument in arguments), node.args, strict=False)) | node.kwargs
    )
    found = [
        passed.get(argument.name)
        for argument in arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [given for given in found if isinstance(given, torch.fx.Node)]


def written_states(graph: torch.fx.Graph, *, own: bool = True) -> tuple[str, ...]:
    """Names of the placeholders that some operator of the graph writes, in placeholder order.

    This reads the graph itself, the operators' alias annotations and the arguments they are given, not what a manifest says.

    Args:
        graph: of the training IR.
        own: False leaves out what only ``inplace::`` operators write.
    """
    written: set[str] = set()
    for node in graph.nodes:
        ours = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == NAMESPACE
        for given in written_arguments(node) if own or not ours else ():
            while given.target in VIEWS and isinstance(given.args[0], torch.fx.Node):
                given = given.args[0]
            written.add(given.name)
    return tuple(
        node.name for node in graph.nodes if node.op == "placeholder" and node.name in written
    )
