"""Generations whose client, sequence, model, process or server goes away, over raw gRPC.

Two slots; a generation of `ENDLESS` tokens outlasts every test, and a witness beside it must
generate what transformers does.
"""

import http.client
import json
import queue
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from inplace.alive import failures
from inplace.server.settings import IDLE_TIMEOUT, MAX_WAITING
from inplace_builder.tools.tritonserver import Ports, TritonServer
from support.engines import Engines
from support.faults import FORGOTTEN, eventually, gone, kill, state, stub
from support.generating import (
    ENDLESS,
    PROMPT,
    SOON,
    GrpcStream,
    Output,
    long_stream,
    seconds_until,
)
from support.models import greedy
from support.pool import EXPLICIT, Deployment
from tritonclient.grpc import InferenceServerClient
from tritonclient.grpc import model_config_pb2 as pb

pytestmark = pytest.mark.server

SLOTS, IDLE = 2, 1.0
MAX_STARTING = (
    16  # as in `inplace.server.generate_proxy`, which only the server's process can import
)


@dataclass(frozen=True)
class Tellers:
    """A server with `teller`, its generate proxy, and `brief`, idle after a second."""

    server: TritonServer
    repository: Path
    expected: list[int]

    def talk(self, model: str = "teller") -> GrpcStream:
        return GrpcStream(self.server.grpc_url, model)

    def slot_free(self, model: str = "teller") -> float:
        """Seconds until a step of a new sequence is served."""
        with self.talk(model) as talk:

            def served() -> bool:
                generated = talk.request("probe", [1], start=True, end=True)
                assert not generated.error or "INPLACE-NO_FREE_SLOT retryable=1" in generated.error
                return not generated.error

            return seconds_until(served)

    def beginning(self, talk: GrpcStream) -> list[int]:
        """The first tokens of a generation of `PROMPT`, as many as come in one response."""
        tokens = talk.collect(1).tokens
        assert tokens
        assert tokens == self.expected[: len(tokens)]
        return tokens

    def all_free(self, model: str = "teller") -> bool:
        with self.talk(model) as talk:
            result = [talk.request(f"free-{n}", [1], start=True) for n in range(SLOTS)]
            for n in range(SLOTS):
                talk.request(f"free-{n}", [], end=True)
        return not any(generated.error for generated in result)


def _hasten(config: pb.ModelConfig) -> None:
    config.parameters[IDLE_TIMEOUT].string_value = str(IDLE)


@pytest.fixture(scope="module")
def tellers(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tellers]:
    llama, model = long_stream(engines, SLOTS)
    repository = tmp_path_factory.mktemp("stream") / "repository"
    Deployment(model, "teller", proxy=True).copy_to(repository)
    Deployment(model, "brief", _hasten).copy_to(repository)
    with TritonServer(
        repository,
        Ports(0, 0, 0),
        log=repository.parent / "log",
        arguments=[*EXPLICIT, "--load-model=*"],
    ) as server:
        yield Tellers(server, repository, greedy(llama, PROMPT, 300))
        server.stop(timeout=5)  # the last test leaves it with a dead generation, which it waits for


VANISHING = """
import sys
from support.generating import GrpcStream
talk = GrpcStream(sys.argv[1], "teller")
talk.send("vanishing", [5, 6, 7], int(sys.argv[2]), start=True)
print(len(talk.collect(5).tokens), flush=True)
talk.collect()
"""


@pytest.mark.parametrize("how", ["cancelled", "killed"])
def test_a_client_that_goes_away_frees_its_slot_at_once_and_its_mates_never_notice(
    tellers: Tellers, how: str
) -> None:
    with tellers.talk() as witness:
        witness.send("witness", PROMPT, 300, start=True)
        collected = tellers.beginning(witness)
        if how == "killed":
            tests = Path(__file__).parents[1]
            arguments = [sys.executable, "-c", VANISHING, tellers.server.grpc_url, str(ENDLESS)]
            paths = {"PYTHONPATH": str(tests)}
            with subprocess.Popen(
                arguments, stdout=subprocess.PIPE, text=True, env=paths
            ) as client:
                assert client.stdout is not None
                assert int(client.stdout.readline()) >= 5
                kill(client.pid, signal.SIGKILL)
        else:
            with tellers.talk() as vanishing:
                vanishing.send("vanishing", [5, 6, 7], ENDLESS, start=True)
                assert len(vanishing.collect(5).tokens) >= 5
        assert tellers.slot_free() < SOON
        with tellers.talk() as other:
            error = other.request("vanishing", [1]).error  # by the backend, or Triton after its END
            assert "INPLACE-UNKNOWN_SEQUENCE" in error or FORGOTTEN in error
        rest = witness.collect()
        assert (rest.reason, collected + rest.tokens) == ("length", tellers.expected)
        witness.request("witness", [], end=True)
    assert seconds_until(tellers.all_free) < SOON


