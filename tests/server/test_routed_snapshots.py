"""Replicas that share a store, behind Envoy with the configuration of `deploy/`.

The client knows the router alone. One replica is killed, another one is drained, and one comes
back, so that sequences hash to other replicas each time.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from inplace.client import Client, Retry, Sequence
from inplace.schema.snapshots import SnapshotOptions
from inplace_builder.choices import Protocol
from inplace_builder.served.build import write_engine
from inplace_builder.served.options import BuildOptions
from inplace_builder.tools.tritonserver import Ports, TritonServer
from support.envoy import Envoy
from support.fault_proxy import kill_server
from support.models import accumulator
from support.storing import left_in_folder

pytestmark = [pytest.mark.server, pytest.mark.long]

SEQUENCES, EVERY = 8, 2
MODELS: dict[str, Protocol] = {"unary": "step", "flow": "stream"}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("routed")
    secret = folder / "secret"
    secret.write_bytes(b"0123456789abcdef" * 2)
    snapshots = SnapshotOptions((folder / "store").as_uri(), str(secret), EVERY)
    for name, serve in MODELS.items():
        options = BuildOptions(
            slots=SEQUENCES, max_rows=SEQUENCES, capacity=1, serve=serve, snapshots=snapshots
        )
        write_engine(accumulator(max_rows=SEQUENCES), folder / "models" / name, options)
    return folder / "models"


class Replicas:
    """Servers of one repository, at the same addresses also after a restart."""

    def __init__(self, repository: Path, folder: Path, count: int) -> None:
        self._repository, self._folder = repository, folder
        self._ports = [Ports(0, 0, 0).resolve() for _ in range(count)]
        self._started: list[TritonServer] = []
        self.servers = [self.start(index) for index in range(count)]
        for server in self.servers:
            server.wait_ready()

    def start(self, index: int) -> TritonServer:
        log = self._folder / f"server{index}-{time.monotonic_ns()}.log"
        server = TritonServer(
            self._repository, self._ports[index], log=log, arguments=["--exit-timeout-secs=30"]
        )
        self._started.append(server)
        server.start()
        return server

    def stop(self) -> None:
        for server in self._started:
            server.stop(timeout=5)


@pytest.fixture
def replicas(
    request: pytest.FixtureRequest, repository: Path, tmp_path: Path
) -> Iterator[Replicas]:
    made = Replicas(repository, tmp_path, request.param)
    yield made
    made.stop()


@pytest.mark.parametrize("replicas", [2, 3], indirect=True)
def test_sequences_behind_the_router_go_on_in_other_replicas(
    replicas: Replicas, repository: Path, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        envoy = stack.enter_context(Envoy(replicas.servers, tmp_path))
        patient = Retry(attempts=60, timeout=90.0)
        client = stack.enter_context(Client(envoy.grpc_url, retry=patient))
        sequences = [
            Sequence(client, model, timeout=20.0) for model in MODELS for _ in range(SEQUENCES)
        ]
        totals = [0.0] * len(sequences)

        def steps(count: int) -> None:
            for _ in range(count):
                for number, sequence in enumerate(sequences):
                    totals[number] += number + 1.0
                    inputs = {"value": np.full(4, number + 1.0, np.float32)}
                    outputs = sequence.step(inputs)
                    assert outputs["sum"].tolist() == [totals[number]] * 4, number

        steps(5)
        time.sleep(0.5)  # what is to be stored is
        kill_server(replicas.servers[0])
        steps(3)
        replicas.servers[0] = replicas.start(0)
        replicas.servers[0].wait_ready()
        steps(3)
        replicas.servers[1].stop()
        steps(3)
        for sequence in sequences:
            sequence.close()
        store, deadline = repository.parent / "store", time.monotonic() + 60
        while left := left_in_folder(store):
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
