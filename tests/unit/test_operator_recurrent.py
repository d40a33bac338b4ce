"""Convolutions and recurrences over ragged rows equal transformers' functions on each row."""

import pytest
import torch
from inplace import operators
from support.attention_case import indices
from support.recurrent_case import CHECKS, Operators, check_causal_conv1d
from torch import Tensor
from torch._subclasses import FakeTensorMode

OPERATORS: Operators = {
    name: getattr(operators, name)
    for name in ("causal_conv1d", "selective_scan", "delta_rule", "linear_recurrence")
}


@pytest.mark.parametrize("name", CHECKS)
def test_each_row_continues_from_its_slot(name: str) -> None:
    CHECKS[name](OPERATORS)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
def test_a_convolution_has_a_bias_and_an_activation_or_none(
    dtype: torch.dtype, tolerance: float, with_bias: bool, silu: bool
) -> None:
    check_causal_conv1d(OPERATORS, dtype, tolerance, with_bias=with_bias, silu=silu)


ROWS = (indices(1, 0), indices(0, 2, 3))
CALLS: dict[str, tuple[tuple[Tensor | None, ...], dict[str, object]]] = {
    "causal_conv1d": (
        (torch.randn(3, 6), torch.randn(6, 4), torch.randn(6), torch.zeros(2, 3, 6), *ROWS),
        {"silu": True},
    ),
    "selective_scan": (
        (
            torch.randn(3, 4, 2),
            torch.rand(3, 4),
            -torch.rand(4, 1, 1),
            torch.randn(3, 2, 5),
            torch.randn(3, 2, 5),
            None,
            torch.zeros(2, 4, 2, 5),
            *ROWS,
        ),
        {},
    ),
    "delta_rule": (
        (
            torch.randn(3, 2, 4),
            torch.randn(3, 2, 4),
            torch.randn(3, 2, 5),
            -torch.rand(3, 2),
            torch.rand(3, 2),
            torch.zeros(2, 2, 4, 5),
            *ROWS,
        ),
        {},
    ),
    "linear_recurrence": ((torch.rand(3, 4), torch.randn(3, 4), torch.zeros(2, 4), *ROWS), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck_accepts_them(name: str) -> None:
    arguments, keywords = CALLS[name]
    operator = getattr(torch.ops.inplace, name).default
    torch.library.opcheck(operator, arguments, keywords)


@pytest.mark.parametrize(
    ("name", "index", "wrong", "text"),
    [
        ("causal_conv1d", 3, (2, 4, 6), r"state \[slots, 3, 6\]"),
        ("causal_conv1d", 0, (3, 5), r"x must be \[tokens, 6\]"),
        ("causal_conv1d", 2, (5,), r"bias must be \[6\]"),
        ("selective_scan", 6, (2, 4, 2, 6), r"the state holds \[4, 2, 6\] \(heads, dim, size\)"),
        ("selective_scan", 0, (3, 8), r"x must be \[tokens, heads, dim\]"),
        ("delta_rule", 5, (2, 2, 5, 4), r"the state holds \[2, 5, 4\] \(heads, key_dim, value_di"),
        ("linear_recurrence", 2, (2, 5), r"state \[slots, channels\]"),
        ("causal_conv1d", 1, (6, 1), r"weight is \[6, 1\]; its width must be at least 2"),
        ("causal_conv1d", 5, (2,), r"row_offsets \[rows \+ 1\], not \[2\] and \[2\]"),
        ("selective_scan", 1, (2, 4), r"inputs have \[3, 2, 3, 3\] tokens"),
        ("delta_rule", 4, (2, 2), r"inputs have \[3, 3, 3, 3, 2\] tokens"),
        ("linear_recurrence", 3, (3,), r"slots must be \[rows\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_while_a_graph_is_traced(
    name: str, index: int, wrong: tuple[int, ...], text: str
) -> None:
    arguments = list(CALLS[name][0])
    arguments[index] = torch.zeros(wrong)
    operator = getattr(torch.ops.inplace, name)
    with pytest.raises(RuntimeError, match=text):
        operator(*arguments)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match=text):
        operator(*arguments)
