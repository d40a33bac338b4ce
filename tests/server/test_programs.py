"""An engine of two programs on a real tritonserver: a transducer, its tokens of each chunk."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from inplace.client import Sequence
from inplace_builder import BuildOptions, write_engine
from inplace_builder.tools.tritonserver import TritonServer
from support.pool import Deployment, ServerPool
from support.transducing import GreedySearch, chunks
from transducer import Listen, Speak, capture, modules
from tritonclient.grpc import InferenceServerClient

pytestmark = pytest.mark.server

MODEL, STREAMS, CHUNKS = "transducer", 3, 8


@pytest.fixture(scope="module")
def parts() -> tuple[Listen, Speak]:
    return modules()


@pytest.fixture(scope="module")
def server(
    pool: ServerPool, parts: tuple[Listen, Speak], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    folder = tmp_path_factory.mktemp("programs") / MODEL
    write_engine(capture(*parts), folder, BuildOptions(slots=4, max_rows=4))
    with pool.serve(Deployment(folder)) as running:
        yield running


def test_interleaved_streams_get_the_tokens_of_greedy_search(
    server: TritonServer, parts: tuple[Listen, Speak]
) -> None:
    together = threading.Barrier(STREAMS)

    def stream(number: int) -> list[list[int]]:
        with InferenceServerClient(server.grpc_url) as client, Sequence(client, MODEL) as sequence:
            results = []
            for chunk in chunks(number, CHUNKS):
                together.wait(60)
                outputs = sequence.step({"features": chunk.numpy()})
                results.append(np.asarray(outputs["tokens"]).reshape(-1).tolist())
            return results

    with ThreadPoolExecutor(STREAMS) as threads:
        results = list(threads.map(stream, range(STREAMS)))
    for number, result in enumerate(results):
        search = GreedySearch(*parts)
        assert result == [search.feed(chunk) for chunk in chunks(number, CHUNKS)]
    lengths = {len(tokens) for result in results for tokens in result}
    assert len(lengths) > 1  # the requests of one call ended at different loop counts
