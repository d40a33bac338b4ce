"""The endpoints of the server that this process belongs to, reached from inside its machine.

Their addresses, TLS files and the headers of restricted protocols are read from the server's
command line.
"""

import contextlib
import http.client
import logging
import os
import ssl
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Self

from inplace.errors import InplaceError
from inplace.server.command_line import CommandLine

TIMEOUT = 1.0
"""Seconds within which a request must be answered; less than the margin that a shutdown has."""


DEFAULT_EXIT_TIMEOUT = 30.0
"""Triton's default of ``--exit-timeout-secs``."""


RESTRICTED_HEADER = "triton-grpc-protocol-"
"""Prefix of the header that a restricted protocol expects."""


PROTOCOLS = frozenset({"inference", "health"})
"""The protocols that are used here, as ``--grpc-restricted-protocol`` names them."""


CLOSED_CONNECTIONS = 3
"""HTTP connections in a row that are closed unanswered by a server that is stopping."""


EXITING = "Server exiting"
"""Triton's answer to questions about its health once it stops (24.10). It serves live sequences on
meanwhile."""


class LoopbackError(InplaceError):
    """The server's gRPC endpoint cannot be reached from here."""


log = logging.getLogger("inplace")


@dataclass(frozen=True)
class ServerOptions:
    """The options of a tritonserver that say how to reach it.

    Attributes:
        target: ``host:port`` of its gRPC endpoint; empty if it has none of its own.
        http_target: the same of its HTTP endpoint.
        tls: it takes TLS connections only.
        mutual: and asks for a certificate of its clients.
        certificate, key: files of its certificate and its key.
        headers: what its restricted protocols expect.
        exit_timeout: seconds for which it waits for live sequences when it stops.
    """

    target: str = "127.0.0.1:8001"
    http_target: str = "127.0.0.1:8000"
    tls: bool = False
    mutual: bool = False
    certificate: Path = Path()
    key: Path = Path()
    headers: tuple[tuple[str, str], ...] = ()
    exit_timeout: float = DEFAULT_EXIT_TIMEOUT

    @classmethod
    def of_parent(cls) -> Self:
        """The options of the parent process, which is the server of a stub.

        Without an endpoint where they cannot be read: another server may listen at Triton's default
        port.
        """
        try:
            return cls.of(CommandLine.of_process(os.getppid()))
        except OSError as error:
            log.warning("the server's command line cannot be read: %s", error)
            return cls(target="", http_target="")

    @classmethod
    def of(cls, command_line: CommandLine, protocols: Collection[str] = PROTOCOLS) -> Self:
        """The options in a command line.

        Args:
            command_line: of a tritonserver.
            protocols: those of which the headers are needed, if they are restricted.
        """
        headers = []
        for restriction in command_line.values("grpc-restricted-protocol"):
            restricted, _, header = restriction.partition(":")
            if set(protocols).intersection(restricted.split(",")):
                key, _, secret = header.partition("=")
                headers.append((f"{RESTRICTED_HEADER}{key}".lower(), secret))
        mutual = command_line.is_true("grpc-use-ssl-mutual")
        timeout = command_line.value("exit-timeout-secs", "")
        return cls(
            target=_target(command_line, "grpc", "8001"),
            http_target=_target(command_line, "http", "8000"),
            tls=mutual or command_line.is_true("grpc-use-ssl"),
            mutual=mutual,
            certificate=command_line.folder / command_line.value("grpc-server-cert", ""),
            key=command_line.folder / command_line.value("grpc-server-key", ""),
            headers=tuple(headers),
            exit_timeout=float(timeout) if timeout.isdigit() else DEFAULT_EXIT_TIMEOUT,
        )


def _target(command_line: CommandLine, endpoint: str, port: str) -> str:
    """The address of an endpoint; empty if the server has none, or shares it with other servers."""
    if not command_line.is_true(f"allow-{endpoint}", True):
        return ""
    if command_line.is_true(f"reuse-{endpoint}-port"):
        return ""  # another server may answer, and end a sequence of its own
    host = command_line.value(f"{endpoint}-address", "0.0.0.0")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "[::]": "::1"}.get(host, host)
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    return f"{host}:{command_line.value(f'{endpoint}-port', port)}"


@dataclass(frozen=True)
class ZeroInput:
    """An input of zeros.

    Attributes:
        name: its name.
        data_type: Triton's name of its type.
        shape: with the batch axis.
        item_bytes: of one entry.
    """

    name: str
    data_type: str
    shape: tuple[int, ...]
    item_bytes: int


