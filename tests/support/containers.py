"""Containers of `deploy/kubernetes` as processes of this machine.

The command line, the probes and the time to end are the manifest's. Paths, ports and names of other
pods are local.
"""

import http.client
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml
from inplace_builder.tools.tritonserver import Ports, TritonServer, environment

DEPLOY = Path(__file__).parents[2] / "deploy"
ENTRYPOINT = DEPLOY / "docker" / "entrypoint.sh"
BIN = Path(sys.executable).parent


def pod(file: str) -> dict[str, Any]:
    """The specification of the pods of a manifest with one kind of them."""
    documents = yaml.safe_load_all((DEPLOY / "kubernetes" / file).read_text())
    [result] = [
        each["spec"]["template"]["spec"]
        for each in documents
        if each["kind"] in ("StatefulSet", "Deployment")
    ]
    specification: dict[str, Any] = result
    return specification


class Container:
    """What a manifest says of its container.

    Args:
        file: the manifest.
        local: what stands for names and paths of it on this machine.
        ports: by name, on this machine.
    """

    def __init__(self, file: str, local: Mapping[str, str], ports: Mapping[str, int]) -> None:
        self._pod = pod(file)
        [self._container] = self._pod["containers"]
        self._local, self._ports = local, ports

    @property
    def arguments(self) -> list[str]:
        """The command line, as the entrypoint gets it."""
        return [self._here(argument) for argument in self._container["args"]]

    @property
    def seconds_to_end(self) -> float:
        """From SIGTERM to SIGKILL: what preStop leaves of the time."""
        pre_stop: int = self._container["lifecycle"]["preStop"]["sleep"]["seconds"]
        return float(self._pod["terminationGracePeriodSeconds"] - pre_stop)

    def passes(self, name: str, *more: str) -> bool:
        """Whether a probe passes now.

        Args:
            name: of the probe.
            more: further arguments of one that is a command.
        """
        probe = self._container[name]
        timeout = probe.get("timeoutSeconds", 1)
        if "exec" in probe:
            command = [*probe["exec"]["command"], *more]
            status = subprocess.run(
                command, env=environment(), timeout=timeout, capture_output=True, check=False
            ).returncode
            return status == 0
        port = self._ports[probe["httpGet"]["port"]]
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
        try:  # the kubelet names the pod's address
            headers = {"Host": f"10.1.2.3:{port}"}
            connection.request("GET", probe["httpGet"]["path"], headers=headers)
            return 200 <= connection.getresponse().status < 400
        except OSError:
            return False
        finally:
            connection.close()

    def wait_for(self, name: str, passes: bool = True) -> None:
        """Wait until a probe passes, or fails, as often in a row as the manifest says."""
        probe = self._container[name]
        wanted = 1 if passes else probe.get("failureThreshold", 3)
        in_a_row, deadline = 0, time.monotonic() + 120
        while in_a_row < wanted:
            assert time.monotonic() < deadline, f"{name} does not become {passes}"
            in_a_row = in_a_row + 1 if self.passes(name) is passes else 0
            time.sleep(0.1)

    def _here(self, argument: str) -> str:
        for name, local in self._local.items():
            argument = argument.replace(name, local)
        return argument


class ServerContainer(TritonServer):
    """The container of `server.yaml`.

    Args:
        repository: the model repository.
        log: its output.
    """

    def __init__(self, repository: Path, log: Path) -> None:
        super().__init__(repository, Ports(0, 0, 0), log=log)
        names = {"http": self.ports.http, "grpc": self.ports.grpc}
        self.container = Container("server.yaml", {"/models": str(repository)}, names)

    def command(self) -> list[str]:
        """The manifest's, with the ports and the backend of this machine."""
        binary, *others = super().command()
        name, *arguments = self.container.arguments
        assert name == "tritonserver"
        others = [each for each in others if not each.startswith("--model-repository")]
        return [str(ENTRYPOINT), binary, *arguments, *others]


class FrontContainer(Container):
    """The container of `openai.yaml`. Inside its block it runs.

    Args:
        servers: ``host:port`` that stand for the replicas' names.
        repository: the model repository.
        keys: the folder of the secret.
    """

    def __init__(self, servers: list[str], repository: Path, keys: Path) -> None:
        self.port = Ports(0).resolve().grpc
        names = [f"inplace-server-{number}.inplace-server:8001" for number in range(len(servers))]
        local = dict(zip(names, servers, strict=True))
        local |= {"/models": str(repository), "/keys/": f"{keys}/", "=9000": f"={self.port}"}
        super().__init__("openai.yaml", local, {"openai": self.port})

    def __enter__(self) -> Self:
        name, *arguments = self.arguments
        self.process = subprocess.Popen([ENTRYPOINT, BIN / name, *arguments])
        return self

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait()
