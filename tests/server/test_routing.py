"""Two real servers behind Envoy with the configuration of `deploy/`.

Every request of a sequence reaches the replica that holds it, and clients reach nothing but
inference, health and the descriptions of models.
"""

import asyncio
import contextlib
import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from inplace.client import NO_RETRY, AsyncClient, AsyncSequence, Client, Sequence
from inplace_builder.served.build import write_engine
from inplace_builder.served.options import BuildOptions
from inplace_builder.tools.tritonserver import Ports, TritonServer
from support.envoy import Envoy
from support.models import accumulator
from support.pool import Deployment, ServerPool
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

pytestmark = pytest.mark.server

SEQUENCES = 12
ONE = {"value": np.ones(4, np.float32)}
ENTRYPOINT = Path(__file__).parents[2] / "deploy" / "docker" / "entrypoint.sh"


@dataclass(frozen=True)
class Routed:
    """Envoy and the replicas behind it."""

    envoy: Envoy
    servers: list[TritonServer]

    def requests(self, model: str) -> list[int]:
        """How many requests each replica has answered for a model."""
        counts = []
        for server in self.servers:
            with InferenceServerClient(server.grpc_url) as client:
                [statistics] = client.get_inference_statistics(model).model_stats
                counts.append(statistics.inference_stats.success.count)
        return counts


@pytest.fixture(scope="module")
def routed(pool: ServerPool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Routed]:
    """The replicas are the pool's server and one more, with the same models."""
    repository: Path = tmp_path_factory.mktemp("routed")
    options = BuildOptions(slots=SEQUENCES, max_rows=SEQUENCES, capacity=1)
    model = accumulator(max_rows=SEQUENCES)
    write_engine(model, repository / "unary", options)
    write_engine(model, repository / "flow", replace(options, serve="stream"))
    models = Deployment(repository / "unary"), Deployment(repository / "flow")
    log = tmp_path_factory.mktemp("server") / "log"
    with (
        TritonServer(repository, Ports(0, 0, 0), log=log) as other,
        pool.serve(*models) as server,
        Envoy([server, other], tmp_path_factory.mktemp("envoy")) as envoy,
    ):
        yield Routed(envoy, [server, other])


@pytest.mark.parametrize("model", ["unary", "flow"])
def test_every_request_of_a_sequence_reaches_its_replica(routed: Routed, model: str) -> None:
    before = routed.requests(model)
    with Client(routed.envoy.grpc_url, retry=NO_RETRY) as client:
        sequences = [
            Sequence(client, model, id=f"séquence {number}", replay=False)
            for number in range(SEQUENCES)
        ]
        for step in range(1, 4):
            for sequence in sequences:
                assert sequence.step(ONE)["values"] == [step]
        for sequence in sequences:
            sequence.close()
    served = [now - then for now, then in zip(routed.requests(model), before, strict=True)]
    assert all(served), f"one replica got everything: {served}"


@pytest.mark.parametrize("model", ["unary", "flow"])
def test_so_do_those_of_the_asynchronous_client(routed: Routed, model: str) -> None:
    async def scenario() -> None:
        async with AsyncClient(routed.envoy.grpc_url, retry=NO_RETRY) as client:
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


def test_without_the_header_a_sequence_is_not_found_again(routed: Routed) -> None:
    """Envoy chooses a replica at random for a request without the header."""
    tensor = InferInput("value", [1, 4], "FP32")
    tensor.set_data_from_numpy(ONE["value"][None])
    with InferenceServerClient(routed.envoy.grpc_url) as client:
        client.infer("unary", [tensor], sequence_id=999, sequence_start=True)
        result: list[bool] = []
        for _ in range(64):
            try:
                client.infer("unary", [tensor], sequence_id=999)
                result.append(True)
            except InferenceServerException as error:
                result.append("must specify the START flag" not in str(error))
    assert set(result) == {True, False}
    for server in routed.servers:
        with InferenceServerClient(server.grpc_url) as client:
            client.infer("unary", [tensor], sequence_id=999, sequence_start=True, sequence_end=True)


FORBIDDEN_GRPC = {
    "repository index": lambda client: client.get_model_repository_index(),
    "load": lambda client: client.load_model("unary"),
    "unload": lambda client: client.unload_model("unary"),
    "statistics": lambda client: client.get_inference_statistics(),
    "register shared memory": lambda client: client.register_system_shared_memory("a", "/a", 64),
    "list shared memory": lambda client: client.get_system_shared_memory_status(),
    "trace": lambda client: client.update_trace_settings(settings={"trace_level": ["TENSORS"]}),
    "log": lambda client: client.update_log_settings({"log_verbose_level": 1}),
}


