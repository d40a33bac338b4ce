"""The registry of request parameters: names, limits, errors and the list in the documentation."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inplace.errors import Code, RequestError
from inplace.parameters import (
    BY_NAME,
    MAX_STOP_TOKEN_IDS,
    REGISTRY,
    SAMPLING_PARAMETERS,
    ParameterSpec,
    RequestKind,
    parse_parameters,
)
from inplace.runtime.requests import SamplingParams

ROOT = Path(__file__).parents[2]
VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**5000), 10**5000)
    | st.floats()
    | st.text()
    | st.integers(0, 10**20).map(str)
    | st.sampled_from(
        ["9" * 5000, "-" + "9" * 5000, "1e9999", "nan", "0x10", "1_0", "٣", "\0", ","]
    )
    | st.lists(st.integers())
    | st.binary()
)


def result_of(call: Callable[[], object]) -> object:
    """What a call returns, or the error that it raises."""
    try:
        return call()
    except RequestError as error:
        return error


def refusal(kind: RequestKind = RequestKind.STEP, /, **parameters: object) -> str:
    with pytest.raises(RequestError) as refused:
        parse_parameters(parameters, kind)
    assert (refused.value.code, refused.value.retryable) == (Code.BAD_PARAMETER, False)
    return str(refused.value)


def test_names_are_unique_and_every_parameter_is_documented() -> None:
    assert len(BY_NAME) == len(REGISTRY)
    for spec in REGISTRY:
        assert spec.description.endswith(".")
        assert spec.kinds
        assert spec.limits
        if spec.default is not None:
            assert spec.parse(spec.default) == spec.default


def test_the_sampling_parameters_are_the_fields_of_sampling_params() -> None:
    own = {"min_tokens", "end_token_ids", "structured"}  # of a generation
    assert set(SamplingParams.__dataclass_fields__) == SAMPLING_PARAMETERS | own
    for name in SAMPLING_PARAMETERS:
        assert (getattr(SamplingParams(), name) or None) == (BY_NAME[name].default or None)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("temprature", "temperature"),
        ("max_new_tokens", "max_tokens"),
        ("topk", "top_k"),
        ("Temperature", "temperature"),
        ("stop_tokens", "stop_token_ids"),
    ],
)
def test_an_unknown_name_is_refused_with_a_similar_one_and_all_names(name: str, meant: str) -> None:
    text = refusal(RequestKind.STEP, **{name: 1})
    assert text.startswith(f"parameter {name!r} is unknown, did you mean {meant!r}? a step takes [")
    assert "'temperature'" in text
    assert "'max_tokens'" not in text.partition(" takes ")[2]


@pytest.mark.parametrize("name", ["stop", "text", "input_ids"])
def test_a_name_that_is_an_input_is_refused_with_that(name: str) -> None:
    text = refusal(RequestKind.GENERATION, **{name: "x"})
    assert text.startswith(f"parameter {name!r} is unknown, {name!r} is the name of an input; a ")


@pytest.mark.parametrize("name", ["n", "", "\0", "best_of" * 1000])
def test_an_unknown_name_without_a_similar_one_is_refused_with_all_names(name: str) -> None:
    text = refusal(RequestKind.GENERATION, **{name: 1})
    assert "is unknown" in text
    assert "a generation takes ['sequence_key', " in text
    assert len(text) < 1000


@pytest.mark.parametrize(
    ("name", "value", "kind", "reason"),
    [
        ("ignore_eos", True, RequestKind.STEP, "belongs to generations; this request is a step"),
        ("stream_interval", 4, RequestKind.STEP, "because it has no 'max_tokens'"),
        ("logits", True, RequestKind.GENERATION, "belongs to steps; this request is a generation"),
        ("seed", 1, RequestKind.END, "belongs to steps and generations; this request is an END"),
        ("stream", False, RequestKind.GENERATION, "belongs to requests of the generate proxy"),
    ],
)
def test_a_parameter_of_another_kind_of_request_is_refused(
    name: str, value: object, kind: RequestKind, reason: str
) -> None:
    assert reason in refusal(kind, **{name: value})


def test_a_boolean_that_is_false_asks_for_nothing() -> None:
    assert parse_parameters({"logits": "false"}, RequestKind.GENERATION) == {"logits": False}


def test_names_of_triton_and_forwarded_headers_are_left_alone() -> None:
    tritons = {"priority": 3, "timeout": "x", "binary_data_output": True, "triton_x": 1, "id": 1}
    assert parse_parameters(tritons, RequestKind.STEP) == {}
    headers = {"traceparent": "00-1"}
    assert parse_parameters(headers, RequestKind.STEP, lambda name: name == "traceparent") == {}
    assert "is unknown" in refusal(RequestKind.STEP, **headers)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(7, (7,)), ("7", (7,)), ("1,2, 3", (1, 2, 3)), (",".join("1" * 64), (1,) * 64)],
)
def test_token_ids_are_an_integer_or_integers_with_commas(
    value: object, expected: tuple[int, ...]
) -> None:
    assert BY_NAME["stop_token_ids"].parse(value) == expected


@pytest.mark.parametrize(
    "value", ["", ",", "1,", "a", -1, "1,-2", True, 1.0, "9" * 30, ",".join("1" * 65)]
)
def test_other_token_ids_are_refused(value: object) -> None:
    assert f"a text of at most {MAX_STOP_TOKEN_IDS} token ids" in refusal(
        RequestKind.GENERATION, stop_token_ids=value
    )


def test_token_biases_are_pairs_with_commas() -> None:
    parse = BY_NAME["logit_bias"].parse
    assert parse("7:1.5, 3:-100") == ((7, 1.5), (3, -100.0))
    for value in ("", "7", "7:", ":1", "7:1,7:2", "7:101", "7:nan", "-1:2", 7, True):
        assert "each with a colon and a number from -100 to 100" in refusal(logit_bias=value)
    many = [f"{token}:1" for token in range(301)]
    assert len(parse(",".join(many[:300]))) == 300  # type: ignore[arg-type]
    refusal(logit_bias=",".join(many))


def test_a_key_appears_in_no_error() -> None:
    for name in ("sequence_key", "group"):
        assert "secret" not in refusal(RequestKind.STEP, **{name: "secret" * 100})
        assert "secret" not in refusal(RequestKind.STEP, **{name: "secret\0"})


@given(st.sampled_from(REGISTRY), VALUES)
def test_any_value_is_parsed_or_refused_with_a_short_text(
    spec: ParameterSpec, value: object
) -> None:
    result = result_of(lambda: spec.parse(value))
    if isinstance(result, RequestError):
        assert result.code is Code.BAD_PARAMETER
        assert len(str(result)) < 700
    elif not isinstance(result, tuple):
        assert spec.parse(result) == result


@given(
    st.dictionaries(st.text() | st.sampled_from(list(BY_NAME)), VALUES),
    st.sampled_from(RequestKind),
)
def test_any_parameters_are_parsed_or_refused(
    parameters: dict[str, object], kind: RequestKind
) -> None:
    result = result_of(lambda: parse_parameters(parameters, kind))
    if isinstance(result, RequestError):
        assert result.code is Code.BAD_PARAMETER
    else:
        assert isinstance(result, dict)
        assert result.keys() <= BY_NAME.keys()


def test_the_documentation_has_the_list_of_the_registry() -> None:
    path = ROOT / "tools" / "parameter_table.py"
    spec = importlib.util.spec_from_file_location("parameter_table", path)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    page = tool.PAGE.read_text()
    assert tool.page_with_table(page) == page, "run `make tables`"


def test_the_registry_needs_neither_pytorch_nor_numpy() -> None:
    code = "import json, sys, inplace.parameters; print(json.dumps(list(sys.modules)))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    assert not {"torch", "numpy", "pydantic"} & set(json.loads(loaded))
