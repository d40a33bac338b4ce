"""``inplace::read``: the rows of some slots of a state."""

import torch
from torch import Tensor

from inplace.operators.library import LIBRARY, define

define("read", "(Tensor state, Tensor slots) -> Tensor")


_AS = {
    torch.uint16: torch.int16,
    torch.float8_e4m3fn: torch.int8,
    torch.float8_e5m2: torch.int8,
}
"""Types that PyTorch does not index, and those of the same size that it does."""


@torch.library.impl(LIBRARY, "read", "CompositeExplicitAutograd")
def _read(state: Tensor, slots: Tensor) -> Tensor:
    rows = state.view(_AS.get(state.dtype, state.dtype)).index_select(0, slots.clamp(min=0))
    null = (slots < 0).view(-1, *[1] * (state.dim() - 1))
    return rows.masked_fill_(null, 0).view(state.dtype)


@torch.library.register_fake("inplace::read", lib=LIBRARY)
def _read_fake(state: Tensor, slots: Tensor) -> Tensor:
    torch._check(slots.dim() == 1, lambda: f"slots must be [rows], got {tuple(slots.shape)}")
    return state.new_empty((slots.shape[0], *state.shape[1:]))


def read(state: Tensor, slots: Tensor) -> Tensor:
    """What the slots hold.

    Args:
        state: ``[slots, ...]``, any dtype.
        slots: ``[rows]``, int32 or int64; -1 is a null row, which reads as zeros.

    Returns:
        ``[rows, ...]``, the state's dtype; a new tensor of the rows' size (never of the arena's).
    """
    out = torch.ops.inplace.read(state, slots)
    assert isinstance(out, Tensor)
    return out
