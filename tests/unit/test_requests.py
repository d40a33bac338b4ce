"""Validation of requests: each refusal has its code, what is wrong and what is expected."""

import re
from collections.abc import Mapping

import pytest
import torch
from inplace.errors import Code, InplaceError, RequestError
from inplace.runtime.requests import Request, validate_inputs
from inplace.schema.programs import Program
from inplace.schema.specs import Dtype, Role, TensorSpec
from support.models import RECTANGULAR
from torch import Tensor

PACKED = Program(
    name="step",
    row_layout="packed",
    inputs=(
        TensorSpec(
            name="ids", role=Role.TOKENS, dtype=Dtype.INT64, shape=(-1,), minimum=0, maximum=99
        ),
        TensorSpec(name="frames", role=Role.TOKENS, dtype=Dtype.FLOAT32, shape=(-1, 3)),
        TensorSpec(name="bias", role=Role.ROW, dtype=Dtype.FLOAT32, shape=(2,), minimum=-1),
        TensorSpec(name="slots", role=Role.SLOTS, dtype=Dtype.INT32),
    ),
    outputs=(TensorSpec(name="token", role=Role.TOKEN, dtype=Dtype.INT64, shape=(1,)),),
    aliases=(),
    max_rows=4,
    chunk=8,
)
GOOD = {
    "ids": torch.tensor([[0, 99, 5]]),
    "frames": torch.zeros(1, 3, 3),
    "bias": torch.tensor([[-1.0, 1e9]]),
}


def refusal(program: Program, inputs: Mapping[str, Tensor]) -> RequestError:
    with pytest.raises(RequestError) as error:
        validate_inputs(program, inputs)
    assert not error.value.retryable
    return error.value


def test_valid_inputs_lose_their_batch_axis_and_are_not_copied() -> None:
    inputs, tokens = validate_inputs(PACKED, GOOD)
    assert tokens == 3
    assert set(inputs) == {"ids", "frames", "bias"}
    for name, tensor in inputs.items():
        assert torch.equal(tensor, GOOD[name][0])
        assert tensor.data_ptr() == GOOD[name].data_ptr()


def test_an_unknown_input_is_refused_with_the_known_ones() -> None:
    error = refusal(PACKED, GOOD | {"unknown": torch.zeros(1)})
    assert error.code is Code.BAD_INPUT
    assert str(error) == (
        "the inputs ['unknown'] are not used by this request; it takes ['ids', 'frames', 'bias']"
    )


def test_a_rectangular_request_has_one_token() -> None:
    inputs, tokens = validate_inputs(RECTANGULAR, {"value": torch.ones(1, 4)})
    assert tokens == 1
    assert inputs["value"].shape == (4,)


@pytest.mark.parametrize(
    ("name", "tensor", "code", "message"),
    [
        (
            "ids",
            None,
            Code.MISSING_INPUT,
            "input 'ids' is missing; this model takes ['ids', 'frames', 'bias']",
        ),
        (
            "bias",
            None,
            Code.MISSING_INPUT,
            "input 'bias' is missing; this model takes ['ids', 'frames', 'bias']",
        ),
        (
            "ids",
            torch.zeros(1, 3, dtype=torch.int32),
            Code.BAD_DTYPE,
            "input 'ids' is int32; expected int64",
        ),
        (
            "bias",
            torch.zeros(1, 2, dtype=torch.float16),
            Code.BAD_DTYPE,
            "input 'bias' is float16; expected float32",
        ),
        (
            "ids",
            torch.tensor([1, 2, 3]),
            Code.BAD_SHAPE,
            "input 'ids' has the shape [3]; expected [1, 'tokens']",
        ),
        (
            "ids",
            torch.tensor([1]),
            Code.BAD_SHAPE,
            "input 'ids' has the shape [1]; expected [1, 'tokens']",
        ),
        (
            "ids",
            torch.tensor(1),
            Code.BAD_SHAPE,
            "input 'ids' has the shape []; expected [1, 'tokens']",
        ),
        (
            "ids",
            torch.zeros(2, 3, dtype=torch.int64),
            Code.BAD_SHAPE,
            "input 'ids' has the shape [2, 3]; expected [1, 'tokens']",
        ),
        (
            "ids",
            torch.zeros(1, 3, 1, dtype=torch.int64),
            Code.BAD_SHAPE,
            "input 'ids' has the shape [1, 3, 1]; expected [1, 'tokens']",
        ),
        (
            "ids",
            torch.zeros(0, 3, dtype=torch.int64),
            Code.BAD_SHAPE,
            "input 'ids' has the shape [0, 3]; expected [1, 'tokens']",
        ),
        (
            "frames",
            torch.zeros(1, 3, 4),
            Code.BAD_SHAPE,
            "input 'frames' has the shape [1, 3, 4]; expected [1, 'tokens', 3]",
        ),
        (
            "frames",
            torch.zeros(1, 3),
            Code.BAD_SHAPE,
            "input 'frames' has the shape [1, 3]; expected [1, 'tokens', 3]",
        ),
        (
            "frames",
            torch.zeros(1, 2, 3),
            Code.BAD_SHAPE,
            "the same number of tokens, got {'ids': 3, 'frames': 2}",
        ),
        (
            "bias",
            torch.zeros(1, 3),
            Code.BAD_SHAPE,
            "input 'bias' has the shape [1, 3]; expected [1, 2]",
        ),
        (
            "bias",
            torch.zeros(1, 1, 2),
            Code.BAD_SHAPE,
            "input 'bias' has the shape [1, 1, 2]; expected [1, 2]",
        ),
        ("bias", torch.zeros(1), Code.BAD_SHAPE, "input 'bias' has the shape [1]; expected [1, 2]"),
        (
            "ids",
            torch.zeros(1, 0, dtype=torch.int64),
            Code.EMPTY_INPUT,
            "input 'ids' is empty; send at least 1 token",
        ),
        (
            "frames",
            torch.zeros(1, 0, 3),
            Code.EMPTY_INPUT,
            "input 'frames' is empty; send at least 1 token",
        ),
        (
            "ids",
            torch.tensor([[1, 2, 100]]),
            Code.VALUE_RANGE,
            "input 'ids' holds 100; expected values from 0 to 99",
        ),
        (
            "ids",
            torch.tensor([[1, -3, 100]]),
            Code.VALUE_RANGE,
            "input 'ids' holds -3; expected values from 0 to 99",
        ),
        (
            "bias",
            torch.tensor([[0.0, -1.5]]),
            Code.VALUE_RANGE,
            "input 'bias' holds -1.5; expected values from -1 to None",
        ),
    ],
)
def test_an_invalid_input_is_refused_with_its_code(
    name: str, tensor: Tensor | None, code: Code, message: str
) -> None:
    inputs = {key: value for key, value in (GOOD | {name: tensor}).items() if value is not None}
    error = refusal(PACKED, inputs)
    assert error.code is code
    assert message in str(error)


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint16, torch.complex64])
def test_an_unsupported_dtype_is_refused(dtype: torch.dtype) -> None:
    assert refusal(PACKED, GOOD | {"ids": torch.zeros(1, 3, dtype=dtype)}).code is Code.BAD_DTYPE


