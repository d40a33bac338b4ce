"""The router of `deploy/kubernetes` before local servers: Envoy itself, other ports."""

import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml
from inplace_builder.tools.tritonserver import TritonServer

from support.containers import pod

CONFIGURATION = Path(__file__).parents[2] / "deploy" / "kubernetes" / "envoy.yaml"
ENVOY = Path(sys.executable).with_name("envoy")


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def endpoint(port: int) -> dict[str, Any]:
    address = {"socket_address": {"address": "127.0.0.1", "port_value": port}}
    return {"endpoint": {"address": address}}


class Envoy:
    """Envoy with the deployed configuration; only addresses and ports are local.

    Args:
        servers: the replicas.
        folder: for the configuration and the log.
    """

    def __init__(self, servers: list[TritonServer], folder: Path) -> None:
        self.ports = {"grpc": free_port(), "http": free_port()}
        self._log = folder / "envoy.log"
        configuration = yaml.safe_load(CONFIGURATION.read_text())
        for listener in configuration["static_resources"]["listeners"]:
            listener["address"] = endpoint(self.ports[listener["name"]])["endpoint"]["address"]
        for cluster in configuration["static_resources"]["clusters"]:
            name = cluster["name"].removeprefix("triton_")
            ports = [getattr(server.ports, name) for server in servers]
            [group] = cluster["load_assignment"]["endpoints"]
            group["lb_endpoints"] = [endpoint(port) for port in ports]
        self._path = folder / "envoy.yaml"
        self._path.write_text(yaml.safe_dump(configuration))

    @property
    def grpc_url(self) -> str:
        return f"127.0.0.1:{self.ports['grpc']}"

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['http']}"

    def __enter__(self) -> Self:
        [container] = pod("router.yaml")["containers"]
        name, *arguments = container["args"]
        assert name == ENVOY.name
        arguments = [each.replace("/etc/envoy/envoy.yaml", str(self._path)) for each in arguments]
        command = [str(ENVOY), *arguments, "--concurrency", "1", "--use-dynamic-base-id"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        until = time.monotonic() + 60
        for port in self.ports.values():
            while True:
                assert self._process.poll() is None, self._log.read_text()
                assert time.monotonic() < until, self._log.read_text()
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.05)
        time.sleep(2.5)  # one round of the health checks, before which no replica gets requests
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._process.wait(30)
