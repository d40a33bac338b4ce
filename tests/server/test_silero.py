"""A streaming model on a real tritonserver: 64 streams of speech, 32 ms a request."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from inplace.client import Sequence
from inplace_builder.served.build import write_engine
from inplace_builder.served.options import BuildOptions
from inplace_builder.tools.tritonserver import TritonServer
from numpy.testing import assert_allclose
from silero import capture_silero, load_silero
from support.pool import Deployment, ServerPool
from support.speech import Samples, chunks, package_says, recordings
from support.streams import batch_counts
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

pytestmark = pytest.mark.server

MODEL, STREAMS, LIMIT = "silero-vad", 64, 1e-4


@pytest.fixture(scope="module")
def speech_server(
    pool: ServerPool, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    folder = tmp_path_factory.mktemp("speech")
    options = BuildOptions(
        slots=STREAMS, max_rows=STREAMS, capacity=1, queue_delay_microseconds=2000
    )
    write_engine(capture_silero(load_silero(), max_rows=STREAMS), folder / MODEL, options)
    with pool.serve(Deployment(folder / MODEL)) as running:
        yield running


@pytest.fixture
def speech_client(speech_server: TritonServer) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(speech_server.grpc_url) as connected:
        yield connected


def probability(sequence: Sequence, chunk: Samples, *, end: bool = False) -> float:
    return float(sequence.step({"audio": chunk}, end=end)["probability"][0])


def test_64_interleaved_streams_say_what_the_package_says_over_whole_files(
    speech_client: InferenceServerClient,
) -> None:
    names = (list(recordings()) * 3)[:STREAMS]
    together = threading.Barrier(STREAMS)

    def stream(name: str) -> list[float]:
        sequence = Sequence(speech_client, MODEL)
        *first, last = chunks(recordings()[name])
        together.wait(60)  # every stream holds a slot before any ends
        return [
            *(probability(sequence, chunk) for chunk in first),
            probability(sequence, last, end=True),
        ]

    with ThreadPoolExecutor(STREAMS) as pool:
        generated = list(pool.map(stream, names))
    for name, result in zip(names, generated, strict=True):
        assert_allclose(result, package_says(name), rtol=0, atol=LIMIT, err_msg=name)
    assert max(batch_counts(speech_client, MODEL)) > 1  # they did share steps


def test_start_resets_a_stream_in_the_middle_and_leaves_its_neighbour_alone(
    speech_client: InferenceServerClient,
) -> None:
    ours, theirs = list(recordings())[:2]
    mine, other = chunks(recordings()[ours]), chunks(recordings()[theirs])
    sequence, neighbour = Sequence(speech_client, MODEL), Sequence(speech_client, MODEL)
    before = [probability(sequence, chunk) for chunk in mine[:20]]
    beside = [probability(neighbour, chunk) for chunk in other[:15]]
    restarted = Sequence(speech_client, MODEL, sequence.id, key=sequence.key)
    again = [
        probability(restarted, chunk, end=index == 19) for index, chunk in enumerate(mine[:20])
    ]
    beside += [
        probability(neighbour, chunk, end=index == 14) for index, chunk in enumerate(other[15:30])
    ]
    assert again == pytest.approx(before, abs=1e-6)
    assert_allclose(again, package_says(ours)[:20], rtol=0, atol=LIMIT)
    assert_allclose(beside, package_says(theirs)[:30], rtol=0, atol=LIMIT)


def test_a_chunk_of_another_length_is_refused_and_the_stream_goes_on(
    speech_client: InferenceServerClient,
) -> None:
    name = next(iter(recordings()))
    first, second, third, *_ = chunks(recordings()[name])
    sequence = Sequence(speech_client, MODEL)
    result = [probability(sequence, first), probability(sequence, second)]
    with pytest.raises(InferenceServerException, match="unexpected shape for input 'audio'"):
        probability(sequence, np.concatenate([third, third]))
    result.append(probability(sequence, third, end=True))
    assert_allclose(result, package_says(name)[:3], rtol=0, atol=LIMIT)
