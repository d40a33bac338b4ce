"""The operators in a trace: shapes, refused arguments, and `torch.library.opcheck`."""

import pytest
import torch
from inplace.operators import read, update
from support.attention_case import RAGGED, Case, Options, indices
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode


def test_fakes_give_the_shape_and_dtype_of_the_real_operators() -> None:
    real = Case(RAGGED, dtype=torch.bfloat16).run()
    with FakeTensorMode():
        traced = Case(RAGGED, dtype=torch.bfloat16).run()
        assert (traced.shape, traced.dtype) == (real.shape, real.dtype)
        rows = read(torch.zeros(5, 2, 3, dtype=torch.int8), indices(1, 2))
        assert (rows.shape, rows.dtype) == ((2, 2, 3), torch.int8)


def test_fake_read_refuses_slots_of_two_axes() -> None:
    with (
        FakeTensorMode(),
        pytest.raises(RuntimeError, match=r"slots must be \[rows\], got \(1, 2\)"),
    ):
        read(torch.zeros(5, 3), torch.zeros(1, 2, dtype=torch.int32))


@pytest.mark.parametrize(
    ("value", "axis", "message"),
    [
        (
            torch.zeros(2, 4, 3, dtype=torch.float64),
            None,
            r"value is torch.float64, the state is torch.float32",
        ),
        (
            torch.zeros(2, 4, 1),
            None,
            r"value \(2, 4, 1\) must be \[rows, ...\] with the extents of the state \(5, 4, 3\)",
        ),
        (torch.zeros(2, 3), None, r"value \(2, 3\) must be"),
        (
            torch.zeros(2, 3, dtype=torch.float16),
            1,
            r"value is torch.float16, the state is torch.float32",
        ),
        (torch.zeros(2, 3), 0, r"axis 0 is not an axis of a slot of \(5, 4, 3\)"),
        (torch.zeros(2, 3), 3, r"axis 3 is not an axis of a slot of \(5, 4, 3\)"),
    ],
)
def test_fake_update_refuses_what_cannot_be_written(
    value: Tensor, axis: int | None, message: str
) -> None:
    offsets, starts = (None, None) if axis is None else (indices(0, 1, 2), indices(0, 0))
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match=message):
        update(torch.zeros(5, 4, 3), indices(0, 1), value, offsets, starts, axis=axis or 0)


def test_fake_attention_refuses_what_does_not_fit_its_states() -> None:
    with FakeTensorMode():
        case = Case(RAGGED)
        case.query = case.query[0]
        with pytest.raises(
            RuntimeError,
            match=r"query must be \[tokens, heads, dim\], states \[slots, kv_heads, capacity, ",
        ):
            case.run()
        case = Case(RAGGED, heads=3)
        with pytest.raises(RuntimeError, match="3 query heads are not a multiple of 2 kv heads"):
            case.run()
        case = Case(RAGGED)
        case.key = None
        with pytest.raises(
            RuntimeError, match="key and value must be given exactly when append is True"
        ):
            case.run()
        case = Case(RAGGED, Options(append=False, causal=False))
        case.key, case.value = Case(RAGGED).key, Case(RAGGED).value
        with pytest.raises(
            RuntimeError, match="key and value must be given exactly when append is True"
        ):
            case.run()
        for wrong in ("key", "value"):
            case = Case(RAGGED)
            setattr(case, wrong, getattr(case, wrong).to(torch.bfloat16))
            with pytest.raises(RuntimeError, match="keys and values must have their state's dtype"):
                case.run()
        for value_dim in (0, 8):  # of keys of 8 elements
            case = Case(RAGGED, Options(latent=True), value_dim=value_dim)
            with pytest.raises(
                RuntimeError, match=f"latent_dim is {value_dim}; it must be 0 with a value state, "
            ):
                case.run()


def test_opcheck_accepts_read() -> None:
    torch.library.opcheck(torch.ops.inplace.read.default, (torch.randn(5, 3), indices(1, -1)))


@pytest.mark.parametrize(
    ("arguments", "keywords"),
    [
        ((torch.zeros(5, 3), indices(1, -1), torch.randn(2, 3)), {}),
        (
            (
                torch.zeros(5, 8, 3),
                indices(1, -1),
                torch.randn(3, 3),
                indices(0, 2, 3),
                indices(4, 0),
            ),
            {"axis": 1},
        ),
        (
            (torch.zeros(5, 8, 3), indices(1, 0), torch.randn(2, 2, 3), None, indices(7, 0)),
            {"axis": 1, "ring": True},
        ),
    ],
    ids=["replace", "packed", "rectangular ring"],
)
def test_opcheck_accepts_update(
    arguments: tuple[Tensor | None, ...], keywords: dict[str, object]
) -> None:
    torch.library.opcheck(torch.ops.inplace.update.default, arguments, keywords)


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("append", [True, False])
def test_opcheck_accepts_attention(append: bool, latent: bool) -> None:
    case = Case(RAGGED, Options(append=append, causal=append))
    arguments = (
        case.query,
        case.key,
        None if latent else case.value,
        case.key_state.nan_to_num(),
        None if latent else case.value_state.nan_to_num(),
        indices(*[row.slot for row in RAGGED]),
        indices(*case.offsets),
        indices(*[max(1, row.start) for row in RAGGED]),
    )
    torch.library.opcheck(
        torch.ops.inplace.attention.default,
        arguments,
        {"scale": 0.3, "append": append, "causal": append, "latent_dim": 6 if latent else 0},
    )
