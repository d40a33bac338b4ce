"""A user's operator: a leaky sum and a sum of that, both states written in one call."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from inplace.kernels.memory import as_tensor
from inplace.plugins import Launch, Operation
from inplace.trt import TensorRT
from torch import Tensor, nn

LIBRARY = torch.library.Library("testing", "DEF")
LIBRARY.define("leak(Tensor x, float decay, Tensor(a!) level, Tensor(b!) total) -> Tensor")
LIBRARY.define("tick(Tensor(a!) count) -> ()")
LIBRARY.define("nothing(Tensor x) -> Tensor")
LIBRARY.define("several(Tensor(a!)[] states) -> ()")
leak, tick = torch.ops.testing.leak.default, torch.ops.testing.tick.default


@torch.library.impl(LIBRARY, "leak", "CompositeExplicitAutograd")
def _leak(x: Tensor, decay: float, level: Tensor, total: Tensor) -> Tensor:
    level.mul_(decay).add_(x)
    total.add_(level)
    return level * total


@torch.library.register_fake("testing::leak", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _leak_fake(x: Tensor, decay: float, level: Tensor, total: Tensor) -> Tensor:
    return torch.empty_like(level)


@torch.library.impl(LIBRARY, "tick", "CompositeExplicitAutograd")
def _tick(count: Tensor) -> None:
    count.add_(1)


@torch.library.register_fake("testing::tick", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _tick_fake(count: Tensor) -> None:
    return None


@dataclass(frozen=True)
class Leak(Operation):
    """`leak` as a plugin with two aliased outputs: x, level, total; the result, level, total."""

    name: ClassVar[str] = "TestingLeak"
    aliases: ClassVar[Mapping[int, int]] = {1: 1, 2: 2}

    decay: float

    @property
    def input_count(self) -> int:
        return 3

    def accepts(self, position: int, dtypes: Sequence[torch.dtype]) -> bool:
        return dtypes[position] is torch.float32

    def output_dtypes(self, inputs: Sequence[torch.dtype]) -> list[torch.dtype]:
        return [torch.float32] * 3

    def output_shapes(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        return [list(inputs[1]), list(inputs[1]), list(inputs[2])]

    def launch(self, call: Launch) -> None:
        x, level, total = (
            as_tensor(memory, shape) for memory, shape in zip(call.inputs, call.shapes, strict=True)
        )
        as_tensor(call.outputs[0], call.shapes[1]).copy_(_leak(x, self.decay, level, total))


@dataclass(frozen=True)
class Swapped(Leak):
    """The same with its two states exchanged: no alias of what the operator writes."""

    name: ClassVar[str] = "TestingSwapped"
    aliases: ClassVar[Mapping[int, int]] = {1: 2, 2: 1}


def make_leak(tensorrt: TensorRT, constants: Mapping[str, Any]) -> Operation:
    return Leak(decay=constants["decay"])


class Leaky(nn.Module):
    """One state is the caller's, one a buffer, one is used afterwards; a third is our update."""

    total: Tensor
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(3, 4))
        self.register_buffer("steps", torch.zeros(1, 2))

    def forward(self, level: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.ops.testing.leak(x, 0.5, level, self.total)
        self.steps.add_(self.total.sum())
        return out + self.steps.sum(), x
