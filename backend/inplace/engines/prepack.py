"""A load-time pass for the CPU: weights of linear layers in oneDNN's own blocked layout.

A decode step is a few rows times every weight: bound by how fast the weights are read. In the plain layout they are repacked or
read badly on every call; packed once, SmolLM2's large layers took less time at every row count tried from 1 to 128 (two cores).
"""

import torch
from torch import Tensor

PACKABLE = (torch.float32, torch.bfloat16, torch.float16)


def prepack_linears(module: torch.fx.GraphModule) -> int:
    """Replace each linear layer whose weight is a constant of the module by oneDNN's product with the packed weight.

    The plain weights are left to their other users (a tied embedding); `torch.fx.GraphModule(module, graph)` drops the rest.

    Returns:
        How many were replaced; 0 where this build of PyTorch has no oneDNN.
    """
    if not torch.backends.mkldnn.is_available():
        return 0
    replaced = 0
    for node in list(module.graph.nodes):
        if node.target is not torch.ops.aten.linear.default or node.args[1].op != "get_attr":
            continue
        weight = _attribute(module, node.args[1].target)
        if weight.device.type != "cpu" or weight.dtype not in PACKABLE:
            continue
        name = f"packed_{replaced}"
        try:
            packed_weight = torch.ops.mkldnn._reorder_linear_weight(
                weight.detach().contiguous(), None
            )
        except (
            RuntimeError
        ):  # a processor without instructions for this type; PyTorch's own product still has it
            continue
        module.register_buffer(name, packed_weight, persistent=False)
        bias = node.args[2] if len(node.args) > 2 else None
        with module.graph.inserting_before(node):
            packed = module.graph.get_attr(name)
            product = module.graph.call_function(
                torch.ops.mkldnn._linear_pointwise.default,
                (node.args[0], packed, bias, "none", [], ""),
            )
        node.replace_all_uses_with(product)
        module.graph.erase_node(node)
        replaced += 1
    module.graph.eliminate_dead_code()
    return replaced


def _attribute(module: torch.nn.Module, path: str) -> Tensor:
    """The tensor at a dotted path."""
    owner, _, name = path.rpartition(".")
    tensor = getattr(module.get_submodule(owner), name)
    assert isinstance(tensor, Tensor)
    return tensor
