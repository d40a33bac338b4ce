"""Engines of several programs on a real tritonserver: a transducer, and a stream that is summed."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing
import pytest
from inplace.client import RefusedError, Sequence
from inplace_builder import BuildOptions, write_engine
from inplace_builder.tools.tritonserver import TritonServer
from support.pool import Deployment, ServerPool
from support.sums import SCHEDULES, capture_sums
from support.transducing import GreedySearch, chunks
from support.vocabulary import save_tokenizer, tiny_tokenizer
from transducer import Decode, Encode, capture, modules
from tritonclient.grpc import InferenceServerClient

pytestmark = pytest.mark.server

STEPS, STREAM, SUMS, STREAMS, CHUNKS = "transducer", "transducer_stream", "chunk_sums", 3, 8


@pytest.fixture(scope="module")
def parts() -> tuple[Encode, Decode]:
    return modules()


@pytest.fixture(scope="module")
def server(
    pool: ServerPool, parts: tuple[Encode, Decode], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    folder, captured = tmp_path_factory.mktemp("programs"), capture(*parts)
    write_engine(captured, folder / STEPS, BuildOptions(slots=4, max_rows=4))
    write_engine(
        captured,
        folder / STREAM,
        BuildOptions(slots=4, max_rows=4, serve="stream"),
        extras=lambda version: save_tokenizer(version / "tokenizer"),
    )
    write_engine(capture_sums(SCHEDULES), folder / SUMS, BuildOptions(slots=4, max_rows=4))
    names = (STEPS, STREAM, SUMS)
    with pool.serve(*(Deployment(folder / name) for name in names)) as running:
        yield running


def test_interleaved_streams_get_the_tokens_of_greedy_search(
    server: TritonServer, parts: tuple[Encode, Decode]
) -> None:
    together = threading.Barrier(STREAMS)

    def stream(number: int) -> list[list[int]]:
        with InferenceServerClient(server.grpc_url) as client, Sequence(client, STEPS) as sequence:
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


def test_a_stream_model_sends_tokens_and_text_as_they_come(
    server: TritonServer, parts: tuple[Encode, Decode]
) -> None:
    def stream(number: int) -> tuple[list[list[int]], str, int]:
        results, text, num_responses = [], "", 0
        with InferenceServerClient(server.grpc_url) as client, Sequence(client, STREAM) as sequence:
            for chunk in chunks(number, CHUNKS):
                tokens: list[int] = []
                for response in sequence.stream({"features": chunk.numpy()}):
                    num_responses += 1
                    tokens += response["tokens"].tolist()
                    text += response["text_output"][0].decode()
                assert response["finish_reason"][0] == b"done"
                assert response["level"].shape == (16,)
                results.append(tokens)
            whole = sequence.step({"features": chunk.numpy()})  # all responses as one
            return [*results, whole["tokens"].tolist()], text, num_responses

    with ThreadPoolExecutor(STREAMS) as threads:
        answers = list(threads.map(stream, range(STREAMS)))
    for number, (results, text, num_responses) in enumerate(answers):
        search, given = GreedySearch(*parts), chunks(number, CHUNKS)
        assert results == [search.feed(chunk) for chunk in (*given, given[-1])]
        spoken = [token for tokens in results[:-1] for token in tokens]
        assert text == tiny_tokenizer().decode(spoken)
        assert num_responses > 2 * CHUNKS


def test_requests_have_schedules_of_their_own(server: TritonServer) -> None:
    def entries(*values: float) -> dict[str, np.typing.NDArray[np.float32]]:
        return {"entries": np.array(values, np.float32)}

    with InferenceServerClient(server.grpc_url) as client:
        with Sequence(client, SUMS) as sequence:
            assert sequence.step(entries(1, 2, 3, 4))["tokens"].tolist() == [10]
            value = {"value": np.array([100], np.float32)}
            assert sequence.step(entries(1, 1, 1, 1) | value)["tokens"].tolist() == [104]
            with pytest.raises(RefusedError, match="only the last one, with END, may have fewer"):
                sequence.step(entries(1, 2))
            last = sequence.step(entries(5), end=True)
            assert (last["tokens"].tolist(), last["last"].tolist()) == ([109], [1109])
        with Sequence(client, SUMS) as sequence:
            sequence.step(entries(1, 2, 3, 4))
            assert sequence.step(entries(), end=True)["last"].tolist() == [1010]
