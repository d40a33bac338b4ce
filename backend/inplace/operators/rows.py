"""The rows of a step, for operators whose states have a fixed size.

Row r of a step owns the packed tokens ``row_offsets[r]:row_offsets[r + 1]`` and continues from the
state of its slot.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Recurrence = Callable[[Sequence[Tensor], Tensor], tuple[Tensor, Tensor]]
"""From float32 inputs ``[rows, tokens, ...]`` and states ``[rows, ...]`` to outputs
``[rows, tokens, ...]`` and the states after the last token."""


def check_rows(inputs: Sequence[Tensor], slots: Tensor, row_offsets: Tensor) -> None:
    """Check the sizes of what is packed, before a kernel is handed addresses.

    Raises:
        RuntimeError: the inputs differ in their tokens, or there is not one offset more than slots.
    """
    tokens = [each.shape[0] for each in inputs]
    torch._check(
        all(count == tokens[0] for count in tokens),
        lambda: f"the packed inputs have {tokens} tokens; they must have the same number",
    )
    torch._check(
        slots.dim() == row_offsets.dim() == 1 and row_offsets.shape[0] == slots.shape[0] + 1,
        lambda: (
            f"slots must be [rows] and row_offsets [rows + 1], not {list(slots.shape)} and "
            f"{list(row_offsets.shape)}"
        ),
    )


def by_rows(
    recurrence: Recurrence,
    inputs: Sequence[Tensor],
    out: Tensor,
    state: Tensor,
    slots: Tensor,
    row_offsets: Tensor,
) -> Tensor:
    """Run a recurrence over the rows of a step, and update the states of their slots.

    Args:
        recurrence: what to run.
        inputs: ``[tokens, ...]`` each.
        out: zeros ``[tokens, ...]``, filled where a row has a slot.
        state: ``[slots, ...]``, mutated.
        slots, row_offsets: the rows.

    Returns:
        ``out``.
    """
    offsets, slot_list = row_offsets.tolist(), slots.tolist()
    rows = len(slot_list)
    if offsets == list(range(rows + 1)) and min(slot_list, default=-1) >= 0:
        # One token a row: one call for all rows. Calls are what a small step costs.
        tokens = [each[:rows, None].float() for each in inputs]
        result, new_state = recurrence(tokens, state[slots].float())
        out[:rows] = result[:, 0].to(out.dtype)
        state[slots] = new_state.to(state.dtype)
        return out
    for row, slot in enumerate(slot_list):
        first, end = offsets[row], offsets[row + 1]
        if slot < 0 or first == end:
            continue
        tokens = [each[None, first:end].float() for each in inputs]
        result, new_state = recurrence(tokens, state[slot, None].float())
        out[first:end] = result[0].to(out.dtype)
        state[slot].copy_(new_state[0])
    return out
