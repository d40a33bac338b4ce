"""The PyTorch engine: the captured graph itself, its states bound in place."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Self

import torch
from torch import Tensor
from typing_extensions import Buffer

import inplace.operators  # noqa: F401  registers the operators that the graph calls
from inplace.engines.arena import Arena
from inplace.engines.base import Finish
from inplace.engines.gpus import device_of, full_float32
from inplace.engines.graph_reader import LoadedGraph, finish_modules, read_graphs
from inplace.engines.scales import check_scales
from inplace.errors import LoadError
from inplace.schema.graph import CONSTANT_DTYPES
from inplace.schema.programs import CompiledProgram
from inplace.schema.schedule import STEP
from inplace.schema.served import Manifest


class TorchEngine:
    """Runs a captured graph whose state inputs are the arena's tensors.

    Args:
        program: the program.
        module: takes the program's inputs; its states are bound.
        device: where it runs.
    """

    overlaps = False

    def __init__(
        self, program: CompiledProgram, module: torch.fx.GraphModule, device: torch.device
    ) -> None:
        self._program, self._module, self._device = program, module, device
        self._exact = full_float32 if device.type == "cuda" else nullcontext

    @classmethod
    def load(
        cls,
        content: Buffer,
        title: str,
        manifest: Manifest,
        arena: Arena,
        names: Sequence[str] = (STEP,),
    ) -> list[Self]:
        """Load programs of one file. They share the constants that they have in common.

        Args:
            content: the engine file.
            title: what errors call it.
            manifest: the manifest of the engine.
            arena: the memory to bind the states to.
            names: of the programs.

        Raises:
            LoadError: the file cannot be read, or what a graph takes, returns or writes is not what
                the manifest says.
        """
        device = device_of(manifest)
        programs = [manifest.program(name) for name in names]
        graphs = read_graphs(content, title, [each.engine.graph for each in programs], device)
        for graph, program in zip(graphs, programs, strict=True):
            _check_signature(title, graph, program)
            _check_states(title, graph, manifest, program)
            constants = graph.record.graph.constants
            dtypes = {name: CONSTANT_DTYPES[each.dtype] for name, each in constants.items()}
            check_scales(title, program.engine, dtypes)
            _bind(graph, arena, program.states)
        modules = finish_modules([graph.module for graph in graphs], device)
        return [cls(*each, device) for each in zip(programs, modules, strict=True)]

    def on_stream(self) -> AbstractContextManager[object]:
        """Make the engine's GPU the thread's; steps run on the thread's stream there."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def launch(self, inputs: Mapping[str, Tensor], requested: Collection[str]) -> Finish:
        """Prepare a step, see `inplace.engines.base.StepEngine.launch`; it runs when finished."""
        return partial(self._step, inputs, requested)

    def launch_repeated(
        self, inputs: Mapping[str, Tensor], requested: Collection[str], count: int
    ) -> Finish:
        """Prepare several steps, see `inplace.engines.base.StepEngine.launch_repeated`."""
        return partial(self._steps, inputs, requested, count)

    def _steps(
        self,
        inputs: Mapping[str, Tensor],
        requested: Collection[str],
        count: int,
        while_waiting: AbstractContextManager[object],
    ) -> dict[str, Tensor]:
        with while_waiting:
            steps = []
            for _ in range(count):
                outputs = self._compute(inputs, requested)
                # copied, because an output may be memory of a state, which the next step writes
                steps.append({name: output.clone() for name, output in outputs.items()})
            return {name: torch.stack([step[name] for step in steps]).cpu() for name in steps[0]}

    def _step(
        self,
        inputs: Mapping[str, Tensor],
        requested: Collection[str],
        while_waiting: AbstractContextManager[object],
    ) -> dict[str, Tensor]:
        with while_waiting:
            outputs = self._compute(inputs, requested)
            return {name: output.cpu() for name, output in outputs.items()}

    def _compute(
        self, inputs: Mapping[str, Tensor], requested: Collection[str]
    ) -> dict[str, Tensor]:
        """The requested outputs of a step, on the engine's device."""
        with torch.inference_mode(), self._exact():
            arguments = [
                inputs[spec.name].to(self._device, non_blocking=True)
                for spec in self._program.inputs
            ]
            outputs = self._module(*arguments)
            return {
                spec.name: output
                for spec, output in zip(self._program.outputs, outputs, strict=True)
                if spec.name in requested
            }


def _check_signature(title: str, graph: LoadedGraph, program: CompiledProgram) -> None:
    """Compare the graph's inputs and outputs with the manifest's.

    Raises:
        LoadError: they differ.
    """
    inputs = list(graph.inputs)
    expected = [spec.name for spec in program.inputs] + list(program.states)
    if inputs != expected:
        raise LoadError(
            f"{title} takes {inputs}, the manifest says {expected}; build the model again"
        )
    outputs = graph.record.graph.outputs
    if len(outputs) != len(program.outputs):
        names = [spec.name for spec in program.outputs]
        raise LoadError(
            f"{title} returns {len(outputs)} outputs, the manifest names {names}; "
            "build the model again"
        )


def _check_states(
    title: str, graph: LoadedGraph, manifest: Manifest, program: CompiledProgram
) -> None:
    """Compare the states of the graph, and those it writes, with the manifest's.

    Raises:
        LoadError: they differ.
    """
    values = {value.name: value for value in graph.record.graph.inputs}
    for state in manifest.states:
        if state.name not in program.states:
            continue
        value = values[state.name]
        shape = tuple(extent if isinstance(extent, int) else -1 for extent in value.shape[1:])
        expected = manifest.compiled_shape(state)
        if (shape, value.dtype) != (expected, state.dtype):
            raise LoadError(
                f"{title} has state {state.name} as {list(shape)} {value.dtype}, the manifest as "
                f"{list(expected)} {state.dtype}; build the model again"
            )
    written = graph.written_inputs()
    declared = {alias.input for alias in program.aliases}
    if written != declared:
        raise LoadError(
            f"{title}: the states the graph writes in place and the aliases the manifest declares "
            f"differ in {sorted(written ^ declared)}; build the model again"
        )


def _bind(loaded: LoadedGraph, arena: Arena, states: Collection[str]) -> None:
    """Replace each state input by the arena's tensor."""
    module, graph = loaded.module, loaded.module.graph
    for index, (name, node) in enumerate(loaded.inputs.items()):
        if name in states:
            module.register_buffer(f"state_{index}", arena.tensors[name], persistent=False)
            with graph.inserting_before(node):
                state = graph.get_attr(f"state_{index}")
            node.replace_all_uses_with(state)
            graph.erase_node(node)
