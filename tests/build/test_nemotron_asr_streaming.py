"""transformers' streaming speech model as two programs: the tokens are those of ``generate``."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from inplace.drivers import StepDriver, StreamDriver, TokenizerConfig, engine_thread
from inplace.errors import Code, RequestError
from inplace.parameters import Parameter
from inplace.runtime.requests import Request
from inplace.runtime.schedules import ScheduledInstance
from inplace.schema.served import Manifest
from inplace_builder.__main__ import app
from inplace_builder.capture.nemotron_asr_streaming import (
    ChunkSizes,
    Encoded,
    Extraction,
    NemotronDecode,
    NemotronEncode,
    NemotronLogMel,
)
from inplace_builder.compare import fill_with_sentinel
from support.nemotron import (
    BINS,
    FACTOR,
    HOP,
    LEAD,
    SAMPLE_RATE,
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
from support.streaming import StreamClient
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
    """Also where attention looks back a number of frames that is not a multiple of a chunk."""
    model = tiny(left=left)
    whole = first_length(lookahead) + 8 * FACTOR * (lookahead + 1)
    for stream, length in enumerate((whole, whole - 1, whole + 5, 3)):
        mel, expected = features(stream, length), []
        chunks = ChunkSizes(lookahead, FACTOR)
        encoded = Encoded(chunks.frames, 32, torch.float32)
        encode, decode = (
            NemotronEncode(model, chunks, Extraction(), encoded),
            NemotronDecode(model, encoded),
        )
        tokens: Tokens = []
        with torch.no_grad():
            for chunk, valid in feed(mel, lookahead):
                encode.encode_features(chunk, torch.tensor([valid]))
                done = False
                while not done:
                    token, frame, last = decode()
                    tokens += [(int(token), int(frame))] if token >= 0 else []
                    done = bool(last)
        reference = streamed if length == whole else offline
        expected = reference(model, mel, lookahead)
        assert tokens == expected
        assert len(tokens) > length / 20 or length < 10


@pytest.mark.parametrize("lookahead", [0, 3])
def test_features_are_those_of_the_extractor(lookahead: int) -> None:
    for stream, length in enumerate((20000, 16000, 1000, 161)):
        audio, chunks = speech(stream, length), ChunkSizes(lookahead, FACTOR)
        module = NemotronLogMel(Extraction(), BINS, chunks)
        assert (module.lead, module.samples) == (LEAD, HOP * chunks.features)
        frames = []
        for chunk, valid in feed_audio(audio, lookahead):
            mel, count = module(chunk, torch.tensor([valid]))
            frames.append(mel[:, : int(count)])
        result = torch.cat(frames, 1)[:, chunks.front :]
        torch.testing.assert_close(result, log_mel(audio), rtol=0, atol=2e-4)


# --- the engine ---


def request(stream: int, samples: Tensor, *, start: bool = False, end: bool = False) -> Request:
    parameters: dict[str, Parameter] = {"sample_rate": SAMPLE_RATE}
    return Request(stream, start, end, {"audio": samples[None]}, parameters=parameters)


def test_three_interleaved_streams_get_the_tokens_of_generate(
    driver: StepDriver, model: NemotronAsrStreamingForRNNT
) -> None:
    """Each sends its samples in pieces of its own, from less than a chunk to several."""
    audio = {1: speech(1, 300 + 8 * CHUNK), 2: speech(2, 1999 + 4 * CHUNK), 3: speech(3, 9 * CHUNK)}
    pieces = {1: 1000, 2: CHUNK - 1, 3: 3 * CHUNK + 77}
    sent = {stream: samples.split(pieces[stream]) for stream, samples in audio.items()}
    tokens: dict[int, Tokens] = {stream: [] for stream in audio}
    for place in range(max(map(len, sent.values())) + 2):
        requests = []
        for stream, parts in sent.items():
            index = place - stream + 1
            if 0 <= index < len(parts):
                start, end = index == 0, index == len(parts) - 1
                requests.append(request(stream, parts[index], start=start, end=end))
        for each, answer in zip(requests, driver.run(requests), strict=True):
            tokens[int(each.sequence_id)] += pairs(answer)
    for stream, samples in audio.items():
        assert tokens[stream] == offline(model, log_mel(samples), LOOKAHEAD)
    assert len({token for stream in tokens.values() for token, _ in stream}) > 3


def test_whole_chunks_give_the_tokens_of_streaming_generate(
    driver: StepDriver, model: NemotronAsrStreamingForRNNT
) -> None:
    """The first piece is as long as transformers' first chunk: each has its answer at once."""
    audio = speech(5, 6 * CHUNK - LEAD)
    tokens: Tokens = []
    for place, part in enumerate([audio[: CHUNK - LEAD], *audio[CHUNK - LEAD :].split(CHUNK)]):
        [answer] = driver.run([request(5, part, start=place == 0)])
        new = pairs(answer)
        frames = range(place * (LOOKAHEAD + 1), (place + 1) * (LOOKAHEAD + 1))
        assert {frame for _, frame in new} <= set(frames)
        tokens += new
    assert tokens == streamed(model, log_mel(audio), LOOKAHEAD)


