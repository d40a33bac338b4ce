"""A whole encoder-decoder in TensorRT generates transformers' tokens."""

import pytest
import torch
from inplace.trt import TensorRT, load_tensorrt
from inplace_builder.lower import CompileOptions, compile_network, lower
from support.whisper_programs import (
    FRAMES,
    MEL,
    SEQUENCES,
    Run,
    WhisperProgram,
    decoder_program,
    encoder_program,
    program_tokens,
    tiny_whisper,
    transformers_tokens,
)
from torch import Tensor

pytest.importorskip("tensorrt", reason="needs TensorRT")
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use; there is none here"
)

from support.engine_runner import PlanRunner  # noqa: E402


def _built(program: WhisperProgram, tensorrt: TensorRT) -> Run:
    kinds = {state.name: "copy" for state in program.states}
    lowered = lower(
        program.exported,
        outputs=program.outputs,
        states=program.states,
        kinds=kinds,
        tensorrt=tensorrt,
    )
    runner = PlanRunner(
        tensorrt, compile_network(lowered, program.profiles, CompileOptions(optimization_level=1))
    )

    def run(inputs: dict[str, Tensor], profile: int) -> dict[str, Tensor]:
        runner.profile(profile)
        outputs = runner.run(inputs)
        return outputs | {name: outputs[output] for name, output in lowered.state_outputs.items()}

    return run


def test_greedy_tokens_are_those_of_transformers() -> None:
    tensorrt, whisper = load_tensorrt("tensorrt"), tiny_whisper()
    features = torch.randn(SEQUENCES, MEL, FRAMES, generator=torch.Generator().manual_seed(1))
    expected = transformers_tokens(whisper, features)
    assert len(set(expected[0])) > 4, (
        "the tokens of a random model must vary for the comparison to mean anything"
    )
    assert (
        program_tokens(
            _built(encoder_program(whisper), tensorrt),
            _built(decoder_program(whisper), tensorrt),
            features,
        )
        == expected
    )
