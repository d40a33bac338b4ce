"""An encoder-decoder compiles as two programs; only a GPU can run it."""

import pytest
from inplace.trt import TensorRT, load_tensorrt
from inplace_builder.lower import CompileOptions, compile_network, lower
from whisper_programs import CROSS, SELF, decoder_program, encoder_program, tiny_whisper


@pytest.fixture(scope="module")
def rtx() -> TensorRT:
    return load_tensorrt("tensorrt_rtx")


@pytest.mark.parametrize("kind", ["copy", "kv_cache_update"])
def test_the_encoder_writes_what_the_decoder_reads(rtx: TensorRT, kind: str) -> None:
    whisper = tiny_whisper()
    for program, written in ((encoder_program(whisper), CROSS), (decoder_program(whisper), SELF)):
        kinds = {state.name: kind for state in program.states}
        lowered = lower(program.exported, outputs=program.outputs, states=program.states, kinds=kinds, tensorrt=rtx)
        assert set(lowered.state_outputs) == {state.name for state in written}
        assert compile_network(lowered, program.profiles, CompileOptions(("SM89", "SM120"))).nbytes > 10_000
