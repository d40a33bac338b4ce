"""The TensorRT engine: a plan loaded, checked against its manifest, bound to the arena and run."""

import logging
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inplace.engines.arena import Arena
from inplace.engines.base import Finish
from inplace.engines.scales import check_scales
from inplace.engines.tensorrt.plan import (
    ExecutionContexts,
    check_native_aliases,
    input_names,
    open_plan,
)
from inplace.engines.tensorrt.static_steps import StaticSlotSteps
from inplace.engines.tensorrt.steps import DynamicSlotSteps
from inplace.errors import LoadError
from inplace.schema.artifacts import Plan
from inplace.schema.files import EngineFolder
from inplace.schema.programs import CompiledProgram
from inplace.schema.schedule import STEP
from inplace.schema.served import Manifest
from inplace.schema.specs import Dtype, in_words
from inplace.schema.tensor_file import read_tensors

log = logging.getLogger("inplace")


class TensorRtEngine:
    """Runs a TensorRT plan over state that is bound in place.

    Args:
        folder: the engine directory; the plan is code and must be in a trusted folder.
        manifest: its manifest.
        arena: the memory to bind the states to; on a GPU.
        graphs: replay steps as CUDA graphs; False launches every step kernel by kernel.
        program: the program whose plan is run.
        loaded_weights: weights on the GPU by file and name, of programs that were loaded before;
            those of this one are added.

    Raises:
        LoadError: the plan was built for another GPU or TensorRT, cannot be read, has other inputs
            or outputs than the manifest, or does not update a state in the memory it is bound to;
            or its weights and scratch memory do not fit the GPU.

    Attributes:
        memory: bytes of device memory by what they are for: ``weights``, ``scratch``, ``copies``
            (second buffers of copied states), ``steps`` (inputs and outputs of captured sizes),
            ``libraries`` (what else PyTorch reserved, above all cuBLAS's workspace), ``driver``
            (what CUDA and TensorRT took while the engine was loaded and warmed up: plan, code,
            stacks, graphs; the driver counts other users of the GPU too).
    """

    def __init__(
        self,
        folder: EngineFolder,
        manifest: Manifest,
        arena: Arena,
        *,
        graphs: bool = True,
        program: str = STEP,
        loaded_weights: dict[str, dict[str, Tensor]] | None = None,
    ) -> None:
        compiled = manifest.program(program)
        plan = compiled.engine.plan
        if plan is None:
            raise LoadError(
                f"{folder.path}: the manifest has no record of its TensorRT plan; build the model "
                "again"
            )
        record = manifest.file(compiled.engine.file)
        path = folder.path / record.name
        self._arena, self._addresses = arena, list(arena.addresses().values())
        before = _DeviceMemory.now()
        opened = open_plan(str(path), partial(folder.read_code, record), plan)
        engine = opened.engine
        _check_names(path, engine, manifest, compiled)
        check_native_aliases(str(path), engine, compiled.aliases)
        try:
            loaded = {} if loaded_weights is None else loaded_weights
            is_loaded = plan.weights in loaded
            weights = _weights(folder, manifest, plan, loaded)
            dtypes = {name: weight.dtype for name, weight in weights.items()}
            check_scales(str(path), compiled.engine, dtypes)
            contexts = ExecutionContexts(opened, plan, weights)
            kind = StaticSlotSteps if compiled.rows_are_slots else DynamicSlotSteps
            self._steps: StaticSlotSteps | DynamicSlotSteps = kind(
                compiled, arena, contexts, graphs=graphs
            )
            self._steps.warm_up()
        except torch.cuda.OutOfMemoryError as error:
            raise LoadError(
                f"{path}: the GPU has too little memory for the engine and its arena of "
                f"{arena.bytes:,} bytes ({str(error).partition('.')[0]}): build with fewer slots, "
                "a smaller capacity or fewer tokens a step"
            ) from error
        self.memory = {
            "weights": 0 if is_loaded else sum(weight.nbytes for weight in weights.values()),
            **contexts.memory,
            **self._steps.memory,
        }
        now = _DeviceMemory.now()
        self.memory["libraries"] = now.pytorch - before.pytorch - sum(self.memory.values())
        self.memory["driver"] = now.other - before.other
        log.info("%s: plan bound on %s, device memory %s", path.name, plan.gpu, self.memory)

    def on_stream(self) -> AbstractContextManager[object]:
        """See `inplace.engines.base.StepEngine.on_stream`."""
        return self._steps.on_stream()

    @property
    def overlaps(self) -> bool:
        """See `inplace.engines.base.StepEngine.overlaps`."""
        return self._steps.overlaps

    def launch(self, inputs: Mapping[str, Tensor], requested: Collection[str]) -> Finish:
        """Launch a step, see `inplace.engines.base.StepEngine.launch`.

        Raises:
            RuntimeError: TensorRT or a plugin failed, or a state is not at the address it was
                bound at: a captured graph holds addresses, and none is replayed on stale ones.
        """
        self._check_addresses()
        return self._steps.launch(inputs, requested)

    def launch_repeated(
        self, inputs: Mapping[str, Tensor], requested: Collection[str], count: int
    ) -> Finish:
        """Launch several steps, see `inplace.engines.base.StepEngine.launch_repeated`.

        Raises:
            RuntimeError: as `launch`.
        """
        self._check_addresses()
        assert isinstance(self._steps, DynamicSlotSteps)  # schedules have no other programs
        return self._steps.launch_repeated(inputs, requested, count)

    def _check_addresses(self) -> None:
        tensors = self._arena.tensors
        if (
            not self._steps.moves_states
            and [tensor.data_ptr() for tensor in tensors.values()] != self._addresses
        ):
            moved = [
                name
                for name, old in zip(tensors, self._addresses, strict=True)
                if tensors[name].data_ptr() != old
            ]
            raise RuntimeError(
                f"states {moved} are no longer at the addresses the engine was bound to; load the "
                "engine again"
            )

    def time(self, inputs: Mapping[str, Tensor], count: int) -> float:
        """Microseconds of one step on the GPU, see `DynamicSlotSteps.time`."""
        return self._steps.time(inputs, count)


