"""An encoder-decoder compiles as two programs that generate transformers' tokens.

Their networks are interpreted in PyTorch.
"""

import pytest
import torch
from inplace.trt import TensorRT, load_tensorrt
from inplace_builder.lower import CompileOptions, compile_network, lower
from support.long import long_except
from support.network_interpreter import interpret
from support.whisper_programs import (
    CROSS,
    FRAMES,
    MEL,
    SELF,
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

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rtx() -> TensorRT:
    return load_tensorrt("tensorrt_rtx")


@pytest.mark.parametrize("kind", long_except(["kv_cache_update"], ["copy", "kv_cache_update"]))
def test_the_decoder_reads_what_the_encoder_wrote(rtx: TensorRT, kind: str) -> None:
    def built(program: WhisperProgram, written: set[str]) -> Run:
        kinds = {state.name: kind for state in program.states}
        lowered = lower(
            program.exported,
            outputs=program.outputs,
            states=program.states,
            kinds=kinds,
            tensorrt=rtx,
        )
        assert set(lowered.state_outputs) == written
        assert (
            compile_network(lowered, program.profiles, CompileOptions(("SM89", "SM120"))).nbytes
            > 10_000
        )

        def run(inputs: dict[str, Tensor], profile: int) -> dict[str, Tensor]:
            outputs = interpret(lowered, inputs)
            return outputs | {
                name: outputs[output].clone() for name, output in lowered.state_outputs.items()
            }

        return run

    whisper = tiny_whisper()
    features = torch.randn(SEQUENCES, MEL, FRAMES, generator=torch.Generator().manual_seed(1))
    encode = built(encoder_program(whisper), {state.name for state in CROSS})
    decode = built(decoder_program(whisper), {state.name for state in SELF})
    assert program_tokens(encode, decode, features) == transformers_tokens(whisper, features)
