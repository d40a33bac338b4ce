"""The ``inplace`` operator library, and what a graph's calls into it write."""

import torch

NAMESPACE = "inplace"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")  # kept for the life of the process: dropping it unregisters the operators


def define(name: str, schema: str) -> None:
    """Register the operator ``inplace::name``; its functions carry the rest."""
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))


def written_states(graph: torch.fx.Graph) -> tuple[str, ...]:
    """Names of the placeholders that some ``inplace::`` operator of the graph writes, in placeholder order.

    This reads the graph itself, the operators' alias annotations and the arguments they are given, not what a manifest says.
    """
    written: set[str] = set()
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != NAMESPACE:
            continue
        arguments = node.target._schema.arguments
        passed = dict(zip((argument.name for argument in arguments), node.args, strict=False)) | node.kwargs
        for argument in arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                state = passed[argument.name]
                assert isinstance(state, torch.fx.Node)
                written.add(state.name)
    return tuple(node.name for node in graph.nodes if node.op == "placeholder" and node.name in written)
