"""Constants in the place of operators that TensorRT does not have, and that depend on no input."""

from torch.export.graph_signature import InputKind
from torch.fx import Node

from inplace_builder.graph.nodes import ConstantValues
from inplace_builder.graph.program import GraphProgram, weights_of


class FoldedConstants:
    """Replaces nodes of a program whose inputs are constants.

    Parameters and buffers are none: a plan may take them as inputs.
    """

    def __init__(self, program: GraphProgram) -> None:
        constants = {
            spec.arg.name
            for spec in program.graph_signature.input_specs
            if spec.kind is InputKind.CONSTANT_TENSOR
        }
        self._values = ConstantValues(
            {
                node: tensor
                for node, tensor in weights_of(program).items()
                if node.op == "get_attr" or node.name in constants
            }
        )

    def fold(self, node: Node) -> bool:
        """Replace a tensor by a constant of its value; whether it depends on no input."""
        value = self._values.tensor(node)
        if value is None or value.is_complex():
            return False
        constant = self._values.insert(node, value, "folded")
        constant.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(constant)
        node.graph.erase_node(node)
        return True
