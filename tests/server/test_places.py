"""Sequences without an END, on models with 40 places in Triton, and a server that stops.

Clients vanish, cancel, are refused, and send ids with NUL bytes; afterwards a new client is served
at once, no place stays open, and SIGTERM ends the server soon after its last running request.
"""

import json
import queue
import signal
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import grpc
import pytest
from inplace_builder.served.build import write_engine
from inplace_builder.served.options import BuildOptions
from inplace_builder.tools.tritonserver import Ports, TritonServer
from support.certificates import self_signed
from support.engines import Engines
from support.faults import Answer, Stream, add, eventually, kill
from support.generating import ENDLESS, PROMPT, GrpcStream, long_stream
from support.long import long_except
from support.models import accumulator
from support.observed import samples
from support.pool import Deployment, ServerPool, reconfigure, warmed
from tritonclient.grpc import InferenceServerClient, service_pb2, service_pb2_grpc
from tritonclient.grpc import model_config_pb2 as pb

pytestmark = pytest.mark.server

PLACES, SLOTS = 40, 4
"""Of every model: places in Triton, and slots."""


EXIT_TIMEOUT = 180
"""Seconds for which the server would wait for sequences that nobody ends."""
LIMIT = 90.0
"""Seconds within which the server ends after its last running request."""


@dataclass(frozen=True)
class Storm:
    """A server with `teller` and its proxy, which generate, and the accumulators `flow` (a stream
    model) and `unary`. All are warmed up by Triton.
    """

    server: TritonServer
    log: Path

    def total(self, metric: str, model: str = "") -> float:
        """The sum over the instances of one model, or of all."""
        return sum(
            value
            for name, labels, value in samples(self.server)
            if name == metric and model in ("", labels["model"])
        )

    def no_place_open(self, model: str) -> bool:
        return self.total("inplace_places_open", model) == 0


def _few_places(config: pb.ModelConfig) -> None:
    config.sequence_batching.oldest.max_candidate_sequences = PLACES


def _accumulator(config: pb.ModelConfig) -> None:
    _few_places(config)
    warmed(config)
    config.sequence_batching.max_sequence_idle_microseconds = 1_000_000
    config.parameters["idle_timeout_seconds"].string_value = "1"


def _twins(config: pb.ModelConfig) -> None:
    warmed(config)
    config.instance_group[0].count = 2


def _teller(config: pb.ModelConfig) -> None:
    _few_places(config)
    warmed(config)


@pytest.fixture(scope="module")
def accumulators(engines: Engines) -> Path:
    """`unary` and `flow`."""

    def build(path: Path) -> None:
        options = BuildOptions(slots=SLOTS, max_rows=SLOTS, capacity=1)
        write_engine(accumulator(), path / "unary", options)
        write_engine(accumulator(), path / "flow", replace(options, serve="stream"))

    return engines.get("places-accumulators", build)


@pytest.fixture(scope="module")
def storm(
    engines: Engines, accumulators: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Storm]:
    _, long = long_stream(engines, 2)
    folder = tmp_path_factory.mktemp("places")
    repository = folder / "repository"
    Deployment(long, "teller", _teller, proxy=True).copy_to(repository)
    reconfigure(repository / "teller_generate", warmed)
    for name in ("unary", "flow"):
        Deployment(accumulators / name, name, _accumulator).copy_to(repository)
    log = folder / "log"
    arguments = [f"--exit-timeout-secs={EXIT_TIMEOUT}"]
    with TritonServer(repository, Ports(0, 0, 0), log=log, arguments=arguments) as server:
        yield Storm(server, log)


def test_warm_up_requests_of_triton_are_answered_and_leave_no_slot(storm: Storm) -> None:
    assert storm.total("inplace_slots", "teller") == 2
    assert storm.total("inplace_slots", "unary") == SLOTS
    assert storm.total("inplace_sequences_started_total") == 0
    assert storm.total("inplace_requests_refused_total") == 0
    assert "failed to run warmup" not in storm.log.read_text().lower()
    with Stream(storm.server.grpc_url) as stream:
        stream.send("flow", 1, 1.0, start=True, end=True)
        assert stream.receive() == (1.0, 1)


@pytest.mark.parametrize("name", long_except(["flow"], ["unary", "flow"]))
def test_so_are_those_of_two_instances(name: str, accumulators: Path, pool: ServerPool) -> None:
    twins = Deployment(accumulators / name, f"{name}_twins", _twins)
    with (
        pool.serve(twins) as server,
        InferenceServerClient(server.grpc_url) as client,
        Stream(server.grpc_url) as stream,
    ):

        def ask(number: int, **flags: bool) -> Answer:
            if name == "unary":
                return add(client, "unary_twins", number, 1.0, **flags)
            stream.send("flow_twins", number, 1.0, **flags)
            return stream.receive()

        numbers = range(1, 2 * SLOTS + 1)  # every slot of both instances is free
        assert [ask(number, start=True) for number in numbers] == [(1.0, 1)] * len(numbers)
        assert [ask(number, end=True) for number in numbers] == [(2.0, 2)] * len(numbers)


def cancelled(storm: Storm, number: int) -> None:
    """A client that goes away while it generates or waits for a slot."""
    with GrpcStream(storm.server.grpc_url, "teller") as talk:
        talk.send(f"cancelled-{number}", PROMPT, ENDLESS, start=True)
        with suppress(queue.Empty):  # it waits for a slot
            talk.receive(timeout=0.3)


