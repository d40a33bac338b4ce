"""The plugin that chooses each row's next token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from inplace.kernels.memory import Pointer
from inplace.kernels.sample import sample, sample_workspace
from inplace.plugins.operation import Launch, Operation, Shape

TYPES = (
    torch.float32,
    torch.float32,
    torch.int32,
    torch.float32,
    torch.int64,
    torch.int32,
    torch.int64,
)
"""Of scores, temperature, top_k, top_p, seeds and positions, and of the result."""


@dataclass(frozen=True)
class SampleOperation(Operation):
    """``inplace::sample``: scores ``[rows, count]``, then temperature, top_k, top_p, seeds and positions, ``[rows]`` each."""

    name: ClassVar[str] = "InplaceSample"

    max_rows: int

    @property
    def input_count(self) -> int:
        """Scores and five parameters."""
        return 6

    def accepts(self, position: int, dtypes: Sequence[torch.dtype]) -> bool:
        """Each its own type."""
        return dtypes[position] is TYPES[position]

    def output_dtypes(self, inputs: Sequence[torch.dtype]) -> list[torch.dtype]:
        """An index."""
        return [torch.int64]

    def output_shapes(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """One index a row."""
        return [[inputs[0][0], 1]]

    def workspace(self, shapes: Sequence[Shape], dtypes: Sequence[torch.dtype]) -> int:
        """The parts' candidates."""
        return sample_workspace(shapes[0][0])

    def locks(self) -> int:
        """One a row."""
        return self.max_rows

    def launch(self, call: Launch) -> None:
        """See `inplace.kernels.sample.sample`."""
        rows, count = call.shapes[0]
        scores, temperature, top_k, top_p, seeds, positions = call.inputs
        sample(
            scores=scores,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seeds=seeds,
            positions=positions,
            out=call.outputs[0],
            workspace=Pointer(call.workspace, torch.float32),
            locks=call.locks,
            rows=rows,
            count=count,
            pdl=call.pdl,
        )
