"""``inplace::update`` and ``inplace::read``: write slots of a state in place, and read them.

`written_states` says which states the calls of a graph write, these and all others.
"""

import torch
from torch import Tensor

from inplace.operators.library import LIBRARY, NAMESPACE, define

define(
    "update",
    "(Tensor(a!) state, Tensor slots, Tensor value, Tensor? row_offsets=None, "
    "Tensor? write_indices=None, int axis=0, bool ring=False) -> ()",
)


@torch.library.impl(LIBRARY, "update", "CompositeExplicitAutograd")
def _update(
    state: Tensor,
    slots: Tensor,
    value: Tensor,
    row_offsets: Tensor | None = None,
    write_indices: Tensor | None = None,
    axis: int = 0,
    ring: bool = False,
) -> None:
    slot_list = slots.tolist()
    if write_indices is None:
        for row, slot in enumerate(slot_list):
            if slot >= 0:
                state[slot].copy_(value[row])
        return
    starts = write_indices.tolist()
    offsets = range(len(slot_list) + 1) if row_offsets is None else row_offsets.tolist()
    for row, (slot, start) in enumerate(zip(slot_list, starts, strict=True)):
        if slot < 0:
            continue
        # In packed values the tokens are the first axis; in the slot they are on `axis`.
        new = (
            value[row]
            if row_offsets is None
            else value[offsets[row] : offsets[row + 1]].movedim(0, axis - 1)
        )
        write(state[slot], new, start, axis - 1, ring=ring)


@torch.library.impl(LIBRARY, "update", "CUDA")
def _update_on_gpu(
    state: Tensor,
    slots: Tensor,
    value: Tensor,
    row_offsets: Tensor | None = None,
    write_indices: Tensor | None = None,
    axis: int = 0,
    ring: bool = False,
) -> None:
    """`update` in a Triton-language kernel, without a synchronisation with the host.

    Entries that do not fit a slot are therefore dropped, not refused.
    """
    from inplace.kernels import update as kernels  # imports Triton

    check_contiguous(state)
    spec = kernels.UpdateSpec.of(
        tuple(state.shape), axis, append=write_indices is not None, ring=ring
    )
    rows = slots.shape[0]
    packed = row_offsets is not None and write_indices is not None
    kernels.update(
        spec,
        state=state,
        slots=slots.int(),
        value=value.contiguous(),
        row_offsets=row_offsets.int() if packed and row_offsets is not None else None,
        write_indices=None if write_indices is None else write_indices.int(),
        rows=rows,
        units=value.shape[0]
        if packed
        else rows
        if write_indices is None
        else rows * value.shape[axis],
    )


def check_contiguous(state: Tensor, name: str = "the state") -> None:
    """ValueError if a state is not contiguous, which the kernels take it for."""
    if not state.is_contiguous():
        raise ValueError(f"{name} has strides {state.stride()}; it must be contiguous")


def write(slot: Tensor, new: Tensor, start: int, axis: int, *, ring: bool) -> None:
    """Copy ``new`` into ``slot`` from ``start`` along ``axis``; in a ring it wraps around.

    Raises:
        IndexError: the rows do not fit. The runtime checks this before a step; an operator never
            writes outside its slot.
    """
    capacity, count = slot.shape[axis], new.shape[axis]
    if (*new.shape[:axis], *new.shape[axis + 1 :]) != (*slot.shape[:axis], *slot.shape[axis + 1 :]):
        raise IndexError(
            f"rows of shape {tuple(new.shape)} and their slot of shape {tuple(slot.shape)} differ "
            f"in more than axis {axis}"
        )
    if ring:
        if count > capacity:
            raise IndexError(f"{count} rows do not fit a ring of {capacity}")
        start %= capacity
        head = min(count, capacity - start)
        slot.narrow(axis, start, head).copy_(new.narrow(axis, 0, head))
        if head < count:
            slot.narrow(axis, 0, count - head).copy_(new.narrow(axis, head, count - head))
        return
    if start < 0 or start + count > capacity:
        raise IndexError(f"rows {start}:{start + count} are outside a slot that holds {capacity}")
    slot.narrow(axis, start, count).copy_(new)


@torch.library.register_fake("inplace::update", lib=LIBRARY)
def _update_fake(
    state: Tensor,
    slots: Tensor,
    value: Tensor,
    row_offsets: Tensor | None = None,
    write_indices: Tensor | None = None,
    axis: int = 0,
    ring: bool = False,
) -> None:
    torch._check(
        value.dtype == state.dtype, lambda: f"value is {value.dtype}, the state is {state.dtype}"
    )
    if write_indices is not None:
        torch._check(
            1 <= axis < state.dim(),
            lambda: f"axis {axis} is not an axis of a slot of {tuple(state.shape)}",
        )
    else:
        torch._check(
            tuple(value.shape[1:]) == tuple(state.shape[1:]),
            lambda: (
                f"value {tuple(value.shape)} must be [rows, ...] with the extents of the state "
                f"{tuple(state.shape)}"
            ),
        )


