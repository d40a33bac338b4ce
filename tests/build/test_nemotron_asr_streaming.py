"""transformers' streaming speech model as two programs: the tokens are those of ``generate``."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from inplace.drivers.step_driver import StepDriver
from inplace.errors import Code, RequestError
from inplace.runtime.requests import Request
from inplace.runtime.schedules import ScheduledInstance
from inplace.schema.served import Manifest
from inplace_builder.__main__ import app
from inplace_builder.capture.nemotron_asr_streaming import (
    Chunks,
    Encoded,
    Extraction,
    Listen,
    LogMel,
    Speak,
)
from inplace_builder.compare import fill_with_sentinel
from support.nemotron import (
    BINS,
    FACTOR,
    HOP,
    LEAD,
    Tokens,
    features,
    feed,
    feed_audio,
    first_length,
    log_mel,
    offline,
    speech,
    streamed,
)
from support.nemotron import tiny_nemotron as tiny
from torch import Tensor
from transformers import NemotronAsrStreamingForRNNT
from typer.testing import CliRunner

LOOKAHEAD = 1
CHUNK = HOP * FACTOR * (LOOKAHEAD + 1)
"""Samples."""


@pytest.fixture(scope="module")
def model() -> NemotronAsrStreamingForRNNT:
    return tiny()


def build(source: Path, output: Path, *options: str) -> str:
    arguments = ["build", str(source), "--output", str(output), "--slots", "4", *options]
    result = CliRunner().invoke(app, arguments)
    return result.output


@pytest.fixture(scope="module")
def source(model: NemotronAsrStreamingForRNNT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("nemotron") / "source"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(source: Path) -> Path:
    path = source.parent / "model"
    printed = build(source, path, "--lookahead", str(LOOKAHEAD))
    assert (path / "1").is_dir(), printed
    return path / "1"


@pytest.fixture
def driver(folder: Path) -> Iterator[StepDriver]:
    """Every byte of every slot is NaN or the largest integer before a stream starts in it."""
    instance = ScheduledInstance.open(folder)
    for tensor in instance.arena.tensors.values():
        fill_with_sentinel(tensor)
    running = StepDriver(instance)
    yield running
    running.close()


def pairs(answer: dict[str, Tensor] | RequestError) -> Tokens:
    assert not isinstance(answer, RequestError), answer
    tokens, frames = answer["tokens"], answer["token_frames"]
    return list(zip(tokens[0].tolist(), frames[0].tolist(), strict=True))


# --- the modules ---


@pytest.mark.parametrize(("lookahead", "left"), [(0, 16), (1, 16), (3, 18), (6, 21), (13, 70)])
def test_every_lookahead_gives_the_tokens_of_generate(lookahead: int, left: int) -> None:
    """Also where attention looks back a number of frames that is no multiple of a chunk."""
    model = tiny(left=left)
    whole = first_length(lookahead) + 8 * FACTOR * (lookahead + 1)
    for stream, length in enumerate((whole, whole - 1, whole + 5, 3)):
        mel, expected = features(stream, length), []
        chunks = Chunks(lookahead, FACTOR)
        encoded = Encoded(chunks.frames, 32, torch.float32)
        listen, speak = Listen(model, chunks, Extraction(), encoded), Speak(model, encoded)
        tokens: Tokens = []
        with torch.no_grad():
            for chunk, valid in feed(mel, lookahead):
                listen.encode(chunk, torch.tensor([valid]))
                done = False
                while not done:
                    token, frame, last = speak()
                    tokens += [(int(token), int(frame))] if token >= 0 else []
                    done = bool(last)
        reference = streamed if length == whole else offline
        expected = reference(model, mel, lookahead)
        assert tokens == expected
        assert len(tokens) > length / 20 or length < 10


@pytest.mark.parametrize("lookahead", [0, 3])
def test_features_are_those_of_the_extractor(lookahead: int) -> None:
    for stream, length in enumerate((20000, 16000, 1000, 161)):
        audio, chunks = speech(stream, length), Chunks(lookahead, FACTOR)
        module = LogMel(Extraction(), BINS, chunks)
        assert (module.lead, module.samples) == (LEAD, HOP * chunks.features)
        frames = []
        for chunk, valid in feed_audio(audio, lookahead):
            mel, count = module(chunk, torch.tensor([valid]))
            frames.append(mel[:, : int(count)])
        result = torch.cat(frames, 1)[:, chunks.front :]
        torch.testing.assert_close(result, log_mel(audio), rtol=0, atol=2e-4)


# --- the engine ---


def test_three_interleaved_streams_get_the_tokens_of_generate(
    driver: StepDriver, model: NemotronAsrStreamingForRNNT
) -> None:
    """They start at different calls and end with chunks of different lengths."""
    lengths = {1: 300 + 8 * CHUNK, 2: 1999 + 4 * CHUNK, 3: 6 * CHUNK - LEAD}
    audio = {stream: speech(stream, length) for stream, length in lengths.items()}
    sent = {stream: list(feed_audio(samples, LOOKAHEAD)) for stream, samples in audio.items()}
    tokens: dict[int, Tokens] = {stream: [] for stream in audio}
    for place in range(12):
        requests = []
        for stream, chunks in sent.items():
            index = place - stream + 1
            if 0 <= index < len(chunks):
                chunk, valid = chunks[index]
                inputs = {"audio": chunk, "length": torch.tensor([[valid]])}
                end = index == len(chunks) - 1
                requests.append(Request(stream, index == 0, end, inputs))
        for request, answer in zip(requests, driver.run(requests), strict=True):
            tokens[int(request.sequence_id)] += pairs(answer)
    for stream, samples in audio.items():
        assert tokens[stream] == offline(model, log_mel(samples), LOOKAHEAD)
    assert tokens[3] == streamed(model, log_mel(audio[3]), LOOKAHEAD)
    assert len({token for stream in tokens.values() for token, _ in stream}) > 3


def test_encoded_frames_are_those_of_transformers(
    driver: StepDriver, model: NemotronAsrStreamingForRNNT
) -> None:
    audio = speech(7, 700 + 4 * CHUNK)
    mel = log_mel(audio)
    with torch.no_grad():
        expected = model.get_audio_features(input_features=mel, num_lookahead_tokens=LOOKAHEAD)
    frames = []
    for place, (chunk, valid) in enumerate(feed_audio(audio, LOOKAHEAD)):
        inputs = {"audio": chunk, "length": torch.tensor([[valid]])}
        [answer] = driver.run([Request(1, place == 0, False, inputs)])
        assert not isinstance(answer, RequestError), answer
        frames.append(answer["encoded"][0, : int(answer["num_frames"])])
    torch.testing.assert_close(
        torch.cat(frames), expected.pooler_output[0, : len(torch.cat(frames))], rtol=0, atol=1e-3
    )


def test_what_a_stream_keeps_does_not_grow(folder: Path) -> None:
    manifest = Manifest.load(folder)
    assert manifest.capacity is None
    assert [program.name for program in manifest.programs] == ["listen", "speak"]
    assert manifest.program("speak").read_only == tuple(
        f"encoded_{name}" for name in ("frames", "num_frames", "seen")
    )
    assert manifest.built_with["lookahead"] == str(LOOKAHEAD)


def test_a_wrong_length_is_refused(driver: StepDriver) -> None:
    for length in (0, CHUNK + 1):
        inputs = {"audio": torch.zeros(1, CHUNK), "length": torch.tensor([[length]])}
        [answer] = driver.run([Request(1, True, True, inputs)])
        assert isinstance(answer, RequestError)
        assert answer.code is Code.VALUE_RANGE


# --- builds that are refused ---


def test_a_lookahead_the_model_was_not_trained_with_is_refused(
    source: Path, tmp_path: Path
) -> None:
    printed = build(source, tmp_path / "model", "--lookahead", "3")
    assert "the lookahead is 3" in printed
    assert "was trained with [0, 1, 6, 13]: choose one of them" in printed.replace("\n", " ")
    assert not (tmp_path / "model").exists()


def test_the_processor_says_which_lookaheads_there_are(source: Path, tmp_path: Path) -> None:
    for path in source.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = tmp_path / "processor_config.json"
    config.write_text('{"supported_num_lookahead_tokens": [3, 0]}')
    printed = build(tmp_path, tmp_path / "model", "--lookahead", "1")
    assert "trained with [0, 3]" in printed.replace("\n", " ")
    config.write_text("[")
    assert "processor_config.json cannot be read" in build(tmp_path, tmp_path / "model")


def test_sizes_of_token_sequences_are_refused(source: Path, tmp_path: Path) -> None:
    printed = build(source, tmp_path / "model", "--min-capacity", "5")
    assert "a stream of speech keeps what its model looks back to" in printed.replace("\n", " ")
