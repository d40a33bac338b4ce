"""The stub of the Python backend: an unfit one is refused at load, and it ends with its server."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import psutil
import pytest
from inplace.errors import LoadError
from inplace.server.stub import check_numpy, start_watchdog
from inplace_builder.tools.tritonserver import installation

STUB = installation().stub


def test_the_stub_of_triton_24_10_is_accepted_with_numpy_1_only() -> None:
    check_numpy(STUB, "1.26.4")
    with pytest.raises(
        LoadError,
        match=r'made for NumPy 1 and sends empty texts with NumPy 2\.5\.2: install "numpy<2"',
    ):
        check_numpy(STUB, "2.5.2")


def test_a_stub_compiled_for_numpy_2_is_accepted_with_both(tmp_path: Path) -> None:
    newer = tmp_path / "stub"
    newer.write_bytes(STUB.read_bytes() + b"numpy._core.multiarray")
    check_numpy(newer, "1.26.4")
    check_numpy(newer, "2.5.2")


SERVER = """
import subprocess, sys
with subprocess.Popen([sys.executable, "-c", sys.argv[1]]) as child:
    pass
"""
BUSY = """
import ctypes, os
from inplace.server.stub import start_watchdog
print(os.getpid(), start_watchdog().pid, flush=True)
ctypes.PyDLL(None).sleep(600)  # holds the GIL: no other Python thread runs
"""
IDLE = """
from inplace.server.stub import start_watchdog
print(0, start_watchdog().pid, flush=True)
"""


def test_a_stub_that_holds_the_gil_ends_when_its_server_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, BUSY], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        stub, watchdog = (psutil.Process(int(pid)) for pid in server.stdout.readline().split())
        assert stub.is_running()
        assert watchdog.memory_info().rss < 20 << 20
        os.kill(server.pid, signal.SIGKILL)
        _, stayed = psutil.wait_procs([stub, watchdog], timeout=60.0)
        assert not stayed


MAPPED = """
import mmap, os, sys, time
from inplace.server.stub import start_watchdog
with open(os.environ["SHARED"], "r+b") as file:
    mapping = mmap.mmap(file.fileno(), 0)
print(os.getpid(), start_watchdog().pid, flush=True)
time.sleep(float(os.environ["SECONDS"]))
"""


@pytest.mark.parametrize("seconds", ["600", "0"], ids=["the stub lives", "the stub has ended"])
def test_the_shared_memory_of_a_killed_server_is_removed(seconds: str) -> None:
    shared = Path(f"/dev/shm/triton_test_shm_region_{uuid.uuid4()}")
    foreign = shared.with_name(f"{shared.name}_of_another_server")
    try:
        shared.write_bytes(bytes(4096))
        foreign.write_bytes(bytes(4096))
        environment = os.environ | {"SHARED": str(shared), "SECONDS": seconds}
        code = SERVER + "import time; time.sleep(600)"
        with subprocess.Popen(
            [sys.executable, "-c", code, MAPPED],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        ) as server:
            assert server.stdout is not None
            stub, watchdog = map(int, server.stdout.readline().split())
            running = psutil.Process(watchdog)
            if seconds == "0":
                with contextlib.suppress(psutil.NoSuchProcess):
                    psutil.Process(stub).wait(60)
                assert shared.exists()  # the server may still remove it itself
            os.kill(server.pid, signal.SIGKILL)
        running.wait(60)
        assert not shared.exists()
        assert foreign.exists()
    finally:
        shared.unlink(missing_ok=True)
        foreign.unlink(missing_ok=True)


def test_the_watchdog_of_a_stub_that_ends_by_itself_ends_with_it() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, IDLE], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        _, watchdog = server.stdout.readline().split()
        assert server.wait(60) == 0
        with contextlib.suppress(psutil.NoSuchProcess):  # already
            psutil.Process(int(watchdog)).wait(60)


def test_a_watchdog_that_cannot_be_started_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("shutil.which", lambda _: "/nowhere/python3")
    with caplog.at_level(logging.WARNING, "inplace"):
        assert start_watchdog() is None
    assert (
        "keeps running if the server is killed: its watchdog did not start (/nowhere/python3 -I -S"
        in caplog.text
    )