class GrpcEndpoint:
    """Sends requests to the server of this process over gRPC.

    Args:
        options: how to reach it.

    Raises:
        LoopbackError: it has no gRPC endpoint, a file of its TLS cannot be read, or gRPC is not
            installed here.
    """

    def __init__(self, options: ServerOptions) -> None:
        if not options.target:
            raise LoopbackError(
                "the server has no gRPC endpoint of its own (--allow-grpc=false, "
                "--reuse-grpc-port=true), or it is not known"
            )
        try:
            import grpc
            from tritonclient.grpc import service_pb2, service_pb2_grpc
        except ImportError as error:
            raise LoopbackError(f"install tritonclient[grpc] for the server: {error}") from error
        self._messages, self._options, self._error = service_pb2, options, grpc.RpcError
        try:
            self._channel = _open_channel(options)
        except OSError as error:
            raise LoopbackError(f"the server's TLS files cannot be read: {error}") from error
        self._service = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def infer(
        self,
        model: str,
        version: str,
        inputs: Sequence[ZeroInput],
        sequence_id: int | str,
        *,
        start: bool,
        end: bool,
        parameters: Mapping[str, str],
    ) -> str:
        """Send one request over a stream of its own and wait for its answer.

        Returns:
            The error that it was answered with, or an empty text.

        Raises:
            LoopbackError: it cannot be sent.
        """
        request = self._request(model, version, inputs, sequence_id)
        values = request.parameters
        values["sequence_start"].bool_param = start
        values["sequence_end"].bool_param = end
        values["triton_enable_empty_final_response"].bool_param = True
        for name, value in parameters.items():
            values[name].string_param = value
        error = ""
        try:
            for response in self._service.ModelStreamInfer(
                iter([request]), metadata=self._options.headers, timeout=TIMEOUT
            ):
                error = error or response.error_message
        except self._error as failure:
            raise self._unreachable(failure) from failure
        return error

    def is_exiting(self) -> bool:
        """Whether the server has begun to stop.

        Raises:
            LoopbackError: it cannot be asked.
        """
        try:
            self._service.ServerLive(
                self._messages.ServerLiveRequest(),
                metadata=self._options.headers,
                timeout=TIMEOUT,
            )
        except self._error as failure:
            if failure.details() == EXITING:
                return True
            raise self._unreachable(failure) from failure
        return False

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def _unreachable(self, failure: Any) -> LoopbackError:
        return LoopbackError(
            f"the server's gRPC endpoint {self._options.target} does not answer: "
            f"{failure.code().name}: {failure.details()}"
        )

    def _request(
        self, model: str, version: str, inputs: Sequence[ZeroInput], sequence_id: int | str
    ) -> Any:
        request = self._messages.ModelInferRequest(model_name=model, model_version=version)
        for spec in inputs:
            request.inputs.add(name=spec.name, datatype=spec.data_type, shape=spec.shape)
            request.raw_input_contents.append(bytes(prod(spec.shape) * spec.item_bytes))
        if isinstance(sequence_id, str):
            request.parameters["sequence_id"].string_param = sequence_id
        else:  # the protocol has signed numbers only; the server reads them as unsigned
            signed = sequence_id - 2**64 if sequence_id >= 2**63 else sequence_id
            request.parameters["sequence_id"].int64_param = signed
        return request


class HttpEndpoint:
    """Tells from the server's HTTP endpoint whether the server is stopping.

    A server that is told to stop answers requests over HTTP first, for as long as its exit timeout,
    and says over gRPC that it is live meanwhile. But it accepts new HTTP connections and closes
    them without an answer (24.10). A server that has not opened HTTP yet refuses them.

    Args:
        target: ``host:port``; empty if there is none.
    """

    def __init__(self, target: str) -> None:
        self._target = target
        self._num_closed = 0

    def is_closing(self) -> bool:
        """Whether it has closed the last `CLOSED_CONNECTIONS` unanswered, this one among them."""
        if not self._target:
            return False
        connection = http.client.HTTPConnection(self._target, timeout=TIMEOUT)
        try:
            connection.request("GET", "/v2/health/live")
            connection.getresponse()
            self._num_closed = 0
        except ConnectionRefusedError:
            self._num_closed = 0
        except ConnectionError:
            self._num_closed += 1
        except (OSError, http.client.HTTPException):  # too busy to answer, for example
            self._num_closed = 0
        finally:
            connection.close()
        return self._num_closed >= CLOSED_CONNECTIONS


def _open_channel(options: ServerOptions) -> Any:
    import grpc

    channel_options: list[tuple[str, Any]] = [
        ("grpc.enable_http_proxy", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if not options.tls:
        return grpc.insecure_channel(options.target, channel_options)
    credentials, tls_options = channel_credentials(options)
    return grpc.secure_channel(options.target, credentials, [*channel_options, *tls_options])


def channel_credentials(options: ServerOptions) -> tuple[Any, list[tuple[str, Any]]]:
    """The credentials of a TLS connection to the server, and the options of its channel.

    Raises:
        OSError: a file cannot be read.
    """
    import grpc

    # The certificate is compared with the very file that the server presents.
    own = options.certificate.read_bytes()
    pair = (options.key.read_bytes(), own) if options.mutual else (None, None)
    name = _certificate_name(options.certificate)
    channel_options = [("grpc.ssl_target_name_override", name)] if name else []
    return grpc.ssl_channel_credentials(own, *pair), channel_options


def _certificate_name(certificate: Path) -> str:
    """A name that the certificate is valid for; empty if it has none that can be read."""
    with contextlib.suppress(Exception):  # an interface of CPython that is not documented
        decoded = ssl._ssl._test_decode_cert(str(certificate))  # type: ignore[attr-defined]
        for _, name in decoded.get("subjectAltName", ()):
            return str(name).replace("*", "inplace")
        for ((key, name),) in decoded.get("subject", ()):
            if key == "commonName":
                return str(name).replace("*", "inplace")
    return ""
