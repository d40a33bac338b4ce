"""Every decoder of the survey as a network with plugins, which TensorRT's engines are.

The survey itself has networks of other mechanisms, which TensorRT for RTX compiles. The plugins
compute with the operators of the CPU (`support.plugin_networks`).
"""

import pytest
import torch
from decoders.configs import CONFIGS, FORWARD, make_model
from decoders.survey import (
    CAPACITY,
    CHUNK,
    PROMPTS,
    ROWS,
    TOKENS,
    Decoded,
    compare,
    decode_forward,
    decode_generate,
    prompt,
)
from inplace.trt import TensorRT
from inplace_builder import DecoderOptions, capture_decoder
from inplace_builder.capture.checkpoint import quiet
from inplace_builder.errors import BuildError
from support.plugin_decoders import TwoSequences
from support.plugin_networks import tensorrt_with_plugins

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def tensorrt() -> TensorRT:
    return tensorrt_with_plugins()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_network_with_plugins_is_equal_to_generate(tensorrt: TensorRT, name: str) -> None:
    with quiet():
        model = make_model(name)
        if getattr(model.config, "attn_logit_softcapping", None):
            model.set_attn_implementation("eager")  # the default one ignores it
    vocabulary: int = model.config.get_text_config(decoder=True).vocab_size
    prompts = [prompt(seed, length, vocabulary) for seed, length in enumerate(PROMPTS[1:])]
    decode = decode_forward if name in FORWARD else decode_generate
    try:
        with quiet():
            capture = capture_decoder(model, DecoderOptions(CAPACITY, ROWS, CHUNK))
            if capture.program.lookahead:
                capture = capture_decoder(model, DecoderOptions(CAPACITY, ROWS, max(PROMPTS)))
    except BuildError as error:
        pytest.skip(str(error))
    expected = [decode(model, each) for each in prompts]
    verdict, difference = compare(
        expected, _decoded(TwoSequences(capture, tensorrt), prompts, capture.program.chunk)
    )
    assert verdict == "equal", difference


def _decoded(sequences: TwoSequences, prompts: list[list[int]], chunk: int) -> list[Decoded]:
    """Both prompts in chunks; the shorter one is decoded beside the other's last chunks."""
    tokens = [list(each) for each in prompts]
    logits: list[list[torch.Tensor]] = [[], []]
    while min(map(len, logits)) < TOKENS:
        parts = [each[at : at + chunk] for each, at in zip(tokens, sequences.lengths, strict=True)]
        outputs = sequences.step(*parts)
        for row in (0, 1):
            if sequences.lengths[row] == len(tokens[row]):
                tokens[row].append(int(outputs[row]["next_token"]))
                logits[row].append(outputs[row]["logits"].flatten())
    return [
        Decoded(each[len(given) :][:TOKENS], torch.stack(scores[:TOKENS]))
        for each, given, scores in zip(tokens, prompts, logits, strict=True)
    ]
