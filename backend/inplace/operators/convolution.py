"""``inplace::causal_conv1d``: a depthwise convolution over each row's own past tokens."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from inplace.operators.library import LIBRARY, define
from inplace.operators.rows import by_rows, check_rows
from inplace.operators.state import check_contiguous

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
    out = _empty_result(x, weight, bias, state, slots, row_offsets, silu=silu).zero_()
    weights = weight.float()

    def convolve(inputs: Sequence[Tensor], states: Tensor) -> tuple[Tensor, Tensor]:
        tokens = inputs[0].shape[1]
        window = torch.cat([states, inputs[0]], 1)
        if tokens == 1:
            sums = torch.einsum("rkc,ck->rc", window, weights)[:, None]
        else:
            sums = F.conv1d(window.mT, weights[:, None], groups=len(weights)).mT
        sums = sums if bias is None else sums + bias.float()
        return F.silu(sums) if silu else sums, window[:, tokens:]

    return by_rows(convolve, (x,), out, state, slots, row_offsets)


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

    out = _empty_result(x, weight, bias, state, slots, row_offsets, silu=silu)
    check_contiguous(state)
    if not slots.shape[0]:
        return out.zero_()
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


def _empty_result(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    slots: Tensor,
    row_offsets: Tensor,
    *,
    silu: bool = False,
) -> Tensor:
    """Memory for the result.

    Raises:
        RuntimeError: the arguments do not fit.
    """
    torch._check(
        x.dim() == 2 and weight.dim() == 2 and state.dim() == 3,
        lambda: (
            "x must be [tokens, channels], weight [channels, width], "
            "state [slots, width - 1, channels]"
        ),
    )
    channels, width = weight.shape
    torch._check(width >= 2, lambda: f"weight is {[channels, width]}; its width must be at least 2")
    torch._check(
        x.shape[1] == channels and tuple(state.shape[1:]) == (width - 1, channels),
        lambda: (
            f"weight is {[channels, width]}, so x must be [tokens, {channels}] and state "
            f"[slots, {width - 1}, {channels}], not {list(x.shape)} and {list(state.shape)}"
        ),
    )
    torch._check(
        bias is None or tuple(bias.shape) == (channels,),
        lambda: f"bias must be [{channels}], not {None if bias is None else list(bias.shape)}",
    )
    torch._check(
        x.dtype == state.dtype,
        lambda: f"x is {x.dtype}, the state is {state.dtype}; they must be the same",
    )
    check_rows((x,), slots, row_offsets)
    return x.new_empty(x.shape)


torch.library.register_fake("inplace::causal_conv1d", _empty_result, lib=LIBRARY)


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
    """Convolve each channel over its own last tokens, of earlier steps too, in float32.

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
