"""The PyTorch engine: the captured graph itself, its states bound in place.

On a CPU, the weights of linear layers are packed for oneDNN when the graph is loaded. A decode step
multiplies a few rows with every weight, so its time is the time to read the weights; in the plain
layout oneDNN repacks them in every call. Packed once, SmolLM2's large layers took less time at
every row count that was tried, from 1 to 128 (two cores).
"""

import io
import warnings
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.fx.graph import CodeGen

import inplace.operators  # noqa: F401  registers the operators that the graph calls
from inplace.engines.arena import Arena
from inplace.engines.base import Finish
from inplace.errors import LoadError
from inplace.operators import written_states
from inplace.schema.served import STEP, Manifest

PACKABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TorchEngine:
    """Runs a ``torch.export`` program whose state placeholders are the arena's tensors.

    Args:
        content: ``engine.pt2``, the whole file.
        title: what errors call it.
        manifest: the manifest of the engine.
        arena: the memory to bind the states to.

    Raises:
        LoadError: the file cannot be read, or what its graph takes, returns or writes is not what
            the manifest says.
    """

    overlaps = False

    def __init__(self, content: memoryview, title: str, manifest: Manifest, arena: Arena) -> None:
        self._program = manifest.program(STEP)
        self._device = torch.device(manifest.device)
        try:
            with warnings.catch_warnings():
                # The reader warns of tensors over read-only memory; nothing writes weights.
                warnings.simplefilter("ignore")
                exported = torch.export.load(io.BytesIO(content))
        except Exception as error:  # torch.export raises whatever the archive reader raises
            raise LoadError(
                f"{title} cannot be read as a torch.export program ({error}); build the model again"
            ) from error
        module = exported.module(check_guards=False)
        assert isinstance(module, torch.fx.GraphModule)
        _check_signature(title, exported, manifest)
        _check_states(title, exported, manifest)
        self._module = _bind(module, arena, self._device)

    def on_stream(self) -> AbstractContextManager[object]:
        """Do nothing: steps run on the stream of the thread that calls them."""
        return nullcontext()

    def launch(self, inputs: Mapping[str, Tensor], requested: Collection[str]) -> Finish:
        """Prepare a step, see `inplace.engines.base.StepEngine.launch`; it runs when finished."""
        return partial(self._step, inputs, requested)

    def _step(
        self,
        inputs: Mapping[str, Tensor],
        requested: Collection[str],
        while_waiting: AbstractContextManager[object],
    ) -> dict[str, Tensor]:
        with while_waiting, torch.inference_mode():
            arguments = [
                inputs[spec.name].to(self._device, non_blocking=True)
                for spec in self._program.inputs
            ]
            outputs = self._module(*arguments)
            return {
                spec.name: output.cpu()
                for spec, output in zip(self._program.outputs, outputs, strict=True)
                if spec.name in requested
            }


def _check_signature(
    title: str, exported: torch.export.ExportedProgram, manifest: Manifest
) -> None:
    """Compare the graph's inputs and outputs with the manifest's.

    Raises:
        LoadError: they differ.
    """
    program, signature = manifest.program(STEP), exported.graph_signature
    inputs = list(signature.user_inputs)
    expected = [spec.name for spec in program.inputs] + list(program.states)
    if inputs != expected:
        raise LoadError(
            f"{title} takes {inputs}, the manifest says {expected}; build the model again"
        )
    if len(signature.user_outputs) != len(program.outputs):
        names = [spec.name for spec in program.outputs]
        raise LoadError(
            f"{title} returns {len(signature.user_outputs)} outputs, the manifest names {names}; "
            "build the model again"
        )


def _check_states(title: str, exported: torch.export.ExportedProgram, manifest: Manifest) -> None:
    """Compare the states of the graph, and those it writes, with the manifest's.

    Raises:
        LoadError: they differ.
    """
    graph = exported.graph
    values = {node.name: node.meta["val"] for node in graph.nodes if node.op == "placeholder"}
    program = manifest.program(STEP)
    for state in manifest.states:
        if state.name not in program.states:
            continue
        value = values[state.name]
        shape = tuple(extent if isinstance(extent, int) else -1 for extent in value.shape[1:])
        expected = manifest.compiled_shape(state)
        if (shape, value.dtype) != (expected, state.dtype.as_torch):
            raise LoadError(
                f"{title} has state {state.name} as {list(shape)} {value.dtype}, the manifest as "
                f"{list(expected)} {state.dtype}; build the model again"
            )
    written = set(written_states(graph))
    declared = {alias.input for alias in program.aliases}
    if written != declared:
        raise LoadError(
            f"{title}: the states the graph writes in place and the aliases the manifest declares "
            f"differ in {sorted(written ^ declared)}; build the model again"
        )


def _bind(module: torch.fx.GraphModule, arena: Arena, device: torch.device) -> torch.fx.GraphModule:
    """Replace each state placeholder by the arena's tensor; take and return plain tuples."""
    graph = module.graph
    # Exported modules flatten and unflatten nested arguments in every call.
    graph.set_codegen(CodeGen())
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.name in arena.tensors:
            module.register_buffer(f"state_{node.name}", arena.tensors[node.name], persistent=False)
            with graph.inserting_before(node):
                state = graph.get_attr(f"state_{node.name}")
            node.replace_all_uses_with(state)
            graph.erase_node(node)
        elif node.op == "output":
            node.args = (tuple(torch.utils._pytree.tree_leaves(node.args[0])),)
    module.to(device)
    if device.type == "cpu":
        prepack_linears(module)
    # A new module, without the hooks that compare every call with the exported signature.
    return torch.fx.GraphModule(module, graph)


def prepack_linears(module: torch.fx.GraphModule) -> int:
    """Replace each linear layer with a constant weight by oneDNN's product with a packed weight.

    The plain weights are left to their other users (a tied embedding);
    `torch.fx.GraphModule(module, graph)` drops the rest.

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
        if weight.device.type != "cpu" or weight.dtype not in PACKABLE_DTYPES:
            continue
        name = f"packed_{replaced}"
        try:
            packed_weight = torch.ops.mkldnn._reorder_linear_weight(
                weight.detach().contiguous(), None
            )
        except RuntimeError:
            # The processor has no instructions for this type; PyTorch's own product works.
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
