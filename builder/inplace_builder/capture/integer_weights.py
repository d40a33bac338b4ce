"""GPTQ and AWQ checkpoints: integers of a few bits, packed into 32-bit words, and their scales.

Both hold for a linear layer ``weight [out, in]`` the tensors ``qweight``, ``qzeros`` and
``scales``, transposed, and cut the inputs into groups: with the group ``g`` of input ``i``,
``weight[o, i] = scales[g, o] * (q[i, o] - zeros[g, o])`` (arXiv:2210.17323, arXiv:2306.00978).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PARTS = ("qweight", "qzeros", "scales", "g_idx")
"""Tensors of a quantized layer in the place of ``weight``; ``g_idx`` may be absent."""


GPTQ_BITS = (2, 3, 4, 8)
WORD = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight columns is in each place of a word of AWQ's gemm layout, lowest bits first."""


@dataclass(frozen=True)
class IntegerFormat:
    """How a checkpoint packs its weights.

    Attributes:
        method: ``gptq`` or ``awq``.
        bits: of an integer.
        group_size: inputs that share a scale; None if all do.
        zero_offset: what is added to a stored zero point.
        varies: layers may have numbers of bits or groups of their own.
    """

    method: str
    bits: int
    group_size: int | None
    zero_offset: int = 0
    varies: bool = False

    def __str__(self) -> str:
        groups = "" if self.group_size is None else f", groups of {self.group_size}"
        return f"{self.method} weights ({self.bits} bits{groups})"


def integer_format(method: str, fields: Mapping[str, Any]) -> IntegerFormat | str:
    """The format that a configuration states, or why it is not one that can be read.

    Args:
        method: ``gptq`` or ``awq``.
        fields: ``quantization_config`` of the model's ``config.json``.
    """
    bits = fields.get("bits", fields.get("w_bit", 4))
    group = fields.get("group_size", fields.get("q_group_size", 128))
    if not isinstance(group, int) or isinstance(group, bool) or (group < 1 and group != -1):
        return f"its group_size is {group!r}, expected a number of inputs, or -1 for all"
    group_size = None if group == -1 else group
    if method == "gptq":
        return _gptq_format(bits, group_size, fields)
    version = str(fields.get("version") or "gemm").lower()
    if version != "gemm" or str(fields.get("backend") or "autoawq").lower() == "llm-awq":
        named = "of llm-awq" if version == "gemm" else repr(version)
        return f"its layout is {named}, only 'gemm' is read"
    if bits != 4:
        return f"it has {bits} bits, only 4 are read"
    return IntegerFormat(method, bits, group_size)


def _gptq_format(
    bits: Any, group_size: int | None, fields: Mapping[str, Any]
) -> IntegerFormat | str:
    layout = str(fields.get("checkpoint_format") or "gptq")
    if fields.get("is_marlin_format"):
        layout = "marlin"
    if layout not in ("gptq", "gptq_v2"):
        return f"its checkpoint_format is {layout!r}, only gptq and gptq_v2 are read"
    if bits not in GPTQ_BITS:
        return f"it has {bits} bits, only {GPTQ_BITS} are read"
    # the first version stores zero points less one
    offset = 1 if layout == "gptq" else 0
    return IntegerFormat("gptq", bits, group_size, offset, bool(fields.get("dynamic")))


def quantized_layers(stored: Mapping[str, Tensor]) -> list[str]:
    """The names of the layers that a checkpoint holds as packed integers."""
    return [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]


def read_layer(layer: str, stored: Mapping[str, Tensor], form: IntegerFormat) -> Tensor:
    """The weight of a layer.

    Args:
        layer: its name.
        stored: the tensors of the checkpoint.
        form: how they are packed.

    Returns:
        ``[out, in]`` float32.

    Raises:
        ValueError: a part is missing, or does not fit.
    """
    if missing := [part for part in PARTS[:3] if f"{layer}.{part}" not in stored]:
        raise ValueError(f"there is no {layer}.{missing[0]}")
    qweight, qzeros, scales = (stored[f"{layer}.{part}"] for part in PARTS[:3])
    if form.method == "awq":
        return dequantize_awq(qweight, qzeros, scales, form=form)
    return dequantize_gptq(qweight, qzeros, scales, stored.get(f"{layer}.g_idx"), form=form)


