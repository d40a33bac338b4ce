"""Quantize and pack weights as AutoGPTQ and AutoAWQ publish them, word by word, in NumPy.

It shares nothing with the reader: integers are written with loops over the places of a word, as the
two packages' own ``pack`` methods describe them.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

AWQ_PLACES = [0, 2, 4, 6, 1, 3, 5, 7]
"""AutoAWQ: the column, of eight, whose four bits are at place i of the word."""


def quantize(
    weight: Tensor, group: Tensor, bits: int, *, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantize ``[out, in]`` in groups of inputs.

    Returns:
        Integers ``[in, out]``, zero points ``[groups, out]``, scales ``[groups, out]`` float16, and
        the ``[out, in]`` weight that they stand for.
    """
    largest = (1 << bits) - 1
    groups = int(group.max()) + 1
    integers = torch.zeros(weight.shape[1], weight.shape[0], dtype=torch.int64)
    zeros = torch.zeros(groups, weight.shape[0], dtype=torch.int64)
    scales = torch.zeros(groups, weight.shape[0], dtype=torch.float16)
    whole = torch.zeros_like(weight)
    for index in range(groups):
        inputs = (group == index).nonzero()[:, 0]
        part = weight[:, inputs]
        low, high = part.min(1).values.clamp(max=0), part.max(1).values.clamp(min=0)
        if symmetric:
            high = torch.maximum(high, -low)
            low = -high
        scale = ((high - low) / largest).clamp(min=1e-4).half()
        middle = torch.full_like(scale, (largest + 1) // 2)
        zero = middle if symmetric else (-low / scale.float()).round().half()
        found = (part / scale.float()[:, None]).round() + zero.float()[:, None]
        found = found.clamp(0, largest)
        integers[inputs] = found.t().long()
        zeros[index], scales[index] = zero.long(), scale
        whole[:, inputs] = scale.float()[:, None] * (found - zero.float()[:, None])
    return integers, zeros, scales, whole


def _stream(column: NDArray[np.int64], bits: int) -> list[int]:
    """Integers of one column in words: AutoGPTQ's loop, in which those of 3 bits cross words."""
    words: list[int] = []
    if bits != 3:
        for first in range(0, len(column), 32 // bits):
            word = 0
            for place, value in enumerate(column[first : first + 32 // bits]):
                word |= int(value) << (bits * place)
            words.append(word)
        return words
    for first in range(0, len(column), 32):
        value = [int(each) for each in column[first : first + 32]]
        one = sum(value[i] << (3 * i) for i in range(10)) | (value[10] & 0b11) << 30
        two = value[10] >> 2 | sum(value[11 + i] << (3 * i + 1) for i in range(10))
        two |= (value[21] & 0b1) << 31
        three = value[21] >> 1 | sum(value[22 + i] << (3 * i + 2) for i in range(10))
        words += [one, two, three]
    return words


def _int32(words: object) -> Tensor:
    return torch.from_numpy(np.array(words, dtype=np.uint32).view(np.int32).copy())


def pack_gptq(
    integers: Tensor, zeros: Tensor, scales: Tensor, group: Tensor, bits: int, *, v2: bool
) -> dict[str, Tensor]:
    """The tensors of a layer in AutoGPTQ's layout; ``v2`` stores zero points as they are."""
    stored = zeros if v2 else (zeros - 1) % (1 << bits)
    return {
        "qweight": _int32([_stream(column, bits) for column in integers.numpy().T]).t(),
        "qzeros": _int32([_stream(row, bits) for row in stored.numpy()]),
        "scales": scales,
        "g_idx": group.int(),
    }


def pack_awq(integers: Tensor, zeros: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """The tensors of a layer in AutoAWQ's gemm layout."""

    def packed(rows: Tensor) -> Tensor:
        lines = []
        for row in rows.numpy():
            line = []
            for first in range(0, len(row), 8):
                word = 0
                for place, column in enumerate(AWQ_PLACES):
                    word |= int(row[first + column]) << (4 * place)
                line.append(word)
            lines.append(line)
        return _int32(lines)

    return {"qweight": packed(integers), "qzeros": packed(zeros), "scales": scales}


def groups_of(inputs: int, size: int, *, act_order: bool = False) -> Tensor:
    """The group of each input: consecutive ones, or, as ``desc_act`` leaves them, in any order."""
    size = inputs if size == -1 else size
    order = torch.arange(inputs)
    if act_order:
        order = torch.randperm(inputs, generator=torch.Generator().manual_seed(1))
    return order // size


def contiguous(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same, as safetensors takes them."""
    return {name: part.contiguous() for name, part in parts.items()}
