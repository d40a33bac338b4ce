"""The plugins that choose each row's next token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from inplace.kernels.gumbel import MAX_LOGPROBS
from inplace.kernels.memory import Pointer
from inplace.kernels.sample import (
    SampleOptions,
    adjusted_workspace,
    argmax,
    argmax_workspace,
    candidates_workspace,
    sample,
    sample_workspace,
)
from inplace.plugins.plugin import FLOATS, Launch, Operation, Shape, register


@register
@dataclass(frozen=True)
class ArgmaxOperation(Operation):
    """``inplace::argmax``. Input: scores ``[rows, count]``."""

    name: ClassVar[str] = "InplaceArgmax"

    max_rows: int

    @property
    def input_count(self) -> int:
        """The scores."""
        return 1

    def accepts(self, position: int, dtypes: Sequence[torch.dtype]) -> bool:
        """Floating scores, an int64 index."""
        return dtypes[position] in FLOATS if position == 0 else dtypes[position] is torch.int64

    def output_dtypes(self, inputs: Sequence[torch.dtype]) -> list[torch.dtype]:
        """An int64 index."""
        return [torch.int64]

    def output_shapes(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """One index for each row."""
        return [[inputs[0][0], 1]]

    def workspace(self, shapes: Sequence[Shape], dtypes: Sequence[torch.dtype]) -> int:
        """The maxima of the splits."""
        return argmax_workspace(shapes[0][0])

    def locks(self) -> int:
        """One for each row."""
        return self.max_rows

    def launch(self, call: Launch) -> None:
        """Launch `inplace.kernels.sample.argmax`."""
        rows, count = call.shapes[0]
        argmax(
            scores=call.inputs[0],
            out=call.outputs[0],
            workspace=Pointer(call.workspace, torch.float32),
            locks=call.locks,
            rows=rows,
            count=count,
            pdl=call.pdl,
        )


SAMPLE_DTYPES = (
    torch.float32,
    torch.float32,
    torch.int32,
    torch.float32,
    torch.int64,
    torch.int32,
    torch.int64,
)
"""Of scores, temperature, top_k, top_p, seeds and positions, and of the result."""


@register
@dataclass(frozen=True)
class SampleOperation(Operation):
    """``inplace::sample``.

    Inputs: scores ``[rows, count]``; temperature, top_k, top_p, seeds and positions ``[rows]``.
    """

    name: ClassVar[str] = "InplaceSample"

    max_rows: int

    @property
    def input_count(self) -> int:
        """Scores and five parameters."""
        return 6

    def accepts(self, position: int, dtypes: Sequence[torch.dtype]) -> bool:
        """Each has one dtype."""
        return dtypes[position] is SAMPLE_DTYPES[position]

    def output_dtypes(self, inputs: Sequence[torch.dtype]) -> list[torch.dtype]:
        """An int64 index."""
        return [torch.int64]

    def output_shapes(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """One index for each row."""
        return [[inputs[0][0], 1]]

    def workspace(self, shapes: Sequence[Shape], dtypes: Sequence[torch.dtype]) -> int:
        """The candidates of the splits."""
        return sample_workspace(shapes[0][0])

    def locks(self) -> int:
        """One for each row."""
        return self.max_rows

    def launch(self, call: Launch) -> None:
        """Launch `inplace.kernels.sample.sample`."""
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


OPTION_DTYPES = (
    torch.float32,
    torch.int32,
    torch.int32,
    torch.int32,
    torch.float32,
    torch.int64,
    torch.float32,
    torch.float32,
    torch.int64,
)
"""Of min_p, num_logprobs, num_adjusted, adjusted_tokens and adjustments, and of the results."""


@register
@dataclass(frozen=True)
class SampleOptionsOperation(Operation):
    """``inplace::sample.options``.

    Inputs: those of ``inplace::sample``; min_p, num_logprobs and num_adjusted ``[rows]``,
    adjusted_tokens ``[rows, entries]`` and adjustments ``[rows, 3, entries]``.
    """

    name: ClassVar[str] = "InplaceSampleOptions"

    max_rows: int

    @property
    def input_count(self) -> int:
        """Scores, five parameters and five options."""
        return 11

    def accepts(self, position: int, dtypes: Sequence[torch.dtype]) -> bool:
        """Each has one dtype."""
        return dtypes[position] is (*SAMPLE_DTYPES[:-1], *OPTION_DTYPES)[position]

    def output_dtypes(self, inputs: Sequence[torch.dtype]) -> list[torch.dtype]:
        """Indices and log-probabilities."""
        return list(OPTION_DTYPES[-4:])

    def output_shapes(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """One index and its log-probability for each row, and those of the most likely."""
        rows = inputs[0][0]
        return [[rows, 1], [rows, 1], [rows, MAX_LOGPROBS], [rows, MAX_LOGPROBS]]

    def workspace(self, shapes: Sequence[Shape], dtypes: Sequence[torch.dtype]) -> int:
        """The candidates of the splits, their largest scores, and adjusted scores."""
        rows, count = shapes[0]
        return sample_workspace(rows) + candidates_workspace(rows) + adjusted_workspace(rows, count)

    def locks(self) -> int:
        """One for each row."""
        return self.max_rows

    def launch(self, call: Launch) -> None:
        """Launch `inplace.kernels.sample.sample` with options."""
        rows, count = call.shapes[0]
        scores, temperature, top_k, top_p, seeds, positions = call.inputs[:6]
        min_p, num_logprobs, num_adjusted, adjusted_tokens, adjustments = call.inputs[6:]
        out, token_logprobs, top_logprobs, top_tokens = call.outputs
        candidates = sample_workspace(rows)
        sample(
            scores=scores,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seeds=seeds,
            positions=positions,
            out=out,
            workspace=call.scratch(0, torch.float32),
            locks=call.locks,
            rows=rows,
            count=count,
            options=SampleOptions(
                min_p,
                num_logprobs,
                num_adjusted,
                adjusted_tokens,
                adjustments,
                call.shapes[9][1],
                token_logprobs,
                top_logprobs,
                top_tokens,
                call.scratch(candidates, torch.float32),
                call.scratch(candidates + candidates_workspace(rows), torch.float32),
            ),
            pdl=call.pdl,
        )