def update(
    state: Tensor,
    slots: Tensor,
    value: Tensor,
    row_offsets: Tensor | None = None,
    write_indices: Tensor | None = None,
    *,
    axis: int = 0,
    ring: bool = False,
) -> None:
    """Write the rows of these slots, in place.

    Args:
        state: ``[slots, ...]``, mutated.
        slots: ``[rows]``, int32 or int64; a row with slot -1 writes nothing.
        value: without ``write_indices``: ``[rows, ...]``, the whole of each slot. With
            ``write_indices``: what to append, ``[rows, ...]`` with the new entries on ``axis``.
            With ``row_offsets`` too: packed, ``[tokens, ...]``, the token axis first in place of
            ``axis``.
        row_offsets: ``[rows + 1]``: row r owns ``value[row_offsets[r]:row_offsets[r + 1]]``.
        write_indices: ``[rows]``: where each row's append starts.
        axis: the state's axis, counted with the slot axis, that an append is along.
        ring: write modulo the extent of ``axis``.

    Raises:
        IndexError: an append does not fit its slot. Only on the CPU: on a GPU, where the host does
            not read the indices, entries beyond the slot are dropped.
    """
    torch.ops.inplace.update(state, slots, value, row_offsets, write_indices, axis, ring)


define("read", "(Tensor state, Tensor slots) -> Tensor")


_INDEXABLE_DTYPES = {
    torch.uint16: torch.int16,
    torch.float8_e4m3fn: torch.int8,
    torch.float8_e5m2: torch.int8,
}
"""For each type that PyTorch cannot index, one of the same size that it can."""


def indexable(tensor: Tensor) -> Tensor:
    """The same memory in a type that PyTorch can index."""
    return tensor.view(_INDEXABLE_DTYPES.get(tensor.dtype, tensor.dtype))


@torch.library.impl(LIBRARY, "read", "CompositeExplicitAutograd")
def _read(state: Tensor, slots: Tensor) -> Tensor:
    rows = indexable(state).index_select(0, slots.clamp(min=0))
    null = (slots < 0).view(-1, *[1] * (state.dim() - 1))
    return rows.masked_fill_(null, 0).view(state.dtype)


@torch.library.register_fake("inplace::read", lib=LIBRARY)
def _read_fake(state: Tensor, slots: Tensor) -> Tensor:
    torch._check(slots.dim() == 1, lambda: f"slots must be [rows], got {tuple(slots.shape)}")
    return state.new_empty((slots.shape[0], *state.shape[1:]))


def read(state: Tensor, slots: Tensor) -> Tensor:
    """Read the rows of these slots.

    Args:
        state: ``[slots, ...]``, any dtype.
        slots: ``[rows]``, int32 or int64; a row with slot -1 reads as zeros.

    Returns:
        ``[rows, ...]``, the state's dtype, in new memory.
    """
    out = torch.ops.inplace.read(state, slots)
    assert isinstance(out, Tensor)
    return out


VIEWS = frozenset(
    {torch.ops.aten.select.int, torch.ops.aten.narrow.default, torch.ops.aten.slice.Tensor}
)
"""Operators whose result is a view of their first argument.

Through them a graph passes a state to a user's operator.
"""


def written_arguments(node: torch.fx.Node) -> list[torch.fx.Node]:
    """The nodes that a call mutates, by its operator's alias annotations."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return []
    arguments = node.target._schema.arguments
    passed = (
        dict(zip((argument.name for argument in arguments), node.args, strict=False)) | node.kwargs
    )
    mutated = [
        passed.get(argument.name)
        for argument in arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [argument for argument in mutated if isinstance(argument, torch.fx.Node)]


def written_states(graph: torch.fx.Graph, *, include_inplace: bool = True) -> tuple[str, ...]:
    """Names of the placeholders that some operator of the graph mutates, in placeholder order.

    They are read from the graph: the operators' alias annotations and their arguments.

    Args:
        graph: of the training IR.
        include_inplace: False leaves out what only ``inplace::`` operators mutate.
    """
    written: set[str] = set()
    for node in graph.nodes:
        is_inplace = (
            isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == NAMESPACE
        )
        if is_inplace and not include_inplace:
            continue
        for argument in written_arguments(node):
            while argument.target in VIEWS and isinstance(argument.args[0], torch.fx.Node):
                argument = argument.args[0]
            written.add(argument.name)
    return tuple(
        node.name for node in graph.nodes if node.op == "placeholder" and node.name in written
    )
