"""Models unloaded, reloaded and killed, and servers ended, while sequences are live."""

import itertools
import queue
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from inplace_builder.tools.tritonserver import Ports, TritonServer
from support.faults import (
    FORGOTTEN,
    Stream,
    add,
    eventually,
    gone,
    kill,
    state,
    stub,
    stubs,
)
from support.models import Repository
from support.pool import Deployment, ServerPool, reconfigure
from tritonclient.grpc import InferenceServerClient
from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.utils import InferenceServerException

pytestmark = pytest.mark.server

UNLOADED = "has no available versions"


@pytest.fixture(scope="module")
def controlled(repository: Repository, pool: ServerPool) -> Iterator[TritonServer]:
    source = repository.path / "accumulator"
    with pool.serve(Deployment(source, "doomed"), Deployment(source, "spare")) as running:
        yield running


@pytest.fixture
def alone(repository: Repository, tmp_path: Path) -> Path:
    """A repository with one accumulator, for a server that is ended."""
    Deployment(repository.path / "accumulator", "doomed").copy_to(tmp_path)
    return tmp_path


@pytest.fixture
def client(controlled: TritonServer) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(controlled.grpc_url) as connected:
        yield connected


def log(server: TritonServer) -> str:
    assert server.log is not None
    return server.log.read_text(errors="replace")


def http(server: TritonServer, port: int, path: str) -> int | None:
    """The status of a GET; None where nothing listens."""
    try:
        with urllib.request.urlopen(f"http://{server.host}:{port}{path}", timeout=30) as answer:
            return int(answer.status)
    except (urllib.error.URLError, ConnectionError):
        return None


def test_an_unloaded_model_loses_its_sequences_but_lives_as_long_as_an_open_stream(
    controlled: TritonServer, client: InferenceServerClient
) -> None:
    old = stub(controlled, "doomed")
    assert add(client, "doomed", 1, 1.0, start=True, sequence_key="mine") == (1.0, 1)
    with Stream(controlled.grpc_url) as stream:
        stream.send("doomed", 2, 1.0, start=True)
        assert stream.receive() == (1.0, 1)
        client.unload_model("doomed")  # it does not wait for sequences
        assert UNLOADED in str(add(client, "doomed", 1, 1.0))
        stream.send("doomed", 2, 1.0)
        assert UNLOADED in str(stream.receive())
        time.sleep(0.5)
        assert state(client, "doomed") == "UNLOADING"
        client.load_model("doomed")
        assert len(stubs(controlled, "doomed")) == 2  # and two arenas
        assert FORGOTTEN in str(add(client, "doomed", 1, 1.0, sequence_key="mine"))
        assert "INPLACE-POSITION" in str(
            add(client, "doomed", 1, 1.0, start=True, sequence_key="mine", position=1)
        )
        assert add(client, "doomed", 1, 1.0, start=True, end=True) == (1.0, 1)
    eventually(lambda: gone(old), "the stream's model is gone with the stream")
    assert "unloaded: live=2" in log(controlled)
    assert add(client, "doomed", 3, 1.0, start=True, end=True) == (1.0, 1)
    assert add(client, "spare", 3, 1.0, start=True, end=True) == (1.0, 1)


def test_a_reload_replaces_a_model_beside_its_live_sequences_and_the_server_survives(
    controlled: TritonServer, client: InferenceServerClient, pool: ServerPool
) -> None:
    """Two processes with the same metrics, for a moment, once corrupted the server's memory."""
    old = stub(controlled, "doomed")
    assert add(client, "doomed", 4, 1.0, start=True) == (1.0, 1)
    client.load_model("doomed")
    assert add(client, "doomed", 4, 1.0) == (
        2.0,
        2,
    )  # nothing has changed in the repository, so nothing is loaded

    def slower(config: pb.ModelConfig) -> None:
        config.sequence_batching.oldest.max_queue_delay_microseconds = 700

    reconfigure(pool.repository / "doomed", slower)
    client.load_model("doomed")
    assert FORGOTTEN in str(add(client, "doomed", 4, 1.0))
    assert add(client, "doomed", 5, 1.0, start=True) == (1.0, 1)
    eventually(lambda: gone(old), "the replaced process ends")
    for step in range(2, 10):  # while metrics are handed over, once a second
        assert add(client, "doomed", 5, 1.0) == (float(step), step)
        assert http(controlled, controlled.ports.metrics, "/metrics") == 200
        time.sleep(0.3)
    assert add(client, "doomed", 5, 1.0, end=True) == (10.0, 10)
    assert "Signal" not in log(controlled)


