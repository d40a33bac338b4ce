"""Whisper as two networks with plugins on the states' own memory.

They are defined and interpreted as `support.plugin_networks` says; the tokens are transformers'.
"""

import pytest
import torch
from inplace_builder.capture.whisper import capture_whisper
from inplace_builder.compare import fill_with_sentinel
from support.program_networks import Networks
from support.whisper import SECONDS, audio, extractor, generated, tiny_whisper

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_both_networks_give_the_tokens_of_generate() -> None:
    """Two windows with other options, a null row between them, and slots that stay as they are."""
    model = tiny_whisper()
    networks = Networks(capture_whisper(model, extractor(), 4))
    slots = [3, -1, 1]
    options: list[dict[str, object]] = [{"timestamps": True}, {}, {"language": "de"}]
    samples = [audio(0), audio(5) * float("nan"), audio(1, 0.7)]
    padded = torch.zeros(3, SECONDS * 16000)
    for row, each in enumerate(samples):
        padded[row, : len(each)] = torch.from_numpy(each)
    numbers = {
        "language": torch.tensor([[0], [0], [2]]),  # none, or the second of en, de, fr
        "task": torch.zeros(3, 1, dtype=torch.int64),
        "timestamps": torch.tensor([[1], [0], [0]]),
    }
    networks.start(3)
    networks.start(1)
    networks.call("encode", slots, audio=padded, **numbers)
    tokens: list[list[int]] = [[], [], []]
    done = [False, True, False]
    while not all(done):  # a row that is done is called again, and gives nothing
        result = networks.call("decode", slots)
        for row in (0, 2):
            token = int(result["tokens"][row])
            assert token < 0 or not done[row]
            tokens[row] += [token] if token >= 0 else []
            done[row] = bool(result["done"][row])
    for row in (0, 2):
        assert tokens[row] == generated(model, samples[row], options[row])
    assert len(tokens[0]) != len(tokens[2])
    others = torch.empty_like(networks.memory["keys_1"][[0, 2]])
    fill_with_sentinel(others)
    torch.testing.assert_close(
        networks.memory["keys_1"][[0, 2]], others, equal_nan=True, rtol=0, atol=0
    )
