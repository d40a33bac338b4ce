"""How the server of a process is reached, as its command line says."""

from pathlib import Path

import pytest
from inplace.server.command_line import CommandLine
from inplace.server.loopback import DEFAULT_EXIT_TIMEOUT, ServerOptions


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
        with pytest.raises(OSError, match=r"process 7 is no tritonserver: 'python3 app.py"):
            CommandLine.of_process(7, tmp_path)


def test_without_a_command_line_no_endpoint_is_guessed() -> None:
    assert ServerOptions.of_parent().target == ""  # the parent of a test is no tritonserver