def test_a_killed_stub_leaves_its_model_ready_and_dead_until_it_is_unloaded_and_loaded(
    controlled: TritonServer, client: InferenceServerClient
) -> None:
    """Only a real inference shows it; readiness does not."""
    process = stub(controlled, "doomed")
    assert add(client, "spare", 6, 1.0, start=True) == (1.0, 1)
    with Stream(controlled.grpc_url) as stream:
        stream.send("doomed", 6, 1.0, start=True)
        assert stream.receive() == (1.0, 1)
        kill(process, signal.SIGKILL)
        stream.send("doomed", 6, 1.0)
        assert "Stub process 'doomed_0_0' is not healthy" in str(stream.receive())
    assert "Stub process 'doomed_0_0' is not healthy" in str(
        add(client, "doomed", 7, 1.0, start=True)
    )
    assert client.is_server_live()
    assert client.is_model_ready("doomed")
    assert stubs(controlled, "doomed") == []
    assert add(client, "spare", 6, 1.0, end=True) == (2.0, 2)  # other models are unharmed
    client.unload_model("doomed")
    client.load_model("doomed")
    assert FORGOTTEN in str(add(client, "doomed", 6, 1.0))
    assert add(client, "doomed", 6, 1.0, start=True, end=True) == (1.0, 1)
    assert "Signal" not in log(controlled)


def test_a_server_told_to_end_serves_its_sequences_until_they_have_ended(
    alone: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """But it is not live and closes HTTP: a liveness probe there kills it. Inference works."""
    with (
        TritonServer(
            alone,
            Ports(0, 0, 0),
            log=tmp_path_factory.mktemp("drained") / "log",
            arguments=["--exit-timeout-secs=180"],
        ) as server,
        InferenceServerClient(server.grpc_url) as client,
    ):
        assert server.process is not None
        assert add(client, "doomed", 1, 1.0, start=True) == (1.0, 1)
        assert http(server, server.ports.http, "/v2/health/live") == 200
        assert add(client, "doomed", 1, 1.0) == (2.0, 2)  # not idle when the server is told to end
        kill(server.process.pid, signal.SIGTERM)
        steps = itertools.count(3)

        def step(client: InferenceServerClient, *, end: bool = False) -> None:
            count = next(steps)
            assert add(client, "doomed", 1, 1.0, end=end) == (float(count), count)

        def refuses() -> bool:
            step(client)  # while Triton waits for HTTP connections: not idle
            return "is stopping" in str(add(client, "doomed", 2, 1.0, start=True, end=True))

        eventually(refuses, "it refuses")
        for _ in range(4):
            step(client)
            time.sleep(0.1)
        with InferenceServerClient(server.grpc_url) as late:  # over new connections too
            step(late)
        step(client, end=True)
        with pytest.raises(InferenceServerException, match="Server exiting"):
            client.is_server_live()
        assert http(server, server.ports.http, "/v2/health/live") is None
        assert server.process.wait(90) == 0  # far below its exit timeout


def test_a_server_told_to_end_gives_up_on_live_sequences_and_may_hang_on_an_open_stream(
    alone: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """So it must be killed after a while, as Kubernetes does."""
    arguments = ["--exit-timeout-secs=2"]
    with TritonServer(
        alone,
        Ports(0, 0, 0),
        log=tmp_path_factory.mktemp("hung") / "log",
        arguments=arguments,
    ) as server:
        assert server.process is not None
        with Stream(server.grpc_url) as stream:
            stream.send("doomed", 1, 1.0, start=True)
            assert stream.receive() == (1.0, 1)
            kill(server.process.pid, signal.SIGTERM)
            eventually(
                lambda: http(server, server.ports.http, "/v2/health/live") is None, "it ends"
            )
            stream.send("doomed", 1, 1.0)
            assert stream.receive() == (2.0, 2)
            eventually(lambda: "Exit timeout expired" in log(server), "the exit timeout")
            with pytest.raises(queue.Empty):  # the stream gets no error
                stream.receive(timeout=0.5)
            with InferenceServerClient(server.grpc_url) as late:
                eventually(
                    lambda: "UNAVAILABLE" in str(add(late, "doomed", 1, 1.0, timeout=1.0)),
                    "gRPC is closed",
                )
        assert server.stop(timeout=5) != 0
