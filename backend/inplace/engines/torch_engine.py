"""The PyTorch engine: the captured graph itself, its states bound in place."""

import warnings
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.fx.graph import CodeGen

import inplace.operators  # noqa: F401  registers the operators that the graph calls
from inplace.engines.arena import Arena
from inplace.engines.base import NO_OTHER_THREADS, Finish
from inplace.engines.prepack import prepack_linears
from inplace.errors import LoadError
from inplace.operators import written_states
from inplace.schema.served import Manifest


class TorchEngine:
    """Runs a ``torch.export`` program whose state placeholders are replaced by the arena's tensors.

    Args:
        path: ``engine.pt2``.
        manifest: what the program is said to be.
        arena: the memory to bind the states to.

    Raises:
        LoadError: the file cannot be read, or what its graph takes, returns or writes is not what the manifest says.
    """

    overlaps = False

    def __init__(self, path: Path, manifest: Manifest, arena: Arena) -> None:
        self._program = manifest.program("step")
        self._device = torch.device(manifest.engine.device)
        if self._device.type == "cuda" and not torch.cuda.is_available():
            raise LoadError(
                f"{path} was built for a GPU and this machine has none that PyTorch can use; build with --device cpu"
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # the reader warns that its read-only buffers become tensors; nothing writes weights
                exported = torch.export.load(path)
        except Exception as error:  # torch.export raises whatever the archive reader raises
            raise LoadError(
                f"{path} cannot be read as a torch.export program ({error}); build the model again"
            ) from error
        module = exported.module(check_guards=False)
        assert isinstance(module, torch.fx.GraphModule)
        self._check(path, exported, manifest)
        self._module = _bound(module, arena, self._device)

    def _check(
        self, path: Path, exported: torch.export.ExportedProgram, manifest: Manifest
    ) -> None:
        """The graph is the truth: its inputs, and the states it writes, must be the manifest's."""
        graph, signature = exported.graph, exported.graph_signature
        found = list(signature.user_inputs)
        wanted = [spec.name for spec in self._program.inputs] + [
            state.name for state in manifest.states
        ]
        if found != wanted:
            raise LoadError(
                f"{path} takes {found}, the manifest says {wanted}; build the model again"
            )
        if len(signature.user_outputs) != len(self._program.outputs):
            names = [spec.name for spec in self._program.outputs]
            raise LoadError(
                f"{path} returns {len(signature.user_outputs)} outputs, the manifest names {names}; build the model again"
            )
        values = {node.name: node.meta["val"] for node in graph.nodes if node.op == "placeholder"}
        for state in manifest.states:
            value = values[state.name]
            found_shape = tuple(
                extent if isinstance(extent, int) else -1 for extent in value.shape[1:]
            )
            shape = manifest.compiled_shape(state)
            if (found_shape, value.dtype) != (shape, state.dtype.as_torch):
                raise LoadError(
                    f"{path} has state {state.name} as {list(found_shape)} {value.dtype}, the manifest as {list(shape)} "
                    f"{state.dtype}; build the model again"
                )
        written, declared = (
            set(written_states(graph)),
            {alias.input for alias in self._program.aliases},
        )
        if written != declared:
            raise LoadError(
                f"{path}: the states the graph writes in place and the aliases the manifest declares differ in "
                f"{sorted(written ^ declared)}; build the model again"
            )

    def on_stream(self) -> AbstractContextManager[object]:
        """See `Engine.attached`: everything runs where its caller does."""
        return NO_OTHER_THREADS

    def launch(self, inputs: Mapping[str, Tensor], wanted: Collection[str]) -> Finish:
        """See `Engine.launch`."""
        return partial(self._step, inputs, wanted)

    def _step(
        self,
        inputs: Mapping[str, Tensor],
        wanted: Collection[str],
        waiting: AbstractContextManager[object],
    ) -> dict[str, Tensor]:
        with waiting, torch.inference_mode():
            arguments = [
                inputs[spec.name].to(self._device, non_blocking=True)
                for spec in self._program.inputs
            ]
            outputs = self._module(*arguments)
            return {
                spec.name: output.cpu()
                for spec, output in zip(self._program.outputs, outputs, strict=True)
                if spec.name in wanted
            }


def _bound(
    module: torch.fx.GraphModule, arena: Arena, device: torch.device
) -> torch.fx.GraphModule:
    """The module with each state placeholder replaced by the arena's own tensor, taking and returning plain tuples."""
    graph = module.graph
    graph.set_codegen(
        CodeGen()
    )  # exported modules flatten and unflatten nested arguments at every call
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
    return torch.fx.GraphModule(
        module, graph
    )  # without the hooks that check every call against the exported signature
