"""What the plugins of convolutions and recurrences do, without TensorRT.

A convolution keeps its last inputs, a recurrence one state for each head or channel. The sizes are
those of the tensors that a launch gets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from inplace.kernels.memory import Memory
from inplace.kernels.recurrence import (
    causal_conv1d,
    delta_rule,
    delta_rule_workspaces,
    linear_recurrence,
    selective_scan,
    selective_scan_workspace,
)
from inplace.plugins.plugin import FLOATS, Launch, Operation, Shape, register

ALIGNMENT = 256
"""Bytes. Each scratch memory of a launch begins at a multiple of it."""


@dataclass(frozen=True, kw_only=True)
class RecurrentOperation(Operation):
    """An operator on the tokens of each row and the state of its slot.

    Inputs: those of the operator; the state; slots and row_offsets; an optional weight; then
    ``readers`` results of earlier reads of the state, which make TensorRT run those reads first.
    Outputs: the operator's, and the state.

    Attributes:
        first_state: how many inputs are before the state.
        values: the input whose shape and dtype the first output has.
    """

    first_state: ClassVar[int]
    values: ClassVar[int]

    readers: int = 0

    @property
    def optional(self) -> bool:
        """Whether there is the optional weight."""
        return False

    @property
    def input_count(self) -> int:
        """The operator's, the state, two row descriptions, the weight, results of reads."""
        return self.first_state + 3 + self.optional + self.readers

    def accepts(self, position: int, dtypes: Sequence[torch.dtype]) -> bool:
        """Row descriptions are int32, reads any; all others floating, each with a dtype its own."""
        dtype, rows = dtypes[position], self.first_state + 1
        if position >= self.input_count:
            source = (self.values, self.first_state)[position - self.input_count]
            return dtype is dtypes[source]
        if rows <= position < rows + 2:
            return dtype is torch.int32
        return position >= self.input_count - self.readers or dtype in FLOATS

    def output_dtypes(self, inputs: Sequence[torch.dtype]) -> list[torch.dtype]:
        """The values' and the state's."""
        return [inputs[self.values], inputs[self.first_state]]

    def output_shapes(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """The values' and the state's."""
        return [list(inputs[self.values]), list(inputs[self.first_state])]

    def num_rows(self, shapes: Sequence[Shape]) -> int:
        """The rows of a step with inputs of these shapes."""
        return shapes[self.first_state + 1][0]

    def slot_shape(self, shapes: Sequence[Shape]) -> tuple[int, int, int]:
        """The extents of a slot of a recurrence whose heads have matrices."""
        _, heads, first, second = shapes[self.first_state]
        return heads, first, second

    def most_tokens(self, shapes: Sequence[Shape]) -> int:
        """Most tokens of a step, and more than it has rows.

        Fewer rows than the most may have as many tokens together, which need scratch memory; one
        token for each row would need none.
        """
        return max(shapes[self.values][0], self.num_rows(shapes) + 1)

    def _weight(self, call: Launch) -> Memory | None:
        return call.inputs[self.first_state + 3] if self.optional else None


@register
@dataclass(frozen=True, kw_only=True)
class CausalConv1dOperation(RecurrentOperation):
    """``inplace::causal_conv1d``.

    Inputs: x, weight; the state; slots, row_offsets; the bias if there is one; ``readers``.
    """

    name: ClassVar[str] = "InplaceCausalConv1d"
    first_state: ClassVar[int] = 2
    values: ClassVar[int] = 0
    aliases: ClassVar[Mapping[int, int]] = {1: 2}

    bias: bool
    silu: bool

    @property
    def optional(self) -> bool:
        """Whether there is a bias."""
        return self.bias

    def launch(self, call: Launch) -> None:
        """Launch `inplace.kernels.recurrence.causal_conv1d`."""
        (tokens, _), (channels, width) = call.shapes[:2]
        x, weight, state, slots, row_offsets = call.inputs[:5]
        causal_conv1d(
            x=x,
            weight=weight,
            bias=self._weight(call),
            state=state,
            slots=slots,
            row_offsets=row_offsets,
            out=call.outputs[0],
            tokens=tokens,
            rows=self.num_rows(call.shapes),
            channels=channels,
            width=width,
            silu=self.silu,
        )


@register
@dataclass(frozen=True, kw_only=True)
class SelectiveScanOperation(RecurrentOperation):
    """``inplace::selective_scan``.

    Inputs: x, dt, A, B, C; the state; slots, row_offsets; D if ``skip``; ``readers``.
    """

    name: ClassVar[str] = "InplaceSelectiveScan"
    first_state: ClassVar[int] = 5
    values: ClassVar[int] = 0
    aliases: ClassVar[Mapping[int, int]] = {1: 5}

    skip: bool

    @property
    def optional(self) -> bool:
        """Whether there is D."""
        return self.skip

    def workspace(self, shapes: Sequence[Shape], dtypes: Sequence[torch.dtype]) -> int:
        """The states before the chunks of a prompt."""
        entries = selective_scan_workspace(
            self.most_tokens(shapes),
            self.num_rows(shapes),
            self.slot_shape(shapes),
            _rate_shape(shapes[2]),
            dtypes[3],
        )
        return entries * dtypes[3].itemsize

    def launch(self, call: Launch) -> None:
        """Launch `inplace.kernels.recurrence.selective_scan`."""
        x, dt, rates, key, query, state, slots, row_offsets = call.inputs[:8]
        selective_scan(
            x=x,
            dt=dt,
            rates=rates,
            key=key,
            query=query,
            skip=self._weight(call),
            state=state,
            slots=slots,
            row_offsets=row_offsets,
            out=call.outputs[0],
            workspace=call.scratch(0, key.dtype),
            tokens=call.shapes[0][0],
            rows=self.num_rows(call.shapes),
            shape=self.slot_shape(call.shapes),
            groups=call.shapes[3][1],
            rate_shape=_rate_shape(call.shapes[2]),
        )


def _rate_shape(rates: Shape) -> tuple[int, int]:
    _, dim, size = rates
    return dim, size


@register
@dataclass(frozen=True, kw_only=True)
class DeltaRuleOperation(RecurrentOperation):
    """``inplace::delta_rule``.

    Inputs: query, key, value, decay, beta; the state; slots, row_offsets; ``readers``.
    """

    name: ClassVar[str] = "InplaceDeltaRule"
    first_state: ClassVar[int] = 5
    values: ClassVar[int] = 2
    aliases: ClassVar[Mapping[int, int]] = {1: 5}

    def _scratch_sizes(self, tokens: int, shapes: Sequence[Shape], dtype: torch.dtype) -> list[int]:
        """Bytes of the scratch memories of a step with so many tokens."""
        entries = delta_rule_workspaces(
            tokens,
            self.num_rows(shapes),
            self.slot_shape(shapes),
            dtype,
            diagonal=_is_diagonal(shapes[3]),
        )
        return [-(-each * dtype.itemsize // ALIGNMENT) * ALIGNMENT for each in entries]

    def workspace(self, shapes: Sequence[Shape], dtypes: Sequence[torch.dtype]) -> int:
        """What the chunks of a prompt invert, read and write, and the states before them."""
        return sum(self._scratch_sizes(self.most_tokens(shapes), shapes, dtypes[1]))

    def launch(self, call: Launch) -> None:
        """Launch `inplace.kernels.recurrence.delta_rule`."""
        query, key, value, decay, beta, state, slots, row_offsets = call.inputs[:8]
        tokens = call.shapes[2][0]
        inverses, reads, writes, _ = self._scratch_sizes(tokens, call.shapes, key.dtype)
        delta_rule(
            query=query,
            key=key,
            value=value,
            decay=decay,
            beta=beta,
            state=state,
            slots=slots,
            row_offsets=row_offsets,
            out=call.outputs[0],
            workspaces=(
                call.scratch(0, key.dtype),
                call.scratch(inverses, key.dtype),
                call.scratch(inverses + reads, key.dtype),
                call.scratch(inverses + reads + writes, key.dtype),
            ),
            tokens=tokens,
            rows=self.num_rows(call.shapes),
            shape=self.slot_shape(call.shapes),
            diagonal=_is_diagonal(call.shapes[3]),
        )


def _is_diagonal(decay: Shape) -> bool:
    return len(decay) == 3


@register
@dataclass(frozen=True, kw_only=True)
class LinearRecurrenceOperation(RecurrentOperation):
    """``inplace::linear_recurrence``.

    Inputs: decay, x; the state; slots, row_offsets; ``readers``.
    """

    name: ClassVar[str] = "InplaceLinearRecurrence"
    first_state: ClassVar[int] = 2
    values: ClassVar[int] = 1
    aliases: ClassVar[Mapping[int, int]] = {1: 2}

    def launch(self, call: Launch) -> None:
        """Launch `inplace.kernels.recurrence.linear_recurrence`."""
        decay, x, state, slots, row_offsets = call.inputs[:5]
        tokens, channels = call.shapes[1]
        linear_recurrence(
            decay=decay,
            x=x,
            state=state,
            slots=slots,
            row_offsets=row_offsets,
            out=call.outputs[0],
            tokens=tokens,
            rows=self.num_rows(call.shapes),
            channels=channels,
        )
