"""Two real servers behind a router that hashes `inplace-sequence`: every request of a sequence reaches the one that holds it."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from inplace.client import NO_RETRY, AsyncClient, AsyncSequence, Client, Sequence
from inplace_builder.served.build import write_engine
from inplace_builder.served.options import BuildOptions
from inplace_builder.tools.tritonserver import Ports, TritonServer
from support.models import accumulator
from support.router import Router
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

pytestmark = pytest.mark.server

SEQUENCES = 12
ONE = {"value": np.ones(4, np.float32)}


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    repository: Path = tmp_path_factory.mktemp("routed")
    options = BuildOptions(slots=SEQUENCES, max_rows=SEQUENCES, capacity=1)
    write_engine(accumulator(max_rows=SEQUENCES), repository / "unary", options)
    write_engine(
        accumulator(max_rows=SEQUENCES), repository / "flow", replace(options, serve="stream")
    )
    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                TritonServer(
                    repository, Ports(0, 0, 0), log=tmp_path_factory.mktemp("server") / "log"
                )
            )
            for _ in range(2)
        ]
        yield stack.enter_context(Router([server.grpc_url for server in servers]))


@pytest.mark.parametrize("model", ["unary", "flow"])
def test_the_client_names_the_sequence_to_the_router(router: Router, model: str) -> None:
    router.routed.clear()
    with Client(router.url, retry=NO_RETRY) as client:
        sequences = [
            Sequence(client, model, id=f"séquence {number}", replay=False)
            for number in range(SEQUENCES)
        ]
        for step in range(1, 4):
            for sequence in sequences:
                assert sequence.step(ONE)["values"] == [step]
        for sequence in sequences:
            sequence.close()
    assert len(router.routed) == SEQUENCES
    assert all(len(servers) == 1 for servers in router.routed.values())
    assert {index for servers in router.routed.values() for index in servers} == {
        0,
        1,
    }  # both have some


@pytest.mark.parametrize("model", ["unary", "flow"])
def test_so_does_the_asynchronous_client(router: Router, model: str) -> None:
    router.routed.clear()

    async def scenario() -> None:
        async with AsyncClient(router.url, retry=NO_RETRY) as client:
            sequences = [
                AsyncSequence(client, model, id=1 + number, replay=False)
                for number in range(SEQUENCES)
            ]
            for step in range(1, 4):
                for answer in await asyncio.gather(*(sequence.step(ONE) for sequence in sequences)):
                    assert answer["values"] == [step]
            for sequence in sequences:
                await sequence.close()

    asyncio.run(scenario())
    assert set(router.routed) == {str(1 + number) for number in range(SEQUENCES)}
    assert {index for servers in router.routed.values() for index in servers} == {0, 1}


def test_without_the_header_a_sequence_is_not_found_again(router: Router) -> None:
    """What the header is for: the same requests, sent to either server in turn."""
    tensor = InferInput("value", [1, 4], "FP32")
    tensor.set_data_from_numpy(ONE["value"][None])
    with InferenceServerClient(router.url) as client:
        client.infer("unary", [tensor], sequence_id=999, sequence_start=True)
        with pytest.raises(InferenceServerException, match="must specify the START flag"):
            client.infer("unary", [tensor], sequence_id=999)
        client.infer("unary", [tensor], sequence_id=999, sequence_end=True)
