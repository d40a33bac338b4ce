"""Decoders as transformers exports them: every layer recognised, packed, verified, and as good as generate."""

from pathlib import Path

import pytest
from exported_decoders import FAMILIES, PROMPTS, WINDOW, WINDOWED, decoder, exported, rows_say
from inplace.specs import Update
from inplace_builder.build import BuildOptions, write_engine
from inplace_builder.capture import DecoderOptions, capture_exported_decoder
from models import greedy, open_instance
from state_modules import operators

CAPACITY, CHUNK, TOKENS = 40, 6, 20
OPTIONS = DecoderOptions(CAPACITY, max_rows=8, chunk=CHUNK)


@pytest.mark.parametrize(
    ("family", "dynamic"), [*((name, True) for name in FAMILIES), ("llama", False), ("gemma2", False), ("gpt2", False)]
)
def test_eight_ragged_rows_say_what_generate_says(family: str, dynamic: bool, tmp_path: Path) -> None:
    """Chunks of six of programs that transformers exported for one token too, and 37 positions where windows have 8."""
    model = decoder(family)
    capture = capture_exported_decoder(exported(model, dynamic=dynamic), OPTIONS)
    assert operators(capture) == {"attention": model.config.num_hidden_layers, "sample": 1}
    rings = [state for state in capture.states if state.update is Update.RING]
    assert len(rings) == 2 * WINDOWED.get(family, 0)
    assert all(state.shape[1] == WINDOW + CHUNK - 1 for state in rings)
    write_engine(capture, tmp_path / family, BuildOptions(capacity=CAPACITY, chunk=CHUNK, slots=9, max_rows=8))
    instance = open_instance(tmp_path / family)
    assert rows_say(instance, PROMPTS, TOKENS) == [greedy(model, prompt, TOKENS) for prompt in PROMPTS]
