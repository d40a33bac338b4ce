"""The client over real failures: killed servers, broken connections, lost responses."""

import asyncio
import logging
import time
from collections.abc import Iterator

import numpy as np
import pytest
from inplace.client import (
    AsyncClient,
    AsyncSequence,
    Client,
    RefusedError,
    Retry,
    Sequence,
    SequenceLostError,
    UnreachableError,
)
from inplace_builder.tools.tritonserver import Ports, TritonServer
from support.fault_proxy import FaultProxy, kill_server
from support.models import BRIEF_IDLE, BRIEF_SLOTS, Repository, greedy
from support.streams import generate, prompt
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.grpc import aio as grpc_aio
from tritonclient.utils import InferenceServerException

pytestmark = pytest.mark.server

SAMPLED = {"temperature": 0.9, "top_k": 64, "top_p": 0.95, "seed": 11}


@pytest.fixture(scope="module")
def second(
    repository: Repository, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    """Another server of the same models; the last test kills it."""
    with TritonServer(
        repository.path, Ports(0, 0, 0), log=tmp_path_factory.mktemp("second") / "tritonserver.log"
    ) as running:
        yield running


def inputs(value: float) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float32]]]:
    return {"value": np.full(4, value, dtype=np.float32)}


def test_a_sequence_that_was_idle_for_too_long_is_replayed(
    server: TritonServer, repository: Repository
) -> None:
    expected = greedy(repository.llama, prompt(3, 7), 8)
    with (
        Client(server.grpc_url) as client,
        Sequence(client, "brief") as sequence,
        Sequence(client, "brief", replay=False) as off,
    ):
        tokens = generate(sequence, prompt(3, 7), 4)
        off.tokens([1, 2, 3])
        time.sleep(1.25 * BRIEF_IDLE)
        assert [*tokens, *generate(sequence, tokens[-1:], 4)] == expected
        with pytest.raises(SequenceLostError, match="replay is off; start a new one") as lost:
            off.tokens([4])
        assert not lost.value.retryable


def test_a_step_whose_response_is_lost_runs_once(
    server: TritonServer, repository: Repository, caplog: pytest.LogCaptureFixture
) -> None:
    expected = greedy(repository.llama, prompt(4, 5), 10)
    with (
        caplog.at_level(logging.INFO, "inplace.client"),
        FaultProxy(server.grpc_url) as proxy,
        Client(proxy.url) as client,
    ):
        with Sequence(client, "llama") as sequence:
            tokens = [sequence.tokens(prompt(4, 5))]
            while len(tokens) < 10:
                if len(tokens) in (3, 6):
                    proxy.drop_next_response()
                tokens.append(sequence.tokens(tokens[-1:]))
            assert tokens == expected
        with Sequence(client, "accumulator") as sums:
            sums.step(inputs(1.0))
            proxy.drop_next_response()
            with pytest.raises(
                SequenceLostError,
                match=r"INPLACE-POSITION .*meant for position 1, the sequence holds 2",
            ):
                sums.step(inputs(1.0))
    assert caplog.text.count("try 1 failed, the next in") == 3  # each was lost, and each sent again


def test_a_model_served_step_by_step_refuses_a_generation(
    server: TritonServer, repository: Repository
) -> None:
    async def generate_async() -> None:
        async with (
            AsyncClient(server.grpc_url) as client,
            AsyncSequence(client, "llama") as sequence,
        ):
            with pytest.raises(
                RefusedError,
                match=(
                    "model 'llama' is served step by step and generates nothing: "
                    "build it with --serve stream"
                ),
            ):
                await anext(aiter(sequence.generate([1, 2], max_tokens=3)))
            assert await sequence.tokens([1, 2]) == greedy(repository.llama, [1, 2], 1)[0]

    with Client(server.grpc_url) as client, Sequence(client, "llama") as sequence:
        with pytest.raises(RefusedError, match="is served step by step"):
            next(sequence.generate([1, 2], max_tokens=3))
        with pytest.raises(
            RefusedError,
            match=(
                r"INPLACE-BAD_PARAMETER .* asks for a generation, "
                "but this model is served step by step"
            ),
        ):
            sequence.tokens(
                [1, 2], parameters={"max_tokens": 3}
            )  # as any other client of Triton could
        assert sequence.tokens([1, 2]) == greedy(repository.llama, [1, 2], 1)[0]
    asyncio.run(generate_async())


def test_a_start_or_end_whose_response_is_lost_is_sent_again(
    server: TritonServer, repository: Repository
) -> None:
    with FaultProxy(server.grpc_url) as proxy, Client(proxy.url) as client:
        client.model(proxy.url, "llama", 10.0)
        for _ in range(10):  # more often than there are slots
            proxy.drop_next_response()
            sequence = Sequence(client, "llama")
            tokens = [sequence.tokens(prompt(5, 6))]
            proxy.drop_next_response()
            tokens.append(sequence.tokens(tokens, end=True))
            assert tokens == greedy(repository.llama, prompt(5, 6), 2)


def test_a_broken_connection_loses_no_state(server: TritonServer) -> None:
    with (
        FaultProxy(server.grpc_url) as proxy,
        Client(proxy.url) as client,
        Sequence(client, "accumulator") as sums,
    ):
        for count in range(1, 21):
            assert (
                sums.step(inputs(2.0))["sum"].tolist() == [2.0 * count] * 4
            )  # never added twice, never lost
            proxy.disconnect()


