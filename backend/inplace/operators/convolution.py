"""``inplace::causal_conv1d``: a depthwise convolution over each row's own past tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from inplace.operators.library import LIBRARY, define

define(
    "causal_conv1d",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) state, Tensor slots, Tensor row_offsets, "
    "*, bool silu=False) -> Tensor",
)


@torch.library.impl(LIBRARY, "causal_conv1d", "CompositeExplicitAutograd")
def _causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    slots: Tensor,
    row_offsets: Tensor,
    *,
    silu: bool = False,
) -> Tensor:
    _check_shapes(x, weight, bias, state)
    offsets, slot_list = row_offsets.tolist(), slots.tolist()
    out = torch.zeros_like(x, dtype=weight.dtype, memory_format=torch.contiguous_format)
    if offsets == list(range(len(slot_list) + 1)) and min(slot_list, default=-1) >= 0:
        # One token a row: one product for all rows. Calls are what a small step costs.
        window = torch.cat([state[slots], x[: len(slot_list), None]], 1)
        state[slots] = window[:, 1:]
        sums = torch.einsum("rkc,ck->rc", window.float(), weight.float())
        out[: len(slot_list)] = sums if bias is None else sums + bias.float()
    else:
        for row, slot in enumerate(slot_list):
            first, end = offsets[row], offsets[row + 1]
            if slot < 0 or first == end:
                continue
            window = torch.cat([state[slot], x[first:end]])
            state[slot].copy_(window[end - first :])
            out[first:end] = F.conv1d(
                window.T[None].to(weight.dtype), weight[:, None], bias, groups=len(weight)
            )[0].T
    return (F.silu(out) if silu else out).to(x.dtype)


@torch.library.impl(LIBRARY, "causal_conv1d", "CUDA")
def _causal_conv1d_on_gpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    slots: Tensor,
    row_offsets: Tensor,
    *,
    silu: bool = False,
) -> Tensor:
    """`causal_conv1d` in Triton-language kernels, without a synchronisation with the host."""
    from inplace.kernels import recurrence as kernels  # imports Triton

    _check_shapes(x, weight, bias, state)
    check_contiguous(state)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    kernels.causal_conv1d(
        x=x.contiguous(),
        weight=weight.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        state=state,
        slots=slots.int(),
        row_offsets=row_offsets.int(),
        out=out,
        tokens=x.shape[0],
        rows=slots.shape[0],
        channels=weight.shape[0],
        width=weight.shape[1],
        silu=silu,
    )
    return out


def check_contiguous(state: Tensor) -> None:
    """ValueError if a state is not contiguous, which the kernels take it for."""
    if not state.is_contiguous():
        raise ValueError(f"the state has strides {state.stride()}; it must be contiguous")


def _check_shapes(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> None:
    """Raise if tensors do not fit each other, before a kernel is handed their addresses.

    Raises:
        RuntimeError: the number of axes, the channels, the kernel's width or a type differ.
    """
    if x.dim() != 2 or weight.dim() != 2 or state.dim() != 3:
        raise RuntimeError(
            "x must be [tokens, channels], weight [channels, width], "
            "state [slots, width - 1, channels]"
        )
    channels, width = weight.shape
    if x.shape[1] != channels or tuple(state.shape[1:]) != (width - 1, channels):
        raise RuntimeError(
            f"weight is {[channels, width]}, so x must be [tokens, {channels}] and state "
            f"[slots, {width - 1}, {channels}], not {list(x.shape)} and {list(state.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (channels,):
        raise RuntimeError(f"bias must be [{channels}], not {list(bias.shape)}")
    if x.dtype != state.dtype:
        raise RuntimeError(f"x is {x.dtype}, the state is {state.dtype}; they must be the same")


@torch.library.register_fake("inplace::causal_conv1d", lib=LIBRARY)
def _causal_conv1d_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    slots: Tensor,
    row_offsets: Tensor,
    *,
    silu: bool = False,
) -> Tensor:
    _check_shapes(x, weight, bias, state)
    return x.new_empty(x.shape)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    slots: Tensor,
    row_offsets: Tensor,
    *,
    silu: bool = False,
) -> Tensor:
    """Convolve each channel over its own last tokens, of earlier steps too.

    ``out[t, c] = bias[c] + sum over k of weight[c, k] * input[t - width + 1 + k, c]``. Row r owns
    the packed tokens ``row_offsets[r]:row_offsets[r + 1]``; tokens before them are its slot's.

    Args:
        x: ``[tokens, channels]``.
        weight: ``[channels, width]``, width at least 2.
        bias: ``[channels]``, or None.
        state: ``[slots, width - 1, channels]``, x's dtype, mutated: the last inputs of each
            sequence, the newest last. Zeros are the past of a new sequence.
        slots: ``[rows]``, int32 or int64; a row with slot -1 writes nothing and its output is 0.
        row_offsets: ``[rows + 1]``.
        silu: apply SiLU to the result.

    Returns:
        ``[tokens, channels]``, x's dtype.
    """
    out = torch.ops.inplace.causal_conv1d(x, weight, bias, state, slots, row_offsets, silu=silu)
    assert isinstance(out, Tensor)
    return out
