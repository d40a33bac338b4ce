"""Whisper from a folder of transformers: its tokens are those of ``generate``."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inplace.drivers.detokenizer import load_tokenizer
from inplace.drivers.step_driver import StepDriver
from inplace.errors import Code, RequestError
from inplace.parameters import Parameter
from inplace.runtime.batcher import Answer
from inplace.runtime.requests import Request
from inplace.runtime.schedules import ScheduledInstance
from inplace.schema.files import EngineFolder
from inplace.schema.served import Manifest
from inplace_builder import BuildError, BuildOptions, build_model
from inplace_builder.capture.whisper import WhisperLogMel, load_extractor
from inplace_builder.capture.whisper_rules import NO_TOKEN, Rules
from support.engines import Engines
from support.models import change_config
from support.storing import left_in, memory_bucket, store_in
from support.whisper import (
    IDS,
    RATE,
    SECONDS,
    SOURCE,
    Samples,
    audio,
    generated,
    save_whisper,
    tiny_whisper,
    whisper_engine,
    whisper_tokenizer,
)
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

OPTIONS = BuildOptions(slots=4, max_rows=4)

CHOICES: list[dict[str, Parameter]] = [
    {},
    {"timestamps": True},
    {"language": "de"},
    {"language": "fr", "task": "translate"},
    {"task": "translate", "timestamps": True},
    {"language": "en", "task": "transcribe", "timestamps": "true"},
]


@pytest.fixture(scope="module")
def source(engines: Engines) -> Path:
    return engines.get(SOURCE, save_whisper)


@pytest.fixture(scope="module")
def model() -> WhisperForConditionalGeneration:
    return tiny_whisper()


@pytest.fixture(scope="module")
def folder(engines: Engines) -> Path:
    return whisper_engine(engines) / "1"


@pytest.fixture
def driver(folder: Path) -> Iterator[StepDriver]:
    instance = ScheduledInstance.open(folder)
    for tensor in instance.arena.tensors.values():
        tensor.fill_(float("nan") if tensor.is_floating_point() else 1)
    running = StepDriver(instance, load_tokenizer(EngineFolder(folder), instance.manifest))
    yield running
    running.close()


def request(
    sequence: int,
    samples: Samples,
    options: Mapping[str, Parameter] = {},
    *,
    start: bool = True,
    end: bool = False,
) -> Request:
    parameters = {"sample_rate": RATE, **options}
    return Request(sequence, start, end, {"audio": torch.from_numpy(samples)[None]}, "", parameters)


def tokens(answer: Answer) -> list[int]:
    assert not isinstance(answer, RequestError), answer
    [row] = answer["tokens"].tolist()
    return list(row)


def refused(driver: StepDriver, sent: Request) -> RequestError:
    [answer] = driver.run([sent])
    assert isinstance(answer, RequestError)
    return answer


def expected(
    model: WhisperForConditionalGeneration, samples: Samples, options: Mapping[str, Parameter]
) -> list[int]:
    given = {name: value == "true" if value == "true" else value for name, value in options.items()}
    return generated(model, samples, given)


def test_tokens_are_those_of_generate(
    driver: StepDriver, model: WhisperForConditionalGeneration
) -> None:
    """Forced tokens, detected languages, suppressed tokens and timestamps, for each choice."""
    lengths = set()
    for number, options in enumerate(CHOICES):
        samples = audio(number, SECONDS if number % 2 else 0.6)
        [answer] = driver.run([request(number + 1, samples, options, end=True)])
        assert tokens(answer) == expected(model, samples, options)
        lengths.add(len(tokens(answer)))
    assert len(lengths) > 2


def test_windows_of_several_sequences_are_decoded_together(
    driver: StepDriver, model: WhisperForConditionalGeneration
) -> None:
    """Rows of one call end at different times, and begin a second window on the same sequence."""
    first = [request(number + 1, audio(number), CHOICES[1]) for number in range(3)]
    second = [request(number + 1, audio(9 - number, 0.5), start=False) for number in range(3)]
    for number, answer in enumerate(driver.run([*first, *second])):
        samples = audio(number) if number < 3 else audio(12 - number, 0.5)
        assert tokens(answer) == expected(model, samples, CHOICES[1] if number < 3 else {})


def test_a_sequence_that_was_stored_goes_on(
    driver: StepDriver, model: WhisperForConditionalGeneration
) -> None:
    instance, bucket, key = driver.instance, memory_bucket(), {"sequence_key": "mine"}
    store_in(instance, bucket)
    driver.run([request(1, audio(0), key)])
    driver.hand_over()
    assert len(instance.table) == 0
    for tensor in instance.arena.tensors.values():
        tensor.fill_(float("nan") if tensor.is_floating_point() else 1)
    restore: dict[str, Parameter] = {**key, "restore": True, "position": 1}
    [answer] = driver.run([request(1, audio(1), restore)])
    assert tokens(answer) == expected(model, audio(1), {})
    driver.run([request(1, audio(2, 0.5), key, start=False, end=True)])
    assert instance.snapshots is not None
    instance.snapshots.close()
    assert left_in(bucket) == []


def test_the_text_is_that_of_the_tokens_without_timestamps(driver: StepDriver) -> None:
    [answer] = driver.run([request(1, audio(0), CHOICES[1], end=True)])
    first = whisper_tokenizer().convert_tokens_to_ids("<|0.00|>")
    assert not isinstance(answer, RequestError)
    assert any(token >= first for token in tokens(answer))
    text = whisper_tokenizer().decode([token for token in tokens(answer) if token < first])
    assert answer["text_output"] == text != ""


def test_int16_audio_is_the_same_as_its_floats(driver: StepDriver) -> None:
    integers = torch.from_numpy(audio(2) * 32768).short()
    floats = request(1, (integers / 32768).numpy())
    sent = Request(2, True, False, {"audio_int16": integers[None]}, "", {"sample_rate": RATE})
    one, other = driver.run([floats, sent])
    assert tokens(one) == tokens(other)


def test_an_end_without_audio_ends(driver: StepDriver) -> None:
    silent = torch.zeros(0).numpy()
    driver.run([request(1, audio(0))])
    [answer] = driver.run([request(1, silent, start=False, end=True)])
    assert answer == {}
    error = refused(driver, request(1, audio(0), start=False))
    assert error.code is Code.UNKNOWN_SEQUENCE
    error = refused(driver, request(1, silent, start=False, end=True))
    assert error.code is Code.UNKNOWN_SEQUENCE
    driver.run([request(2, audio(0))])
    error = refused(driver, request(2, silent, {"sample_rate": 8000}, start=False, end=True))
    assert "takes 16000: resample it" in str(error)


def test_a_refused_window_changes_nothing(
    driver: StepDriver, model: WhisperForConditionalGeneration
) -> None:
    driver.run([request(1, audio(0))])
    long = refused(driver, request(1, audio(1, SECONDS + 0.1), start=False))
    assert long.code is Code.CAPACITY
    other_rate = refused(driver, request(1, audio(1), {"sample_rate": 8000}, start=False))
    assert other_rate.code is Code.BAD_PARAMETER
    unknown = refused(driver, request(1, audio(1), {"language": "it"}, start=False))
    assert "['de', 'en', 'fr']" in str(unknown)
    [answer] = driver.run([request(1, audio(1), start=False, end=True)])
    assert tokens(answer) == expected(model, audio(1), {})


def test_the_manifest_describes_both_programs(folder: Path) -> None:
    manifest = Manifest.load(folder)
    encode, decode = manifest.programs
    assert set(decode.read_only) == {
        "window_limit",
        "window_prompt",
        *(f"window_cross_{part}_{layer}" for part in ("keys", "values") for layer in range(2)),
    }
    assert encode.restarts == ("decode",)
    assert decode.max_positions == 24
    assert manifest.verified == "executed"
    assert int(manifest.built_with["verified_tokens"]) > 4


def test_an_english_model_has_no_language(tmp_path: Path) -> None:
    model = tiny_whisper(multilingual=False)
    rules = Rules.of(model)
    assert rules.choices == {"language": ("",), "task": ("",), "timestamps": ("false", "true")}
    start, plain = IDS["<|startoftranscript|>"], IDS["<|notimestamps|>"]
    assert rules.prompts.tolist() == [[start, plain], [start, NO_TOKEN]]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_beams": 5}, "num_beams 5"),
        ({"repetition_penalty": 1.2}, "repetition_penalty 1.2"),
        ({"no_speech_threshold": 0.6}, "no_speech_threshold 0.6"),
        ({"eos_token_id": [2, 3]}, "eos_token_id"),
        ({"lang_to_id": {"<|xx|>": 5}}, "no forced tokens for .*'xx'"),
    ],
)
def test_other_ways_to_generate_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(BuildError, match=text):
        Rules.of(tiny_whisper(**changes))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lookahead": 1}, "a 'whisper' model, which has none"),
        ({"capacity": 448, "step_tokens": 64}, r"\['capacity', 'step_tokens'\] are for sequences"),
    ],
)
def test_options_of_other_models_are_refused(
    source: Path, tmp_path: Path, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(BuildError, match=text):
        build_model(source, tmp_path / "model", BuildOptions(**options))


def test_quantized_weights_are_refused(source: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(source, tmp_path / "source")
    change_config(copied, quantization_config={"load_in_8bit": True})
    with pytest.raises(BuildError, match="'bitsandbytes'"):
        build_model(copied, tmp_path / "model", OPTIONS)


def test_a_folder_needs_a_feature_extractor_of_the_model(tmp_path: Path) -> None:
    config = tiny_whisper().config
    with pytest.raises(BuildError, match=r"preprocessor_config\.json"):
        load_extractor(tmp_path, config)
    WhisperFeatureExtractor(feature_size=80, chunk_length=1).save_pretrained(tmp_path)
    with pytest.raises(BuildError, match="makes 80 mel bins of 100 frames; the model takes 8"):
        load_extractor(tmp_path, config)
    for name, text in (("dither", "adds noise"), ("padding_value", "pads with sound")):
        other = WhisperFeatureExtractor(feature_size=8, chunk_length=1, **{name: 0.1})
        other.save_pretrained(tmp_path)
        with pytest.raises(BuildError, match=text):
            load_extractor(tmp_path, config)


def test_features_are_those_of_the_extractor() -> None:
    extractor = WhisperFeatureExtractor()
    samples = np.concatenate([audio(1, 7.0), np.zeros(1000, np.float32), audio(2, 3.0)])
    features = extractor(samples, sampling_rate=RATE, return_tensors="pt").input_features
    padded = torch.zeros(1, extractor.n_samples)
    padded[0, : len(samples)] = torch.from_numpy(samples)
    assert torch.allclose(WhisperLogMel(extractor)(padded), features, atol=2e-5)
