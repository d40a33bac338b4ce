"""A whole encoder-decoder in TensorRT says what transformers says."""

import pytest
import torch
from inplace.trt import TensorRT, load_tensorrt
from inplace_builder.lower import Lowered, compile_network, lower
from torch import Tensor
from whisper_programs import (
    CROSS,
    FRAMES,
    MEL,
    POSITIONS,
    SELF,
    START,
    WhisperProgram,
    decoder_program,
    encoder_program,
    tiny_whisper,
)

pytest.importorskip("tensorrt", reason="needs TensorRT")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use; there is none here")

from engine_runner import PlanRunner  # noqa: E402

ROWS, PROMPT, TOKENS = 2, [START, 7, 11, 5], 32


@pytest.fixture(scope="module")
def tensorrt() -> TensorRT:
    return load_tensorrt("tensorrt")


def _built(program: WhisperProgram, tensorrt: TensorRT) -> tuple[Lowered, PlanRunner]:
    kinds = {state.name: "copy" for state in program.states}
    lowered = lower(program.exported, outputs=program.outputs, states=program.states, kinds=kinds, tensorrt=tensorrt)
    return lowered, PlanRunner(tensorrt, compile_network(lowered, program.profiles))


def _int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _stepped(
    decoder: tuple[Lowered, PlanRunner], ids: list[list[int]], at: int, memory: dict[str, Tensor]
) -> tuple[list[int], dict[str, Tensor]]:
    """A decoder step of these rows, all at the same position: each row's next token, and the states afterwards."""
    lowered, runner = decoder
    rows, each = len(ids), len(ids[0])
    offsets = torch.arange(rows + 1, dtype=torch.int32) * each
    inputs = {
        "input_ids": torch.tensor(ids).flatten(),
        "positions": (torch.arange(each, dtype=torch.int32) + at).repeat(rows),
        "row_offsets": offsets,
        "last_tokens": offsets[1:] - 1,
        "slots": torch.arange(rows, dtype=torch.int32),
        "write_indices": _int32(*[at] * rows),
        "encoded": _int32(*[POSITIONS] * rows),
    }
    found = runner.run(inputs | memory)
    return found["next_token"].flatten().tolist(), memory | {name: found[out] for name, out in lowered.state_outputs.items()}


def test_greedy_tokens_are_those_of_transformers(tensorrt: TensorRT) -> None:
    whisper = tiny_whisper()
    features = torch.randn(ROWS, MEL, FRAMES, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([PROMPT] * ROWS)
    with torch.no_grad():
        for _ in range(TOKENS):
            logits = whisper(input_features=features, decoder_input_ids=ids).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    expected = ids[:, len(PROMPT) :].tolist()
    assert len(set(expected[0])) > 4, "the tokens of a random model must vary for the comparison to mean anything"

    lowered, encoder = _built(encoder_program(whisper), tensorrt)
    decoder = _built(decoder_program(whisper), tensorrt)
    empty = {state.name: torch.full((ROWS, *state.shape), float("nan")) for state in CROSS}
    controls = {"slots": torch.arange(ROWS, dtype=torch.int32), "write_indices": _int32(*[0] * ROWS)}
    found = encoder.run({"features": features, **controls} | empty)
    cross = {name: found[out] for name, out in lowered.state_outputs.items()}

    # prompts one row at a time, as the runtime prefills; then all rows together
    decoder[1].profile(1)
    first: list[int] = []
    own: list[dict[str, Tensor]] = []
    for index in range(ROWS):
        memory = {name: x[index : index + 1] for name, x in cross.items()}
        memory |= {state.name: torch.full((1, *state.shape), float("nan")) for state in SELF}
        said_first, memory = _stepped(decoder, [PROMPT], 0, memory)
        first += said_first
        own.append(memory)
    memory = {name: torch.cat([each[name] for each in own]) for name in own[0]}
    decoder[1].profile(0)
    said = [[token] for token in first]
    for step in range(TOKENS - 1):
        tokens, memory = _stepped(decoder, [[row[-1]] for row in said], len(PROMPT) + step, memory)
        for sentence, token in zip(said, tokens, strict=True):
            sentence.append(token)
    assert said == expected