def start_with_nul(storm: Storm, number: int) -> None:
    """A START whose id has a NUL byte, which Triton cuts off with what follows."""
    request = service_pb2.ModelInferRequest(model_name="flow")
    request.inputs.add(name="value", datatype="FP32", shape=[1, 4])
    request.raw_input_contents.append(bytes(16))
    request.parameters["sequence_id"].string_param = f"nul-{number}\0tail"
    request.parameters["sequence_start"].bool_param = True
    with grpc.insecure_channel(storm.server.grpc_url) as channel:
        service = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        list(service.ModelStreamInfer(iter([request]), timeout=60.0))


def test_after_a_storm_a_new_client_is_served_at_once_and_the_server_ends(storm: Storm) -> None:
    with ThreadPoolExecutor(8) as clients:
        list(clients.map(lambda number: cancelled(storm, number), range(100)))
        list(clients.map(lambda number: start_with_nul(storm, number), range(60)))
    with (
        Stream(storm.server.grpc_url) as vanishing,
        InferenceServerClient(storm.server.grpc_url) as client,
    ):
        for number in range(1, 101):
            vanishing.send("flow", number, 1.0, start=True)
            add(client, "unary", number, 1.0, start=True)
    with GrpcStream(storm.server.grpc_url, "teller") as talk:
        assert talk.request("new", PROMPT, 5, start=True, end=True).reason == "length"
    time.sleep(1.5)  # the metrics are up to a second old
    for model in ("teller", "flow", "unary"):
        eventually(partial(storm.no_place_open, model), f"{model} has no open place")

    process = storm.server.process
    assert process is not None
    with InferenceServerClient(storm.server.grpc_url) as client:
        assert add(client, "unary", "idle", 1.0, start=True) == (1.0, 1)
    talk = GrpcStream(storm.server.grpc_url, "teller")
    assert talk.request("idle", PROMPT, 5, start=True).reason == "length"
    talk.send("running", PROMPT, 1000, start=True)
    talk.collect(1)
    kill(process.pid, signal.SIGTERM)
    assert talk.collect().reason == "length"
    talk.client.stop_stream()
    assert process.wait(LIMIT) == 0, storm.log.read_text()[-3000:]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate that signs itself, for a name that is not this machine's, and its key."""
    return self_signed(tmp_path_factory.mktemp("tls"), "DNS:triton.example")


@pytest.mark.parametrize("mutual", long_except([True], [False, True]))
def test_under_tls_and_a_restricted_protocol_the_server_ends_too(
    mutual: bool, engines: Engines, certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    """And a generation that outlasts the exit timeout is answered with SHUTDOWN before it."""
    _, long = long_stream(engines, 2)
    Deployment(long, "teller").copy_to(tmp_path / "repository")
    arguments = [
        "--grpc-use-ssl=true",
        f"--grpc-server-cert={certificate[0]}",
        f"--grpc-server-key={certificate[1]}",
        "--grpc-restricted-protocol=inference,health,model-repository:admin-key=secret",
        "--exit-timeout-secs=6",
    ]
    if mutual:
        arguments += ["--grpc-use-ssl-mutual=true", f"--grpc-root-cert={certificate[0]}"]
    server = TritonServer(
        tmp_path / "repository", Ports(0, 0, 0), log=tmp_path / "log", arguments=arguments
    )
    server.start()
    try:
        assert server.process is not None
        server.wait_ready()
        with secure_stream(server, certificate, mutual) as talk:
            assert talk.request("idle", PROMPT, 5, start=True).reason == "length"
            talk.send("running", PROMPT, ENDLESS, start=True)
            talk.collect(1)
            kill(server.process.pid, signal.SIGTERM)
            assert "INPLACE-SHUTDOWN retryable=1" in talk.collect().error
            talk.client.stop_stream()
        # 1 says that unloading took longer than the seconds that were left.
        assert server.process.wait(LIMIT) in (0, 1), (tmp_path / "log").read_text()[-3000:]
        assert " has 0 in-flight inferences" in (tmp_path / "log").read_text() or (
            "All models are stopped" in (tmp_path / "log").read_text()
        )
    finally:
        server.stop(timeout=5)


def test_a_generation_over_http_is_answered_before_the_timeout_too(
    engines: Engines, tmp_path: Path
) -> None:
    """Triton drains HTTP first and says over gRPC that it is live meanwhile.

    No sequence was there before: the backend has never seen HTTP answer.
    """
    _, long = long_stream(engines, 2)
    Deployment(long, "teller", proxy=True).copy_to(tmp_path / "repository")
    log = tmp_path / "log"
    with TritonServer(
        tmp_path / "repository",
        Ports(0, 0, 0),
        log=log,
        arguments=["--exit-timeout-secs=8"],
    ) as server:
        assert server.process is not None
        request = urllib.request.Request(
            f"http://127.0.0.1:{server.ports.http}/v2/models/teller_generate/generate_stream",
            json.dumps({"input_ids": PROMPT, "max_tokens": ENDLESS, "stream": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            answer.readline()
            kill(server.process.pid, signal.SIGTERM)
            last = [line for line in answer if line.strip()][-1].decode()
        assert "INPLACE-SHUTDOWN" in last  # after the timeout the connection just ends
        assert server.process.wait(LIMIT) in (0, 1), log.read_text()[-3000:]


def secure_stream(server: TritonServer, certificate: tuple[Path, Path], mutual: bool) -> GrpcStream:
    public, private = map(str, certificate)
    client = InferenceServerClient(
        server.grpc_url,
        ssl=True,
        root_certificates=public,
        certificate_chain=public if mutual else None,
        private_key=private if mutual else None,
        channel_args=[("grpc.ssl_target_name_override", "triton.example")],
    )
    headers = {"triton-grpc-protocol-admin-key": "secret"}
    return GrpcStream(server.grpc_url, "teller", client, headers)