def dequantize_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    *,
    form: IntegerFormat,
) -> Tensor:
    """A weight in GPTQ's layout (AutoGPTQ, GPTQModel, transformers).

    Integers lie one behind the other, lowest bits first; those of 3 bits cross words. A zero point
    that was stored less one wraps around: all ones are 0.

    Args:
        qweight: ``[in * bits / 32, out]`` int32, packed along the inputs.
        qzeros: ``[groups, out * bits / 32]`` int32, packed along the outputs.
        scales: ``[groups, out]``.
        g_idx: ``[in]`` the group of each input: in any order where ``desc_act`` was on. None:
            groups of consecutive inputs.
        form: bits, the inputs of a group, what is added to zero points.

    Returns:
        ``[out, in]`` float32.

    Raises:
        ValueError: the tensors do not fit together.
    """
    groups, outputs = _extents(scales)
    bits = form.bits
    if form.varies and qzeros.ndim == 2 and outputs:
        bits = qzeros.shape[1] * WORD // outputs
    if bits not in GPTQ_BITS or qweight.ndim != 2 or qweight.shape[0] * WORD % bits:
        raise ValueError(f"qweight {tuple(qweight.shape)} does not hold integers of {bits} bits")
    inputs = qweight.shape[0] * WORD // bits
    if qweight.shape[1] != outputs or tuple(qzeros.shape) != (groups, outputs * bits // WORD):
        raise _misfit(qweight, qzeros, scales, bits)
    if g_idx is None:
        g_idx = _consecutive(inputs, groups, form.group_size)
    if g_idx.shape != (inputs,) or not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups:
        raise ValueError(
            f"g_idx {tuple(g_idx.shape)} does not name one of {groups} groups for each of {inputs} "
            f"inputs"
        )
    weights = unpack(qweight.t(), bits).t()  # [in, out]
    zeros = (unpack(qzeros, bits) + form.zero_offset) & ((1 << bits) - 1)
    return _scale(weights, zeros, scales, g_idx.long())


def dequantize_awq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    *,
    form: IntegerFormat,
) -> Tensor:
    """A weight in AWQ's gemm layout (AutoAWQ): eight outputs a word, in `AWQ_ORDER`.

    Args:
        qweight: ``[in, out / 8]`` int32.
        qzeros: ``[groups, out / 8]`` int32.
        scales: ``[groups, out]``.
        form: the inputs of a group.

    Returns:
        ``[out, in]`` float32.

    Raises:
        ValueError: the tensors do not fit together.
    """
    groups, outputs = _extents(scales)
    words = outputs * form.bits // WORD
    fits = qweight.ndim == 2 and qweight.shape[1] == words and outputs % len(AWQ_ORDER) == 0
    if not fits or tuple(qzeros.shape) != (groups, words):
        raise _misfit(qweight, qzeros, scales, form.bits)
    g_idx = _consecutive(qweight.shape[0], groups, form.group_size)
    weights, zeros = (_reordered(unpack(part, form.bits)) for part in (qweight, qzeros))
    return _scale(weights, zeros, scales, g_idx)


def unpack(words: Tensor, bits: int) -> Tensor:
    """The unsigned integers in rows of 32-bit words, lowest bits first.

    Args:
        words: ``[rows, n]`` int32.
        bits: of an integer; they may cross words.

    Returns:
        ``[rows, n * 32 / bits]`` int32.
    """
    count = words.shape[1] * WORD // bits
    first = torch.arange(count) * bits
    place, shift = first // WORD, first % WORD
    unsigned = words.long() & 0xFFFFFFFF
    found = unsigned[:, place] >> shift
    crosses = shift + bits > WORD
    if bool(crosses.any()):
        following = unsigned[:, (place + 1).clamp(max=words.shape[1] - 1)]
        found |= torch.where(crosses, following << (WORD - shift), 0)
    return (found & ((1 << bits) - 1)).int()


def _reordered(columns: Tensor) -> Tensor:
    """Columns in their own order, from that in which AWQ packs eight of them."""
    order = torch.tensor(AWQ_ORDER).argsort()
    words = columns.reshape(columns.shape[0], -1, len(AWQ_ORDER))
    return words[:, :, order].reshape(columns.shape)


def _scale(weights: Tensor, zeros: Tensor, scales: Tensor, group: Tensor) -> Tensor:
    """``scales * (weights - zeros)``, transposed to ``[out, in]``."""
    return ((weights - zeros[group]).float() * scales.float()[group]).t().contiguous()


def _extents(scales: Tensor) -> tuple[int, int]:
    if scales.ndim != 2 or 0 in scales.shape:
        raise ValueError(f"scales {tuple(scales.shape)}, expected one of each group and output")
    return scales.shape[0], scales.shape[1]


def _consecutive(inputs: int, groups: int, group_size: int | None) -> Tensor:
    """The group of each input, where groups are consecutive."""
    size = group_size or inputs
    if -(-inputs // size) != groups:
        raise ValueError(f"{groups} groups of {size} do not have {inputs} inputs")
    return torch.arange(inputs) // size


def _misfit(qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int) -> ValueError:
    shapes = ", ".join(
        f"{name} {tuple(part.shape)}"
        for name, part in (("qweight", qweight), ("qzeros", qzeros), ("scales", scales))
    )
    return ValueError(f"{shapes} do not fit together with {bits} bits")
