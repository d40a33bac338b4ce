"""Streams of speech of 500 chunks: the tokens stay those of ``generate``, memory stays the same."""

import random
from pathlib import Path

import pytest
import torch
from inplace.drivers import StepDriver
from inplace.errors import RequestError
from inplace.runtime.requests import Request
from inplace.runtime.schedules import ScheduledInstance
from inplace_builder import BuildOptions, write_engine
from inplace_builder.capture.nemotron_asr_streaming import capture_nemotron_asr_streaming
from inplace_builder.compare import fill_with_sentinel, same_bits
from support.nemotron import (
    FACTOR,
    HOP,
    LEAD,
    SAMPLE_RATE,
    Tokens,
    log_mel,
    speech,
    streamed,
    tiny_nemotron,
)

pytestmark = pytest.mark.long

CHUNKS, SLOTS, GROWTH = 500, 6, 16 * 2**20
"""Chunks of a stream; slots, of which three are used; bytes by which the process may grow."""


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.parametrize("lookahead", [0, 3])
def test_three_long_streams(lookahead: int, tmp_path: Path) -> None:
    """In pieces of any length, beside slots full of NaN, which stay as they are."""
    model, chunk = tiny_nemotron(layers=2), HOP * FACTOR * (lookahead + 1)
    captured = capture_nemotron_asr_streaming(model, lookahead, SLOTS)
    write_engine(captured, tmp_path / "model", BuildOptions(slots=SLOTS, max_rows=SLOTS))
    instance = ScheduledInstance.open(tmp_path / "model" / "1")
    for tensor in instance.arena.tensors.values():
        fill_with_sentinel(tensor)
    before = {name: tensor.clone() for name, tensor in instance.arena.tensors.items()}
    addresses = instance.arena.addresses()
    audio = {stream: speech(stream, CHUNKS * chunk - LEAD) for stream in (1, 2, 3)}
    tokens: dict[int, Tokens] = {stream: [] for stream in audio}
    sent, sizes = dict.fromkeys(audio, 0), random.Random(0)
    driver, memory = StepDriver(instance), 0
    try:
        while unsent := [stream for stream in audio if sent[stream] < len(audio[stream])]:
            requests = []
            for stream in sizes.sample(unsent, sizes.randint(1, len(unsent))):
                begin = sent[stream]
                piece = audio[stream][begin : begin + sizes.randint(1, 3 * chunk)]
                sent[stream] += len(piece)
                parameters = {"sample_rate": SAMPLE_RATE}
                requests.append(
                    Request(stream, begin == 0, False, {"audio": piece[None]}, "", parameters)
                )
            for request, answer in zip(requests, driver.run(requests), strict=True):
                assert not isinstance(answer, RequestError), answer
                pair = (answer[name][0].tolist() for name in ("tokens", "token_frames"))
                tokens[int(request.sequence_id)] += zip(*pair, strict=True)
            if not memory and min(sent.values()) > CHUNKS * chunk // 5:
                memory = resident_bytes()
        assert resident_bytes() - memory < GROWTH
    finally:
        driver.close()
    assert instance.arena.addresses() == addresses
    used = {instance.table.find(stream).slot for stream in audio}
    for name, tensor in instance.arena.tensors.items():
        for slot in set(range(SLOTS)) - used:
            assert same_bits(tensor[slot], before[name][slot])
    for stream, samples in audio.items():
        assert tokens[stream] == streamed(model, log_mel(samples), lookahead)
        assert len(tokens[stream]) > CHUNKS // 4
        assert len({token for token, _ in tokens[stream]}) > 5
    assert torch.isfinite(instance.arena.tensors["encoded_frames"][list(used)]).all()
