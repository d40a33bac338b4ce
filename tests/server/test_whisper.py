"""Whisper as a stream on a real tritonserver: clients at once, and the command `transcribe`."""

import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import soundfile
from inplace.client import Client, RefusedError, Sequence
from inplace.openai import Frontend, Limits
from inplace_builder.__main__ import app
from inplace_builder.tools.tritonserver import TritonServer
from support.engines import Engines
from support.faults import eventually
from support.fronts import running
from support.pool import Deployment, ServerPool
from support.whisper import (
    RATE,
    SECONDS,
    Samples,
    audio,
    generated,
    tiny_whisper,
    whisper_engine,
    whisper_tokenizer,
)
from transformers import WhisperForConditionalGeneration
from typer.testing import CliRunner

pytestmark = pytest.mark.server

MODEL, CLIENTS = "whisper", 3


@pytest.fixture(scope="module")
def model() -> WhisperForConditionalGeneration:
    return tiny_whisper()


@pytest.fixture(scope="module")
def server(pool: ServerPool, engines: Engines) -> Iterator[TritonServer]:
    with pool.serve(Deployment(whisper_engine(engines))) as running:
        yield running


def test_clients_at_once_get_the_tokens_of_generate(
    server: TritonServer, model: WhisperForConditionalGeneration
) -> None:
    together = threading.Barrier(CLIENTS)
    options = {"sample_rate": RATE, "timestamps": True}

    def transcribed(number: int) -> list[list[int]]:
        results = []
        with Client(server.grpc_url) as client, Sequence(client, MODEL) as sequence:
            for window in range(3):
                together.wait(60)
                samples = audio(number + CLIENTS * window)
                outputs = sequence.step({"audio": samples}, parameters=options)
                results.append(outputs["tokens"].reshape(-1).tolist())
        return results

    with ThreadPoolExecutor(CLIENTS) as threads:
        results = list(threads.map(transcribed, range(CLIENTS)))
    for number, windows in enumerate(results):
        for window, tokens in enumerate(windows):
            samples = audio(number + CLIENTS * window)
            assert tokens == generated(model, samples, {"timestamps": True})


def test_tokens_and_text_come_one_after_the_other(server: TritonServer) -> None:
    with Client(server.grpc_url) as client, Sequence(client, MODEL) as sequence:
        given = {"audio_int16": (audio(0) * 32767).astype(np.int16)}
        responses = list(sequence.stream(given, parameters={"sample_rate": RATE, "language": "de"}))
    assert len(responses) > 3
    assert [bool(each["finish_reason"][0]) for each in responses] == [
        *[False] * (len(responses) - 1),
        True,
    ]
    tokens = [token for each in responses for token in each["tokens"].tolist()]
    first = whisper_tokenizer().convert_tokens_to_ids("<|0.00|>")
    text = "".join(each["text_output"][0].decode() for each in responses)
    assert whisper_tokenizer().decode([token for token in tokens if token < first]).startswith(text)


def test_audio_that_does_not_fit_is_refused_by_the_server(server: TritonServer) -> None:
    with Client(server.grpc_url) as client, Sequence(client, MODEL) as sequence:
        for samples, rate, text in (
            (audio(0), 44100, "takes 16000: resample it"),
            (audio(0, SECONDS + 0.5), RATE, "more than the 16000"),
            (np.full(100, np.nan, np.float32), RATE, "from nan to nan"),
        ):
            with pytest.raises(RefusedError, match=text):
                sequence.step({"audio": samples}, parameters={"sample_rate": rate})


def test_the_command_prints_the_words_of_a_recording(
    server: TritonServer, model: WhisperForConditionalGeneration, tmp_path: Path
) -> None:
    path = tmp_path / "recording.wav"
    samples = audio(4)
    soundfile.write(path, samples, RATE, subtype="FLOAT")
    command = ["transcribe", server.grpc_url, MODEL, str(path), "--language", "fr"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    tokens = generated(model, samples, {"language": "fr"})
    first = whisper_tokenizer().convert_tokens_to_ids("<|0.00|>")
    text = whisper_tokenizer().decode([token for token in tokens if token < first])
    assert result.output.strip("\n") == text
    wrong = CliRunner().invoke(app, ["transcribe", server.grpc_url, "other", str(path)])
    assert wrong.exit_code == 1


def recording(samples: Samples, rate: int = RATE, channels: int = 1) -> tuple[str, bytes]:
    file = io.BytesIO()
    soundfile.write(file, np.stack([samples] * channels, 1), rate, format="WAV", subtype="FLOAT")
    return "recording.wav", file.getvalue()


def test_the_openai_front_end_transcribes(
    server: TritonServer, model: WhisperForConditionalGeneration, pool: ServerPool
) -> None:
    samples = audio(4)
    tokens = generated(model, samples, {"language": "fr"})
    first = whisper_tokenizer().convert_tokens_to_ids("<|0.00|>")
    text = whisper_tokenizer().decode([token for token in tokens if token < first])
    limits = Limits(audio_seconds=2 * SECONDS, audio_bytes=1 << 20)
    frontend = Frontend([server.grpc_url], pool.repository, limits=limits)
    with running(frontend) as front, front.client() as client:
        create = client.audio.transcriptions.create
        options: Any = {"model": MODEL, "language": "fr"}
        whole = create(**options, file=recording(samples, channels=2))
        assert whole.text == text
        assert whole.usage is not None
        assert whole.usage.to_dict() == {"type": "duration", "seconds": SECONDS}
        events = list(create(**options, file=recording(samples), stream=True))
        assert "".join(event.delta for event in events[:-1]) == text
        assert events[-1].text == text
        plain = create(**options, file=recording(samples), response_format="text")
        assert plain == text
        request_ids = {}
        for file, more, message in (
            (recording(samples, 44100), {}, "resample it"),
            (recording(audio(0, 3 * SECONDS)), {}, "longer than 2 s"),
            (recording(samples, channels=9), {}, "at most 8"),
            (("a.wav", b"no sound"), {}, "cannot be read as audio"),
            (recording(samples), {"language": "xx"}, "xx"),
            (recording(samples), {"prompt": "names"}, "not supported"),
            (recording(samples), {"extra_body": {"speed": 2}}, "not one that this server knows"),
        ):
            with pytest.raises(openai.BadRequestError, match=message) as refused:
                create(**(options | more), file=file)
            request_ids[message] = refused.value.response.headers["x-request-id"]
        with pytest.raises(openai.BadRequestError, match="/v1/audio/transcriptions"):
            client.completions.create(model=MODEL, prompt="a")
        with pytest.raises(openai.APIStatusError, match="more than 1048576 bytes") as caught:
            create(**options, file=("a.wav", b"0" * (1 << 20)))
        assert caught.value.status_code == 413
        assert front.send("/v1/audio/transcriptions", b"{}")[0] == 415
        broken = front.send(
            "/v1/audio/transcriptions", b"--", Content_Type="multipart/form-data; boundary=x"
        )
        assert broken[0] == 400
    log = server.log
    assert log is not None
    known = f"request={request_ids['xx']}-0"  # the backend has refused the first part
    eventually(lambda: known in log.read_text(errors="replace"), known)
