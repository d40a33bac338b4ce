"""A streaming speech model on a real tritonserver: clients that send pieces of any length."""

import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import soundfile
from inplace.client import RefusedError, Sequence
from inplace.openai import Frontend
from inplace_builder import BuildOptions, write_engine
from inplace_builder.capture.nemotron_asr_streaming import capture_nemotron_asr_streaming
from inplace_builder.served.decoder import save_tokenizer
from inplace_builder.tools.tritonserver import TritonServer
from support.fronts import running
from support.nemotron import (
    BLANK,
    FACTOR,
    HOP,
    SAMPLE_RATE,
    log_mel,
    offline,
    speech,
    tiny_nemotron,
)
from support.pool import Deployment, ServerPool
from tokenizers import Tokenizer, decoders, models
from transformers import NemotronAsrStreamingForRNNT, PreTrainedTokenizerFast
from tritonclient.grpc import InferenceServerClient

pytestmark = pytest.mark.server

MODEL, TEXT_MODEL, LOOKAHEAD, STREAMS = "nemotron", "nemotron_text", 1, 3
CHUNK = HOP * FACTOR * (LOOKAHEAD + 1)
PARAMETERS = {"sample_rate": SAMPLE_RATE}


@pytest.fixture(scope="module")
def model() -> NemotronAsrStreamingForRNNT:
    return tiny_nemotron()


@pytest.fixture(scope="module")
def server(
    pool: ServerPool,
    model: NemotronAsrStreamingForRNNT,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[TritonServer]:
    folder = tmp_path_factory.mktemp("speech")
    captured = capture_nemotron_asr_streaming(model, LOOKAHEAD, 4)
    write_engine(captured, folder / MODEL, BuildOptions(slots=4, max_rows=4))
    write_engine(
        captured,
        folder / TEXT_MODEL,
        BuildOptions(slots=4, max_rows=4, serve="stream"),
        extras=lambda path: save_tokenizer(tokenizer(), path),
    )
    with pool.serve(Deployment(folder / MODEL), Deployment(folder / TEXT_MODEL)) as server:
        yield server


def tokenizer() -> PreTrainedTokenizerFast:
    """A word for each token."""
    words = {f"\u0120w{token}": token for token in range(BLANK)}
    made = Tokenizer(models.WordLevel(words))
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def test_streams_get_the_tokens_of_generate(
    server: TritonServer, model: NemotronAsrStreamingForRNNT
) -> None:
    """One in integers; one with pieces between that are refused, which change nothing."""
    together = threading.Barrier(STREAMS)
    audio = [speech(number, 5 * CHUNK + 700 * number).clamp(-1, 1) for number in range(STREAMS)]
    audio[1] = (audio[1] * 32767).round() / 32768

    def stream(number: int) -> list[int]:
        tokens: list[int] = []
        parts = audio[number].split([CHUNK // 3, 2 * CHUNK, CHUNK][number])
        with InferenceServerClient(server.grpc_url) as client, Sequence(client, MODEL) as sequence:
            together.wait(60)
            for place, part in enumerate(parts):
                inputs = {"audio": part.numpy()}
                if number == 1:
                    inputs = {"audio_int16": (part * 32768).short().numpy()}
                if number == 2 and place == 1:
                    for wrong, rate, text in (
                        (inputs, 8000, "takes 16000: resample"),
                        ({"audio": np.full(9, np.nan, np.float32)}, SAMPLE_RATE, "from nan to nan"),
                        ({"audio": part.numpy().astype(np.int16)}, SAMPLE_RATE, "INT16|int16"),
                        (
                            inputs | {"audio_int16": part.short().numpy()},
                            SAMPLE_RATE,
                            "audio_int16",
                        ),
                    ):
                        with pytest.raises(RefusedError, match=text):
                            sequence.step(wrong, parameters={"sample_rate": rate})
                last = place == len(parts) - 1
                outputs = sequence.step(inputs, end=last, parameters=PARAMETERS)
                tokens += np.asarray(outputs["tokens"]).reshape(-1).tolist()
        return tokens

    with ThreadPoolExecutor(STREAMS) as threads:
        results = list(threads.map(stream, range(STREAMS)))
    for result, samples in zip(results, audio, strict=True):
        expected = offline(model, log_mel(samples), LOOKAHEAD)
        assert result == [token for token, _ in expected]
    assert len({token for result in results for token in result}) > 3


def test_the_openai_front_end_transcribes_a_stream(
    server: TritonServer, model: NemotronAsrStreamingForRNNT, pool: ServerPool
) -> None:
    """It is sent in parts of five seconds, which are one stream to the model."""
    audio = speech(4, 6 * SAMPLE_RATE).clamp(-1, 1)
    tokens = [token for token, _ in offline(model, log_mel(audio), LOOKAHEAD)]
    text = "".join(f" w{token}" for token in tokens)
    content = io.BytesIO()
    soundfile.write(content, audio.numpy(), SAMPLE_RATE, format="WAV", subtype="FLOAT")
    file = "recording.wav", content.getvalue()
    with (
        running(Frontend([server.grpc_url], pool.repository)) as front,
        front.client() as client,
    ):
        create = client.audio.transcriptions.create
        whole = create(model=TEXT_MODEL, file=file)
        assert whole.text == text
        assert len(tokens) > 20
        events = list(create(model=TEXT_MODEL, file=file, stream=True))
        deltas = [event.delta for event in events if event.type == "transcript.text.delta"]
        assert len(deltas) > 5
        assert "".join(deltas) == text
        with pytest.raises(openai.NotFoundError, match="there is no model"):
            create(model=MODEL, file=file)  # it is served step by step
        with pytest.raises(openai.BadRequestError, match="language"):
            create(model=TEXT_MODEL, file=file, language="de")