def test_a_stream_that_only_stops_asking_hears_its_generation_out(tellers: Tellers) -> None:
    with tellers.talk() as talk:
        talk.send("polite", PROMPT, 50, start=True, end=True)
        talk.client.stop_stream()  # no more requests; returns when all are answered
        assert talk.collect() == Output(tellers.expected[:50], "length")


def test_an_http_client_that_disconnects_frees_its_slot_at_once(tellers: Tellers) -> None:
    connection = http.client.HTTPConnection(
        tellers.server.host, tellers.server.ports.http, timeout=60
    )
    body = json.dumps(
        {"text": "The License", "max_tokens": ENDLESS, "ignore_eos": True, "stream": True}
    )
    connection.request("POST", "/v2/models/teller_generate/generate_stream", body)
    answer = connection.getresponse()
    assert answer.status == 200
    for _ in range(6):  # three events and the empty lines between them
        assert answer.readline()
    with tellers.talk() as other:
        other.send("other", PROMPT, ENDLESS, start=True)
        tellers.beginning(other)
        assert "INPLACE-NO_FREE_SLOT" in other_step(tellers).error
        answer.close()
        connection.close()
        assert tellers.slot_free() < SOON
    assert tellers.slot_free() < SOON
    assert seconds_until(tellers.all_free) < SOON


def test_a_client_that_goes_away_while_it_waits_for_the_proxy_never_gets_a_slot(
    tellers: Tellers,
) -> None:
    no_sequence = 0  # as the proxy requires
    with tellers.talk("teller_generate") as first:
        # These run or wait in the model, so the next one waits in the proxy.
        for _ in range(SLOTS + MAX_STARTING):
            first.send(no_sequence, PROMPT, ENDLESS, stream=True)
        tellers.beginning(first)
        with tellers.talk("teller_generate") as impatient:
            impatient.send(no_sequence, PROMPT, ENDLESS, stream=True)
            with pytest.raises(queue.Empty):
                impatient.receive(timeout=0.5)
        time.sleep(0.3)  # the proxy has noticed
    time.sleep(0.3)
    assert seconds_until(tellers.all_free) < SOON
    with tellers.talk("teller_generate") as last:
        last.send(no_sequence, PROMPT, 20)
        assert last.collect() == Output(tellers.expected[:20], "length")
    assert seconds_until(tellers.all_free) < SOON


def test_a_group_that_fills_the_proxy_keeps_no_other_group_out(tellers: Tellers) -> None:
    """One more is refused or, if its group has fewer, takes the place of one that waits."""
    no_sequence, full = 0, SLOTS + MAX_WAITING
    with (
        tellers.talk() as first,
        tellers.talk() as second,
        tellers.talk("teller_generate") as crowd,
        tellers.talk("teller_generate") as modest,
    ):
        first.send("first", PROMPT, ENDLESS, start=True)
        second.send("second", PROMPT, ENDLESS, start=True)
        tellers.beginning(first)
        tellers.beginning(second)
        for _ in range(full + 2):
            crowd.send(no_sequence, PROMPT, 20, group="crowd")
        refused = [crowd.receive().error for _ in range(2)]
        modest.send(no_sequence, PROMPT, 20, group="modest")
        refused.append(crowd.receive().error)
        message = f"INPLACE-QUEUE_FULL retryable=1 sequence=- request=-: {full} generations run or"
        assert all(message in error for error in refused)
        with pytest.raises(queue.Empty):
            modest.receive(timeout=0.5)
        second.drop()
        assert modest.collect() == Output(tellers.expected[:20], "length")
        assert crowd.num_pending < full / 4
    assert tellers.slot_free() < SOON
    assert seconds_until(tellers.all_free) < SOON


