"""Remove what tracing leaves behind and nothing needs: each node costs a PyTorch engine some microseconds a step."""

import torch

aten = torch.ops.aten


def remove_no_ops(exported: torch.export.ExportedProgram) -> int:
    """Drop metadata assertions and casts to the type a tensor already has, in place; the number dropped."""
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


def _changes_nothing(node: torch.fx.Node) -> bool:
    if any(user.op == "output" for user in node.users):
        return False  # the program's signature names its outputs
    source = node.args[0]
    assert isinstance(source, torch.fx.Node)
    before, after = source.meta["val"], node.meta["val"]
    copies = len(node.args) > 3 and node.args[3]
    return bool(before.dtype == after.dtype and before.device == after.device and not copies)
