"""A streaming speech model as two networks with plugins on the states' own memory.

They are defined and interpreted as `support.plugin_networks` says; the tokens are transformers'.
"""

import pytest
import torch
from inplace_builder.capture.nemotron_asr_streaming import capture_nemotron_asr_streaming
from inplace_builder.compare import fill_with_sentinel
from support.nemotron import (
    FACTOR,
    HOP,
    Tokens,
    feed_audio,
    log_mel,
    offline,
    speech,
    tiny_nemotron,
)
from support.program_networks import Networks

pytestmark = pytest.mark.slow

LOOKAHEAD = 1


def test_both_networks_give_the_tokens_of_generate() -> None:
    """Two streams, a null row between them, and slots that stay as they are."""
    model = tiny_nemotron()
    networks = Networks(capture_nemotron_asr_streaming(model, LOOKAHEAD, 4))
    slots, length = [3, -1, 1], HOP * FACTOR * (LOOKAHEAD + 1)
    streams = [speech(stream, 300 + 6 * length) for stream in (1, 2)]
    tokens: list[Tokens] = [[], []]
    networks.start(3)
    networks.start(1)
    for one, other in zip(*(feed_audio(audio, LOOKAHEAD) for audio in streams), strict=True):
        rows = [one[0], torch.full_like(one[0], float("nan")), other[0]]
        lengths = torch.tensor([[one[1]], [1], [other[1]]])
        networks.call("encode", slots, audio=torch.cat(rows), length=lengths)
        done = [False, False]
        while not all(done):  # a row that is done is called again, and gives nothing
            result = networks.call("decode", slots)
            for place, row in enumerate((0, 2)):
                token, frame = int(result["tokens"][row]), int(result["token_frames"][row])
                assert token < 0 or not done[place]
                tokens[place] += [(token, frame)] if token >= 0 else []
                done[place] = bool(result["done"][row])
    assert tokens == [offline(model, log_mel(audio), LOOKAHEAD) for audio in streams]
    assert len({token for stream in tokens for token, _ in stream}) > 2
    others = torch.empty_like(networks.memory["encoded_frames"][[0, 2]])
    fill_with_sentinel(others)
    torch.testing.assert_close(
        networks.memory["encoded_frames"][[0, 2]], others, equal_nan=True, rtol=0, atol=0
    )
