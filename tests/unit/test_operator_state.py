"""`inplace::read` and `inplace::update` read and write the right entries, bit for bit."""

import pytest
import torch
from inplace.operators import read, update
from support.attention_case import NAN, bits, indices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 4)])
def test_read_gathers_the_slots_into_new_memory_and_null_rows_are_zero(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    state = torch.randint(1, 2 if dtype is torch.bool else 100, (5, *shape)).to(dtype)
    if dtype.is_floating_point:
        state[[1, 2]] = NAN  # slots that are not read
    before = bits(state)
    out = read(state, indices(4, -1, 0, 4))
    assert torch.equal(out, torch.stack([state[4], torch.zeros_like(state[0]), state[0], state[4]]))
    assert out.dtype == dtype
    out.fill_(0)
    assert torch.equal(bits(state), before)
    with pytest.raises(IndexError, match="out of range"):
        read(state, indices(5))


def test_a_null_row_reads_zero_where_slot_zero_is_nan() -> None:
    assert torch.equal(read(torch.full((2, 3), NAN), indices(-1, -1)), torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.bool])
@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 4)])
def test_replace_writes_whole_slots_in_place(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    state = (
        torch.full((5, *shape), NAN).to(dtype)
        if dtype.is_floating_point
        else torch.ones((5, *shape), dtype=dtype)
    )
    value = torch.randint(0, 2, (3, *shape)).to(dtype)
    expected, address = state.clone(), state.data_ptr()
    expected[3], expected[1] = value[0], value[2]
    update(state, indices(3, -1, 1), value)
    assert torch.equal(bits(state), bits(expected))
    assert state.data_ptr() == address
    with pytest.raises(IndexError):
        update(state, indices(5, 0, 1), value)


APPENDED = {  # shape of a slot → the axis that grows, counted with the slot axis
    "vector": ((8,), 1),
    "first": ((8, 3), 1),
    "middle": ((2, 8, 3), 2),
    "last": ((2, 3, 8), 3),
    "four": ((2, 3, 8, 2), 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize(("shape", "axis"), APPENDED.values(), ids=APPENDED)
@pytest.mark.parametrize("ring", [False, True])
def test_a_packed_append_writes_each_rows_tokens_at_its_index(
    shape: tuple[int, ...], axis: int, dtype: torch.dtype, ring: bool
) -> None:
    rest = [extent for index, extent in enumerate(shape) if index != axis - 1]
    starts = [6, 13, 2, 0] if ring else [6, 3, 2, 0]
    counts = [2, 5, 1, 8]
    slots = [4, 1, -1, 2]
    state = (
        torch.full((5, *shape), NAN).to(dtype)
        if dtype.is_floating_point
        else torch.full((5, *shape), -7).to(dtype)
    )
    value = torch.randint(0, 100, (sum(counts), *rest)).to(dtype)
    expected, address = state.clone(), state.data_ptr()
    token = 0
    for slot, start, count in zip(slots, starts, counts, strict=True):
        for offset in range(count):
            if slot >= 0:
                expected[slot].select(axis - 1, (start + offset) % 8).copy_(value[token])
            token += 1
    update(
        state,
        indices(*slots),
        value,
        indices(0, 2, 7, 8, 16),
        indices(*starts),
        axis=axis,
        ring=ring,
    )
    assert torch.equal(bits(state), bits(expected))
    assert state.data_ptr() == address
    message = (
        "9 rows do not fit a ring of 8" if ring else "rows 0:9 are outside a slot that holds 8"
    )
    with pytest.raises(IndexError, match=message):
        update(state, indices(0), value[:9], indices(0, 9), indices(0), axis=axis, ring=ring)
    assert torch.equal(bits(state), bits(expected))


@pytest.mark.parametrize(("shape", "axis"), APPENDED.values(), ids=APPENDED)
@pytest.mark.parametrize("ring", [False, True])
def test_a_rectangular_append_writes_along_the_axis_of_the_value(
    shape: tuple[int, ...], axis: int, ring: bool
) -> None:
    starts = [7, 21, 0] if ring else [5, 2, 0]
    slots = [4, 1, -1]
    state = torch.full((5, *shape), NAN)
    value = torch.randn(
        3, *[3 if index == axis - 1 else extent for index, extent in enumerate(shape)]
    )
    expected, address = state.clone(), state.data_ptr()
    for row, (slot, start) in enumerate(zip(slots, starts, strict=True)):
        for offset in range(3):
            if slot >= 0:
                expected[slot].select(axis - 1, (start + offset) % 8).copy_(
                    value[row].select(axis - 1, offset)
                )
    update(state, indices(*slots), value, None, indices(*starts), axis=axis, ring=ring)
    assert torch.equal(bits(state), bits(expected))
    assert state.data_ptr() == address
    if not ring:
        with pytest.raises(IndexError, match="rows 6:9 are outside a slot that holds 8"):
            update(state, indices(0), value[:1], None, indices(6), axis=axis)
        assert torch.equal(bits(state), bits(expected))
