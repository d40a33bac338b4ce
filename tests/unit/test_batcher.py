"""How many tokens of each row a step computes."""

import pytest
from inplace.runtime.batcher import schedule_tokens
from inplace.schema.served import Program
from inplace.schema.specs import Role, TensorSpec
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


def test_the_default_budget_is_rows_times_chunk() -> None:
    assert program(4, 8).token_budget == 32
    assert program(4, 8, 9).token_budget == 9
    with pytest.raises(ValidationError, match="too few for 4 rows"):
        program(4, 8, 3)
