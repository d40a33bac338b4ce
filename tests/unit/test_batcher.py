"""How many tokens of each row a step computes."""

import pytest
import torch
from inplace.runtime.batcher import ActiveRequest, form_batch, schedule_tokens
from inplace.runtime.requests import Request
from inplace.runtime.slots import SequenceState
from inplace.schema.programs import Program
from inplace.schema.specs import Dtype, Role, TensorSpec
from pydantic import ValidationError


def program(max_rows: int, chunk: int, max_tokens: int | None = None) -> Program:
    ids = TensorSpec(name="ids", role=Role.TOKENS, dtype="int64", shape=(-1,))  # type: ignore[arg-type]
    return Program(
        name="step",
        row_layout="packed",
        inputs=(ids,),
        outputs=(),
        aliases=(),
        max_rows=max_rows,
        chunk=chunk,
        max_tokens=max_tokens,
    )


@pytest.mark.parametrize(
    ("waiting", "chunk", "budget", "counts"),
    [
        ([5, 1, 9], 8, 24, [5, 1, 8]),
        ([5, 1, 9], 8, 8, [5, 1, 2]),
        ([9, 9, 9], 8, 8, [6, 1, 1]),
        ([1, 1, 1], 8, 3, [1, 1, 1]),
        ([100], 8, 4, [4]),
    ],
)
def test_every_row_advances_within_the_token_budget(
    waiting: list[int], chunk: int, budget: int, counts: list[int]
) -> None:
    assert schedule_tokens(waiting, chunk, budget) == counts
    assert sum(counts) <= budget


def test_the_valid_length_of_a_row_is_its_number_of_tokens_in_the_step() -> None:
    lengths = TensorSpec(name="lengths", role=Role.VALID_LENGTHS, dtype=Dtype.INT32)
    packed = program(4, 8)
    packed = packed.model_copy(update={"inputs": (*packed.inputs, lengths)})

    def step(*counts: int) -> list[int]:
        rows = []
        for slot, count in enumerate(counts):
            inputs = {"ids": torch.zeros(count, dtype=torch.int64)}
            request = Request(slot, start=True, end=False, inputs=inputs)
            rows.append(ActiveRequest(request, SequenceState(slot, slot), inputs, count, 0))
        filled = form_batch(packed, rows).inputs["lengths"]
        assert filled.dtype is torch.int32
        values: list[int] = filled.tolist()
        return values

    assert step(5, 1, 9) == [5, 1, 8]
    assert step(1, 1) == [1, 1]


def test_the_default_budget_is_rows_times_chunk() -> None:
    assert program(4, 8).token_budget == 32
    assert program(4, 8, 9).token_budget == 9
    with pytest.raises(ValidationError, match="too few for 4 rows"):
        program(4, 8, 3)