def other_step(tellers: Tellers) -> Output:
    with tellers.talk() as talk:
        return talk.request("another", [1], start=True, end=True)


def test_a_generation_that_is_dropped_while_it_waits_never_runs(tellers: Tellers) -> None:
    with tellers.talk() as first, tellers.talk() as second, tellers.talk() as patient:
        first.send("first", PROMPT, ENDLESS, start=True)
        second.send("second", PROMPT, ENDLESS, start=True)
        tellers.beginning(first)
        tellers.beginning(second)
        with tellers.talk() as dropped:
            dropped.send("dropped", PROMPT, ENDLESS, start=True)
            with pytest.raises(queue.Empty):
                dropped.receive(timeout=0.5)
        patient.send("patient", PROMPT, 20, start=True, end=True)
        with pytest.raises(queue.Empty):
            patient.receive(timeout=0.5)
        second.drop()
        generated = patient.collect()
        assert (generated.reason, generated.tokens) == ("length", tellers.expected[:20])
        assert first.collect(1).reason == ""
    assert tellers.slot_free() < SOON
    assert seconds_until(tellers.all_free) < SOON


def test_an_end_or_start_takes_a_running_generation_s_sequence_if_it_has_the_key(
    tellers: Tellers,
) -> None:
    with tellers.talk() as owner, tellers.talk() as stranger:
        owner.send("taken", PROMPT, ENDLESS, start=True, sequence_key="mine")
        before = owner.collect(5).tokens
        with tellers.talk() as other:  # on one stream, so that the START comes first
            other.send("taken", [1], start=True)
            other.send("taken", [], end=True, sequence_key="mine")
            ended, refused = sorted(
                (other.collect(), other.collect()), key=lambda generated: generated.error
            )
            assert ended == Output([], "step")
            assert "INPLACE-SEQUENCE_KEY retryable=1" in refused.error
        rest = owner.collect()
        assert rest.reason == "ended"
        result = (before + rest.tokens)[:300]
        assert result == tellers.expected[: len(result)]
        owner.send("taken", PROMPT, ENDLESS, start=True, sequence_key="mine")
        owner.collect(3)
        assert stranger.request(
            "taken", PROMPT, 10, start=True, end=True, sequence_key="mine"
        ) == Output(tellers.expected[:10], "length")
        assert owner.collect().reason == "ended"
    assert seconds_until(tellers.all_free) < SOON


def test_an_open_stream_does_not_keep_an_idle_sequence(tellers: Tellers) -> None:
    with tellers.talk("brief") as talk:
        assert talk.request("idle", PROMPT, 5, start=True) == Output(tellers.expected[:5], "length")
        assert talk.request("held", PROMPT, start=True).tokens == tellers.expected[:1]
        time.sleep(IDLE + 0.5)
        assert seconds_until(lambda: tellers.all_free("brief")) < SOON
        for name in ("idle", "held"):
            # The backend has ended it in Triton too, which answers.
            assert FORGOTTEN in talk.request(name, [1]).error
        assert talk.request("idle", PROMPT, 5, start=True, end=True) == Output(
            tellers.expected[:5], "length"
        )


def test_a_generation_is_not_idle_however_long_it_takes(tellers: Tellers) -> None:
    with tellers.talk("brief") as talk:
        begin = time.monotonic()
        talk.send("long", PROMPT, ENDLESS, start=True)
        generated = talk.collect(1)
        while time.monotonic() - begin < 2 * IDLE:
            generated.tokens += talk.collect(1).tokens
        with tellers.talk("brief") as other:
            assert other.request("long", [], end=True) == Output([], "step")
        assert talk.collect().reason == "ended"
        assert generated.tokens[:300] == tellers.expected[: len(generated.tokens)]


def test_a_model_that_is_unloaded_finishes_its_generations_first(tellers: Tellers) -> None:
    with InferenceServerClient(tellers.server.grpc_url) as client, tellers.talk("brief") as talk:
        old = stub(tellers.server, "brief")
        talk.send("running", PROMPT, 300, start=True)
        generated = talk.collect(1)
        client.unload_model("brief")
        with tellers.talk("brief") as late:
            assert "has no available versions" in late.request("late", PROMPT, 5, start=True).error
        rest = talk.collect()
        assert (rest.reason, generated.tokens + rest.tokens) == ("length", tellers.expected)
        assert state(client, "brief") == "UNLOADING"  # as long as the stream is open
        talk.drop()
        eventually(lambda: gone(old), "the model's process ends")
        client.load_model("brief")
    with tellers.talk("brief") as talk:
        assert FORGOTTEN in talk.request("running", [1]).error
        assert talk.request("running", PROMPT, 5, start=True, end=True) == Output(
            tellers.expected[:5], "length"
        )


