"""Plugins without state: linear layers with their neighbours, RMS norm, argmax."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from inplace.kernels.argmax import argmax, argmax_workspace
from inplace.kernels.linear import LinearSpec, linear, linear_workspace, rms_norm
from inplace.kernels.memory import Pointer
from inplace.operators import ACTIVATIONS
from inplace.plugins.operation import Launch, Operation, Shape, tokens

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LinearOperation(Operation):
    """``inplace::linear``: inputs x, weight, then bias, norm and residual as far as there are any."""

    name: ClassVar[str] = "InplaceLinear"

    inputs: int
    outputs: int
    bias: bool = False
    norm: bool = False
    residual: bool = False
    eps: float = 0.0
    activation: str = field(default="none", metadata={"choices": ACTIVATIONS})
    gated: bool = False
    float_out: bool = False

    @property
    def input_count(self) -> int:
        """X, weight, and what else there is."""
        return 2 + self.bias + self.norm + self.residual

    @property
    def spec(self) -> LinearSpec:
        """The same for the kernels."""
        return LinearSpec(
            self.inputs,
            self.outputs,
            self.bias,
            self.norm,
            self.residual,
            self.eps,
            self.activation,
            self.gated,
            self.float_out,
        )

    def accepts(self, position: int, dtypes: Sequence[torch.dtype]) -> bool:
        """Everything has x's type, but the norm's weight may be any and the result may be float32."""
        found = dtypes[position]
        if position == 2 + self.bias and self.norm:
            return found in FLOATS
        if position == self.input_count and self.float_out:
            return found is torch.float32
        return found in FLOATS and found is dtypes[0]

    def output_dtypes(self, inputs: Sequence[torch.dtype]) -> list[torch.dtype]:
        """That of x, or float32."""
        return [torch.float32 if self.float_out else inputs[0]]

    def output_shapes(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """That of x with another last extent."""
        return [[*inputs[0][:-1], self.spec.width]]

    def workspace(self, shapes: Sequence[Shape], dtypes: Sequence[torch.dtype]) -> int:
        """What cuBLAS steps put between their kernels."""
        return linear_workspace(self.spec, tokens(shapes[0]), dtypes[0].itemsize)

    def launch(self, call: Launch) -> None:
        """See `inplace.kernels.linear.linear`."""
        rest = iter(call.inputs[2:])
        linear(
            self.spec,
            x=call.inputs[0],
            weight=call.inputs[1],
            bias=next(rest) if self.bias else None,
            norm=next(rest) if self.norm else None,
            residual=next(rest) if self.residual else None,
            out=call.outputs[0],
            workspace=call.workspace,
            tokens=tokens(call.shapes[0]),
            pdl=call.pdl,
        )


@dataclass(frozen=True)
class RmsNormOperation(Operation):
    """``inplace::rms_norm``: inputs x, weight."""

    name: ClassVar[str] = "InplaceRmsNorm"

    width: int
    eps: float

    @property
    def input_count(self) -> int:
        """X and the weight."""
        return 2

    def accepts(self, position: int, dtypes: Sequence[torch.dtype]) -> bool:
        """The result has x's type; the weight may have any."""
        return dtypes[position] in FLOATS and (position != 2 or dtypes[2] is dtypes[0])

    def output_dtypes(self, inputs: Sequence[torch.dtype]) -> list[torch.dtype]:
        """That of x."""
        return [inputs[0]]

    def output_shapes(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """That of x."""
        return [list(inputs[0])]

    def launch(self, call: Launch) -> None:
        """See `inplace.kernels.linear.rms_norm`."""
        x, weight = call.inputs
        rms_norm(
            x=x,
            weight=weight,
            out=call.outputs[0],
            tokens=tokens(call.shapes[0]),
            width=self.width,
            eps=self.eps,
            pdl=call.pdl,
        )


@dataclass(frozen=True)
class ArgmaxOperation(Operation):
    """``inplace::argmax``: one input, ``[rows, count]``."""

    name: ClassVar[str] = "InplaceArgmax"

    max_rows: int

    @property
    def input_count(self) -> int:
        """The scores."""
        return 1

    def accepts(self, position: int, dtypes: Sequence[torch.dtype]) -> bool:
        """Scores of a floating type, an int64 index."""
        return dtypes[position] in FLOATS if position == 0 else dtypes[position] is torch.int64

    def output_dtypes(self, inputs: Sequence[torch.dtype]) -> list[torch.dtype]:
        """An index."""
        return [torch.int64]

    def output_shapes(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """One index a row."""
        return [[inputs[0][0], 1]]

    def workspace(self, shapes: Sequence[Shape], dtypes: Sequence[torch.dtype]) -> int:
        """The parts' maxima."""
        return argmax_workspace(shapes[0][0])

    def locks(self) -> int:
        """One a row."""
        return self.max_rows

    def launch(self, call: Launch) -> None:
        """See `inplace.kernels.argmax.argmax`."""
        rows, count = call.shapes[0]
        workspace = Pointer(call.workspace, torch.float32)
        argmax(
            scores=call.inputs[0],
            out=call.outputs[0],
            workspace=workspace,
            locks=call.locks,
            rows=rows,
            count=count,
            pdl=call.pdl,
        )


STATELESS: Mapping[str, type[Operation]] = {
    kind.name: kind for kind in (LinearOperation, RmsNormOperation, ArgmaxOperation)
}