def test_encoded_frames_are_those_of_transformers(
    driver: StepDriver, model: NemotronAsrStreamingForRNNT
) -> None:
    audio = speech(7, 700 + 4 * CHUNK - LEAD)
    with torch.no_grad():
        expected = model.get_audio_features(
            input_features=log_mel(audio), num_lookahead_tokens=LOOKAHEAD
        )
    frames = []
    parts = [audio[: CHUNK - LEAD], *audio[CHUNK - LEAD :].split(CHUNK)]
    for place, part in enumerate(parts):
        [answer] = driver.run([request(1, part, start=place == 0, end=place == len(parts) - 1)])
        assert not isinstance(answer, RequestError), answer
        frames.append(answer["encoded"][0, : int(answer["num_frames"])])
    result = torch.cat(frames)
    torch.testing.assert_close(result, expected.pooler_output[0], rtol=0, atol=1e-3)


def test_a_piece_that_completes_no_chunk_is_answered_without_a_call(
    folder: Path, model: NemotronAsrStreamingForRNNT
) -> None:
    instance = ScheduledInstance.open(folder)
    audio = speech(9, CHUNK)
    active = instance.admit(request(1, audio[:5], start=True))
    assert active.finished
    assert active.outputs["tokens"].shape == (1, 0)
    assert int(active.outputs["num_frames"]) == 0
    instance.finish(active)
    # an END without a sample gives what is left; one of a stream that has none gives nothing
    last = instance.admit(request(1, audio[5:]))
    tokens: Tokens = []
    for active in (last, instance.admit(request(1, audio[:0], end=True))):
        while not active.finished:
            instance.step([active])
        tokens += pairs(active.outputs)
        instance.finish(active)
    assert tokens == offline(model, log_mel(audio), LOOKAHEAD)
    active = instance.admit(request(2, audio[:0], start=True, end=True))
    assert active.finished


def test_int16_samples_are_the_same(driver: StepDriver, model: NemotronAsrStreamingForRNNT) -> None:
    audio = (speech(4, 5 * CHUNK).clamp(-1, 1) * 32767).short()
    sent = replace(request(1, audio, start=True, end=True), inputs={"audio_int16": audio[None]})
    [answer] = driver.run([sent])
    assert pairs(answer) == offline(model, log_mel(audio / 32768), LOOKAHEAD)


def test_a_stream_model_answers_pieces_that_complete_no_chunk(
    folder: Path, model: NemotronAsrStreamingForRNNT
) -> None:
    """Several responses for a piece of several chunks, one for a piece of none."""
    instance, audio = ScheduledInstance.open(folder), speech(3, 5 * CHUNK)
    driver = StreamDriver(instance, TokenizerConfig(None), 4, engine_thread())
    client, tokens = StreamClient(driver), list[int]()
    try:
        parts = [audio[:7], audio[7 : 3 * CHUNK], audio[3 * CHUNK :], audio[:0]]
        for place, part in enumerate(parts):
            sent = request(1, part, start=place == 0, end=place == len(parts) - 1)
            channel = client.send(sent, requested_outputs=frozenset({"tokens", "finish_reason"}))
            assert channel.finish_reason == "done"
            tokens += channel.tokens
    finally:
        driver.close()
    expected = offline(model, log_mel(audio), LOOKAHEAD)
    assert tokens == [token for token, _ in expected]


def test_what_a_stream_keeps_does_not_grow(folder: Path) -> None:
    manifest = Manifest.load(folder)
    assert manifest.capacity is None
    assert [program.name for program in manifest.programs] == ["encode", "decode"]
    assert manifest.program("decode").read_only == tuple(
        f"encoded_{name}" for name in ("frames", "num_frames", "seen")
    )
    assert manifest.built_with["lookahead"] == str(LOOKAHEAD)


def test_audio_that_is_none_is_refused_and_the_stream_goes_on(
    driver: StepDriver, model: NemotronAsrStreamingForRNNT
) -> None:
    audio = speech(6, 3 * CHUNK)
    [first] = driver.run([request(1, audio[:CHUNK], start=True)])
    wrong = replace(request(1, audio), parameters={"sample_rate": 8000})
    nan = torch.full((CHUNK,), float("nan"))
    long = torch.zeros(61 * SAMPLE_RATE)
    for refused, code in (
        (wrong, Code.BAD_PARAMETER),
        (request(1, nan), Code.VALUE_RANGE),
        (request(1, long), Code.CAPACITY),
        (request(1, audio[:0]), Code.MISSING_INPUT),
        (replace(request(1, audio), inputs={"audio": audio[None].double()}), Code.BAD_DTYPE),
    ):
        [answer] = driver.run([refused])
        assert isinstance(answer, RequestError)
        assert answer.code is code
    [last] = driver.run([request(1, audio[CHUNK:], end=True)])
    assert pairs(first) + pairs(last) == offline(model, log_mel(audio), LOOKAHEAD)


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
    for option, size in (("capacity", 2048), ("min_capacity", 5), ("chunk", 64)):
        flag = f"--{option.replace('_', '-')}"
        printed = build(source, tmp_path / "model", flag, str(size))
        assert f"['{option}'] are for sequences of tokens" in printed.replace("\n", " ")
