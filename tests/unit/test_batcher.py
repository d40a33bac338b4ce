"""How many tokens each row of a step brings, and the captured sizes that steps fit."""

import pytest
from inplace.engines.tensorrt.contexts import Size, decode_sizes, fitting, mixed_sizes
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
def test_every_row_advances_and_the_budget_holds(
    waiting: list[int], chunk: int, budget: int, counts: list[int]
) -> None:
    assert schedule_tokens(waiting, chunk, budget) == counts
    assert sum(counts) <= budget


def test_the_budget_is_rows_times_chunk_unless_said() -> None:
    assert program(4, 8).token_budget == 32
    assert program(4, 8, 9).token_budget == 9
    with pytest.raises(ValidationError, match="too few for 4 rows"):
        program(4, 8, 3)


@pytest.mark.parametrize(
    ("max_rows", "chunk", "max_tokens"),
    [(1, 1, None), (1, 512, None), (3, 8, 9), (8, 128, 512), (64, 1, None), (64, 512, 512)],
)
def test_every_step_fits_a_captured_size(max_rows: int, chunk: int, max_tokens: int | None) -> None:
    made = program(max_rows, chunk, max_tokens)
    sizes = decode_sizes(made) + mixed_sizes(made)
    assert len(set(sizes)) == len(sizes)
    for rows in range(1, max_rows + 1):
        for tokens in range(rows, min(rows * chunk, made.token_budget) + 1):
            size = fitting(sizes, rows, tokens)
            assert size is not None, (rows, tokens)
            assert size.decode == (rows == tokens)
            assert size.rows >= rows
            assert size.tokens >= tokens
            if not size.decode:
                assert size.rows > rows  # a null row owns the padding


def test_a_step_beyond_the_largest_fits_nothing() -> None:
    made = program(4, 8)
    assert fitting(decode_sizes(made) + mixed_sizes(made), 5, 5) is None
    assert fitting([Size(1, 1)], 1, 2) is None
