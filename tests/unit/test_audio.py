"""Requests with audio: one of two inputs, the model's sample rate, and its options."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from inplace.errors import Code, RequestError
from inplace.protocol import AUDIO, AUDIO_INT16, LANGUAGE, SAMPLE_RATE
from inplace.runtime.audio import cut_stream
from inplace.runtime.requests import validate_inputs
from inplace.schema.programs import Program
from inplace.schema.specs import Dtype, Role, TensorSpec
from inplace.server.model_config import model_tensors
from pydantic import ValidationError
from torch import Tensor

RATE, SAMPLES = 16000, 8

SPEECH = TensorSpec(
    name=AUDIO, role=Role.AUDIO, dtype=Dtype.FLOAT32, shape=(SAMPLES,), sample_rate=RATE
)
SPOKEN = TensorSpec(
    name=LANGUAGE, role=Role.OPTION, dtype=Dtype.INT64, shape=(1,), choices=("", "en", "de")
)
PROGRAM = Program(
    name="encode",
    row_layout="rectangular",
    inputs=(SPEECH, SPOKEN),
    outputs=(TensorSpec(name="y", role=Role.VALUE, dtype=Dtype.FLOAT32, shape=(1,)),),
    aliases=(),
    max_rows=2,
    chunk=1,
)


def validated(inputs: Mapping[str, Tensor], **parameters: Any) -> dict[str, Tensor]:
    result, num_tokens = validate_inputs(PROGRAM, inputs, {SAMPLE_RATE: RATE, **parameters})
    assert num_tokens == 1
    return result


def test_audio_is_filled_up_with_zeros() -> None:
    samples = torch.tensor([[0.5, -1.0, 0.25]])
    result = validated({AUDIO: samples})
    assert result[AUDIO].tolist() == [0.5, -1.0, 0.25, 0, 0, 0, 0, 0]
    assert result[LANGUAGE].tolist() == [0]


def test_integers_are_the_same_audio() -> None:
    samples = torch.tensor([[16384, -32768, 8192]], dtype=torch.int16)
    result = validated({AUDIO_INT16: samples}, language="de")
    assert result[AUDIO].tolist() == [0.5, -1.0, 0.25, 0, 0, 0, 0, 0]
    assert result[LANGUAGE].tolist() == [2]


FLOATS, INTEGERS = torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.int16)


@pytest.mark.parametrize(
    ("inputs", "parameters", "code", "text"),
    [
        ({}, {}, Code.MISSING_INPUT, "'audio' (float32) or 'audio_int16' (int16)"),
        ({AUDIO: FLOATS, AUDIO_INT16: INTEGERS}, {}, Code.BAD_INPUT, "send one of them"),
        ({AUDIO: INTEGERS}, {}, Code.BAD_DTYPE, "'audio' is int16; expected float32"),
        ({AUDIO_INT16: FLOATS}, {}, Code.BAD_DTYPE, "'audio_int16' is float32; expected int16"),
        ({AUDIO: torch.zeros(1, 2, 3)}, {}, Code.BAD_SHAPE, "one channel"),
        ({AUDIO: torch.zeros(1, 0)}, {}, Code.EMPTY_INPUT, "at least 1 sample"),
        ({AUDIO: torch.zeros(1, SAMPLES + 1)}, {}, Code.CAPACITY, "9 samples (0.0005625 s)"),
        ({AUDIO: FLOATS + torch.nan}, {}, Code.VALUE_RANGE, "from nan to nan"),
        ({AUDIO: torch.tensor([[0.0, torch.nan, 1]])}, {}, Code.VALUE_RANGE, "nan"),
        ({AUDIO: torch.tensor([[0.0, -torch.inf]])}, {}, Code.VALUE_RANGE, "-inf"),
        ({AUDIO: torch.tensor([[0.0, 12000.0]])}, {}, Code.VALUE_RANGE, "send integers in"),
        ({AUDIO: FLOATS}, {SAMPLE_RATE: 44100}, Code.BAD_PARAMETER, "takes 16000: resample it"),
        ({AUDIO: FLOATS}, {SAMPLE_RATE: "fast"}, Code.BAD_PARAMETER, "a whole number"),
        ({AUDIO: FLOATS}, {LANGUAGE: "it"}, Code.BAD_PARAMETER, "this model has ['en', 'de']"),
        ({AUDIO: FLOATS}, {LANGUAGE: ""}, Code.BAD_PARAMETER, "'language' is ''"),
        ({AUDIO: FLOATS}, {LANGUAGE: 2}, Code.BAD_PARAMETER, "'language' is 2"),
        ({AUDIO: FLOATS}, {"task": "translate"}, Code.BAD_PARAMETER, "does not have"),
        ({LANGUAGE: FLOATS}, {}, Code.BAD_INPUT, "takes ['audio', 'audio_int16']"),
    ],
)
def test_what_is_no_audio_of_this_model_is_refused(
    inputs: Mapping[str, Tensor], parameters: Mapping[str, Any], code: Code, text: str
) -> None:
    with pytest.raises(RequestError) as refusal:
        validated(inputs, **parameters)
    assert refusal.value.code is code
    assert text in str(refusal.value)


def test_a_request_says_its_sample_rate() -> None:
    with pytest.raises(RequestError, match=r"'sample_rate' is missing.*must be 16000"):
        validate_inputs(PROGRAM, {AUDIO: FLOATS})


def test_another_sample_rate_is_refused_where_a_stream_ends_without_audio() -> None:
    ends = {"shorter": "last", "length_input": "length", "lead": 0}
    program = PROGRAM.model_copy(update={"inputs": (SPEECH.model_copy(update=ends),)})
    result, _ = validate_inputs(program, {}, {SAMPLE_RATE: RATE}, last=True)
    assert not result[AUDIO].numel()
    with pytest.raises(RequestError, match="takes 16000: resample it"):
        validate_inputs(program, {}, {SAMPLE_RATE: 8000}, last=True)


def test_a_model_without_audio_has_no_audio_parameters() -> None:
    value = TensorSpec(name="value", role=Role.ROW, dtype=Dtype.FLOAT32, shape=(1,))
    program = PROGRAM.model_copy(update={"inputs": (value,)})
    with pytest.raises(RequestError, match="it takes no audio"):
        validate_inputs(program, {"value": torch.zeros(1, 1)}, {SAMPLE_RATE: RATE})


def test_the_server_has_two_optional_inputs() -> None:
    tensors = model_tensors(PROGRAM, generates=False, has_tokenizer=False, streams=False)
    assert [(each.name, each.type, each.dims) for each in tensors.inputs] == [
        (AUDIO, "TYPE_FP32", (-1,)),
        (AUDIO_INT16, "TYPE_INT16", (-1,)),
    ]
    assert all(each.optional and each.ragged for each in tensors.inputs)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "sound"},
        {"dtype": Dtype.INT16},
        {"shape": (2, 4)},
        {"sample_rate": None},
        {"choices": ("a",)},
    ],
)
def test_a_description_of_other_audio_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TensorSpec(**SPEECH.model_dump() | changes)


@pytest.mark.parametrize(
    "changes", [{"choices": ()}, {"choices": ("a", "a")}, {"shape": (2,)}, {"sample_rate": 1}]
)
def test_a_description_of_other_options_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TensorSpec(**SPOKEN.model_dump() | changes)


def test_a_stream_is_cut_into_chunks() -> None:
    samples = torch.arange(11.0)
    chunks, rest = cut_stream(samples[:2], samples[2:], 4, ends=False)
    assert [(chunk.tolist(), length) for chunk, length in chunks] == [
        ([0, 1, 2, 3], 4),
        ([4, 5, 6, 7], 4),
    ]
    assert rest.tolist() == [8, 9, 10]
    chunks, rest = cut_stream(rest, samples[:0], 4, ends=True)
    assert [(chunk.tolist(), length) for chunk, length in chunks] == [([8, 9, 10, 0], 3)]
    assert len(rest) == 0
    assert cut_stream(rest, rest, 4, ends=True)[0] == []


def test_a_lead_belongs_to_audio_with_a_length() -> None:
    fields = SPEECH.model_dump() | {"shorter": "last", "length_input": "length"}
    assert TensorSpec.model_validate(fields | {"lead": SAMPLES - 1}).lead == SAMPLES - 1
    for wrong in ({"lead": SAMPLES}, {"lead": 1, "length_input": None}):
        with pytest.raises(ValidationError, match="a lead belongs to the role audio"):
            TensorSpec.model_validate(fields | wrong)