def test_nan_is_outside_any_range() -> None:
    assert (
        refusal(PACKED, GOOD | {"bias": torch.tensor([[0.0, float("nan")]])}).code
        is Code.VALUE_RANGE
    )


def request(**parameters: bool | int | float | str) -> Request:
    return Request(7, start=False, end=False, inputs={}, parameters=parameters)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, True),
        (False, False),
        ("true", True),
        ("True", True),
        ("FALSE", False),
        ("1", True),
        ("0", False),
        (1, True),
        (0, False),
    ],
)
def test_a_flag_is_true_or_false(value: bool | int | str, expected: bool) -> None:
    assert request(logits=value).flag("logits") is expected


def test_an_absent_flag_is_false() -> None:
    assert request(logits=True).flag("other") is False


@pytest.mark.parametrize("value", ["perhaps", "", 2, -1, 0.5, "yes"])
def test_any_other_flag_is_a_bad_parameter(value: int | float | str) -> None:
    with pytest.raises(
        RequestError,
        match=rf"^parameter 'logits' is {re.escape(repr(value))}; expected true or false$",
    ) as error:
        request(logits=value).flag("logits")
    assert (error.value.code, error.value.retryable) == (Code.BAD_PARAMETER, False)


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (17, 17), ("0", 0), ("17", 17)])
def test_a_position_is_a_whole_number(value: int | str, expected: int) -> None:
    assert request(position=value).position() == expected
    assert request().position() is None


@pytest.mark.parametrize("value", [-1, "-1", 1.5, "1.5", "here", "", True, False])
def test_an_invalid_position_is_a_bad_parameter(value: bool | int | float | str) -> None:
    message = rf"^parameter 'position' is {re.escape(repr(value))}; expected a whole number of"
    with pytest.raises(RequestError, match=message) as error:
        request(position=value).position()
    assert (error.value.code, error.value.retryable) == (Code.BAD_PARAMETER, False)


@pytest.mark.parametrize("code", Code)
@pytest.mark.parametrize("retryable", [False, True])
def test_the_wire_format_names_code_retryable_sequence_and_request(
    code: Code, retryable: bool
) -> None:
    error = RequestError(code, "why", retryable=retryable)
    assert isinstance(error, InplaceError)
    assert (
        error.wire(42, "r-1")
        == f"INPLACE-{code.name} retryable={int(retryable)} sequence=42 request=r-1: why"
    )
    assert (
        error.wire("call-7", "")
        == f"INPLACE-{code.name} retryable={int(retryable)} sequence=call-7 request=-: why"
    )


@pytest.mark.parametrize("sequence", [0, ""])
def test_an_absent_id_is_a_dash_on_the_wire(sequence: int | str) -> None:
    assert (
        RequestError(Code.NO_SEQUENCE_ID, "x").wire(sequence, "")
        == "INPLACE-NO_SEQUENCE_ID retryable=0 sequence=- request=-: x"
    )


@pytest.mark.parametrize("character", ["a", "%", "é", "☃", "\U0001f600", "\n"])
def test_a_wire_text_fits_a_header_for_ids_of_any_length(character: str) -> None:
    long = character * 50_000
    error = RequestError(Code.BAD_PARAMETER, f"parameter 'x' is {long}")
    wire = error.wire(long, long)
    # As gRPC encodes `grpc-message`.
    sent = sum(1 if " " <= one <= "~" and one != "%" else 3 * len(one.encode()) for one in wire)
    assert 7000 < sent < 7500
    assert wire.startswith(f"INPLACE-BAD_PARAMETER retryable=0 sequence={character * 100}")
    assert "…: parameter 'x' is " in wire
