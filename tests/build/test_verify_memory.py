"""The memory check of verification: which bytes a step may write, and that any other is seen."""

import pytest
import torch
from inplace.schema.specs import Dtype, StateSpec, Update
from inplace_builder.compare import fill_with_sentinel, is_inexact, same_bits
from inplace_builder.served.verify import written_parts


def test_the_memory_check_allows_exactly_the_appended_positions() -> None:
    def allowed(spec: StateSpec, start: int, end: int) -> list[int]:
        old, new = torch.zeros(spec.shape), torch.ones(spec.shape)
        for part, now in written_parts(spec, old, new, start, end):
            part.copy_(now)
        assert (old == old[:1, :, :1]).all(), "whole positions"
        return [position for position in range(spec.shape[1]) if old[0, position, 0]]

    append = StateSpec(
        name="keys", shape=(2, 6, 3), dtype=Dtype.FLOAT32, update=Update.APPEND, axis=1
    )
    assert allowed(append, 2, 5) == [2, 3, 4]
    ring = StateSpec(name="keys", shape=(2, 6, 3), dtype=Dtype.FLOAT32, update=Update.RING, axis=1)
    assert allowed(ring, 10, 13) == [0, 4, 5]
    whole = StateSpec(name="cell", shape=(2, 6, 3), dtype=Dtype.FLOAT32, update=Update.REPLACE)
    assert allowed(whole, 2, 3) == [0, 1, 2, 3, 4, 5]


def test_the_memory_check_sees_one_flipped_bit_and_is_not_fooled_by_nan() -> None:
    memory = torch.empty(8)
    fill_with_sentinel(memory)
    assert same_bits(memory, memory.clone())
    other = memory.clone()
    other.view(torch.int32)[3] ^= 1
    assert other.isnan().all()
    assert not same_bits(memory, other)
    assert not same_bits(torch.zeros(2), torch.tensor([0.0, -0.0]))


@pytest.mark.parametrize("dtype", list(Dtype))
def test_every_type_of_state_has_a_sentinel(dtype: Dtype) -> None:
    memory = torch.zeros(4, dtype=dtype.as_torch)
    fill_with_sentinel(memory)
    assert (
        memory.isnan().all()
        if is_inexact(memory)
        else same_bits(memory, torch.full_like(memory, _largest(dtype)))
    )


def _largest(dtype: Dtype) -> int:
    return 0 if dtype is Dtype.BOOL else torch.iinfo(dtype.as_torch).max
