"""The inputs of one captured size: side by side in one pinned buffer and one device buffer, so that a step uploads them with one copy."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inplace.engines.tensorrt.contexts import Size
from inplace.schema.served import Program
from inplace.schema.specs import Role, TensorSpec

ALIGNMENT = 256
"""Bytes; TensorRT wants every binding at a multiple."""


def input_shape(spec: TensorSpec, size: Size) -> tuple[int, ...]:
    """The shape of an input in a step of this size."""
    match spec.role:
        case Role.TOKENS:
            return (size.tokens, *spec.shape[1:])
        case Role.POSITIONS:
            return (size.tokens,)
        case Role.ROW_OFFSETS:
            return (size.rows + 1,)
        case _:
            return (size.rows, *spec.shape)


class Block:
    """One size's inputs on the host and on the device.

    Args:
        program: whose inputs.
        size: the size.
        device: where they go.

    Attributes:
        tensors: the device tensors by name; their addresses never change.
    """

    def __init__(self, program: Program, size: Size, device: torch.device) -> None:
        self._program, self._size = program, size
        offsets, end = [], 0
        for spec in program.inputs:
            offsets.append(end)
            count = torch.Size(input_shape(spec, size)).numel() * spec.dtype.as_torch.itemsize
            end += -(-max(count, 1) // ALIGNMENT) * ALIGNMENT
        self._pinned = torch.zeros(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.zeros(end, dtype=torch.uint8, device=device)
        self._host = self._views(self._pinned, offsets)
        # the same memory for numpy, which keeps the interpreter while it copies: a step must not wait for it once for each input
        self._arrays = {
            name: view.numpy()
            for name, view in self._host.items()
            if view.dtype is not torch.bfloat16
        }
        self._filled: Mapping[str, Tensor] = {}
        self.tensors: Mapping[str, Tensor] = self._views(self._device, offsets)
        self.fill({})

    def _views(self, memory: Tensor, offsets: list[int]) -> dict[str, Tensor]:
        found = {}
        for spec, offset in zip(self._program.inputs, offsets, strict=True):
            shape, dtype = input_shape(spec, self._size), spec.dtype.as_torch
            count = torch.Size(shape).numel() * dtype.itemsize
            found[spec.name] = memory[offset : offset + count].view(dtype).view(shape)
        return found

    def fill(self, inputs: Mapping[str, Tensor]) -> None:
        """Write a step's inputs into the pinned buffer and pad them with null rows. Inputs that are not given are padding throughout.

        A tensor that the step before had too is not written again: nobody changes one that was handed over.
        """
        before, self._filled = self._filled, {}
        for spec in self._program.inputs:
            target, source = self._arrays.get(spec.name), inputs.get(spec.name)
            if source is not None and source is before.get(spec.name):
                continue  # it is there since the last step
            if target is None:
                self._fill_slowly(spec, source)
                continue
            count = 0 if source is None else source.shape[0]
            if source is not None:
                target[:count] = source.numpy()
            if count < len(target):
                target[count:] = self._padding(
                    spec,
                    0
                    if source is None
                    else int(source[-1])
                    if spec.role is Role.ROW_OFFSETS
                    else 0,
                )
                if spec.role is Role.ROW_OFFSETS:
                    self._pad_offsets(target, count)
        self._filled = inputs

    def _fill_slowly(self, spec: TensorSpec, source: Tensor | None) -> None:
        """An input of a type that numpy does not know."""
        target, count = self._host[spec.name], 0 if source is None else source.shape[0]
        if source is not None:
            target[:count].copy_(source)
        target[count:].fill_(self._padding(spec, 0))

    def _padding(self, spec: TensorSpec, last: int) -> int:
        if spec.role is Role.SLOTS:
            return -1
        if spec.role is Role.ROW_OFFSETS:
            return last
        return (
            spec.minimum
            if spec.role in (Role.TOKENS, Role.ROW)
            and spec.minimum is not None
            and spec.minimum > 0
            else 0
        )

    def _pad_offsets(self, offsets: NDArray[Any], count: int) -> None:
        """Null rows of a decode step own a token each; in a mixed step the last one owns all that pad it."""
        if self._size.decode:
            start = max(count, 0)
            offsets[start:] = np.arange(start, len(offsets))
        else:
            offsets[-1] = self._size.tokens

    def upload(self) -> None:
        """Copy the pinned buffer to the device, on the current stream."""
        self._device.copy_(self._pinned, non_blocking=True)
