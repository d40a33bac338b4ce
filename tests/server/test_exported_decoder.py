"""A decoder as transformers exports it on a real tritonserver, with a chosen capacity."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from inplace.client import Sequence
from inplace_builder import DecoderOptions, capture_exported_decoder
from inplace_builder.served.build import write_engine
from inplace_builder.served.options import BuildOptions
from inplace_builder.tools.tritonserver import TritonServer
from support.exported_decoders import PROMPTS, decoder, exported
from support.models import greedy
from support.pool import Deployment, ServerPool
from support.streams import batch_counts
from tritonclient.grpc import InferenceServerClient
from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.utils import InferenceServerException

pytestmark = pytest.mark.server

MODEL, MOST, CHOSEN, TOKENS = "gemma3", 48, 40, 20


@pytest.fixture(scope="module")
def exported_server(
    pool: ServerPool, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    folder = tmp_path_factory.mktemp("exported")
    capture = capture_exported_decoder(
        exported(decoder(MODEL), dynamic=False), DecoderOptions(MOST, 8, 6, min_capacity=16)
    )
    options = BuildOptions(
        slots=8, max_rows=8, capacity=MOST, min_capacity=16, chunk=6, queue_delay_microseconds=5000
    )
    write_engine(capture, folder / MODEL, options)
    with pool.serve(Deployment(folder / MODEL, change=_choose)) as running:
        yield running


def _choose(config: pb.ModelConfig) -> None:
    config.parameters["capacity"].string_value = str(CHOSEN)


def test_eight_clients_at_a_time_hear_what_generate_says(exported_server: TritonServer) -> None:
    def stream(prompt: list[int]) -> list[int]:
        with (
            InferenceServerClient(exported_server.grpc_url) as client,
            Sequence(client, MODEL) as sequence,
        ):
            generated = [sequence.tokens(prompt)]
            while len(generated) < TOKENS:
                generated.append(sequence.tokens(generated[-1:]))
            return generated

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        generated = list(pool.map(stream, PROMPTS))
    model = decoder(MODEL)
    assert generated == [greedy(model, prompt, TOKENS) for prompt in PROMPTS]
    with InferenceServerClient(exported_server.grpc_url) as client:
        assert max(batch_counts(client, MODEL)) > 1, "they did share steps"


def test_a_sequence_ends_at_the_capacity_that_was_chosen(exported_server: TritonServer) -> None:
    with (
        InferenceServerClient(exported_server.grpc_url) as client,
        Sequence(client, MODEL) as sequence,
    ):
        sequence.tokens([1] * CHOSEN)
        with pytest.raises(
            InferenceServerException,
            match=f"the sequence holds {CHOSEN} of {CHOSEN} positions, 0 are left",
        ):
            sequence.tokens([1])