def test_a_sequence_that_triton_forgot_continues(server: TritonServer) -> None:
    """The backend refuses another client's END, but Triton has ended the sequence by then.

    The backend opens its place again; who sends a step sooner is refused by Triton, later by the
    backend.
    """
    with Client(server.grpc_url) as client, Sequence(client, "accumulator", id="mine") as sums:
        sums.step(inputs(1.0))
        with InferenceServerClient(server.grpc_url) as own:
            other = Sequence(own, "accumulator", id="mine")
            with pytest.raises(RefusedError, match="INPLACE-SEQUENCE_KEY"):
                other.step(inputs(5.0), end=True)
            value = InferInput("value", [1, 4], "FP32")
            value.set_data_from_numpy(np.zeros((1, 4), np.float32))
            refused = "must specify the START flag|INPLACE-SEQUENCE_KEY"
            with pytest.raises(InferenceServerException, match=refused):
                own.infer("accumulator", [value], sequence_id="mine")
        assert sums.step(inputs(1.0))["sum"].tolist() == [2.0] * 4


def test_a_connection_of_the_callers_own_stays_open(
    server: TritonServer, repository: Repository
) -> None:
    ids = prompt(9, 4)
    with InferenceServerClient(server.grpc_url) as own:
        with Sequence(own, "llama") as sequence:
            assert [sequence.tokens(ids)] == greedy(repository.llama, ids, 1)
        assert own.is_server_live()

    async def asynchronous() -> None:
        async with grpc_aio.InferenceServerClient(server.grpc_url) as own:
            async with AsyncSequence(own, "llama") as sequence:
                assert [await sequence.tokens(ids)] == greedy(repository.llama, ids, 1)
            assert await own.is_server_live()

    asyncio.run(asynchronous())


def test_a_full_server_is_retried_and_with_two_the_other_one_is_used(
    server: TritonServer, second: TritonServer
) -> None:
    with Client(server.grpc_url) as client:
        sequences = [Sequence(client, "brief") for _ in range(BRIEF_SLOTS)]
        for sequence in sequences:
            sequence.tokens([1])
        with Client([server.grpc_url, second.grpc_url]) as both, Sequence(both, "brief") as moved:
            assert moved.server == server.grpc_url
            moved.tokens([1])
            assert moved.server == second.grpc_url
        with Sequence(client, "brief") as late:
            late.tokens([1])  # when the others have been idle for long enough


def test_errors_have_code_sequence_and_request(server: TritonServer) -> None:
    with Client(server.grpc_url) as client, Sequence(client, "llama", id="named") as sequence:
        with pytest.raises(RefusedError) as refused:
            sequence.step({"input_ids": np.array([-1])}, request_id="r7")
        error = refused.value
        assert (error.code, error.retryable, error.sequence, error.request) == (
            "VALUE_RANGE",
            False,
            "named",
            "r7",
        )
        assert error.status() == "StatusCode.INVALID_ARGUMENT"
        with pytest.raises(RefusedError, match="unexpected shape") as refused:
            sequence.step({"input_ids": np.zeros((2, 2), np.int64)})
        assert refused.value.code == "INVALID_ARGUMENT"
        with pytest.raises(RefusedError, match="unknown model: 'unknown'"):
            Sequence(client, "unknown").tokens([1])
    with Client("127.0.0.1:9", retry=Retry(attempts=3)) as nowhere, pytest.raises(UnreachableError):
        Sequence(nowhere, "llama").tokens([1])


def test_sequences_continue_with_the_same_tokens_when_one_of_two_servers_is_killed(
    server: TritonServer, second: TritonServer, repository: Repository
) -> None:
    with InferenceServerClient(server.grpc_url) as own, Sequence(own, "llama") as reference:
        tokens = [reference.tokens(prompt(2, 9), parameters=SAMPLED)]
        while len(tokens) < 12:
            tokens.append(reference.tokens(tokens[-1:], parameters=SAMPLED))
    both = {server.grpc_url, second.grpc_url}
    with Client(both) as client, Client(both, retry=Retry(attempts=3)) as few_retries:
        sequences = [Sequence(client, "llama") for _ in range(4)]
        sums = {(one := Sequence(few_retries, "accumulator")).server: one for _ in both}
        for one in sums.values():
            one.step(inputs(1.0))
        results = [
            [sequence.tokens(prompt(2, 9), parameters=SAMPLED if index < 2 else None)]
            for index, sequence in enumerate(sequences)
        ]
        assert {sequence.server for sequence in sequences} == set(sums) == both
        for step in range(11):
            if step == 5:
                kill_server(second)
            for index, sequence in enumerate(sequences):
                results[index].append(
                    sequence.tokens(results[index][-1:], parameters=SAMPLED if index < 2 else None)
                )
        assert results == [
            tokens,
            tokens,
            greedy(repository.llama, prompt(2, 9), 12),
            greedy(repository.llama, prompt(2, 9), 12),
        ]
        assert {sequence.server for sequence in sequences} == {server.grpc_url}
        assert [sequence.length for sequence in sequences] == [20] * 4
        assert sums[server.grpc_url].step(inputs(2.0))["sum"].tolist() == [3.0] * 4
        with pytest.raises(UnreachableError) as gone:
            sums[second.grpc_url].step(inputs(2.0))
        assert (gone.value.code, gone.value.sequence) == ("UNAVAILABLE", sums[second.grpc_url].id)
        assert (
            "its inputs are not tokens, so the client kept none to replay"
            in gone.value.__notes__[0]
        )
        for sequence in (*sequences, *sums.values()):
            sequence.close()
