"""The GPU that an engine runs on: chosen by the server, compared with what the engine needs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch

from inplace.errors import LoadError
from inplace.schema.artifacts import Plan
from inplace.schema.served import Manifest


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine.

    Attributes:
        index: its number among those that the process sees.
        name: of the product.
        compute_capability: for example ``9.0``.
        free, total: bytes of its memory.
    """

    index: int
    name: str
    compute_capability: str
    free: int
    total: int

    @classmethod
    def current(cls) -> Self:
        """The GPU of the calling thread."""
        index = torch.cuda.current_device()
        major, minor = torch.cuda.get_device_capability(index)
        free, total = torch.cuda.mem_get_info(index)
        return cls(index, torch.cuda.get_device_name(index), f"{major}.{minor}", free, total)

    def __str__(self) -> str:
        return f"GPU {self.index} ({self.name}, compute capability {self.compute_capability})"


def use_gpu(index: int) -> None:
    """Make a GPU the calling thread's: what is allocated or launched as ``cuda`` is on it.

    Raises:
        LoadError: the process does not see so many GPUs.
    """
    if index >= (count := torch.cuda.device_count()):
        raise LoadError(
            f"the server names GPU {index} for this instance, and PyTorch sees {count}: correct "
            "instance_group in config.pbtxt, or CUDA_VISIBLE_DEVICES"
        )
    torch.cuda.set_device(index)


@contextmanager
def full_float32() -> Iterator[None]:
    """Have cuDNN compute float32 convolutions and recurrent layers in float32.

    PyTorch lets it round their inputs to the 10 bits of TF32's mantissa unless it is told not to.
    """
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def device_of(manifest: Manifest) -> torch.device:
    """Where an engine runs: the CPU, or the calling thread's GPU."""
    if manifest.device == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def check_plan(title: str, plan: Plan, gpu: Gpu) -> None:
    """Refuse a plan that was built for another GPU.

    Raises:
        LoadError: the product or the compute capability differs.
    """
    if gpu.compute_capability != plan.compute_capability or plan.gpu not in ("", gpu.name):
        raise LoadError(
            f"{title} was built for {plan.gpu or 'a GPU'} (compute capability "
            f"{plan.compute_capability}), and this instance runs on {gpu}: build the model again "
            "on such a GPU, or name others in instance_group of config.pbtxt"
        )


def check_memory(title: str, manifest: Manifest, slots: int, gpu: Gpu) -> None:
    """Refuse an engine whose weights or arena do not fit the GPU's free memory.

    Scratch memory and the inputs and outputs of steps, which come on top, are not known yet.

    Raises:
        LoadError: they do not fit; the text has the numbers, and on how many GPUs they would.
    """
    weights, arena = engine_bytes(manifest), arena_bytes(manifest, slots)
    if weights + arena <= gpu.free:
        return
    needs = (
        f"{title} needs {weights:,} bytes of weights and {arena:,} of state for {slots} slots; "
        f"{gpu} has {gpu.free:,} of {gpu.total:,} bytes free"
    )
    fitting = max_slots(manifest, gpu.free)
    if fitting:
        count = -(-slots // fitting)
        raise LoadError(
            f"{needs}, room for {fitting} slots: {slots} slots would fit on {count} such GPUs, "
            f"with an instance of {-(-slots // count)} slots on each (--slots, --gpus); or build "
            "with a smaller capacity"
        )
    count = -(-(weights + arena_bytes(manifest, 1)) // max(gpu.free, 1))
    raise LoadError(
        f"{needs}, too few for one slot beside the weights. They would fill {count} such GPUs, but "
        "an engine is not divided over GPUs: free memory, use a larger GPU, or build with a "
        "smaller dtype or capacity"
    )


def engine_bytes(manifest: Manifest) -> int:
    """Bytes of the engine's files and weights."""
    engines = [program.engine for program in manifest.programs]
    names = {engine.file for engine in engines}
    names |= {engine.plan.weights for engine in engines if engine.plan and engine.plan.weights}
    return sum(manifest.file(name).bytes for name in names)


def arena_bytes(manifest: Manifest, slots: int) -> int:
    """Bytes of the states of so many slots, with the second buffers of those that are copied."""
    copied = {
        alias.input
        for program in manifest.programs
        for alias in program.aliases
        if alias.kind == "copy"
    }
    return slots * sum(
        state.slot_bytes * (2 if state.name in copied else 1) for state in manifest.states
    )


def max_slots(manifest: Manifest, memory: int) -> int:
    """Number of slots that fit into ``memory`` bytes beside the engine's files and weights."""
    slot = arena_bytes(manifest, 1)
    return max(0, memory - engine_bytes(manifest)) // slot if slot else 0
