"""Faults in the middle of a loop of hundreds of calls, on a real tritonserver.

A Whisper that never chooses the end token decodes each window up to its last position.
"""

import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inplace.client import Client, Sequence
from inplace_builder import BuildOptions, build_model
from inplace_builder.tools.tritonserver import TritonServer
from support.faults import FORGOTTEN, eventually
from support.observed import samples
from support.pool import Deployment, ServerPool
from support.vocabulary import tiny_tokenizer
from support.whisper import (
    IDS,
    KEPT,
    RATE,
    Samples,
    audio,
    extractor,
    generated,
    generation_config,
    tiny_whisper,
    whisper_tokenizer,
)
from transformers import WhisperForConditionalGeneration
from tritonclient.grpc import InferenceServerClient, InferInput

pytestmark = pytest.mark.long

MODEL, SLOTS, TOKENS = "endless", 3, 400


@pytest.fixture(scope="module")
def model() -> WhisperForConditionalGeneration:
    config = tiny_whisper(multilingual=False).config
    config.max_target_positions = TOKENS + 8
    model = WhisperForConditionalGeneration(config).eval()
    text = [token for token in range(tiny_tokenizer().get_vocab_size()) if token % KEPT]
    model.generation_config = generation_config(
        multilingual=False, max_length=TOKENS, suppress_tokens=[*text, *IDS.values()]
    )
    return model


@pytest.fixture(scope="module")
def server(
    pool: ServerPool,
    model: WhisperForConditionalGeneration,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[TritonServer]:
    source: Path = tmp_path_factory.mktemp("endless-source")
    for part in (model, extractor(), whisper_tokenizer()):
        part.save_pretrained(source)
    folder = tmp_path_factory.mktemp("endless") / MODEL
    build_model(source, folder, BuildOptions(slots=SLOTS, max_rows=SLOTS, serve="stream"))
    with pool.serve(Deployment(folder)) as running:
        yield running


class Speaker:
    """A client over raw gRPC that reads the responses one by one."""

    def __init__(self, server: TritonServer, sequence: int) -> None:
        self.sequence = sequence
        self.client = InferenceServerClient(server.grpc_url)
        self.responses: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self.client.start_stream(lambda result, error: self.responses.put((result, error)))

    def send(self, window: Samples, *, start: bool = False, end: bool = False) -> None:
        tensor = InferInput("audio", [1, len(window)], "FP32")
        tensor.set_data_from_numpy(window[None])
        self.client.async_stream_infer(
            MODEL,
            [tensor],
            sequence_id=self.sequence,
            sequence_start=start,
            sequence_end=end,
            parameters={"sample_rate": RATE},
        )

    def receive(self) -> tuple[list[int], str]:
        """The tokens of the next response, and why it is the last; or an error."""
        result, error = self.responses.get(timeout=120)
        if error is not None:
            return [], error.message()
        tokens, reason = (result.as_numpy(name) for name in ("tokens", "finish_reason"))
        if tokens is None:  # the answer to an END without audio
            return [], "ended"
        return tokens[0].tolist(), reason[0, 0].decode()

    def window(self) -> list[int]:
        """The tokens of a whole window."""
        tokens, reason = self.receive()
        while not reason:
            more, reason = self.receive()
            tokens += more
        assert reason == "done"
        return tokens

    def close(self, *, vanishes: bool = False) -> None:
        self.client.stop_stream(cancel_requests=vanishes)
        self.client.close()


def ended(server: TritonServer, reason: str) -> float:
    return sum(
        value
        for name, labels, value in samples(server)
        if name == "inplace_sequences_ended_total"
        and (labels["model"], labels["reason"]) == (MODEL, reason)
    )


def test_clients_that_vanish_in_the_middle_free_their_slots_and_disturb_nobody(
    server: TritonServer, model: WhisperForConditionalGeneration
) -> None:
    gone, staying = [Speaker(server, number) for number in (1, 2)], Speaker(server, 3)
    for number, speaker in enumerate([*gone, staying]):
        speaker.send(audio(number), start=True, end=number == 2)
    for speaker in gone:
        while not speaker.receive()[0]:  # its loop has begun
            pass
        speaker.close(vanishes=True)
    eventually(lambda: ended(server, "cancelled") == 2, "both are cancelled", 10.0)
    assert staying.window() == generated(model, audio(2))
    staying.close()

    def transcribed(number: int) -> list[int]:
        with Client(server.grpc_url) as client, Sequence(client, MODEL, timeout=120.0) as sequence:
            outputs = sequence.step(
                {"audio": audio(number)}, end=True, parameters={"sample_rate": RATE}
            )
        return [int(token) for token in outputs["tokens"].reshape(-1)]

    with ThreadPoolExecutor(SLOTS) as threads:  # all slots are free again
        results = list(threads.map(transcribed, range(SLOTS)))
    assert results == [generated(model, audio(number)) for number in range(SLOTS)]


def test_an_end_in_the_middle_waits_for_the_window(
    server: TritonServer, model: WhisperForConditionalGeneration
) -> None:
    speaker = Speaker(server, 11)
    speaker.send(audio(5), start=True)
    first, _ = speaker.receive()
    speaker.send(np.zeros(0, np.float32), end=True)
    tokens, reasons = first, list[str]()
    while len(reasons) < 2:
        more, reason = speaker.receive()
        tokens += more
        reasons += [reason] * bool(reason)
    # answers to two requests come in any order
    assert sorted(reasons) == ["done", "ended"]
    assert tokens == generated(model, audio(5))
    speaker.send(audio(5))
    assert FORGOTTEN in speaker.receive()[1]
    speaker.close()


def test_a_window_that_fills_the_decoder_ends_and_another_one_follows(
    server: TritonServer, model: WhisperForConditionalGeneration
) -> None:
    speaker = Speaker(server, 21)
    for number in (6, 7, 8):
        speaker.send(audio(number), start=number == 6, end=number == 8)
        tokens = speaker.window()
        assert tokens == generated(model, audio(number))
        assert len(tokens) > TOKENS - 8
    speaker.close()
