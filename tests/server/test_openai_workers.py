"""The OpenAI front end in several processes, over a real server."""

import contextlib
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
import pytest
from inplace.openai.keys import KeyFile, new_key
from inplace_builder.tools.front_process import FrontOptions, FrontProcess
from inplace_builder.tools.tritonserver import Ports
from support.fronts import Front
from support.models import greedy
from support.served import MODEL, Served
from support.vocabulary import added, tiny_tokenizer

pytestmark = pytest.mark.server

PROMPT = tiny_tokenizer().encode("the License").ids
LONG = 200


def eventually(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def workers_of(front: FrontProcess) -> list[psutil.Process]:
    """Its processes that listen; others are Python's own."""
    children = psutil.Process(front.pid).children()
    return [each for each in children if "spawn_main" in " ".join(each.cmdline())]


@contextlib.contextmanager
def slow_stream(port: int, key: str) -> Iterator[socket.socket]:
    """A stream over a connection of its own, whose first bytes have come."""
    body = json.dumps(
        {
            "model": MODEL,
            "prompt": PROMPT,
            "max_tokens": LONG,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
    ).encode()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(60)
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            b"Authorization: Bearer %b\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (key.encode(), len(body), body)
        )
        assert connection.recv(12, socket.MSG_WAITALL) == b"HTTP/1.1 200"
        yield connection


def rest(connection: socket.socket) -> bytes:
    content = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            content += part
    return content


def text_of(content: bytes) -> str:
    found = re.findall(rb"data: (\{.+\})\r?\n", content)
    return "".join(json.loads(each)["choices"][0]["text"] for each in found)


def test_processes_share_a_port_limits_and_counters_and_are_started_again(
    served: Served, stream_models: Path, tmp_path: Path
) -> None:
    (key, record), (other, second) = new_key("a"), new_key("b")
    records = (
        record.model_copy(update={"metrics": True}),
        second.model_copy(update={"concurrent": 1}),
    )
    file = tmp_path / "keys.json"
    file.write_text(KeyFile(keys=records).model_dump_json())
    options = FrontOptions("127.0.0.1", Ports(0).resolve().grpc, file)
    whole = added(PROMPT, greedy(served.llama, PROMPT, LONG))
    asking = {"Authorization": f"Bearer {key}"}

    def complete(client: openai.OpenAI) -> str:
        answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=8, temperature=0)
        return answer.choices[0].text

    with FrontProcess(options, served.server.grpc_url, stream_models, ["--workers=2"]) as process:
        front = Front(options.port)

        def metric(name: str) -> float:
            _, _, text = front.send("/metrics", None, **asking)
            return next(
                float(line.rpartition(" ")[2])
                for line in text.splitlines()
                if line.startswith(f"{name} ")
            )

        answered = 'inplace_openai_requests_total{route="/v1/completions",status="200"}'
        assert len(workers_of(process)) == 2
        # each request over a connection of its own, so that both processes have some
        with ThreadPoolExecutor(8) as threads:
            clients = [front.client(key) for _ in range(32)]
            texts = set(threads.map(complete, clients))
        assert texts == {added(PROMPT, greedy(served.llama, PROMPT, 8))}
        assert metric(answered) == 32  # of both, whichever is asked
        assert metric("inplace_openai_generated_tokens_total") == 32 * 8

        # the limit of a key holds over both processes
        with slow_stream(options.port, other) as stream:
            for _ in range(8):
                with front.client(other) as client, pytest.raises(openai.RateLimitError):
                    complete(client)
            assert text_of(rest(stream)) == whole

        # one of them is killed: the other's requests go on, and it is started again
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(slow_stream(options.port, key)) for _ in range(8)]
            killed = workers_of(process)[0]
            killed.kill()
            received = [text_of(rest(stream)) for stream in streams]
            assert all(whole.startswith(text) for text in received)
            lost = [text for text in received if text != whole]
        eventually(
            lambda: len(workers_of(process)) == 2 and killed not in workers_of(process),
            "it is started again",
        )
        for _ in range(8):
            with front.client(key) as client:
                assert whole.startswith(complete(client))
        # what it had answered is counted, what it was answering is gone
        assert metric(answered) == 32 + 1 + len(streams) - len(lost) + 8
        assert metric("inplace_openai_requests_in_flight") == 1  # this one

        # told to end, they serve what they have
        with slow_stream(options.port, key) as stream:
            os.kill(process.pid, signal.SIGTERM)
            assert text_of(rest(stream)) == whole
        eventually(lambda: process.status is not None, "it ends")
        assert process.status == 0
