"""SmolLM2-135M-Instruct for longer than in `tests/server`, and as transformers exports it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from inplace.schema.specs import Dtype
from inplace_builder import DecoderOptions, capture_exported_decoder, load_decoder
from inplace_builder.served.build import write_engine
from inplace_builder.served.options import BuildOptions
from support.comparing import operators
from support.exported_decoders import PROMPTS, exported, generate_as_rows
from support.models import greedy, open_instance
from support.pool import ServerPool
from support.smollm2 import SmolLM2, serve_smollm2

pytestmark = [pytest.mark.long, pytest.mark.real_model]


@pytest.fixture(scope="module")
def smollm2(
    smollm2_folder: Path, pool: ServerPool, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SmolLM2]:
    folder = tmp_path_factory.mktemp("smollm2")
    with serve_smollm2(smollm2_folder, folder, pool, tokens=64) as served:
        yield served


def test_one_sequence_alone(smollm2: SmolLM2) -> None:
    smollm2.check_alone()


def test_eight_sequences_interleaved_in_batches(smollm2: SmolLM2) -> None:
    smollm2.check_together()


def test_prompts_in_random_parts(smollm2: SmolLM2) -> None:
    smollm2.check_parts(tokens=16)


def test_exported_for_one_token_it_generates_what_transformers_does(
    smollm2_folder: Path, tmp_path: Path
) -> None:
    model, _ = load_decoder(smollm2_folder, Dtype.FLOAT32)
    program = exported(model, dynamic=False, capacity=64)
    capture = capture_exported_decoder(program, DecoderOptions(64, max_rows=8, chunk=16))
    assert operators(capture) == {"attention": model.config.num_hidden_layers, "sample": 1}
    options = BuildOptions(capacity=64, chunk=16, slots=8, max_rows=8)
    write_engine(capture, tmp_path / "smollm2", options)
    prompts = [[100 + 7 * token for token in prompt] for prompt in PROMPTS]
    assert generate_as_rows(open_instance(tmp_path / "smollm2"), prompts, 8) == [
        greedy(model, prompt, 8) for prompt in prompts
    ]