@pytest.mark.parametrize("what", FORBIDDEN_GRPC)
def test_grpc_clients_reach_nothing_else(routed: Routed, what: str) -> None:
    with InferenceServerClient(routed.envoy.grpc_url) as client:
        with pytest.raises(InferenceServerException) as error:
            FORBIDDEN_GRPC[what](client)
        assert error.value.status() == "StatusCode.PERMISSION_DENIED"
        assert client.is_server_live()
        assert client.is_model_ready("unary")
        assert client.get_model_metadata("unary").name == "unary"


def status(url: str, body: object = None) -> int:
    """The HTTP status of a GET, or of a POST where there is a body."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=60) as answer:
            code: int = answer.status
            return code
    except urllib.error.HTTPError as error:
        return error.code


def test_http_clients_reach_inference_and_health_alone(routed: Routed) -> None:
    url = routed.envoy.http_url
    for path in ("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/unary"):
        assert status(url + path) == 200, path
    assert status(f"{url}/v2/models/unary/ready") == 200
    value = {"name": "value", "shape": [1, 4], "datatype": "FP32", "data": [1, 1, 1, 1]}
    flags = {"sequence_id": 5, "sequence_start": True, "sequence_end": True}
    body = {"inputs": [value], "parameters": flags}
    assert status(f"{url}/v2/models/unary/infer", body) == 200
    for path in (
        "/v2/repository/index",
        "/v2/repository/models/unary/unload",
        "/v2/systemsharedmemory/region/a/register",
        "/v2/cudasharedmemory/status",
        "/v2/trace/setting",
        "/v2/logging",
        "/v2/models/unary/trace/setting",
        "/v2/models/unary/infer/../../../repository/index",
    ):
        assert status(url + path, {}) == 403, path
    for path in (
        "/metrics",
        "/v2/models/stats",
        "/v2/models/unary/stats",
        "/v2/models/%73tats",
        "/v2/models/unary/infer",
    ):
        assert status(url + path) == 403, path


def chunked(url: str, content: Iterator[bytes]) -> str:
    """Send a body in chunks, one for each part of the content, and return the status line."""
    host, _, port = url.removeprefix("http://").partition(":")
    head = (
        f"POST /v2/models/unary/infer HTTP/1.1\r\nHost: {host}\r\n"
        "Transfer-Encoding: chunked\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head.encode())
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before its end
            for part in content:
                connection.sendall(part)
            connection.sendall(b"0\r\n\r\n")
        return connection.makefile("rb").readline().decode()


def test_a_body_of_very_many_chunks_ends_no_server(routed: Routed) -> None:
    """One of 700,000 chunks ends tritonserver 24.11; here it arrives as one body."""
    block = b"1\r\n \r\n" * 1000
    for _ in routed.servers:
        answer = chunked(routed.envoy.http_url, (block for _ in range(700)))
        assert answer[:12] in ("HTTP/1.1 400", "HTTP/1.1 500")  # Triton's own: spaces are not JSON
    for server in routed.servers:
        assert server.process is not None and server.process.poll() is None
    test_every_request_of_a_sequence_reaches_its_replica(routed, "unary")


def test_a_body_above_the_limit_is_refused(routed: Routed) -> None:
    block = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
    assert chunked(routed.envoy.http_url, (block for _ in range(17))).startswith("HTTP/1.1 413 ")


class Closed(TritonServer):
    """A server that the image's entrypoint starts."""

    def command(self) -> list[str]:
        return [str(ENTRYPOINT), *super().command()]


def test_the_images_entrypoint_closes_what_no_client_needs(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Without the key that it drew no client registers shared memory, behind Envoy or not."""
    repository: Path = tmp_path_factory.mktemp("closed")
    write_engine(accumulator(), repository / "unary", BuildOptions(slots=4, max_rows=4, capacity=1))
    server = Closed(repository, Ports(0, 0, 0), log=tmp_path / "log")
    with server, InferenceServerClient(server.grpc_url) as client:
        for what in ("register shared memory", "list shared memory", "trace", "log"):
            with pytest.raises(InferenceServerException, match="protocol is restricted"):
                FORBIDDEN_GRPC[what](client)
        shared = f"http://127.0.0.1:{server.ports.http}/v2/systemsharedmemory/status"
        assert status(shared) in (401, 403)
        tensor = InferInput("value", [1, 4], "FP32")
        tensor.set_data_from_numpy(ONE["value"][None])
        client.infer("unary", [tensor], sequence_id=1, sequence_start=True, sequence_end=True)
