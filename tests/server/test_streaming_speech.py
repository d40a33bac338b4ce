"""A streaming speech model on a real tritonserver: clients that send pieces of any length."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from inplace.client import RefusedError, Sequence
from inplace_builder import BuildOptions, write_engine
from inplace_builder.capture.nemotron_asr_streaming import capture_nemotron_asr_streaming
from inplace_builder.tools.tritonserver import TritonServer
from support.nemotron import FACTOR, HOP, SAMPLE_RATE, log_mel, offline, speech, tiny_nemotron
from support.pool import Deployment, ServerPool
from transformers import NemotronAsrStreamingForRNNT
from tritonclient.grpc import InferenceServerClient

pytestmark = pytest.mark.server

MODEL, LOOKAHEAD, STREAMS = "nemotron", 1, 3
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
    folder = tmp_path_factory.mktemp("speech") / MODEL
    captured = capture_nemotron_asr_streaming(model, LOOKAHEAD, 4)
    write_engine(captured, folder, BuildOptions(slots=4, max_rows=4))
    with pool.serve(Deployment(folder)) as running:
        yield running


def test_streams_get_the_tokens_of_generate(
    server: TritonServer, model: NemotronAsrStreamingForRNNT
) -> None:
    """One in integers; one with a piece of a wrong rate between, which changes nothing."""
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
                    with pytest.raises(RefusedError, match="takes 16000: resample"):
                        sequence.step(inputs, parameters={"sample_rate": 8000})
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
