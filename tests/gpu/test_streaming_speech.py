"""A streaming speech model on a GPU: the tokens of transformers' ``generate`` on the CPU."""

from pathlib import Path

import pytest
import torch
from inplace.drivers import StepDriver
from inplace.errors import RequestError
from inplace.runtime.requests import Request
from inplace.runtime.schedules import ScheduledInstance
from inplace_builder import BuildOptions, write_engine
from inplace_builder.capture.nemotron_asr_streaming import capture_nemotron_asr_streaming
from inplace_builder.choices import EngineKind
from support.nemotron import (
    FACTOR,
    HOP,
    SAMPLE_RATE,
    Tokens,
    log_mel,
    offline,
    speech,
    tiny_nemotron,
)

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use; there is none here"
)


@pytest.mark.parametrize("engine", ["torch", "tensorrt"])
def test_interleaved_streams_get_the_tokens_of_generate(engine: EngineKind, tmp_path: Path) -> None:
    if engine == "tensorrt":
        pytest.importorskip("tensorrt", reason="needs TensorRT")
    model, lookahead = tiny_nemotron(layers=2), 3
    options = BuildOptions(slots=4, max_rows=4, device="cuda", engine=engine)
    write_engine(capture_nemotron_asr_streaming(model, lookahead, 4), tmp_path / "model", options)
    instance, chunk = ScheduledInstance.open(tmp_path / "model" / "1"), HOP * FACTOR * 4
    audio = {stream: speech(stream, 8 * chunk + 1000 * stream) for stream in (1, 2, 3)}
    pieces = {stream: audio[stream].split(chunk // 2 * stream) for stream in audio}
    tokens: dict[int, Tokens] = {stream: [] for stream in audio}
    driver = StepDriver(instance)
    try:
        for place in range(max(map(len, pieces.values()))):
            requests = [
                Request(
                    stream,
                    place == 0,
                    place == len(parts) - 1,
                    {"audio": parts[place][None]},
                    parameters={"sample_rate": SAMPLE_RATE},
                )
                for stream, parts in pieces.items()
                if place < len(parts)
            ]
            for request, answer in zip(requests, driver.run(requests), strict=True):
                assert not isinstance(answer, RequestError), answer
                pair = (answer[name][0].tolist() for name in ("tokens", "token_frames"))
                tokens[int(request.sequence_id)] += zip(*pair, strict=True)
    finally:
        driver.close()
    for stream, samples in audio.items():
        assert tokens[stream] == offline(model, log_mel(samples), lookahead)
    assert len({token for stream in tokens.values() for token, _ in stream}) > 3
