"""Take sampling out of a graph, for mechanisms whose engines have no kernel for it: what is left says the most likely token."""

import copy

import torch
from inplace.manifest import Program
from inplace.specs import SAMPLING_ROLES, TensorSpec
from torch.export import ExportedProgram
from torch.export.graph_signature import TensorArgument

from inplace_builder.passes.copying import copied_graph
from inplace_builder.passes.fuse import Fused

aten, inplace = torch.ops.aten, torch.ops.inplace


def without_sampling(exported: ExportedProgram, program: Program) -> tuple[Fused, Program]:
    """A copy of the graph with argmax in the place of ``inplace::sample`` and without its parameters, and the description of that.

    A graph that samples nothing is copied as it is.
    """
    graph = copied_graph(exported.graph)
    module = torch.fx.GraphModule(exported.graph_module, graph)
    for node in graph.find_nodes(op="call_function", target=inplace.sample.default):
        with graph.inserting_before(node):
            largest = graph.call_function(aten.argmax.default, (node.args[0], -1, True))
        largest.meta.update(node.meta)
        node.replace_all_uses_with(largest)
        graph.erase_node(node)
    gone = {spec.name for spec in program.inputs if spec.role in SAMPLING_ROLES}
    for node in graph.find_nodes(op="placeholder"):
        if node.name in gone:
            graph.erase_node(node)
    graph.lint()
    module.recompile()
    signature = copy.deepcopy(exported.graph_signature)
    signature.input_specs = [spec for spec in signature.input_specs if spec.arg.name not in gone]
    (output,) = graph.find_nodes(op="output")
    for spec, node in zip(signature.output_specs, output.args[0], strict=True):
        spec.arg = TensorArgument(name=node.name)
    description = program.model_copy(
        update={
            "inputs": tuple(spec for spec in program.inputs if spec.name not in gone),
            "outputs": tuple(_largest(spec) for spec in program.outputs),
        }
    )
    return Fused(graph, module, signature, exported.state_dict, exported.constants), description


def _largest(spec: TensorSpec) -> TensorSpec:
    if spec.sampled_from is None:
        return spec
    return spec.model_copy(update={"argmax_of": spec.sampled_from, "sampled_from": None})
