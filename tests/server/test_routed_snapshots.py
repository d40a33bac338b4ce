"""Replicas that share a store, behind Envoy with the configuration of `deploy/`.

The client knows the router alone. One replica is killed, another one is drained, and one comes
back, so that sequences hash to other replicas each time.
"""

import threading
import time
from collections.abc import Callable, Iterator
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
from support.engines import Engines
from support.envoy import Envoy
from support.fault_proxy import kill_server
from support.generating import long_stream
from support.models import accumulator, greedy
from support.observed import samples
from support.pool import Deployment
from support.storing import left_in_folder
from support.streams import prompt
from transformers import LlamaForCausalLM
from tritonclient.grpc import model_config_pb2 as pb

pytestmark = [pytest.mark.server, pytest.mark.long]

SEQUENCES, EVERY, SLOTS = 6, 2, 8
MODELS: dict[str, Protocol] = {"unary": "step", "flow": "stream"}
CHAT = "chat"


@pytest.fixture(scope="module")
def repository(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("routed")
    secret = folder / "secret"
    secret.write_bytes(b"0123456789abcdef" * 2)
    snapshots = SnapshotOptions((folder / "store").as_uri(), str(secret), EVERY)
    for name, serve in MODELS.items():
        options = BuildOptions(
            slots=SLOTS, max_rows=SLOTS, capacity=1, serve=serve, snapshots=snapshots
        )
        write_engine(accumulator(max_rows=SLOTS), folder / "models" / name, options)

    def stored(config: pb.ModelConfig) -> None:
        for name, value in {
            "snapshot_store": (folder / "store").as_uri(),
            "snapshot_secret_file": str(secret),
            "snapshot_every": "4",
        }.items():
            config.parameters[name].string_value = value

    Deployment(long_stream(engines, SLOTS)[1], CHAT, stored).copy_to(folder / "models")
    return folder / "models"


class Replicas:
    """Servers of one repository, at the same addresses also after a restart."""

    def __init__(self, repository: Path, folder: Path, count: int) -> None:
        self._repository, self._folder = repository, folder
        self._ports = [Ports(0, 0, 0).resolve() for _ in range(count)]
        self._started: list[TritonServer] = []
        try:
            self.servers = [self.start(index) for index in range(count)]
            for server in self.servers:
                server.wait_ready()
        except BaseException:
            self.stop()
            raise

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


class Sum:
    """A running sum, whose states nobody can compute again."""

    def __init__(self, number: int) -> None:
        self._value, self._total = number + 1.0, 0.0

    def __call__(self, sequence: Sequence, turn: int) -> None:
        self._total += self._value
        outputs = sequence.step({"value": np.full(4, self._value, np.float32)})
        assert outputs["sum"].tolist() == [self._total] * 4, turn


class Chat:
    """A conversation, compared with transformers."""

    def __init__(self, number: int, llama: LlamaForCausalLM) -> None:
        self._number, self._llama, self._history = number, llama, list[int]()

    def __call__(self, sequence: Sequence, turn: int) -> None:
        new = prompt(100 * self._number + turn, 5)
        generation = sequence.generate(new, 8, text=False, ignore_eos=True)
        for _ in generation:
            time.sleep(0.02)  # servers end in the middle of it
        self._history += new
        assert generation.tokens == greedy(self._llama, self._history, 8), turn
        self._history += generation.tokens


class User:
    """Runs turns of a sequence on a thread until it is told to stop, then ends it."""

    def __init__(self, sequence: Sequence, run: Callable[[Sequence, int], None]) -> None:
        self.sequence, self._run, self.turns = sequence, run, 0
        self.stopping, self.error = False, None
        self.thread = threading.Thread(target=self._live)
        self.thread.start()

    error: BaseException | None

    def _live(self) -> None:
        try:
            while not self.stopping:
                self._run(self.sequence, self.turns)
                self.turns += 1
                time.sleep(0.05)
            self.sequence.close()
        except BaseException as error:
            self.error = error


def go_on(users: list[User], turns: int) -> None:
    """Wait until every user has had so many turns more."""
    goals = [user.turns + turns for user in users]
    deadline = time.monotonic() + 120
    while any(user.turns < goal for user, goal in zip(users, goals, strict=True)):
        assert [user.error for user in users if user.error is not None] == []
        assert time.monotonic() < deadline, [user.turns for user in users]
        time.sleep(0.02)


def restored(server: TritonServer) -> int:
    """How many sequences a server has restored."""
    time.sleep(1.2)  # metrics are exported once a second
    return sum(
        int(value)
        for name, labels, value in samples(server)
        if name == "inplace_snapshots_total" and "restored" in labels.values()
    )


@pytest.mark.parametrize("replicas", [2, 3], indirect=True)
def test_sequences_behind_the_router_go_on_in_other_replicas(
    replicas: Replicas, repository: Path, engines: Engines, tmp_path: Path
) -> None:
    """All the time clients send; those whose replica is not touched notice nothing."""
    llama, _ = long_stream(engines, SLOTS)
    with ExitStack() as stack:
        envoy = stack.enter_context(Envoy(replicas.servers, tmp_path))
        patient = Retry(attempts=60, timeout=90.0)
        client = stack.enter_context(Client(envoy.grpc_url, retry=patient))
        runs: list[tuple[str, Callable[[Sequence, int], None]]] = [
            *((model, Sum(number)) for model in MODELS for number in range(SEQUENCES)),
            *((CHAT, Chat(number, llama)) for number in range(SEQUENCES)),
        ]
        users = [User(Sequence(client, model, timeout=20.0), run) for model, run in runs]
        for user in users:
            stack.callback(user.thread.join, 60)
        try:
            go_on(users, 4)
            kill_server(replicas.servers[0])
            go_on(users, 3)
            assert sum(map(restored, replicas.servers[1:])) > 0
            replicas.servers[0] = replicas.start(0)
            replicas.servers[0].wait_ready()
            go_on(users, 3)
            before = restored(replicas.servers[0])
            replicas.servers[1].stop()
            go_on(users, 3)
            others = [each for each in replicas.servers if each is not replicas.servers[1]]
            assert sum(map(restored, others)) > before
        finally:
            for user in users:
                user.stopping = True
        for user in users:
            user.thread.join(60)
            assert user.error is None
        store, deadline = repository.parent / "store", time.monotonic() + 60
        while left := left_in_folder(store):
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
