"""Load a plan, prove that it aliases what the manifest says, bind everything once, and step."""

import logging
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inplace.engines.arena import Arena
from inplace.engines.base import Finish
from inplace.engines.tensorrt.contexts import Contexts
from inplace.engines.tensorrt.plan import check_native_aliases, open_plan
from inplace.engines.tensorrt.steps import DynamicSlotSteps, StaticSlotSteps
from inplace.errors import LoadError
from inplace.schema.artifacts import Plan
from inplace.schema.served import Manifest

log = logging.getLogger("inplace")


class TensorRtEngine:
    """Runs a TensorRT plan over state that is bound in place.

    Args:
        folder: the engine directory.
        manifest: what the engine is said to be.
        arena: the memory to bind the states to; on a GPU.
        graphs: replay steps as CUDA graphs; False launches every kernel of every step.

    Raises:
        LoadError: the plan was built for another GPU or TensorRT, cannot be read, does not take or return what the manifest says, or does
            not update a state in the memory it is bound to; or its weights and scratch memory do not fit the GPU.

    Attributes:
        memory: bytes of device memory by what they are for: ``weights``, ``scratch``, ``steps`` (inputs and outputs of captured sizes),
            ``libraries`` (what PyTorch holds beside, cuBLAS's workspace above all), ``driver`` (what CUDA and TensorRT took while the
            engine loaded and warmed: the plan, code, stacks, graphs; as the driver counts it, so of this GPU's other users too).
    """

    def __init__(
        self, folder: Path, manifest: Manifest, arena: Arena, *, graphs: bool = True
    ) -> None:
        program, plan = manifest.program("step"), manifest.engine.plan
        if plan is None:
            raise LoadError(
                f"{folder}: the manifest says nothing of the TensorRT plan it names; build the model again"
            )
        path = manifest.engine.verified(folder)
        self._arena, self._addresses = arena, list(arena.addresses().values())
        before = _Use.now()
        self._plan = opened = open_plan(str(path), path.read_bytes, plan)
        engine = opened.engine
        _check_names(path, engine, manifest)
        check_native_aliases(str(path), engine, program.aliases)
        try:
            weights = _weights(folder, plan)
            contexts = Contexts(opened.tensorrt, engine, plan, weights, opened.log, opened.plugins)
            kind = StaticSlotSteps if program.rows_are_slots else DynamicSlotSteps
            self._steps: StaticSlotSteps | DynamicSlotSteps = kind(
                program, arena, contexts, graphs=graphs
            )
            self._steps.warm()
        except torch.cuda.OutOfMemoryError as error:
            raise LoadError(
                f"{path}: the GPU has too little memory beside the arena of {arena.bytes:,} bytes ({str(error).partition('.')[0]}): "
                f"build with fewer slots, a smaller capacity or fewer tokens a step"
            ) from error
        self.memory = {
            "weights": sum(weight.nbytes for weight in weights.values()),
            **contexts.memory,
            **self._steps.memory,
        }
        now = _Use.now()
        self.memory["libraries"] = now.pytorch - before.pytorch - sum(self.memory.values())
        self.memory["driver"] = now.others - before.others
        log.info("%s: plan bound on %s, device memory %s", path.name, plan.gpu, self.memory)

    def on_stream(self) -> AbstractContextManager[object]:
        """See `Engine.attached`: the stream that steps run on is the thread's."""
        return self._steps.entered()

    @property
    def overlaps(self) -> bool:
        """See `Engine`."""
        return self._steps.overlaps

    def launch(self, inputs: Mapping[str, Tensor], wanted: Collection[str]) -> Finish:
        """See `Engine.launch`.

        Raises:
            RuntimeError: TensorRT or a plugin failed, or a state is no longer where it was bound: captured graphs hold addresses, and a
                stale one is never replayed.
        """
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
                f"states {moved} are no longer at the addresses the engine was bound to; load the engine again"
            )
        return self._steps.launch(inputs, wanted)

    def time(self, inputs: Mapping[str, Tensor], count: int) -> float:
        """Microseconds of one step on the GPU, see `DynamicSlotSteps.time`; for benchmarks."""
        return self._steps.time(inputs, count)


@dataclass(frozen=True)
class _Use:
    """Bytes of device memory in use: by PyTorch's allocator, and by everything else. None where there is no GPU."""

    pytorch: int
    others: int

    @classmethod
    def now(cls) -> "_Use":
        if not torch.cuda.is_available():
            return cls(0, 0)
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        held = torch.cuda.memory_reserved()
        return cls(held, total - free - held)


def _check_names(path: Path, engine: Any, manifest: Manifest) -> None:
    """The plan is the truth: its inputs and outputs must be the manifest's."""
    program = manifest.program("step")
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    modes = {
        name: "input" if "INPUT" in str(engine.get_tensor_mode(name)) else "output"
        for name in names
    }
    states = {spec.name for spec in manifest.states}
    wanted_in = {spec.name for spec in program.inputs} | states
    wanted_out = {spec.name for spec in program.outputs} | {
        alias.output for alias in program.aliases
    }
    found_out = {name for name, mode in modes.items() if mode == "output"}
    missing = sorted(
        (wanted_in - {name for name, mode in modes.items() if mode == "input"})
        | (wanted_out - found_out)
    )
    if missing:
        raise LoadError(
            f"{path} has no {missing}, which the manifest names (an alias needs its output); build the model again"
        )
    if extra := sorted(found_out - wanted_out):
        raise LoadError(
            f"{path} returns {extra}, which the manifest does not name; build the model again"
        )
    for state in manifest.states:
        shape = tuple(engine.get_tensor_shape(state.name))[1:]
        if shape != (wanted := manifest.compiled_shape(state)):
            raise LoadError(
                f"{path} has state {state.name} as {list(shape)}, the manifest as {list(wanted)}; build the model again"
            )


def _weights(folder: Path, plan: Plan) -> dict[str, Tensor]:
    if plan.weights is None:
        return {}
    from safetensors.torch import load_file

    return load_file(plan.weights.verified(folder), device="cuda")
