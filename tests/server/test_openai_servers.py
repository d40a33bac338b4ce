"""The OpenAI front end between its neighbours: HTTPS, TLS to a server, and a server that dies."""

import logging
import ssl
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import openai
import pytest
from inplace.openai import Frontend
from inplace_builder.tools.tritonserver import Ports, TritonServer
from support.certificates import self_signed
from support.fault_proxy import kill_server
from support.faults import eventually
from support.fronts import running
from support.models import greedy
from support.pool import EXPLICIT
from support.served import MODEL, Served
from support.vocabulary import added, tiny_tokenizer

pytestmark = pytest.mark.server

STREAMS, TOKENS = 6, 200


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of the loopback address that signs itself, and its key."""
    return self_signed(tmp_path_factory.mktemp("tls"), "IP:127.0.0.1")


def test_https(served: Served, stream_models: Path, certificate: tuple[Path, Path]) -> None:
    frontend = Frontend([served.server.grpc_url], stream_models)
    tls = replace(frontend, certificate=certificate[0], private_key=certificate[1])
    with running(tls) as front:
        trusting = ssl.create_default_context(cafile=str(certificate[0]))
        url = f"https://127.0.0.1:{front.port}/health"
        with urllib.request.urlopen(url, context=trusting, timeout=30) as answer:
            assert answer.status == 200
        with pytest.raises(urllib.error.URLError, match="self-signed certificate"):
            urllib.request.urlopen(url, timeout=30)
        with pytest.raises(OSError, match=r"closed|reset|Empty"):
            front.send("/health")  # plain HTTP


@pytest.mark.long
def test_tls_to_a_server(
    served: Served, stream_models: Path, certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    arguments = ["--grpc-use-ssl=true", f"--grpc-server-cert={certificate[0]}"]
    arguments.append(f"--grpc-server-key={certificate[1]}")
    log = tmp_path / "log"
    server = TritonServer(stream_models, Ports(0, 0, 0), log=log, arguments=arguments)
    prompt = tiny_tokenizer().encode("Derivative Works").ids
    server.start()
    try:
        eventually(lambda: _ready(server), "it is ready", 120.0)
        frontend = Frontend([server.grpc_url], stream_models, server_ca=certificate[0])
        with running(frontend) as front, front.client() as client:
            answer = client.completions.create(
                model=MODEL, prompt=prompt, temperature=0, max_tokens=12
            )
            assert answer.choices[0].text == added(prompt, greedy(served.llama, prompt, 12))
        with running(replace(frontend, server_ca=None)) as plain:  # no TLS: the server is not there
            assert plain.send("/health")[0] == 503
    finally:
        server.stop(timeout=5)


def _ready(server: TritonServer) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.ports.http}/v2/health/ready"):
            return True
    except OSError:
        return False


def test_requests_go_on_when_one_of_two_servers_dies(
    served: Served, stream_models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also those whose tokens it was sending: they end with the same text."""
    prompts = [tiny_tokenizer().encode(text).ids for text in ("Works", "the License", "Source")]
    expected = [added(each, greedy(served.llama, each, TOKENS)) for each in prompts]
    begun = threading.Barrier(STREAMS + 1)

    def text(client: openai.OpenAI, number: int) -> str:
        stream = client.completions.create(
            model=MODEL,
            prompt=prompts[number % len(prompts)],
            max_tokens=TOKENS,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True, "prompt_cache_key": f"client {number}"},
        )
        first = next(stream).choices[0].text
        begun.wait(60)
        return first + "".join(chunk.choices[0].text for chunk in stream)

    arguments = [*EXPLICIT, f"--load-model={MODEL}"]
    other = TritonServer(stream_models, Ports(0, 0, 0), log=tmp_path / "log", arguments=arguments)
    with (
        caplog.at_level(logging.INFO, "inplace.client"),
        other,
        running(Frontend([served.server.grpc_url, other.grpc_url], stream_models)) as front,
        front.client() as client,
        ThreadPoolExecutor(STREAMS) as threads,
    ):
        ready = f'inplace_openai_server_ready{{server="{other.grpc_url}"}}'
        assert front.metric(ready) == 1
        running_streams = [threads.submit(text, client, number) for number in range(STREAMS)]
        begun.wait(60)
        kill_server(other)
        for number, stream in enumerate(running_streams):
            assert stream.result(60) == expected[number % len(prompts)]
        assert "try 1 failed" in caplog.text  # some were on the server that died
        for number in range(STREAMS):  # prefer both servers, and are answered by one
            answer = client.completions.create(
                model=MODEL,
                prompt=prompts[0],
                max_tokens=4,
                temperature=0,
                extra_body={"prompt_cache_key": f"client {number}"},
            )
            assert expected[0].startswith(answer.choices[0].text)
        front.wait_for(ready, 0)
        assert front.send("/health")[0] == 200
