"""A module, how it is called, and what becomes of its states when an engine is built of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


def noise(step: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal random numbers, the same ones for the same step."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(step)).to(dtype)


def position(step: int) -> Tensor:
    """``[1]``: the position that is the number of the step."""
    return torch.tensor([step])


@dataclass(frozen=True)
class ModuleCase:
    """A module and the expected outcome of building it.

    Attributes:
        name: unique in the corpus.
        module: makes the module.
        states: makes the states that the caller passes as the first arguments.
        inputs: the further arguments of a step, by its number; those of step 0 are the example.
        patterns: how each state is written, by its name; ``explicit`` is a state that is read,
            computed and written back whole, which ``strict`` refuses.
        operators: how often the graph has each ``inplace::`` operator; None is not compared.
        axes: the axis that each of the states is appended along; empty is not compared.
        rows: of a step.
        reason: a regular expression that matches in the reason recorded for some state.
        steps: how many steps are compared with eager PyTorch.
        options: of the capture and of the build.
        fits_cache_layer: whether TensorRT's own cache layer can update all of its states.
        plans: whether it is built for TensorRT too.
    """

    name: str
    module: Callable[[], nn.Module]
    states: Callable[[], list[Any]]
    inputs: Callable[[int], tuple[Any, ...]]
    patterns: Mapping[str, str]
    operators: Mapping[str, int] | None = None
    axes: tuple[int, ...] = ()
    rows: int = 1
    reason: str = ""
    steps: int = 8
    options: dict[str, Any] = field(default_factory=dict)
    fits_cache_layer: bool = False
    plans: bool = False

    @property
    def explicit(self) -> bool:
        """Whether a state is written back whole."""
        return "explicit" in self.patterns.values()

    def example(self) -> tuple[Any, ...]:
        """The arguments that it is captured with."""
        return (*self.states(), *self.inputs(0))