@dataclass(frozen=True)
class _DeviceMemory:
    """Bytes of device memory in use, by PyTorch's allocator and by all else; 0 without a GPU."""

    pytorch: int
    other: int

    @classmethod
    def now(cls) -> "_DeviceMemory":
        if not torch.cuda.is_available():
            return cls(0, 0)
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        reserved = torch.cuda.memory_reserved()
        return cls(reserved, total - free - reserved)


def _check_names(path: Path, engine: Any, manifest: Manifest, program: CompiledProgram) -> None:
    """Compare the plan's inputs, outputs and shapes of states with the manifest's.

    Raises:
        LoadError: they differ.
    """
    names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    inputs = input_names(engine)
    outputs = names - inputs
    states = set(program.states)
    expected_inputs = {spec.name for spec in program.inputs} | states
    expected_outputs = {spec.name for spec in program.outputs} | {
        alias.output for alias in program.aliases
    }
    missing = sorted((expected_inputs - inputs) | (expected_outputs - outputs))
    if missing:
        raise LoadError(
            f"{path} has no {missing}, which the manifest names (an alias needs its output); "
            "build the model again"
        )
    if extra := sorted(outputs - expected_outputs):
        raise LoadError(
            f"{path} returns {extra}, which the manifest does not name; build the model again"
        )
    for state in manifest.states:
        if state.name not in states:
            continue
        shape = tuple(engine.get_tensor_shape(state.name))[1:]
        expected = manifest.compiled_shape(state)
        if state.dtype is Dtype.FLOAT8_E4M3FN:
            expected = in_words(expected)
        if shape != expected:
            raise LoadError(
                f"{path} has state {state.name} of shape {list(shape)}, the manifest says "
                f"{list(expected)}; build the model again"
            )


def _weights(
    folder: EngineFolder, manifest: Manifest, plan: Plan, loaded: dict[str, dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The weights that a plan takes as inputs, on the GPU."""
    if plan.weights is None:
        return {}
    if plan.weights not in loaded:
        record = manifest.file(plan.weights)
        tensors = read_tensors(folder.read(record), str(folder.path / record.name))
        loaded[plan.weights] = {name: tensor.to("cuda") for name, tensor in tensors.items()}
    return loaded[plan.weights]
