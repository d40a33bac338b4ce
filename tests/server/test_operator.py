"""An operator's own command line, damaged models, and a shutdown with live sequences."""

import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import astuple
from pathlib import Path

import pytest
from inplace.client import Sequence
from inplace_builder.__main__ import app
from inplace_builder.tools.tritonserver import (
    Ports,
    ServerError,
    TritonServer,
    environment,
    install_backend,
    installation,
)
from support.manifests import edit
from support.models import Repository
from support.pool import Deployment, ServerPool
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException
from typer.testing import CliRunner

pytestmark = pytest.mark.server


def test_the_servers_own_command_line(repository: Repository, tmp_path: Path) -> None:
    """`inplace install-backend`, then tritonserver as an operator types it."""
    arguments = ["install-backend", str(tmp_path / "backends")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    models = _alone(repository, tmp_path, "llama").parent.parent
    template = TritonServer(models, Ports(0, 0, 0), backends=tmp_path / "backends")
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(template.command(), env=environment(), stdout=log, stderr=log)
    try:
        template.process = process
        template.wait_ready()
        with (
            InferenceServerClient(template.grpc_url) as client,
            Sequence(client, "llama") as sequence,
        ):
            assert 0 <= sequence.tokens([1, 2, 3]) < 512
    finally:
        template.stop()


@pytest.fixture
def no_models(tmp_path: Path) -> Path:
    """A repository without models, for what does not depend on any."""
    (tmp_path / "no models").mkdir()
    return tmp_path / "no models"


def test_a_server_that_is_ready_answers_at_every_endpoint(no_models: Path, tmp_path: Path) -> None:
    with TritonServer(no_models, Ports(0, 0, 0), log=tmp_path / "log") as server:
        for port, path in (
            (server.ports.metrics, "metrics"),
            (server.ports.http, "v2/health/ready"),
        ):
            with urllib.request.urlopen(
                f"http://{server.host}:{port}/{path}", timeout=60
            ) as answer:
                assert answer.status == 200


@pytest.mark.parametrize(
    "off",
    [
        ["--allow-metrics=false", "--allow-http=0"],
        ["--allow-metrics", "False", "--allow-http", "false"],
    ],
)
def test_an_endpoint_that_is_turned_off_is_not_waited_for(
    no_models: Path, tmp_path: Path, off: list[str]
) -> None:
    with TritonServer(
        no_models, Ports(0, 0, 0), log=tmp_path / "log", arguments=off, start_timeout=300
    ) as server:
        with InferenceServerClient(server.grpc_url) as client:
            assert client.is_server_ready()
        for port in (server.ports.metrics, server.ports.http):
            with socket.socket() as probe:
                assert probe.connect_ex((server.host, port)) != 0


def own_server(root: Path, stub: Path) -> Path:
    """A server as its container has it: on PATH, its backends beside it."""
    theirs = installation()
    shutil.copytree(theirs.backends / "python", root / "backends" / "python")
    shutil.copy(stub, root / "backends" / "python" / theirs.stub.name)
    (root / "backends" / "other").mkdir()
    script = root / "bin" / "tritonserver"
    script.parent.mkdir()
    libraries = f"{theirs.libraries}:$LD_LIBRARY_PATH"
    script.write_text(f'#!/bin/sh\nexec env LD_LIBRARY_PATH="{libraries}" {theirs.binary} "$@"\n')
    script.chmod(0o755)
    return root


def test_a_tritonserver_on_path_is_run_with_its_own_backends(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = _alone(repository, tmp_path, "llama").parent.parent
    root = own_server(tmp_path / "tritonserver", installation().stub)
    monkeypatch.setenv("PATH", f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert installation().backends == root / "backends"
    install_backend(tmp_path / "backends")
    assert (tmp_path / "backends" / "other").resolve() == root / "backends" / "other"
    with (
        TritonServer(models, Ports(0, 0, 0), log=tmp_path / "log") as server,
        InferenceServerClient(server.grpc_url) as client,
        Sequence(client, "llama") as sequence,
    ):
        sequence.tokens([1, 2, 3])


def test_a_server_whose_python_is_another_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = installation().stub
    other = next(
        path / result.name
        for path in sorted(result.parent.parent.iterdir())
        if path != result.parent
    )
    root = own_server(tmp_path / "tritonserver", other)
    monkeypatch.setenv("PATH", f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(
        ServerError,
        match=(
            rf"runs Python {other.parent.name}, this is Python {result.parent.name}: install "
            r"this package"
        ),
    ):
        installation()
    (root / "backends" / "python" / result.name).unlink()
    with pytest.raises(
        ServerError,
        match=(
            r"bin/tritonserver has no Python backend for Python .*: "
            r".*backends/python/.* does not exist"
        ),
    ):
        installation()


def test_inplace_serve_serves_until_it_is_told_to_end(
    repository: Repository, tmp_path: Path
) -> None:
    """Without a model that cannot be loaded, if so asked; sequences that are left delay no end."""
    ports = Ports(0, 0, 0).resolve()
    where = [
        f"--grpc-port={ports.grpc}",
        f"--http-port={ports.http}",
        f"--metrics-port={ports.metrics}",
    ]
    models = _alone(repository, tmp_path, "llama").parent.parent
    _damage(Deployment(repository.path / "accumulator", "damaged"), models)
    options = [*where, "--model-repository", str(models), "--log-file", str(tmp_path / "log")]
    options += ["--start-timeout=300", "--exit-on-error=false", "--exit-timeout-secs=180"]
    command = [sys.executable, "-m", "inplace_builder", "serve", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert f"gRPC 127.0.0.1:{ports.grpc}" in process.stdout.readline()
            assert "model damaged could not be loaded: " in process.stdout.readline()
            with InferenceServerClient(f"127.0.0.1:{ports.grpc}") as client:
                Sequence(client, "llama").tokens([1, 2, 3])  # left alive: Triton waits for it
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(90) == 0  # it waits 180 s for a sequence that does not end
        assert "stopping: running requests may finish for 180 s" in process.stdout.read()


def _damage(deployment: Deployment, models: Path) -> None:
    """Copy a model into a repository without most of its engine."""
    [name] = deployment.copy_to(models)
    engine = models / name / "1" / "engine.safetensors"
    engine.write_bytes(engine.read_bytes()[:1000])


def test_a_server_that_does_not_start_says_why(no_models: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    server = TritonServer(no_models, Ports(0, 0, 0), log=log, arguments=["--no-such-option=1"])
    with pytest.raises(ServerError, match=r"ended with status 1\n  .*no-such-option"), server:
        pass
    server = TritonServer(no_models, Ports(0, 0, 0), log=log, start_timeout=0.0)
    with pytest.raises(ServerError, match="was not ready after 0 s"), server:
        pass
    off = ["--allow-grpc=false", "--allow-http=false"]
    server = TritonServer(no_models, Ports(0, 0, 0), log=log, arguments=off)
    with pytest.raises(ServerError, match="neither gRPC nor HTTP"), server:
        pass


def _alone(repository: Repository, tmp_path: Path, name: str) -> Path:
    """A copy of a built model, to start quickly or to damage, alone in a repository."""
    return Path(shutil.copytree(repository.path / name, tmp_path / "models" / name)) / "1"


def _refusal(tmp_path: Path) -> str:
    """The server's error when it cannot load the model."""
    server = TritonServer(
        tmp_path / "models", Ports(0, 0, 0), log=tmp_path / "log", start_timeout=300
    )
    with pytest.raises(ServerError, match="tritonserver ended with status 1") as refused, server:
        pass
    return str(refused.value)


@pytest.mark.long
def test_a_manifest_of_another_version_is_refused(repository: Repository, tmp_path: Path) -> None:
    folder = _alone(repository, tmp_path, "accumulator")
    edit(folder, lambda fields: fields.update(manifest_version=1))
    refusal = _refusal(tmp_path)
    assert "has manifest version 1, this runtime reads version 2: build the model again" in refusal
    assert f"with `inplace build … --output {folder.parent}`" in refusal


@pytest.mark.long
def test_a_missing_engine_file_is_refused(repository: Repository, pool: ServerPool) -> None:
    Deployment(repository.path / "accumulator", "damaged").copy_to(pool.repository)
    (pool.repository / "damaged" / "1" / "engine.safetensors").unlink()
    with (
        InferenceServerClient(pool.server.grpc_url) as client,
        pytest.raises(InferenceServerException, match="'damaged'"),
    ):
        client.load_model("damaged")
    assert pool.server.log is not None
    deadline = time.monotonic() + 60  # the backend's lines reach the log from a thread
    while "engine.safetensors is missing" not in (
        log := pool.server.log.read_text(errors="replace")
    ):
        assert time.monotonic() < deadline, log[-4000:]
        time.sleep(0.1)


def test_a_truncated_engine_file_is_refused_and_other_models_are_served(
    repository: Repository, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    Deployment(repository.path / "accumulator", "whole").copy_to(models)
    _damage(Deployment(repository.path / "accumulator", "damaged"), models)
    arguments = ["--exit-on-error=false", "--allow-grpc=false"]
    server = TritonServer(models, Ports(0, 0, 0), log=tmp_path / "log", arguments=arguments)
    with server:  # without gRPC it is asked over HTTP
        assert server.failed_models().keys() == {"damaged"}
        ready = f"http://{server.host}:{server.ports.http}/v2/models/whole/ready"
        with urllib.request.urlopen(ready, timeout=60) as answer:
            assert answer.status == 200
        assert server.log is not None
        assert "engine.safetensors has 1,000 bytes, the manifest says" in server.log.read_text(
            errors="replace"
        )


def test_the_example_of_a_module_of_your_own(capsys: pytest.CaptureFixture[str]) -> None:
    script = Path(__file__).parents[2] / "examples" / "served_module.py"
    runpy.run_path(str(script), run_name="__main__")
    out = capsys.readouterr().out
    assert "aliases (output@input@kind): mean_updated@mean@operator" in out
    assert "after 20 steps: 0.8784 and 87.84, as NumPy computes them" in out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.long
def test_the_example_of_a_module_with_an_lstm(capsys: pytest.CaptureFixture[str]) -> None:
    script = Path(__file__).parents[2] / "examples" / "lstm_module.py"
    runpy.run_path(str(script), run_name="__main__")
    assert "each chunk's scores are those of the module" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_the_example_of_a_mixture_of_experts(capsys: pytest.CaptureFixture[str]) -> None:
    script = Path(__file__).parents[2] / "examples" / "moe_decoder.py"
    runpy.run_path(str(script), run_name="__main__")
    assert "23 tokens of prompt, then what transformers generates" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_the_example_of_a_hybrid_decoder(capsys: pytest.CaptureFixture[str]) -> None:
    script = Path(__file__).parents[2] / "examples" / "hybrid_decoder.py"
    runpy.run_path(str(script), run_name="__main__")
    out = capsys.readouterr().out
    assert "state conv_states_0: [2, 64] a sequence, replace" in out
    assert "23 tokens of prompt, then what transformers generates" in out


def test_a_backend_directory_holds_only_what_triton_loads(tmp_path: Path) -> None:
    install_backend(tmp_path)
    install_backend(tmp_path)  # again, over itself
    assert sorted(path.name for path in (tmp_path / "inplace").iterdir()) == ["model.py"]


def test_chosen_ports_go_only_to_sockets_that_name_them() -> None:
    chosen = [port for _ in range(20) for port in astuple(Ports(0, 0, 0).resolve())]
    assert len(set(chosen)) == len(chosen)
    for port in chosen:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("127.0.0.1", port))