def test_a_server_told_to_end_serves_its_generations_until_they_have_ended(
    tellers: Tellers,
) -> None:
    one = tellers.repository.parent / "one"
    shutil.copytree(tellers.repository / "teller", one / "teller")
    arguments = ["--exit-timeout-secs=120"]
    with TritonServer(
        one, Ports(0, 0, 0), log=one.parent / "one.log", arguments=arguments
    ) as server:
        assert server.process is not None
        with (
            GrpcStream(server.grpc_url, "teller") as talk,
            GrpcStream(server.grpc_url, "teller") as late,
        ):
            talk.send("running", PROMPT, ENDLESS, start=True)
            generated = talk.collect(1)
            kill(server.process.pid, signal.SIGTERM)
            eventually(
                lambda: (
                    "is stopping" in late.request("late", PROMPT, 5, start=True, end=True).error
                ),
                "it refuses",
            )
            generated.tokens += talk.collect(10).tokens
            assert late.request("running", [], end=True) == Output([], "step")
            rest = talk.collect()
            result = (generated.tokens + rest.tokens)[:300]
            assert (rest.reason, result) == ("ended", tellers.expected[: len(result)])
            for client in (talk.client, late.client):
                # Closed, not cancelled: after a cancel the server kept the model until it gave up.
                client.stop_stream()
        assert server.process.wait(60) == 0  # 1 where it gave up waiting for them


def test_the_processes_of_a_killed_server_end_with_it_in_the_middle_of_their_generations(
    tellers: Tellers,
) -> None:
    """Left to itself a stub waits in `send` for ever, with all its memory."""
    repository = tellers.repository.parent / "killed"
    for name in ("teller", "teller_generate"):
        shutil.copytree(tellers.repository / name, repository / name)
    with (
        TritonServer(repository, Ports(0, 0, 0), log=repository.parent / "killed.log") as server,
        GrpcStream(server.grpc_url, "teller") as talk,
    ):
        talk.send("first", PROMPT, ENDLESS, start=True)
        talk.send("second", PROMPT, ENDLESS, start=True)
        talk.collect(20)
        left = [psutil.Process(stub(server, name)) for name in ("teller", "teller_generate")]
        assert server.process is not None
        kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        _, stayed = psutil.wait_procs(left, timeout=60.0)
        for process in stayed:
            process.kill()
        assert not stayed


def test_the_streams_of_a_killed_stub_hear_nothing_and_its_model_can_neither_be_unloaded_nor_loaded(
    tellers: Tellers,
) -> None:
    """So clients need a limit on silence, liveness is a real inference, the server a restart."""
    with InferenceServerClient(tellers.server.grpc_url) as client:
        with tellers.talk("brief") as talk:
            talk.send("running", PROMPT, ENDLESS, start=True)
            talk.collect(3)
            kill(stub(tellers.server, "brief"), signal.SIGKILL)
            with pytest.raises(queue.Empty):
                talk.collect(timeout=1.0)
            assert client.is_server_ready()
            assert client.is_model_ready("brief")
            with tellers.talk("brief") as late:
                assert "is not healthy" in late.request("late", PROMPT, 5, start=True).error
        client.unload_model("brief")
        time.sleep(1.0)
        assert state(client, "brief") == "UNLOADING"  # it waits for a generation that never ends
        with tellers.talk() as other:
            assert other.request("other", PROMPT, 5, start=True, end=True) == Output(
                tellers.expected[:5], "length"
            )
    assert "Signal" not in (tellers.repository.parent / "log").read_text(errors="replace")


def test_a_proxy_whose_process_hangs_is_not_alive(tellers: Tellers) -> None:
    assert "teller_generate" not in failures(tellers.server.grpc_url)
    proxy = psutil.Process(stub(tellers.server, "teller_generate"))
    proxy.suspend()
    try:
        result = failures(tellers.server.grpc_url, timeout=6.0)
    finally:
        proxy.kill()
    assert "teller_generate" in result
    assert "teller" not in result
