"""How the server of a process is reached, as its command line says, and whether it is stopping."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from inplace.server.command_line import CommandLine
from inplace.server.loopback import (
    CLOSED_CONNECTIONS,
    DEFAULT_EXIT_TIMEOUT,
    HttpEndpoint,
    ServerOptions,
)


def options(*words: str) -> ServerOptions:
    return ServerOptions.of(CommandLine.parse(words, Path("/srv")))


def test_without_options_a_server_is_reached_at_tritons_defaults() -> None:
    server = options()
    assert (server.target, server.tls, server.headers) == ("127.0.0.1:8001", False, ())
    assert server.exit_timeout == DEFAULT_EXIT_TIMEOUT


@pytest.mark.parametrize(
    ("words", "target"),
    [
        (["--grpc-port=9"], "127.0.0.1:9"),
        (["--grpc-port", "9", "--grpc-address", "::"], "[::1]:9"),
        (["--grpc-address=10.1.2.3"], "10.1.2.3:8001"),
        (["--grpc-address=fe80::1"], "[fe80::1]:8001"),
        (["--grpc-port=7", "--grpc-port=9"], "127.0.0.1:9"),
        (["--allow-grpc=false"], ""),
        (["--reuse-grpc-port=true"], ""),
    ],
)
def test_the_address_is_one_of_this_machine(words: list[str], target: str) -> None:
    assert options(*words).target == target


@pytest.mark.parametrize(
    ("words", "target"),
    [
        ([], "127.0.0.1:8000"),
        (["--http-port=9", "--http-address", "::"], "[::1]:9"),
        (["--allow-http=false"], ""),
        (["--reuse-http-port", "1"], ""),
    ],
)
def test_so_is_that_of_the_http_endpoint(words: list[str], target: str) -> None:
    assert options(*words).http_target == target


def test_tls_files_are_relative_to_the_servers_folder() -> None:
    server = options("--grpc-use-ssl=1", "--grpc-server-cert=tls/a", "--grpc-server-key", "/b")
    assert server.tls and not server.mutual
    assert (server.certificate, server.key) == (Path("/srv/tls/a"), Path("/b"))


def test_headers_of_restricted_protocols_are_read_where_they_are_about_ours() -> None:
    server = options(
        "--grpc-restricted-protocol=health,inference:Admin-Key=secret=1",
        "--grpc-restricted-protocol=model-repository:other=x",
        "--grpc-restricted-protocol=health:probe=y",
        "--exit-timeout-secs",
        "6",
    )
    assert server.headers == (
        ("triton-grpc-protocol-admin-key", "secret=1"),
        ("triton-grpc-protocol-probe", "y"),
    )
    assert server.exit_timeout == 6


@pytest.mark.parametrize(
    ("words", "is_server"),
    [
        (["/opt/tritonserver/bin/tritonserver", "--grpc-port=9"], True),
        (["/lib/ld-linux-x86-64.so.2", "/x/tritonserver", "--grpc-port=9"], True),
        (["python3", "app.py", "--grpc-port=9"], False),
    ],
)
def test_only_the_command_line_of_a_tritonserver_is_read(
    words: list[str], is_server: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "7"
    folder.mkdir()
    (folder / "cmdline").write_text("\0".join(words) + "\0")
    (folder / "cwd").symlink_to(tmp_path)
    if is_server:
        assert CommandLine.of_process(7, tmp_path).value("grpc-port", "") == "9"
    else:
        with pytest.raises(OSError, match=r"process 7 is not a tritonserver: 'python3 app.py"):
            CommandLine.of_process(7, tmp_path)


def test_without_a_command_line_no_endpoint_is_guessed() -> None:
    assert ServerOptions.of_parent().target == ""  # the parent of a test is not a tritonserver


@contextmanager
def listening(*answers: bool) -> Iterator[str]:
    """A server that answers each connection, or closes it unanswered, and is gone then."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for answers_it in answers:
                with listener.accept()[0] as connection:
                    connection.recv(1000)
                    if answers_it:
                        connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
            listener.close()

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


def test_a_server_is_stopping_once_it_closes_connections_unanswered() -> None:
    """Also one that has never answered: its first sequence may be there since a moment ago."""
    closed = [False] * CLOSED_CONNECTIONS
    expected = [False] * (CLOSED_CONNECTIONS - 1) + [True]
    for before in ([], [True], [*closed[1:], True]):
        with listening(*before, *closed) as target:
            endpoint = HttpEndpoint(target)
            closing = [endpoint.is_closing() for _ in (*before, *closed)]
            assert closing == [False] * len(before) + expected


def test_a_server_that_is_not_there_is_not_stopping() -> None:
    """It may not have opened HTTP yet."""
    with listening(False) as target:
        endpoint = HttpEndpoint(target)
        assert not endpoint.is_closing()
    assert not any(endpoint.is_closing() for _ in range(2 * CLOSED_CONNECTIONS))
    assert not HttpEndpoint("").is_closing()
